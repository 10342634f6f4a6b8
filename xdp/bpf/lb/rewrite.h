/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * New addresses and ports for a packet, with every checksum that covers them. In an ICMP error the quoted packet is the
 * flow turned round, and gets the new flow turned round.
 */
#pragma once

#include "checksum.h"
#include "packet.h"

/* The packet's new flow; the protocol stays. */
struct rewrite {
	const __be32 *source;
	const __be32 *destination;
	__be16 source_port;
	__be16 destination_port;
};

static __always_inline __u64 replaced_address(__u64 difference, const __be32 *old, const __be32 *new, int family)
{
	difference = replaced(difference, old[0], new[0]);
	if (family == AF_INET)
		return difference;
	difference = replaced(difference, old[1], new[1]);
	difference = replaced(difference, old[2], new[2]);
	return replaced(difference, old[3], new[3]);
}

static __always_inline __u64 address_difference(struct packet *pkt, const struct rewrite *new, int family)
{
	__u64 difference = replaced_address(0, flow_source(pkt->flow), new->source, family);

	return replaced_address(difference, flow_destination(pkt->flow, family), new->destination, family);
}

/* An ICMP error's own source may be any router on the way; the destination is the flow's. */
static __always_inline __u64 outer_difference(struct packet *pkt, const struct rewrite *new, int family)
{
	const __be32 *source = family == AF_INET ? &((struct iphdr *)pkt->ip)->saddr
						 : ((struct ipv6hdr *)pkt->ip)->saddr.in6_u.u6_addr32;
	__u64 difference = replaced_address(0, source, new->source, family);

	return replaced_address(difference, flow_destination(pkt->flow, family), new->destination, family);
}

static __always_inline __u64 port_difference(const struct packet *pkt, const struct rewrite *new)
{
	__u64 difference = replaced16(0, pkt->flow->source_port, new->source_port);

	return replaced16(difference, pkt->flow->destination_port, new->destination_port);
}

static __always_inline void set_addresses(void *ip, const __be32 *source, const __be32 *destination, int family)
{
	if (family == AF_INET) {
		((struct iphdr *)ip)->saddr = source[0];
		((struct iphdr *)ip)->daddr = destination[0];
	} else {
		__builtin_memcpy(&((struct ipv6hdr *)ip)->saddr, source, 16);
		__builtin_memcpy(&((struct ipv6hdr *)ip)->daddr, destination, 16);
	}
}

static __always_inline void rewrite_tcp(struct tcphdr *tcp, const struct rewrite *new, __u64 difference)
{
	tcp->source = new->source_port;
	tcp->dest = new->destination_port;
	tcp->check = updated_checksum(tcp->check, difference);
}

static __always_inline void rewrite_udp(struct udphdr *udp, const struct rewrite *new, __u64 difference)
{
	udp->source = new->source_port;
	udp->dest = new->destination_port;
	udp->check = updated_udp_checksum(udp->check, difference);
}
