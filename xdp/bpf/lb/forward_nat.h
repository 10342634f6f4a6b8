/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Full nat: requests leave with the balancer's address and a port of its own towards the member, replies with the VIP's
 * towards the client. Backends need no change.
 */
#pragma once

#include "flow_table.h"
#include "next_hop.h"
#include "icmp.h"
#include "nat.h"
#include "rewrite.h"
#include "verdict.h"

static __always_inline void rewrite(struct packet *pkt, const struct rewrite *new, int family)
{
	__u64 addresses = address_difference(pkt, new, family);
	__u64 ports = port_difference(pkt, new);
	__u64 outer = pkt->l4_kind == L4_ICMP_ERROR ? outer_difference(pkt, new, family) : addresses;

	if (pkt->l4_kind == L4_ICMP_ERROR)
		rewrite_icmp(pkt, new, outer, addresses, ports, family);
	else if (pkt->l4_kind == L4_TCP)
		rewrite_tcp(pkt->l4, new, addresses + ports);
	else
		rewrite_udp(pkt->l4, new, addresses + ports);
	if (family == AF_INET) {
		struct iphdr *ip = pkt->ip;

		ip->check = updated_checksum(ip->check, outer);
	}
	set_addresses(pkt->ip, new->source, new->destination, family);
}

static __always_inline int nat_flow_ended(const struct nat_flow *flow, const struct packet *pkt, __u64 now)
{
	if (older_than(flow->seen_ns, now, flow->timeout_s))
		return 1;
	return flow->state & (NAT_CLIENT_FIN | NAT_RESET) && (opens_connection(pkt) || flow_may_be_missing());
}

/* Returns nonzero where the flow has lost its port. */
static __always_inline int refresh_nat_flow(struct xdp_md *ctx, const struct service *service, const struct member *member,
					    struct packet *pkt, struct nat_flow *flow, __u64 now, int family)
{
	__u32 state = state_after_request(flow->state, pkt);

	if (pkt->l4_kind == L4_ICMP_ERROR || (state == flow->state && now - flow->seen_ns < config.refresh_ns))
		return 0;
	flow->seen_ns = now;
	flow->state = state;
	flow->timeout_s = timeout_s(pkt->flow, state, service->flow_timeout_s);
	if (service->options & OPTION_AFFINITY)
		affine_member(service, pkt->flow, KIND(pkt->l4_kind, pkt->tcp_flags), family); /* the client is not silent */
	return refresh_reply(ctx, member, pkt->flow, flow, family);
}

static __always_inline enum reason send_to_member(struct xdp_md *ctx, struct packet *pkt, const struct member *member,
						  const struct hop *hop, __be16 port, int opens, int family)
{
	struct rewrite new = {
		.source = member->source,
		.destination = member->address,
		.source_port = port,
		.destination_port = member_port(member, pkt->flow),
	};

	rewrite(pkt, &new, family);
	if (!ttl_expired(pkt, family))
		decrement_ttl(pkt, family);
	set_hop(pkt, hop);
	return forwarded_request(ctx, pkt, member, opens, 0, family);
}

static __always_inline enum reason forward_new_flow(struct xdp_md *ctx, const struct service *service, struct packet *pkt,
						    int family)
{
	struct hop found = {};
	const struct hop *hop;
	struct member *member;
	__be16 port;

	if (pkt->l4_kind == L4_ICMP_ERROR)
		return PASS_ICMP_NO_FLOW;
	if (pkt->tcp_flags & TCP_RST)
		return DROP_NAT_NO_FLOW;
	if (pkt->l4_kind == L4_TCP && !opens_connection(pkt) && flow_may_be_missing())
		return DROP_NAT_NO_FLOW;
	member = select_member_untracked(ctx, service, pkt, family);
	if (!member)
		return DROP_NO_BACKEND;
	hop = hop_to(ctx, member, &found, family);
	if (!hop)
		return DROP_NO_NEIGHBOUR;
	port = open_reply(ctx, member, pkt->flow, family);
	if (!port || open_request(member, service->member_base, pkt->flow, port, family))
		return DROP_NAT_NO_PORT;
	return send_to_member(ctx, pkt, member, hop, port, 1, family);
}

/* A connection may have moved to a port of the client's whose last one has its translation still: the ID decides. */
static __always_inline int names_other_member(struct xdp_md *ctx, const struct service *service, const struct packet *pkt,
					      const struct member *member, int family)
{
	struct member *named = named_member(ctx, service, pkt, family);

	return named && named->index != member->index;
}

static __always_inline enum reason forward_nat(struct xdp_md *ctx, const struct service *service, struct packet *pkt,
					       int family)
{
	struct hop found = {};
	const struct hop *hop;
	struct nat_flow *flow;
	struct member *member = NULL;
	__u64 now = now_ns();

	flow = bpf_map_lookup_elem(MAP(nat_flows, family), pkt->flow);
	if (flow && !nat_flow_ended(flow, pkt, now))
		member = recorded_member(service, flow->member, flow->uid);
	if (!member || names_other_member(ctx, service, pkt, member, family) ||
	    refresh_nat_flow(ctx, service, member, pkt, flow, now, family))
		return forward_new_flow(ctx, service, pkt, family);
	hop = hop_to(ctx, member, &found, family);
	if (!hop)
		return DROP_NO_NEIGHBOUR;
	return send_to_member(ctx, pkt, member, hop, flow->port, 0, family);
}

static __always_inline void refresh_from_reply(struct packet *pkt, struct nat_reply *reply, int family)
{
	__u32 state = state_after_reply(reply->state, pkt);
	__u64 now = now_ns();

	if (pkt->l4_kind == L4_ICMP_ERROR || (state == reply->state && now - reply->seen_ns < config.refresh_ns))
		return;
	reply->seen_ns = now;
	reply->state = state;
	refresh_request(pkt->flow, reply, family);
}

static __always_inline int may_be_reply(const struct flow_key *flow)
{
	__u16 port = bpf_ntohs(flow->destination_port);

	return port >= config.nat_port_first && port < config.nat_port_first + config.nat_port_count && flow_may_be_missing();
}

/* Its port may belong to a later flow by now: the client that had it before would reset that one's connection. */
static SLOW_PATH struct nat_reply *live_reply(struct nat_reply *reply)
{
	if (!reply || !flow_may_be_missing())
		return reply;
	return NAT_CLOSED(reply->state) || older_than(reply->seen_ns, now_ns(), reply->timeout_s) ? NULL : reply;
}

/* Anything that is for no service may be a reply; what is not is the host's own. */
static __always_inline enum reason forward_reply(struct packet *pkt, int family)
{
	struct nat_reply *reply = bpf_map_lookup_elem(MAP(nat_replies, family), pkt->flow);
	struct rewrite new;

	if (control.whole_ns)
		reply = live_reply(reply);
	if (!reply && may_be_reply(pkt->flow)) /* the host would reset the connection */
		return DROP_NAT_NO_FLOW;
	if (!reply)
		return pkt->l4_kind == L4_ICMP_ERROR ? PASS_ICMP_NO_FLOW : PASS_NOT_A_SERVICE;
	if (ttl_expired(pkt, family))
		return DROP_TTL_EXPIRED;
	refresh_from_reply(pkt, reply, family);
	new = (struct rewrite){
		.source = reply->vip,
		.destination = reply->client,
		.source_port = reply->vip_port,
		.destination_port = reply->client_port,
	};
	rewrite(pkt, &new, family);
	decrement_ttl(pkt, family);
	set_hop(pkt, &reply->hop);
	return forwarded_reply(pkt, reply);
}
