/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The outer headers of IPIP and GUE (tunnel.h), written here and nowhere else: by the balancer, by a backend that sends a
 * packet on to another one, and by health checks, whose packets so look as those of the services that they check.
 */
#pragma once

#include <linux/udp.h>
#include "checksum.h"
#include "ip.h"
#include "tunnel.h"

#define OUTER_TTL 64
#define GUE_SOURCE_PORTS 0xc000 /* and up: the dynamic ports of RFC 6335 */
/* The shortest GUE header with the shortest packet behind it is longer too. */
#define GUE_MOST (sizeof(struct udphdr) + sizeof(struct gue_header) + sizeof(struct second_chance))

struct encap {
	const __be32 *source; /* addresses of four words, of which IPv4 uses one */
	const __be32 *destination;
	const __be32 *other_member; /* second chance: who else may know the flow; NULL: nobody */
	__be32 source_suffix;	    /* bits that the end of the source has beside its own */
	__u32 flow_label;
	__u32 inner_bytes;
	__u32 inner_sum; /* of the inner packet; 0: the outer UDP checksum is left out (RFC 6935, 6936) */
	__be16 source_port;
	__be16 destination_port;
	__u8 traffic_class;	  /* DSCP and ECN (RFC 6040, normal mode) of the inner packet */
	__u8 inner_protocol;	  /* IPPROTO_IPIP or IPPROTO_IPV6 */
	__u8 other_member_family; /* 4 or 6 */
	__u8 is_gue;
};

static __always_inline __u32 gue_bytes(int is_gue, int has_second_chance)
{
	if (!is_gue)
		return 0;
	return sizeof(struct udphdr) + sizeof(struct gue_header) + (has_second_chance ? sizeof(struct second_chance) : 0);
}

static __always_inline void write_outer_ip4(struct iphdr *ip, const struct encap *encap, __u8 protocol, __u32 payload)
{
	*(__be32 *)ip = bpf_htonl(0x45000000 | (__u32)encap->traffic_class << 16 | (payload + sizeof(*ip)));
	((__be32 *)ip)[1] = bpf_htonl(0x4000); /* DF: never fragmented, so needs no ID (RFC 6864) */
	((__be32 *)ip)[2] = bpf_htonl(OUTER_TTL << 24 | (__u32)protocol << 16);
	ip->saddr = encap->source[0] | encap->source_suffix;
	ip->daddr = encap->destination[0];
	ip->check = ~fold(sum_words(0, (__be32 *)ip, sizeof(*ip) / 4));
}

static __always_inline void write_outer_ip6(struct ipv6hdr *ip, const struct encap *encap, __u8 protocol, __u32 payload)
{
	((__be32 *)ip)[0] = bpf_htonl(0x60000000 | (__u32)encap->traffic_class << 20 | encap->flow_label);
	((__be32 *)ip)[1] = bpf_htonl(payload << 16 | (__u32)protocol << 8 | OUTER_TTL);
	__builtin_memcpy(&ip->saddr, encap->source, 16);
	__builtin_memcpy(&ip->daddr, encap->destination, 16);
	ip->saddr.in6_u.u6_addr32[3] = encap->source[3] | encap->source_suffix;
}

static __always_inline void write_outer_ip(void *ip, const struct encap *encap, int family)
{
	__u8 protocol = encap->is_gue ? IPPROTO_UDP : encap->inner_protocol;
	__u32 payload = gue_bytes(encap->is_gue, encap->other_member != NULL) + encap->inner_bytes;

	if (family == AF_INET)
		write_outer_ip4(ip, encap, protocol, payload);
	else
		write_outer_ip6(ip, encap, protocol, payload);
}

/* The headers as they stand in front of the inner packet, whose sum is known. */
static __always_inline __u16 gue_checksum(const struct encap *encap, const struct udphdr *udp, const void *outer_ip, int family)
{
	__u64 sum = encap->inner_sum + bpf_htons(IPPROTO_UDP) + (__u64)udp->len;
	__u16 check;

	sum = sum_words(sum, (const __be32 *)udp, 3);
	if (encap->other_member)
		sum = sum_words(sum, (const __be32 *)udp + 3, SECOND_CHANCE_WORDS);
	if (family == AF_INET)
		sum = sum_words(sum, &((const struct iphdr *)outer_ip)->saddr, 2);
	else
		sum = sum_words(sum, ((const struct ipv6hdr *)outer_ip)->saddr.in6_u.u6_addr32, 8);
	check = ~fold(sum);
	return check ? check : 0xffff;
}

static __always_inline void write_second_chance(struct second_chance *chance, const struct encap *encap)
{
	chance->magic = bpf_htons(SECOND_CHANCE_MAGIC);
	chance->family = encap->other_member_family;
	chance->zero = 0;
	__builtin_memcpy(chance->address, encap->other_member, 16);
}

/* UDP and GUE, right behind the outer IP header that is written already. */
static __always_inline void write_gue(struct udphdr *udp, const struct encap *encap, const void *outer_ip, int family)
{
	struct gue_header *gue = (void *)(udp + 1);

	udp->source = encap->source_port;
	udp->dest = encap->destination_port;
	udp->len = bpf_htons(gue_bytes(1, encap->other_member != NULL) + encap->inner_bytes);
	udp->check = 0;
	gue->first = encap->other_member ? SECOND_CHANCE_WORDS : 0;
	gue->protocol = encap->inner_protocol;
	gue->flags = 0;
	if (encap->other_member)
		write_second_chance((void *)(gue + 1), encap);
	if (encap->inner_sum)
		udp->check = gue_checksum(encap, udp, outer_ip, family);
}
