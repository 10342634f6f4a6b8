/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Modes ipip and gue: the packet goes to the member whole, behind an outer header of the member's family. The backend ends
 * the tunnel (decap.bpf.c, or the kernel's own devices) and answers the client itself.
 */
#pragma once

#include "encap.h"
#include "flow_table.h"
#include "icmp_reply.h"
#include "next_hop.h"
#include "outer_checksum.h"
#include "verdict.h"

/* A packet on its way into the tunnel. */
struct tunnel {
	const struct service *service;
	const struct member *member;
	const struct member *other; /* second chance: who else may know the flow */
	__u32 hash;
	__u32 inner_bytes;
	__u32 inner_sum; /* 0: the outer checksum is left out */
	__u8 traffic_class;
	__u8 protocol; /* of the inner packet, IPPROTO_IPIP or IPPROTO_IPV6 */
	__u8 is_gue;
};

/* The low bits of the source follow the flow, so that the receiver's NIC spreads the flows over its queues. */
static __always_inline __be32 source_suffix(const struct tunnel *tunnel)
{
	return bpf_htonl(tunnel->hash & (__u32)((1ull << (tunnel->member->source_bits & 63)) - 1));
}

static __always_inline struct encap outer_ip_fields(const struct tunnel *tunnel)
{
	return (struct encap){
		.source = tunnel->member->source,
		.destination = tunnel->member->address,
		.other_member = tunnel->other ? tunnel->other->address : NULL,
		.source_suffix = source_suffix(tunnel),
		.flow_label = tunnel->hash & 0xfffff,
		.inner_bytes = tunnel->inner_bytes,
		.traffic_class = tunnel->traffic_class,
		.inner_protocol = tunnel->protocol,
		.is_gue = tunnel->is_gue,
	};
}

/* What only GUE wants is read where it is written. */
static __always_inline void set_gue_fields(struct encap *encap, const struct tunnel *tunnel)
{
	encap->source_port = bpf_htons(GUE_SOURCE_PORTS | (tunnel->hash >> 16));
	encap->destination_port = tunnel->service->gue_port;
	encap->inner_sum = tunnel->inner_sum;
	if (tunnel->other)
		encap->other_member_family = tunnel->other->flags & MEMBER_IP6 ? 6 : 4;
}

/* The outer headers in front of the packet, and the frame's own in front of them. */
static __always_inline enum reason write_headers(struct xdp_md *ctx, struct packet *pkt, const struct hop *hop,
						 const struct tunnel *tunnel, int outer_family)
{
	struct ethhdr *eth = (void *)(long)ctx->data;
	struct encap encap = outer_ip_fields(tunnel);
	void *ip, *behind;

	ip = eth + 1;
	behind = ip + ip_header_size(outer_family);
	if (behind > frame_end(ctx))
		return DROP_MALFORMED;
	pkt->ip = ip;
	set_hop(pkt, hop);
	eth->h_proto = bpf_htons(outer_family == AF_INET ? ETH_P_IP : ETH_P_IPV6);
	write_outer_ip(ip, &encap, outer_family);
	if (!tunnel->is_gue)
		return GO_ON;
	if (behind + GUE_MOST > frame_end(ctx))
		return DROP_MALFORMED;
	set_gue_fields(&encap, tunnel);
	write_gue(behind, &encap, ip, outer_family);
	return GO_ON;
}

/*
 * The member of a slot in transition that the packet does not go to. What is recorded may be a guess about a flow that
 * another balancer saw open: after the transition, until the slot is stable, the current member is named beside it.
 */
static __always_inline const struct member *second_chance(const struct service *service, const struct packet *pkt,
							  const struct member *member)
{
	__u32 number = member->index - service->member_base;

	if (pkt->l4_kind != L4_TCP || !(pkt->word & (RING_TRACK | RING_PREVIOUS_MASK)))
		return NULL;
	return live_member(service, number == RING_CURRENT(pkt->word) ? RING_PREVIOUS(pkt->word) : RING_CURRENT(pkt->word));
}

static __always_inline enum reason encapsulate(struct xdp_md *ctx, struct packet *pkt, struct tunnel *tunnel, int family,
					       int outer_family)
{
	__u32 overhead = ip_header_size(outer_family) + gue_bytes(tunnel->is_gue, tunnel->other != NULL);
	struct hop found = {};
	const struct hop *hop;
	enum reason why;

	if (tunnel->inner_bytes + overhead > tunnel->member->mtu)
		return pkt->l4_kind == L4_ICMP_ERROR ? DROP_TOO_BIG /* RFC 1122, 3.2.2: no error about an error */
						     : answer_too_big(ctx, tunnel->member->mtu - overhead, family);
	hop = hop_to(ctx, tunnel->member, &found, outer_family);
	if (!hop)
		return DROP_NO_NEIGHBOUR;
	decrement_ttl(pkt, family);
	if (tunnel->service->options & OPTION_OUTER_CHECKSUM && has_l4_checksum(pkt))
		tunnel->inner_sum = fold(0xffff + packet_sum(pkt, family)); /* nothing, as its other form, which is not 0 */
	if (bpf_xdp_adjust_head(ctx, -(int)overhead))
		return DROP_NO_HEADROOM;
	why = write_headers(ctx, pkt, hop, tunnel, outer_family);
	if (why)
		return why;
	return forwarded_request(ctx, pkt, tunnel->member, opens_connection(pkt), overhead, family);
}

static __always_inline enum reason forward_tunnel(struct xdp_md *ctx, const struct service *service, struct packet *pkt,
						  const struct member *member, int family)
{
	struct tunnel tunnel = {
		.service = service,
		.member = member,
		.hash = pkt->hash,
		.inner_bytes = ip_header_size(family) + pkt->l4_bytes,
		.traffic_class = traffic_class(pkt->ip, family),
		.protocol = family == AF_INET ? IPPROTO_IPIP : IPPROTO_IPV6,
		.is_gue = service->mode == MODE_GUE,
	};

	if (service->options & OPTION_SECOND_CHANCE)
		tunnel.other = second_chance(service, pkt, member);
	if (member->flags & MEMBER_IP6)
		return encapsulate(ctx, pkt, &tunnel, family, AF_INET6);
	return encapsulate(ctx, pkt, &tunnel, family, AF_INET);
}
