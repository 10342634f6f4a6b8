/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * From a frame to a struct packet: headers found once, the flow written down as a map key. A packet that no service can
 * use ends here with its reason. An ICMP error stands for the flow that it quotes: the flow's key is the quoted packet's
 * turned round, as if its receiver had sent the error himself.
 */
#pragma once

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include "counter_maps.h"
#include "flow_maps.h"
#include "ip.h"
#include "verifier.h"

#define IP6_OFFSET bpf_htons(0xfff8)

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

/* Of ICMP and ICMPv6 alike; <linux/icmp.h> pulls in libc. */
struct icmp_header {
	__u8 type;
	__u8 code;
	__sum16 checksum;
	__be32 rest;
};

struct fragment_header { /* RFC 8200, section 4.5 */
	__u8 next;
	__u8 zero;
	__be16 offset;
	__be32 id;
};

enum l4_kind {
	L4_TCP = 1,
	L4_UDP,
	L4_ICMP_ERROR,
	L4_FRAGMENT,
};

/* What a packet that is FORWARDED is counted as. */
enum counted_as {
	COUNTED_REQUEST,
	COUNTED_OPENING, /* the first request of a connection */
	COUNTED_REPLY,
};

struct packet {
	void *ip;   /* struct iphdr or struct ipv6hdr, right behind a struct ethhdr */
	void *l4;   /* TCP, UDP, ICMP or ICMPv6 */
	void *end;
	__u32 bytes; /* of the frame */
	__u32 l4_bytes; /* by the IP header, which the frame holds in full */
	__u32 egress; /* ifindex, once the packet is FORWARDED */
	__u32 word;   /* of its slot; 0 where its member was found otherwise */
	__u32 hash;   /* of its flow, for what else is to vary by flow */
	__u32 tcp_flags;
	enum l4_kind l4_kind;
	__u32 counter; /* once FORWARDED: of the member that it goes to or comes from */
	enum counted_as counted_as;
	struct flow_key *flow; /* apart, since maps want its address: the rest stays in registers */
};

static __always_inline __be32 *flow_source(struct flow_key *flow)
{
	return flow->address;
}

static __always_inline __be32 *flow_destination(struct flow_key *flow, int family)
{
	return family == AF_INET ? flow->address + 1 : flow->address + 4;
}

static __always_inline void copy_address(__be32 *to, const __be32 *from, int family)
{
	to[0] = from[0];
	if (family == AF_INET)
		return;
	to[1] = from[1];
	to[2] = from[2];
	to[3] = from[3];
}

static __always_inline int same_address(const __be32 *one, const __be32 *other, int family)
{
	if (family == AF_INET)
		return one[0] == other[0];
	return one[0] == other[0] && one[1] == other[1] && one[2] == other[2] && one[3] == other[3];
}

/*
 * Ports, protocol and zeros of a map key in one word: a store that a load of another size has to be put together from
 * several of costs as much as a cache miss of the first level. Little-endian, as all that libbpf runs on here.
 */
static __always_inline __u32 key_word(__be16 port, __u8 protocol)
{
	return port | (__u32)protocol << 16;
}

static __always_inline void set_ends(struct flow_key *flow, __be16 source_port, __be16 destination_port, __u8 protocol)
{
	*(__u64 *)flow = source_port | (__u64)destination_port << 16 | (__u64)protocol << 32;
}

