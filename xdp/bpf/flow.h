/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Just-enough tracking: only a slot in transition has its flows looked up and recorded. A TCP packet that does not open
 * a connection and is unknown belongs to a connection older than the change, hence to the previous member. UDP has no
 * such mark: for udp_timeout after the change, what is unknown counts as older.
 */
#pragma once

#include "config.h"
#include "maps.h"
#include "packet.h"
#include "ring.h"

static __always_inline int belongs_to_previous(const struct service *service, const struct packet *pkt, __u64 now)
{
	if (pkt->flow->protocol == IPPROTO_TCP)
		return !opens_connection(pkt);
	return !older_than(service->changed_ns, now, config.udp_timeout_s);
}

static __always_inline void touch(struct flow *flow, const struct packet *pkt, __u64 now)
{
	if (now - flow->seen_ns >= config.refresh_ns)
		flow->seen_ns = now;
	if (pkt->tcp_flags & (TCP_FIN | TCP_RST))
		flow->closing = 1;
}

static __always_inline int has_ended(const struct flow *flow, const struct service *service, const struct packet *pkt,
				   __u64 now)
{
	return (flow->closing && opens_connection(pkt)) || older_than(flow->seen_ns, now, service->flow_timeout_s);
}

/* A flood of SYNs must not push what is recorded out of the table: each CPU has so many a second. */
static __always_inline int too_many_connections(const struct packet *pkt, __u64 now)
{
	__u64 second = now / 1000000000;
	struct pace *pace;
	__u32 zero = 0;

	if (!opens_connection(pkt))
		return 0;
	pace = bpf_map_lookup_elem(&paces, &zero);
	if (!pace)
		return 0;
	if (pace->second != second)
		*pace = (struct pace){ .second = second };
	return ++pace->connections > config.recorded_syns_per_s;
}

static __always_inline void record(struct packet *pkt, const struct member *member, __u64 now, int family)
{
	struct flow flow = {
		.seen_ns = now,
		.uid = member->uid,
		.member = member->number,
		.closing = !!(pkt->tcp_flags & (TCP_FIN | TCP_RST)),
	};

	if (too_many_connections(pkt, now)) {
		count_reason(NOTED_SYN_NOT_RECORDED);
		return;
	}
	bpf_map_update_elem(MAP(flows, family), pkt->flow, &flow, BPF_ANY);
}

static __always_inline struct member *first_seen_member(const struct service *service, const struct packet *pkt,
							__u32 word, __u64 now)
{
	struct member *member = NULL;

	if (belongs_to_previous(service, pkt, now))
		member = live_member(service, RING_PREVIOUS(word));
	return member ? member : live_member(service, RING_CURRENT(word));
}

static __always_inline struct member *tracked_member(const struct service *service, struct packet *pkt, __u32 word,
						     int family)
{
	struct flow *flow = bpf_map_lookup_elem(MAP(flows, family), pkt->flow);
	struct member *member = NULL;
	__u64 now = now_ns();

	if (flow && !has_ended(flow, service, pkt, now))
		member = recorded_member(service, flow->member, flow->uid);
	if (member) {
		touch(flow, pkt, now);
		return member;
	}
	member = first_seen_member(service, pkt, word, now);
	if (member && (flow || RING_PREVIOUS(word)) && pkt->l4_kind != L4_ICMP_ERROR)
		record(pkt, member, now, family);
	return member;
}

static __always_inline struct member *select_member(const struct service *service, struct packet *pkt, int family)
{
	__u32 word = slot_word(service, flow_hash(pkt->flow, family));

	if (word & RING_TRACK)
		return tracked_member(service, pkt, word, family);
	return live_member(service, RING_CURRENT(word));
}

/* For mode nat, whose translation table has every flow already: what it does not know is new, but for open TCP connections. */
static __always_inline struct member *select_member_untracked(const struct service *service, struct packet *pkt, int family)
{
	__u32 word = slot_word(service, flow_hash(pkt->flow, family));
	struct member *member = NULL;

	if (pkt->flow->protocol == IPPROTO_TCP && !opens_connection(pkt))
		member = live_member(service, RING_PREVIOUS(word));
	return member ? member : live_member(service, RING_CURRENT(word));
}
