/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The UDP checksum of a GUE packet without a look at its payload: what a right checksum covers sums up to a known value
 * (the kernel's "local checksum offload"). Optional: RFC 6935 and 6936 allow tunnels to leave it out.
 */
#pragma once

#include "checksum.h"
#include "packet.h"

/* Of the transport header and all behind it: the complement of its pseudo header, which an IPv4 ICMP message has not. */
static __always_inline __u64 l4_sum(const struct packet *pkt, __u8 protocol, int family)
{
	__u64 pseudo = bpf_htonl(pkt->l4_bytes + protocol);

	if (family == AF_INET && protocol == IPPROTO_ICMP)
		return 0;
	if (family == AF_INET)
		pseudo = sum_words(pseudo, &((struct iphdr *)pkt->ip)->saddr, 2);
	else
		pseudo = sum_words(pseudo, ((struct ipv6hdr *)pkt->ip)->saddr.in6_u.u6_addr32, 8);
	return (__u16)~fold(pseudo);
}

/* Whether the transport's checksum is there and covers just this packet: a datagram may end before its packet does. */
static __always_inline int has_l4_checksum(const struct packet *pkt)
{
	const struct udphdr *udp = pkt->l4;

	if (pkt->l4_kind == L4_UDP)
		return udp->check && bpf_ntohs(udp->len) == pkt->l4_bytes;
	return pkt->l4_kind != L4_FRAGMENT;
}

/* The sum of a whole packet as it goes into the tunnel. The sum of an IPv4 header is nothing, by its own checksum. */
static __always_inline __u64 packet_sum(const struct packet *pkt, int family)
{
	if (family == AF_INET)
		return l4_sum(pkt, ((struct iphdr *)pkt->ip)->protocol, AF_INET);
	return sum_words(l4_sum(pkt, ((struct ipv6hdr *)pkt->ip)->nexthdr, AF_INET6), pkt->ip, sizeof(struct ipv6hdr) / 4);
}
