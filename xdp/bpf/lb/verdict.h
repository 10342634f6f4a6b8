/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The one exit: a forwarded packet is counted for its member, every other one for its reason. Tags are put back. */
#pragma once

#include "maps.h"
#include "syn_retransmit.h"
#include "packet.h"
#include "stage.h"
#include "vlan.h"

/* outer_bytes: of the tunnel's headers that the packet is behind. */
static __always_inline enum reason count_request(struct xdp_md *ctx, const struct member *member, const struct packet *pkt,
						 int opens, __u32 outer_bytes, int family)
{
	struct counter *counter;

	if (opens_connection(pkt))
		count_syn_retransmit(ctx, member, pkt->flow, outer_bytes, family);
	counter = counter_of(member->index);
	if (counter) {
		counter->packets++;
		counter->bytes += pkt->bytes;
		counter->connections += opens;
	}
	return FORWARDED;
}

static __always_inline enum reason count_reply(const struct nat_reply *reply, const struct packet *pkt)
{
	struct counter *counter = counter_of(reply->counter);

	if (counter) {
		counter->reply_packets++;
		counter->reply_bytes += pkt->bytes;
	}
	return FORWARDED;
}

static __always_inline int action_of(struct xdp_md *ctx, const struct packet *pkt, enum reason why)
{
	if (why == FORWARDED)
		return pkt->egress == ctx->ingress_ifindex ? XDP_TX : bpf_redirect(pkt->egress, 0);
	count_reason(why);
	if (why == ANSWERED_ECHO || why == ANSWERED_TOO_BIG)
		return XDP_TX;
	return why >= DROP_MALFORMED ? XDP_DROP : XDP_PASS;
}

static __always_inline int verdict(struct xdp_md *ctx, const struct packet *pkt, struct tags *tags, enum reason why)
{
	if (tags->words[0] && restore_vlan_tags(ctx, tags))
		why = DROP_NO_HEADROOM;
	return run_exit_stages(ctx, pkt->egress, why, action_of(ctx, pkt, why));
}
