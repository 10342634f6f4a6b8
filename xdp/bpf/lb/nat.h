/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The translation table of mode nat: one entry for each direction of a flow, both of them least-recently-used maps.
 *
 * A port belongs to a flow from the moment its reply entry is in the map: BPF_NOEXIST lets one CPU win, and an entry that
 * has timed out is taken over by a compare-and-swap on its time. The first candidates follow from the flow's hash, so that
 * a flow whose entries were lost gets its old port again where it is still free, and two CPUs that open the same flow at
 * the same time agree. Either direction refreshes the other about once a second: both stay in their maps while one side talks.
 */
#pragma once

#include "config.h"
#include "maps.h"
#include "packet.h"
#include "ring.h"
#include "service.h"

#define NAT_HASHED_TRIES 16
#define NAT_LOOKED_AT 4 /* looking at an entry keeps the map from evicting it: not at more of them than are likely its own */
#define NAT_TRIES 48

#define NAT_CLOSED(state) \
	((state) & NAT_RESET || ((state) & (NAT_CLIENT_FIN | NAT_BACKEND_FIN)) == (NAT_CLIENT_FIN | NAT_BACKEND_FIN))

static __always_inline __be16 member_port(const struct member *member, const struct flow_key *flow)
{
	return member->port ? member->port : flow->destination_port;
}

static __always_inline void reply_key(struct flow_key *key, const struct member *member, const struct flow_key *flow,
				      __be16 port, int family)
{
	key->source_port = member_port(member, flow);
	key->destination_port = port;
	key->protocol = flow->protocol;
	copy_address(flow_source(key), member->address, family);
	copy_address(flow_destination(key, family), member->source, family);
}

static __always_inline void forward_key(struct flow_key *key, const struct nat_reply *reply, __u8 protocol, int family)
{
	key->source_port = reply->client_port;
	key->destination_port = reply->vip_port;
	key->protocol = protocol;
	copy_address(flow_source(key), reply->client, family);
	copy_address(flow_destination(key, family), reply->vip, family);
}

static __always_inline __u32 timeout_s(const struct flow_key *flow, __u32 state, __u32 established_timeout_s)
{
	if (flow->protocol != IPPROTO_TCP)
		return config.udp_timeout_s;
	if (NAT_CLOSED(state))
		return config.nat_closed_timeout_s;
	return state & NAT_ESTABLISHED ? established_timeout_s : config.nat_opening_timeout_s;
}

/* Replies leave the way the requests come: same interface, MAC addresses exchanged. */
static __always_inline int fill_reply(struct nat_reply *reply, struct xdp_md *ctx, const struct member *member,
				      struct flow_key *flow, int family)
{
	struct ethhdr *eth = (void *)(long)ctx->data;

	if ((void *)(eth + 1) > frame_end(ctx))
		return -1;
	reply->client_port = flow->source_port;
	reply->vip_port = flow->destination_port;
	copy_address(reply->client, flow_source(flow), family);
	copy_address(reply->vip, flow_destination(flow, family), family);
	reply->hop.ifindex = ctx->ingress_ifindex;
	__builtin_memcpy(reply->hop.destination, eth->h_source, 6);
	__builtin_memcpy(reply->hop.source, eth->h_dest, 6);
	reply->counter = member->index;
	reply->uid = member->uid;
	return 0;
}

static __always_inline int is_for_flow(const struct nat_reply *reply, struct flow_key *flow, int family)
{
	return reply->client_port == flow->source_port && reply->vip_port == flow->destination_port &&
	       same_address(reply->client, flow_source(flow), family) &&
	       same_address(reply->vip, flow_destination(flow, family), family);
}

/* One CPU only gets the entry of a flow that has timed out. */
static __always_inline int take_over(struct nat_reply *old, __u64 now)
{
	__u64 seen = old->seen_ns;

	return older_than(seen, now, old->timeout_s) && __sync_val_compare_and_swap(&old->seen_ns, seen, now) == seen;
}

/* Whether the entry that holds a port may be written over: it is this flow's own, or has timed out. */
static __always_inline int may_replace(struct nat_reply *old, struct flow_key *flow, __u64 now, int family)
{
	if (older_than(old->seen_ns, now, old->timeout_s))
		return take_over(old, now);
	return is_for_flow(old, flow, family);
}

static __always_inline int claim_port(const struct nat_reply *reply, const struct member *member, struct flow_key *flow,
				      __be16 port, __u32 try, int family)
{
	struct flow_key key = {};
	struct nat_reply *old;

	reply_key(&key, member, flow, port, family);
	if (!bpf_map_update_elem(MAP(nat_replies, family), &key, reply, BPF_NOEXIST))
		return 1;
	if (try >= NAT_LOOKED_AT)
		return 0;
	old = bpf_map_lookup_elem(MAP(nat_replies, family), &key);
	if (!old || !may_replace(old, flow, reply->seen_ns, family))
		return 0;
	return !bpf_map_update_elem(MAP(nat_replies, family), &key, reply, BPF_ANY);
}

static __always_inline __u16 candidate_port(__u64 hash, __u32 try)
{
	__u32 offset = try < NAT_HASHED_TRIES ? (__u32)hash + try * ((hash >> 32) | 1) : bpf_get_prandom_u32();

	return config.nat_port_first + (__u32)(((__u64)offset * config.nat_port_count) >> 32);
}

