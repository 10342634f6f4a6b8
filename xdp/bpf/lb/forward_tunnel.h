/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Modes ipip and gue: the packet goes to the member whole, behind an outer header of the member's family. The backend ends
 * the tunnel (decap.bpf.c, or the kernel's own devices) and answers the client itself.
 */
#pragma once

#include "icmp_reply.h"
#include "flow_table.h"
#include "next_hop.h"
#include "outer_checksum.h"
#include "tunnel.h"
#include "verdict.h"

#define OUTER_TTL 64
#define GUE_SOURCE_PORTS 0xc000 /* and up: the dynamic ports of RFC 6335 */
#define IP_DF bpf_htons(0x4000)
/* The shortest GUE header with the shortest packet behind it is longer too. */
#define GUE_MOST (sizeof(struct udphdr) + sizeof(struct gue_header) + sizeof(struct second_chance))

/* What the headers need to know of the packet behind them, and of the way it takes. */
struct tunnel {
	const struct service *service;
	const struct member *member;
	const struct member *other; /* second chance: who else may know the flow */
	__u32 hash;
	__u32 inner_bytes;
	__u32 inner_sum;  /* 0: the outer checksum is left out */
	__u8 traffic_class; /* DSCP and ECN (RFC 6040, normal mode) are copied */
	__u8 protocol;	    /* of the inner packet, IPPROTO_IPIP or IPPROTO_IPV6 */
	__u8 is_gue;
};

static __always_inline __u8 traffic_class(const void *ip, int family)
{
	if (family == AF_INET)
		return ((struct iphdr *)ip)->tos;
	return bpf_ntohs(*(__be16 *)ip) >> 4;
}

/* The low bits follow the flow, so that the receiver's NIC spreads the flows over its queues. */
static __always_inline __be32 varied(__be32 word, const struct tunnel *tunnel)
{
	return word | bpf_htonl(tunnel->hash & (__u32)((1ull << (tunnel->member->source_bits & 63)) - 1));
}

static __always_inline void write_outer4(struct iphdr *ip, const struct tunnel *tunnel, __u32 payload)
{
	*(__be32 *)ip = bpf_htonl(0x45000000 | (__u32)tunnel->traffic_class << 16 | (payload + sizeof(*ip)));
	((__be32 *)ip)[1] = bpf_htonl(0x4000); /* never fragmented, so needs no ID: RFC 6864 */
	((__be32 *)ip)[2] = bpf_htonl(OUTER_TTL << 24 | (__u32)(tunnel->is_gue ? IPPROTO_UDP : tunnel->protocol) << 16);
	ip->saddr = varied(tunnel->member->source[0], tunnel);
	ip->daddr = tunnel->member->address[0];
	ip->check = ~fold(added(0, (__be32 *)ip, sizeof(*ip) / 4));
}

static __always_inline void write_outer6(struct ipv6hdr *ip, const struct tunnel *tunnel, __u32 payload)
{
	__u8 next = tunnel->is_gue ? IPPROTO_UDP : tunnel->protocol;

	((__be32 *)ip)[0] = bpf_htonl(0x60000000 | (__u32)tunnel->traffic_class << 20 | (tunnel->hash & 0xfffff));
	((__be32 *)ip)[1] = bpf_htonl(payload << 16 | (__u32)next << 8 | OUTER_TTL);
	__builtin_memcpy(&ip->saddr, tunnel->member->source, 16);
	__builtin_memcpy(&ip->daddr, tunnel->member->address, 16);
	ip->saddr.in6_u.u6_addr32[3] = varied(tunnel->member->source[3], tunnel);
}

static __always_inline __u32 gue_bytes(const struct tunnel *tunnel)
{
	if (!tunnel->is_gue)
		return 0;
	return sizeof(struct udphdr) + sizeof(struct gue_header) + (tunnel->other ? sizeof(struct second_chance) : 0);
}

static __always_inline __u16 gue_checksum(const struct tunnel *tunnel, const struct udphdr *udp, const void *outer_ip,
					  int outer_family)
{
	__u64 sum = tunnel->inner_sum + bpf_htons(IPPROTO_UDP) + (__u64)udp->len;
	__u16 check;

	sum = added(sum, (const __be32 *)udp, 3);
	if (tunnel->other)
		sum = added(sum, (const __be32 *)udp + 3, SECOND_CHANCE_WORDS);
	if (outer_family == AF_INET)
		sum = added(sum, &((struct iphdr *)outer_ip)->saddr, 2);
	else
		sum = added(sum, ((struct ipv6hdr *)outer_ip)->saddr.in6_u.u6_addr32, 8);
	check = ~fold(sum);
	return check ? check : 0xffff;
}

static __always_inline void write_second_chance(struct second_chance *chance, const struct member *other)
{
	chance->magic = bpf_htons(SECOND_CHANCE_MAGIC);
	chance->family = other->flags & MEMBER_IP6 ? 6 : 4;
	chance->zero = 0;
	__builtin_memcpy(chance->address, other->address, 16);
}

static __always_inline void write_gue(struct udphdr *udp, const struct tunnel *tunnel, const void *outer_ip, int outer_family)
{
	struct gue_header *gue = (void *)(udp + 1);

	udp->source = bpf_htons(GUE_SOURCE_PORTS | (tunnel->hash >> 16));
	udp->dest = tunnel->service->gue_port;
	udp->len = bpf_htons(gue_bytes(tunnel) + tunnel->inner_bytes);
	udp->check = 0;
	gue->first = tunnel->other ? SECOND_CHANCE_WORDS : 0;
	gue->protocol = tunnel->protocol;
	gue->flags = 0;
	if (tunnel->other)
		write_second_chance((void *)(gue + 1), tunnel->other);
	if (tunnel->inner_sum)
		udp->check = gue_checksum(tunnel, udp, outer_ip, outer_family);
}

/* The outer headers in front of the packet, and the frame's own in front of them. */
static __always_inline enum reason write_headers(struct xdp_md *ctx, struct packet *pkt, const struct hop *hop,
						 const struct tunnel *tunnel, int outer_family)
{
	struct ethhdr *eth = (void *)(long)ctx->data;
	void *ip, *behind;

	ip = eth + 1;
	behind = ip + ip_header_size(outer_family);
	if (behind > frame_end(ctx))
		return DROP_MALFORMED;
	pkt->ip = ip;
	set_hop(pkt, hop);
	eth->h_proto = bpf_htons(outer_family == AF_INET ? ETH_P_IP : ETH_P_IPV6);
	if (outer_family == AF_INET)
		write_outer4(ip, tunnel, gue_bytes(tunnel) + tunnel->inner_bytes);
	else
		write_outer6(ip, tunnel, gue_bytes(tunnel) + tunnel->inner_bytes);
	if (!tunnel->is_gue)
		return GO_ON;
	if (behind + GUE_MOST > frame_end(ctx))
		return DROP_MALFORMED;
	write_gue(behind, tunnel, ip, outer_family);
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
	__u32 overhead = ip_header_size(outer_family) + gue_bytes(tunnel);
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
	return count_request(ctx, tunnel->member, pkt, opens_connection(pkt), overhead, family);
}

static __always_inline enum reason send_through_tunnel(struct xdp_md *ctx, const struct service *service, struct packet *pkt,
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