/* TCP: the first packet of a connection. UDP has no such mark. */
static __always_inline int opens_connection(const struct packet *pkt)
{
	return (pkt->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

/* What a header is that is not the plain one. */
static __always_inline enum reason reject_ip4(const struct iphdr *ip)
{
	if (ip->version != 4 || ip->ihl < 5)
		return PASS_MALFORMED;
	return ip->frag_off & IP_OFFSET ? PASS_FRAGMENT : DROP_IP_OPTIONS;
}

static __always_inline enum reason parse_ip4(struct packet *pkt, __u8 *protocol)
{
	struct iphdr *ip = pkt->ip;
	__u32 total = bounded_length(ip->tot_len);

	if (*(__u8 *)ip != 0x45)
		return reject_ip4(ip);
	if (total < sizeof(*ip) || pkt->ip + total > pkt->end)
		return DROP_MALFORMED;
	pkt->l4_bytes = total - sizeof(*ip);
	pkt->flow->address[0] = ip->saddr;
	pkt->flow->address[1] = ip->daddr;
	*protocol = ip->protocol;
	if (ip->frag_off & (IP_MF | IP_OFFSET))
		return ip->frag_off & IP_OFFSET ? PASS_FRAGMENT : DROP_FRAGMENT;
	return GO_ON;
}

static __always_inline enum reason parse_ip6(struct packet *pkt, __u8 *protocol)
{
	struct ipv6hdr *ip = pkt->ip;

	if (ip->version != 6)
		return PASS_MALFORMED;
	pkt->l4_bytes = bounded_length(ip->payload_len);
	if (pkt->l4 + pkt->l4_bytes > pkt->end)
		return DROP_MALFORMED;
	__builtin_memcpy(pkt->flow->address, &ip->saddr, 32);
	*protocol = ip->nexthdr;
	return GO_ON;
}

static __always_inline enum reason parse_tcp(struct packet *pkt)
{
	struct tcphdr *tcp = pkt->l4;

	if ((void *)(tcp + 1) > pkt->end)
		return PASS_MALFORMED;
	if (tcp->doff < 5 || tcp->doff * 4 > pkt->l4_bytes)
		return DROP_MALFORMED;
	set_ends(pkt->flow, tcp->source, tcp->dest, IPPROTO_TCP);
	pkt->tcp_flags = ((__u8 *)tcp)[13];
	pkt->l4_kind = L4_TCP;
	return GO_ON;
}

static __always_inline enum reason parse_udp(struct packet *pkt)
{
	struct udphdr *udp = pkt->l4;
	__u32 length;

	if ((void *)(udp + 1) > pkt->end)
		return PASS_MALFORMED;
	length = bpf_ntohs(udp->len);
	if (length < sizeof(*udp) || length > pkt->l4_bytes)
		return DROP_MALFORMED;
	set_ends(pkt->flow, udp->source, udp->dest, IPPROTO_UDP);
	pkt->l4_kind = L4_UDP;
	return GO_ON;
}

static __always_inline int is_icmp_error(__u8 type, int family)
{
	if (family == AF_INET6)
		return type >= 1 && type <= 4; /* RFC 4443: unreachable, too big, time exceeded, parameter problem */
	return type == 3 || type == 11 || type == 12; /* RFC 792: unreachable, time exceeded, parameter problem */
}

static __always_inline int quotes_its_receiver(struct packet *pkt, void *quoted_ip, int family)
{
	__be32 *receiver = flow_destination(pkt->flow, family);

	if (family == AF_INET)
		return ((struct iphdr *)quoted_ip)->saddr == receiver[0];
	return same_address(((struct ipv6hdr *)quoted_ip)->saddr.in6_u.u6_addr32, receiver, family);
}

static __always_inline int quoted_flow(struct packet *pkt, void *quoted_ip, __u8 *protocol, int family)
{
	if (family == AF_INET) {
		struct iphdr *ip = quoted_ip;

		if (ip->version != 4 || ip->ihl != 5 || ip->frag_off & IP_OFFSET)
			return 0;
		pkt->flow->address[0] = ip->daddr;
		*protocol = ip->protocol;
	} else {
		struct ipv6hdr *ip = quoted_ip;

		if (ip->version != 6)
			return 0;
		__builtin_memcpy(pkt->flow->address, &ip->daddr, 16);
		*protocol = ip->nexthdr;
	}
	return *protocol == IPPROTO_TCP || *protocol == IPPROTO_UDP;
}

/* RFC 792: an error quotes the IP header and at least 8 bytes behind it, so the ports are always there. */
static __always_inline enum reason parse_icmp(struct packet *pkt, __u8 *protocol, int family)
{
	struct icmp_header *icmp = pkt->l4;
	void *quoted_ip = icmp + 1;
	__be16 *ports = quoted_ip + ip_header_size(family);

	if ((void *)(icmp + 1) > pkt->end)
		return PASS_MALFORMED;
	if (!is_icmp_error(icmp->type, family))
		return PASS_ICMP;
	if ((void *)(ports + 4) > pkt->end || pkt->l4_bytes < sizeof(*icmp) + ip_header_size(family) + 8)
		return PASS_MALFORMED;
	if (!quotes_its_receiver(pkt, quoted_ip, family) || !quoted_flow(pkt, quoted_ip, protocol, family))
		return PASS_ICMP;
	set_ends(pkt->flow, ports[1], ports[0], *protocol);
	pkt->l4_kind = L4_ICMP_ERROR;
	return GO_ON;
}

static __always_inline enum reason reject_ip6_next_header(struct packet *pkt, __u8 next)
{
	struct fragment_header *fragment = pkt->l4;

	if (next == IPPROTO_HOPOPTS || next == IPPROTO_ROUTING || next == IPPROTO_DSTOPTS)
		return PASS_IPV6_EXTENSION;
	if (next != IPPROTO_FRAGMENT)
		return PASS_NOT_TCP_OR_UDP;
	if ((void *)(fragment + 1) > pkt->end)
		return PASS_MALFORMED;
	return fragment->offset & IP6_OFFSET ? PASS_FRAGMENT : DROP_FRAGMENT;
}

static __always_inline enum reason parse_l4(struct packet *pkt, int family)
{
	enum reason why;
	__u8 protocol;

	why = family == AF_INET ? parse_ip4(pkt, &protocol) : parse_ip6(pkt, &protocol);
	if (why)
		return why;
	if (protocol == IPPROTO_TCP)
		why = parse_tcp(pkt);
	else if (protocol == IPPROTO_UDP)
		why = parse_udp(pkt);
	else if (protocol == (family == AF_INET ? IPPROTO_ICMP : IPPROTO_ICMPV6))
		why = parse_icmp(pkt, &protocol, family);
	else
		why = family == AF_INET ? PASS_NOT_TCP_OR_UDP : reject_ip6_next_header(pkt, protocol);
	return why;
}

/* What is wrong with a packet of a service drops it; whether it is one of a service, refuse() finds out. */
static __always_inline enum reason parse(struct xdp_md *ctx, struct packet *pkt, int family)
{
	void *frame = (void *)(long)ctx->data;

	pkt->end = frame_end(ctx);
	pkt->ip = frame + sizeof(struct ethhdr);
	pkt->l4 = pkt->ip + ip_header_size(family);
	pkt->bytes = ctx->data_end - ctx->data;
	if (pkt->l4 > pkt->end)
		return PASS_MALFORMED;
	return parse_l4(pkt, family);
}