static __always_inline __be16 allocate_port(const struct nat_reply *reply, const struct member *member,
					    struct flow_key *flow, int family)
{
	__u64 hash = mix(flow_hash(flow, family) + flow->destination_port);
	__u32 try;

	for (try = 0; try < NAT_TRIES; try++) {
		__be16 port = bpf_htons(candidate_port(hash, try));

		if (find_service(member->source, port, flow->protocol, family))
			continue;
		if (claim_port(reply, member, flow, port, try, family))
			return port;
	}
	return 0;
}

static __always_inline __be16 open_reply_in(struct xdp_md *ctx, const struct member *member, struct flow_key *flow, int family)
{
	struct nat_reply reply = { .seen_ns = now_ns(), .timeout_s = timeout_s(flow, 0, 0) };

	if (fill_reply(&reply, ctx, member, flow, family))
		return 0;
	return allocate_port(&reply, member, flow, family);
}

/* The reply direction gets a port of the flow's own, in network byte order; 0 where none is free. */
SLOW_PATH __be16 open_reply(struct xdp_md *ctx, const struct member *member, struct flow_key *flow, int family)
{
	if (!member || !flow)
		return 0;
	return family == AF_INET ? open_reply_in(ctx, member, flow, AF_INET) : open_reply_in(ctx, member, flow, AF_INET6);
}

SLOW_PATH int open_request(const struct member *member, __u32 member_base, struct flow_key *flow, __u16 port, int family)
{
	struct nat_flow entry = { .seen_ns = now_ns(), .port = port };
	struct flow_key key;

	if (!member || !flow)
		return -1;
	key = *flow; /* Linux 6.1 takes no map key from memory of the caller's */
	entry.uid = member->uid;
	entry.member = member->index - member_base;
	entry.timeout_s = timeout_s(flow, 0, 0);
	return bpf_map_update_elem(MAP(nat_flows, family), &key, &entry, BPF_ANY);
}

static __always_inline __u32 state_after_request(__u32 state, const struct packet *pkt)
{
	if (pkt->flow->protocol != IPPROTO_TCP)
		return state;
	if (!opens_connection(pkt))
		state |= NAT_ESTABLISHED;
	if (pkt->tcp_flags & TCP_FIN)
		state |= NAT_CLIENT_FIN;
	if (pkt->tcp_flags & TCP_RST)
		state |= NAT_RESET;
	return state;
}

static __always_inline __u32 state_after_reply(__u32 state, const struct packet *pkt)
{
	if (pkt->tcp_flags & TCP_FIN)
		state |= NAT_BACKEND_FIN;
	if (pkt->tcp_flags & TCP_RST)
		state |= NAT_RESET;
	return state;
}

static __always_inline int refresh_reply_in(struct xdp_md *ctx, const struct member *member, struct flow_key *flow,
					    struct nat_flow *request, int family)
{
	struct nat_reply fresh = { .seen_ns = request->seen_ns, .state = request->state, .timeout_s = request->timeout_s };
	struct flow_key key = {};
	struct nat_reply *reply;

	if (fill_reply(&fresh, ctx, member, flow, family))
		return -1;
	reply_key(&key, member, flow, request->port, family);
	reply = bpf_map_lookup_elem(MAP(nat_replies, family), &key);
	if (!reply)
		return bpf_map_update_elem(MAP(nat_replies, family), &key, &fresh, BPF_NOEXIST);
	if (!is_for_flow(reply, flow, family))
		return -1;
	reply->seen_ns = fresh.seen_ns;
	reply->state |= fresh.state;
	reply->timeout_s = NAT_CLOSED(reply->state) ? config.nat_closed_timeout_s : fresh.timeout_s;
	reply->hop = fresh.hop;
	reply->counter = fresh.counter;
	return 0;
}

/*
 * The reply entry learns the state, and the way back to the client where that has changed; if it was evicted it is made
 * again. Returns nonzero where the port has gone to another flow meanwhile.
 */
SLOW_PATH int refresh_reply(struct xdp_md *ctx, const struct member *member, struct flow_key *flow, struct nat_flow *request,
			    int family)
{
	if (!member || !flow || !request)
		return -1;
	return family == AF_INET ? refresh_reply_in(ctx, member, flow, request, AF_INET)
				 : refresh_reply_in(ctx, member, flow, request, AF_INET6);
}

static __always_inline int refresh_request_in(const struct flow_key *flow, struct nat_reply *reply, int family)
{
	struct flow_key key = {
		.source_port = reply->client_port,
		.destination_port = reply->vip_port,
		.protocol = flow->protocol,
	};
	struct nat_flow *request;

	copy_address(flow_source(&key), reply->client, family);
	copy_address(flow_destination(&key, family), reply->vip, family);
	request = bpf_map_lookup_elem(MAP(nat_flows, family), &key);
	if (!request || request->port != flow->destination_port || request->uid != reply->uid)
		return -1;
	request->seen_ns = reply->seen_ns;
	request->state |= reply->state;
	if (NAT_CLOSED(request->state))
		reply->timeout_s = request->timeout_s = config.nat_closed_timeout_s;
	return 0;
}

/* The other way round: what the backend says is news for the request's entry. */
SLOW_PATH int refresh_request(struct flow_key *flow, struct nat_reply *reply, int family)
{
	if (!flow || !reply)
		return -1;
	return family == AF_INET ? refresh_request_in(flow, reply, AF_INET) : refresh_request_in(flow, reply, AF_INET6);
}
