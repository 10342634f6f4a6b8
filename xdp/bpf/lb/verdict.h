/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The one exit: what became of the packet is counted, for its member where it is forwarded, else for its reason, and its
 * VLAN tags are put back. Counted first: what says whose counter it is must not outlive another call on a stack that Linux
 * 6.1 has no room left on.
 */
#pragma once

#include "maps.h"
#include "packet.h"
#include "stage.h"
#include "syn_retransmit.h"
#include "vlan.h"

/* outer_bytes: of the tunnel's headers that the packet is behind. */
static __always_inline enum reason forwarded_request(struct xdp_md *ctx, struct packet *pkt, const struct member *member,
						     int opens, __u32 outer_bytes, int family)
{
	if (opens_connection(pkt))
		count_syn_retransmit(ctx, member, pkt->flow, outer_bytes, family);
	pkt->counter = member->index;
	pkt->counted_as = opens ? COUNTED_OPENING : COUNTED_REQUEST;
	return FORWARDED;
}

static __always_inline enum reason forwarded_reply(struct packet *pkt, const struct nat_reply *reply)
{
	pkt->counter = reply->counter;
	pkt->counted_as = COUNTED_REPLY;
	return FORWARDED;
}

static __always_inline void count_request(struct counter *counter, const struct packet *pkt)
{
	counter->packets++;
	counter->bytes += pkt->bytes;
	counter->connections += pkt->counted_as == COUNTED_OPENING;
}

static __always_inline void count_reply(struct counter *counter, const struct packet *pkt)
{
	counter->reply_packets++;
	counter->reply_bytes += pkt->bytes;
}

static __always_inline void count(const struct packet *pkt, enum reason why)
{
	struct counter *counter;

	if (why != FORWARDED) {
		count_reason(why);
		return;
	}
	counter = counter_of(pkt->counter);
	if (!counter)
		return;
	if (pkt->counted_as == COUNTED_REPLY)
		count_reply(counter, pkt);
	else
		count_request(counter, pkt);
}

static __always_inline int action_of(struct xdp_md *ctx, const struct packet *pkt, enum reason why)
{
	if (why == FORWARDED)
		return pkt->egress == ctx->ingress_ifindex ? XDP_TX : bpf_redirect(pkt->egress, 0);
	if (why >= ANSWERED_ECHO && why <= ANSWERED_TTL_EXPIRED)
		return XDP_TX;
	return why >= DROP_MALFORMED ? XDP_DROP : XDP_PASS;
}

static __always_inline int verdict(struct xdp_md *ctx, const struct packet *pkt, struct tags *tags, enum reason why)
{
	count(pkt, why);
	if (tags->words[0] && restore_vlan_tags(ctx, tags)) {
		why = DROP_NO_HEADROOM;
		count_reason(why);
	}
	return run_exit_stages(ctx, pkt->egress, why, action_of(ctx, pkt, why));
}
