/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Just-enough tracking: only a slot in transition has its flows looked up and recorded. A TCP packet that does not open
 * a connection and is unknown belongs to a connection older than the change, hence to the previous member. UDP has no
 * such mark: for udp_timeout after the change, what is unknown counts as older. So does, for the affinity's timeout, a client of
 * a service with affinity, where all flows of a client are one.
 */
#pragma once

#include "config.h"
#include "maps.h"
#include "packet.h"
#include "quic.h"
#include "ring.h"

/* What a packet is, in one word, for functions that get no packet. */
#define KIND(l4_kind, tcp_flags) ((__u32)(l4_kind) << 8 | (tcp_flags))
#define KIND_L4(kind) ((kind) >> 8)
#define KIND_TCP_FLAGS(kind) ((kind) & 0xff)

static __always_inline int belongs_to_previous(const struct service *service, const struct packet *pkt, __u64 now)
{
	if (service->options & OPTION_AFFINITY)
		return !older_than(service->changed_ns, now, service->affinity_s);
	if (pkt->flow->protocol == IPPROTO_TCP)
		return !opens_connection(pkt);
	return !older_than(service->changed_ns, now, config.udp_timeout_s);
}

/* What is recorded of a client that has affinity outlives each of its connections. */
static __always_inline int closes_flow(const struct service *service, const struct packet *pkt)
{
	return pkt->tcp_flags & (TCP_FIN | TCP_RST) && !(service->options & OPTION_AFFINITY);
}

static __always_inline void refresh_flow(struct flow *flow, const struct service *service, const struct packet *pkt, __u64 now)
{
	if (now - flow->seen_ns >= config.refresh_ns)
		flow->seen_ns = now;
	if (closes_flow(service, pkt))
		flow->closing = 1;
}

static __always_inline int flow_ended(const struct flow *flow, const struct service *service, const struct packet *pkt,
				      __u64 now)
{
	if (flow->closing && (opens_connection(pkt) || flow_may_be_missing()))
		return 1;
	if (opens_connection(pkt) && service->options & OPTION_AFFINITY && older_than(flow->seen_ns, now, service->affinity_s))
		return 1;
	return older_than(flow->seen_ns, now, service->flow_timeout_s);
}

/* A flood of SYNs must not push what is recorded out of the table. */
static __always_inline int may_record_flow(const struct packet *pkt, __u64 now)
{
	return !opens_connection(pkt) || within_pace(PACED_RECORDS, config.recorded_syns_per_s, now);
}

static __always_inline void record_flow(const struct service *service, struct packet *pkt, const struct member *member, __u64 now,
					int family)
{
	struct flow flow = {
		.seen_ns = now,
		.uid = member->uid,
		.member = member->index - service->member_base,
		.closing = closes_flow(service, pkt),
	};

	if (!may_record_flow(pkt, now)) {
		count_reason(NOTED_SYN_NOT_RECORDED);
		return;
	}
	bpf_map_update_elem(MAP(flows, family), pkt->flow, &flow, BPF_ANY);
}

static __always_inline struct member *first_seen_member(const struct service *service, const struct packet *pkt,
							__u64 now)
{
	struct member *member = NULL;

	if (belongs_to_previous(service, pkt, now))
		member = live_member(service, RING_PREVIOUS(pkt->word));
	return member ? member : live_member(service, RING_CURRENT(pkt->word));
}

static __always_inline struct member *tracked_member_in(const struct service *service, struct packet *pkt, int family)
{
	struct flow *flow = bpf_map_lookup_elem(MAP(flows, family), pkt->flow);
	struct member *member = NULL;
	__u64 now = now_ns();

	if (flow && !flow_ended(flow, service, pkt, now))
		member = recorded_member(service, flow->member, flow->uid);
	if (member) {
		refresh_flow(flow, service, pkt, now);
		return member;
	}
	if (pkt->flow->protocol == IPPROTO_TCP && !opens_connection(pkt) && flow_may_be_missing())
		return NULL;
	member = first_seen_member(service, pkt, now);
	if (member && (flow || RING_PREVIOUS(pkt->word)) && pkt->l4_kind != L4_ICMP_ERROR)
		record_flow(service, pkt, member, now, family);
	return member;
}

