/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Direct routing: the frame goes to the member's MAC address, the packet stays the VIP's. An ICMP error follows its flow. */
#pragma once

#include "flow.h"
#include "hop.h"
#include "verdict.h"

static __always_inline enum reason forward_dr(struct xdp_md *ctx, const struct service *service, struct packet *pkt,
					      int family)
{
	struct hop found = {};
	const struct hop *hop;
	struct member *member;

	if (ttl_expired(pkt, family))
		return DROP_TTL_EXPIRED;
	member = select_member(service, pkt, family);
	if (!member)
		return DROP_NO_BACKEND;
	hop = hop_to(ctx, member, &found, family);
	if (!hop)
		return DROP_NO_NEIGHBOUR;
	set_hop(pkt, hop);
	decrement_ttl(pkt, family);
	return count_request(member, pkt, opens_connection(pkt));
}
