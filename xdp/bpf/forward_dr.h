/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Direct routing: the frame goes to the member's MAC address, the packet stays the VIP's. An ICMP error follows its flow. */
#pragma once

#include "flow.h"
#include "hop.h"
#include "verdict.h"

static __always_inline enum reason forward_dr(struct xdp_md *ctx, const struct service *service, struct packet *pkt,
					      int family)
{
	struct member *member;
	enum reason why;

	if (ttl_expired(pkt, family))
		return DROP_TTL_EXPIRED;
	member = select_member(service, pkt, family);
	if (!member)
		return DROP_NO_BACKEND;
	why = go_to_member(ctx, pkt, member, family);
	if (why)
		return why;
	decrement_ttl(pkt, family);
	return count_request(member, pkt, opens_connection(pkt));
}
