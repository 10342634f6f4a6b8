/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Packets that look like a service's and may not be balanced, nor answered: from an address that no client can have, or to
 * no single host on this link. What they would set off goes to somebody else, or round in circles: two services that answer
 * whatever they are sent would answer each other for ever.
 */
#pragma once

#include "config.h"
#include "martian.h"
#include "packet.h"
#include "service.h"

#define VIP_ADDRESS 0 /* the protocol, with port 0, under which `services` has each VIP's bare address */

/* Fibonacci hashing; lb.dataplane.lookup_maps sets the bits. */
static __always_inline int may_be_vip(const __be32 *address, int family)
{
	__u32 word = family == AF_INET ? address[0] : address[1] ^ address[3];
	__u32 bit = word * 0x9e3779b1u >> (32 - VIP_FILTER_BITS);

	return control.vip_filter[bit / 64] >> (bit % 64) & 1;
}

static __always_inline int came_by_group_address(const struct packet *pkt)
{
	const struct ethhdr *eth = pkt->ip - sizeof(*eth);

	return eth->h_dest[0] & 1;
}

/* An ICMP error's is a router's, and none of its flow's. */
static __always_inline const __be32 *ip_source(const void *ip, int family)
{
	return family == AF_INET ? &((const struct iphdr *)ip)->saddr
				 : ((const struct ipv6hdr *)ip)->saddr.in6_u.u6_addr32;
}

static __always_inline int source_is_vip_in(struct xdp_md *ctx, int family)
{
	void *ip = (void *)(long)ctx->data + sizeof(struct ethhdr);

	return ip + ip_header_size(family) <= frame_end(ctx) && exact_service(ip_source(ip, family), 0, VIP_ADDRESS, family);
}

SLOW_PATH int source_is_vip(struct xdp_md *ctx, int family)
{
	return family == AF_INET ? source_is_vip_in(ctx, AF_INET) : source_is_vip_in(ctx, AF_INET6);
}

/* GO_ON, or why not. Whether it is a VIP is asked where a call costs no more than it has to: may_be_vip() says when. */
static __always_inline enum reason check_source(const struct packet *pkt, int family)
{
	if (came_by_group_address(pkt))
		return PASS_GROUP_MAC;
	if (is_martian(ip_source(pkt->ip, family), family) ||
	    same_address(flow_source(pkt->flow), flow_destination(pkt->flow, family), family))
		return DROP_MARTIAN_SOURCE;
	return GO_ON;
}
