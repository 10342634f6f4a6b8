/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * ICMP errors through nat: the quoted packet becomes what its sender sent (RFC 5508, section 4.2), with its own checksums
 * where the quote is long enough to hold them. 8 quoted bytes are enough.
 */
#pragma once

#include "rewrite.h"

#define TCP_CHECK_END 18

static __always_inline __u64 update_quoted_ip(struct iphdr *ip, __u64 addresses, __u64 icmp)
{
	__u16 check = updated_checksum(ip->check, addresses);

	icmp = replaced16(icmp, ip->check, check);
	ip->check = check;
	return icmp;
}

static __always_inline __u64 update_quoted_udp(struct udphdr *udp, __u64 difference, __u64 icmp)
{
	__u16 check = updated_udp_checksum(udp->check, difference);

	icmp = replaced16(icmp, udp->check, check);
	udp->check = check;
	return icmp;
}

static __always_inline __u64 update_quoted_tcp(struct packet *pkt, struct tcphdr *tcp, __u64 difference, __u64 icmp,
					       int family)
{
	__u32 quoted = pkt->l4_bytes - sizeof(struct icmp_header) - ip_header_size(family);
	__u16 check;

	if (quoted < TCP_CHECK_END || (void *)tcp + TCP_CHECK_END > pkt->end)
		return icmp;
	check = updated_checksum(tcp->check, difference);
	icmp = replaced16(icmp, tcp->check, check);
	tcp->check = check;
	return icmp;
}

/* Returns the difference that the ICMP checksum has to take in. */
static __always_inline __u64 rewrite_quoted(struct packet *pkt, const struct rewrite *new, __u64 addresses, __u64 ports,
					    int family)
{
	void *ip = pkt->l4 + sizeof(struct icmp_header);
	__be16 *quoted_ports = ip + ip_header_size(family);
	__u64 icmp = addresses + ports;

	if (family == AF_INET)
		icmp = update_quoted_ip(ip, addresses, icmp);
	if (pkt->flow->protocol == IPPROTO_UDP)
		icmp = update_quoted_udp((void *)quoted_ports, addresses + ports, icmp);
	else
		icmp = update_quoted_tcp(pkt, (void *)quoted_ports, addresses + ports, icmp, family);
	set_addresses(ip, new->destination, new->source, family);
	quoted_ports[0] = new->destination_port;
	quoted_ports[1] = new->source_port;
	return icmp;
}

/* Outer source and destination change too: RFC 4443 has them in the ICMPv6 checksum, RFC 792 leaves them out. */
static __always_inline void rewrite_icmp(struct packet *pkt, const struct rewrite *new, __u64 outer, __u64 addresses,
					 __u64 ports, int family)
{
	struct icmp_header *icmp = pkt->l4;
	__u64 difference = rewrite_quoted(pkt, new, addresses, ports, family);

	if (family == AF_INET6)
		difference += outer;
	icmp->checksum = updated_checksum(icmp->checksum, difference);
}
