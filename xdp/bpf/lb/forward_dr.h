/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Direct routing: the frame goes to the member's MAC address, the packet stays the VIP's. An ICMP error follows its flow. */
#pragma once

#include "flow_table.h"
#include "next_hop.h"
#include "verdict.h"

static __always_inline enum reason forward_dr(struct xdp_md *ctx, struct packet *pkt, const struct member *member, int family)
{
	struct hop found = {};
	const struct hop *hop = hop_to(ctx, member, &found, family);

	if (!hop)
		return DROP_NO_NEIGHBOUR;
	set_hop(pkt, hop);
	decrement_ttl(pkt, family);
	return forwarded_request(ctx, pkt, member, opens_connection(pkt), 0, family);
}
