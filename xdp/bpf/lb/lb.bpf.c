// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * The balancer: a packet's way. It is parsed once, its service is looked up, and forwarded in the service's mode; what is
 * for no service is a reply of a translated flow, or the host's. Each step returns a reason or goes on, and all leave
 * through verdict(). All of it is compiled once for each address family.
 */
#include "admission.h"
#include "atomic_fragment.h"
#include "icmp_reply.h"
#include "carry_counters.h"
#include "forward_dr.h"
#include "forward_nat.h"
#include "forward_tunnel.h"
#include "fragment.h"
#include "names.h"
#include "service_cache.h"
#include "source.h"
#include "vlan.h"

/* The flow of a packet that parse() refused, found the slow way: behind IP options or a fragment header. */
static __always_inline int refused_flow(struct xdp_md *ctx, struct flow_key *flow, int family)
{
	void *data = (void *)(long)ctx->data, *end = frame_end(ctx);
	void *l3 = data + sizeof(struct ethhdr);
	__be16 *ports;

	if (l3 + ip_header_size(family) + sizeof(struct fragment_header) > end)
		return -1;
	if (family == AF_INET) {
		struct iphdr *ip = l3;

		flow->protocol = ip->protocol;
		flow->address[0] = ip->saddr;
		flow->address[1] = ip->daddr;
		ports = l3 + ip->ihl * 4;
	} else {
		struct ipv6hdr *ip = l3;
		struct fragment_header *fragment = l3 + sizeof(*ip);
		int fragmented = ip->nexthdr == IPPROTO_FRAGMENT;

		flow->protocol = fragmented ? fragment->next : ip->nexthdr;
		__builtin_memcpy(flow->address, &ip->saddr, 32);
		ports = (void *)fragment + (fragmented ? sizeof(*fragment) : 0);
	}
	if ((void *)(ports + 2) > end)
		return -1;
	flow->source_port = ports[0];
	flow->destination_port = ports[1];
	return 0;
}

static __always_inline enum reason refuse_in(struct xdp_md *ctx, enum reason why, int family)
{
	struct flow_key flow = {};

	if (refused_flow(ctx, &flow, family))
		return PASS_MALFORMED;
	if (find_service(flow_destination(&flow, family), flow.destination_port, flow.protocol, family))
		return why;
	return bpf_map_lookup_elem(MAP(nat_replies, family), &flow) ? why : PASS_NOT_A_SERVICE;
}

/*
 * A packet that cannot be balanced (malformed, a fragment, with IP options) is dropped where a service or a translated
 * flow would have had it, and is the host's otherwise.
 */
SLOW_PATH int refuse(struct xdp_md *ctx, int why, int family)
{
	return family == AF_INET ? refuse_in(ctx, why, AF_INET) : refuse_in(ctx, why, AF_INET6);
}

/* Of a fragment that is all of its packet (RFC 6946), where the packet is a service's. */
static __always_inline void remove_fragment_header(struct xdp_md *ctx)
{
	if (is_atomic_fragment(ctx) && refuse(ctx, DROP_FRAGMENT, AF_INET6) == DROP_FRAGMENT)
		cut_fragment_header(ctx);
}

/* In mode nat the packet has arrived, for all that its sender can know: what goes on to the member is another one. */
static __always_inline enum reason end_of_ttl(struct xdp_md *ctx, const struct service *service, const struct packet *pkt,
					      int family)
{
	if (service->mode == MODE_NAT)
		return GO_ON;
	if (pkt->l4_kind == L4_ICMP_ERROR || answer_ttl_expired(ctx, family) != ANSWERED_TTL_EXPIRED)
		return DROP_TTL_EXPIRED;
	return ANSWERED_TTL_EXPIRED;
}

/* GO_ON: it is for *service. Anything else: it is done with, as a reply of nat's or for this reason. */
static __always_inline enum reason find_service_of_packet(struct xdp_md *ctx, struct packet *pkt, struct service **service,
							  int family)
{
	enum reason why;
	int number;

	*service = find_service_cached(flow_destination(pkt->flow, family), pkt->flow->destination_port, pkt->flow->protocol,
				       family);
	if (!*service)
		return forward_reply(pkt, family);
	why = check_source(pkt, family);
	if (why)
		return why;
	if ((*service)->options & OPTIONS_OF_ADMISSION || may_be_vip(ip_source(pkt->ip, family), family)) {
		number = admit(ctx, *service, pkt->flow, opens_connection(pkt), family);
		if (number < 0)
			return -number;
		*service = service_numbered(number);
		if (!*service)
			return DROP_NO_BACKEND;
	}
	return ttl_expired(pkt, family) ? end_of_ttl(ctx, *service, pkt, family) : GO_ON;
}