/* The number of the flow's member, 0 for none. kind: what KIND() makes of the packet. */
static SLOW_PATH __u32 tracked_member(const struct service *service, struct flow_key *flow, __u32 word, __u32 kind, int family)
{
	struct packet pkt = { .flow = flow, .word = word, .tcp_flags = KIND_TCP_FLAGS(kind), .l4_kind = KIND_L4(kind) };
	struct member *member;

	if (!service || !flow)
		return 0;
	member = family == AF_INET ? tracked_member_in(service, &pkt, AF_INET) : tracked_member_in(service, &pkt, AF_INET6);
	return member ? member->index - service->member_base : 0;
}

static __always_inline void find_slot(const struct service *service, struct packet *pkt, int family)
{
	__u64 hash = flow_hash(pkt->flow, family);

	pkt->hash = hash;
	pkt->word = slot_word(service, hash);
}

static __always_inline struct member *hashed_member(const struct service *service, struct packet *pkt, int family)
{
	__u32 number;

	find_slot(service, pkt, family);
	number = RING_CURRENT(pkt->word);
	if (pkt->word & RING_TRACK)
		number = tracked_member(service, pkt->flow, pkt->word, KIND(pkt->l4_kind, pkt->tcp_flags), family);
	return live_member(service, number);
}

/* The number of the member that all flows of this client have. */
SLOW_PATH __u32 affine_member(const struct service *service, struct flow_key *flow, __u32 kind, int family)
{
	struct flow_key client = {};
	struct packet pkt = { .flow = &client, .tcp_flags = KIND_TCP_FLAGS(kind), .l4_kind = KIND_L4(kind) };
	struct member *member;

	if (!service || !flow)
		return 0;
	set_ends(&client, 0, service->first_port, flow->protocol);
	copy_address(flow_source(&client), flow->address, family);
	copy_address(flow_destination(&client, family), service->address, family);
	member = family == AF_INET ? hashed_member(service, &pkt, AF_INET) : hashed_member(service, &pkt, AF_INET6);
	return member ? member->index - service->member_base : 0;
}

#define OPTIONS_OF_SELECTION (OPTION_AFFINITY | OPTION_QUIC)

/* The member that the packet's connection ID names; NULL: none. */
static __always_inline struct member *named_member(struct xdp_md *ctx, const struct service *service,
						   const struct packet *pkt, int family)
{
	if (!(service->options & OPTION_QUIC) || pkt->l4_kind != L4_UDP)
		return NULL;
	return live_member(service, quic_member(ctx, service, family));
}

/* The member that more than the slot decides; NULL: the slot does. */
static __always_inline struct member *optional_member(struct xdp_md *ctx, const struct service *service, struct packet *pkt,
						      int family)
{
	struct member *member = named_member(ctx, service, pkt, family);

	pkt->word = 0;
	pkt->hash = flow_hash(pkt->flow, family);
	if (!member && service->options & OPTION_AFFINITY)
		member = live_member(service, affine_member(service, pkt->flow, KIND(pkt->l4_kind, pkt->tcp_flags), family));
	return member;
}

static __always_inline struct member *select_member(struct xdp_md *ctx, const struct service *service, struct packet *pkt,
						    int family)
{
	struct member *member = NULL;

	if (service->options & OPTIONS_OF_SELECTION)
		member = optional_member(ctx, service, pkt, family);
	return member ? member : hashed_member(service, pkt, family);
}

/* For mode nat, whose translation table has every flow already: what it does not know is new, but for open TCP connections. */
static __always_inline struct member *select_member_untracked(struct xdp_md *ctx, const struct service *service,
							      struct packet *pkt, int family)
{
	struct member *member = NULL;

	if (service->options & OPTIONS_OF_SELECTION)
		member = optional_member(ctx, service, pkt, family);
	if (member)
		return member;
	find_slot(service, pkt, family);
	if (pkt->flow->protocol == IPPROTO_TCP && !opens_connection(pkt))
		member = live_member(service, RING_PREVIOUS(pkt->word));
	return member ? member : live_member(service, RING_CURRENT(pkt->word));
}