/* GO_ON: it goes where the first fragment of its datagram went. */
static __always_inline enum reason find_member_of_fragment(struct xdp_md *ctx, struct packet *pkt, struct service **service,
							   struct member **member, int family)
{
	struct fragment found = {};
	enum reason why = find_fragment(ctx, pkt->flow, &found, family);

	if (why == DROP_FRAGMENT)
		return refuse(ctx, why, family);
	if (!why)
		why = check_source(pkt, family);
	if (why)
		return why;
	if (ttl_expired(pkt, family))
		return DROP_TTL_EXPIRED;
	pkt->l4_kind = L4_FRAGMENT;
	pkt->hash = found.hash;
	*service = service_numbered(found.service);
	*member = *service ? recorded_member(*service, found.member, found.uid) : NULL;
	return *member ? GO_ON : DROP_NO_BACKEND;
}

/* In the mode of the service. member: a fragment's, which are none of mode nat's; otherwise it is to be selected. */
static __always_inline enum reason forward(struct xdp_md *ctx, const struct service *service, struct packet *pkt,
					   const struct member *member, int family)
{
	if (pkt->l4_kind != L4_FRAGMENT) {
		if (service->mode == MODE_NAT)
			return forward_nat(ctx, service, pkt, family);
		member = select_member(ctx, service, pkt, family);
	}
	if (!member)
		return DROP_NO_BACKEND;
	if (service->mode == MODE_DR)
		return forward_dr(ctx, pkt, member, family);
	return forward_tunnel(ctx, service, pkt, member, family);
}

/* What belongs to no flow. */
static __always_inline enum reason handle_without_flow(struct xdp_md *ctx, struct packet *pkt, enum reason why, int family)
{
	if (why == PASS_ICMP && control.echo_addresses && !check_source(pkt, family))
		return answer_echo(ctx, pkt->flow, family);
	return why >= DROP_MALFORMED ? refuse(ctx, why, family) : why;
}

static __always_inline enum reason balance(struct xdp_md *ctx, struct packet *pkt, int family)
{
	struct service *service = NULL;
	struct member *member = NULL;
	enum reason why;

	if (family == AF_INET6 && has_fragment_header(ctx))
		remove_fragment_header(ctx);
	why = parse(ctx, pkt, family);
	if (!why)
		why = find_service_of_packet(ctx, pkt, &service, family);
	else if (why == PASS_FRAGMENT || why == DROP_FRAGMENT)
		why = find_member_of_fragment(ctx, pkt, &service, &member, family);
	else
		return handle_without_flow(ctx, pkt, why, family);
	return why || !service ? why : forward(ctx, service, pkt, member, family);
}

static __always_inline enum reason balance_untagged(struct xdp_md *ctx, struct packet *pkt)
{
	struct ethhdr *eth = (void *)(long)ctx->data;

	if ((void *)(eth + 1) > frame_end(ctx))
		return PASS_MALFORMED;
	if (eth->h_proto == bpf_htons(ETH_P_IP))
		return balance(ctx, pkt, AF_INET);
	return eth->h_proto == bpf_htons(ETH_P_IPV6) ? balance(ctx, pkt, AF_INET6) : PASS_NOT_IP;
}

static __always_inline int balance_frame(struct xdp_md *ctx)
{
	struct ethhdr *eth = (void *)(long)ctx->data;
	struct flow_key flow = {};
	struct packet pkt = { .flow = &flow };
	struct tags tags = {};
	enum reason why = PASS_NOT_IP;

	if ((void *)(eth + 1) > frame_end(ctx))
		why = PASS_MALFORMED;
	else if (!is_tag(eth->h_proto) || !remove_vlan_tags(ctx, &tags))
		why = balance_untagged(ctx, &pkt);
	return verdict(ctx, &pkt, &tags, why);
}

SEC("xdp")
int xdp_lb(struct xdp_md *ctx)
{
	run_front_stages(ctx);
	return balance_frame(ctx);
}

/* For the stages in front. */
SEC("xdp")
int xdp_balance(struct xdp_md *ctx)
{
	return balance_frame(ctx);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
