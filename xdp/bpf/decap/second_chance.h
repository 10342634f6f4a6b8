/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The second chance: while a slot of the ring is in transition, the balancer names in the tunnel header the other member
 * that may own the flow. A TCP packet that no socket here knows goes on to that one, and not up the stack, which would
 * answer with a reset. It goes without private data, so that it comes to rest there.
 *
 * The neighbour's MAC address is the kernel's to find, and an XDP program can only ask what is known already, on hosts
 * that route. So the rebuilt packet goes up under a source MAC that nobody can guess, and a tc program gives what it finds
 * under that to bpf_redirect_neigh(). It leaves on the interface that it came in on.
 */
#pragma once

#include <linux/pkt_cls.h>
#include "checksum.h"
#include "decap.h"

#define OUTER_HOP_LIMIT 64
#define IP_DF bpf_htons(0x4000)
#define IP_FRAGMENTED bpf_htons(0x3fff)
#define PACKET_HOST 0 /* <linux/if_packet.h> */

#define SLOW_PATH __attribute__((noinline))

struct gue_packet {
	struct udphdr udp;
	struct gue_header gue;
};

/* From the outer IP header's end to the inner one. */
#define OLD_HEADERS (sizeof(struct gue_packet) + sizeof(struct second_chance))

/* What is kept of a packet's old headers for its new ones. */
struct outer {
	__be32 source[4];
	__be32 destination[4];
	__u8 mac[6];
	__u8 family; /* 4 or 6 */
	__u8 traffic_class;
	__be16 source_port;
	__u8 inner_protocol;
};

/* Is the flow a socket's of this host, or (at a listener) a new one, or one that a SYN cookie stands for? */
static __always_inline int owned(struct xdp_md *ctx, struct bpf_sock_tuple *tuple, __u32 tuple_size, void *ip,
				 __u32 ip_size, struct tcphdr *tcp)
{
	struct bpf_sock *sk = bpf_skc_lookup_tcp(ctx, tuple, tuple_size, BPF_F_CURRENT_NETNS, 0);
	int ours = 1;

	if (!sk)
		return 0;
	if (sk->state == BPF_TCP_LISTEN && (!tcp->syn || tcp->ack))
		ours = !bpf_tcp_check_syncookie(sk, ip, ip_size, tcp, sizeof(*tcp));
	bpf_sk_release(sk);
	return ours;
}

static __always_inline int owned4(struct xdp_md *ctx, struct iphdr *ip, void *end)
{
	struct bpf_sock_tuple tuple = {};
	struct tcphdr *tcp;

	if ((void *)(ip + 1) > end || ip->protocol != IPPROTO_TCP || ip->frag_off & IP_FRAGMENTED)
		return 1;
	tcp = (void *)ip + ip->ihl * 4;
	if ((void *)(tcp + 1) > end)
		return 1;
	tuple.ipv4.saddr = ip->saddr;
	tuple.ipv4.daddr = ip->daddr;
	tuple.ipv4.sport = tcp->source;
	tuple.ipv4.dport = tcp->dest;
	return owned(ctx, &tuple, sizeof(tuple.ipv4), ip, sizeof(*ip), tcp);
}

static __always_inline int owned6(struct xdp_md *ctx, struct ipv6hdr *ip, void *end)
{
	struct bpf_sock_tuple tuple = {};
	struct tcphdr *tcp = (void *)(ip + 1);

	if ((void *)(tcp + 1) > end || ip->nexthdr != IPPROTO_TCP)
		return 1;
	__builtin_memcpy(tuple.ipv6.saddr, &ip->saddr, 16);
	__builtin_memcpy(tuple.ipv6.daddr, &ip->daddr, 16);
	tuple.ipv6.sport = tcp->source;
	tuple.ipv6.dport = tcp->dest;
	return owned(ctx, &tuple, sizeof(tuple.ipv6), ip, sizeof(*ip), tcp);
}

static __always_inline __u32 ip_header_size(int version)
{
	return version == 4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);
}

/* Whether the inner packet is TCP of a flow that this host has nothing to do with. The frame is untagged. */
SLOW_PATH int belongs_elsewhere(struct xdp_md *ctx, __u32 outer_ip_size)
{
	void *inner = (void *)(long)ctx->data + sizeof(struct ethhdr) + OLD_HEADERS, *end = (void *)(long)ctx->data_end;

	if (outer_ip_size > sizeof(struct ipv6hdr))
		return 0;
	inner += outer_ip_size;
	if (inner + 1 > end)
		return 0;
	return *(__u8 *)inner >> 4 == 4 ? !owned4(ctx, inner, end) : !owned6(ctx, inner, end);
}

static __always_inline void read_old_outer(struct outer *outer, const struct ipv6hdr *ip6)
{
	const struct iphdr *ip4 = (const void *)ip6;

	if (ip6->version == 4) {
		outer->traffic_class = ip4->tos;
		outer->source[0] = ip4->daddr;
	} else {
		outer->traffic_class = ip6->priority << 4 | ip6->flow_lbl[0] >> 4;
		__builtin_memcpy(outer->source, &ip6->daddr, 16);
	}
}

static __always_inline void set_own_address(struct outer *outer)
{
	__builtin_memset(outer->source, 0, sizeof(outer->source));
	if (outer->family == 4)
		outer->source[0] = config.own_address4;
	else
		for (int word = 0; word < 4; word++)
			outer->source[word] = config.own_address6[word];
}

/* The source is the address under which the balancer knows this host, unless the other member is of another family. */
static __always_inline enum decap_reason read_outer(struct xdp_md *ctx, struct outer *outer, __u32 outer_ip_size)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;
	struct gue_packet *tunnel = data + sizeof(*eth) + outer_ip_size;
	struct second_chance *chance = (void *)(tunnel + 1);
	struct ipv6hdr *ip = (void *)(eth + 1);

	if ((void *)(ip + 1) > end || (void *)(chance + 1) > end)
		return DROP_INNER_MALFORMED;
	__builtin_memcpy(outer->mac, eth->h_dest, 6);
	__builtin_memcpy(outer->destination, chance->address, 16);
	outer->family = chance->family;
	outer->source_port = tunnel->udp.source;
	outer->inner_protocol = tunnel->gue.protocol;
	read_old_outer(outer, ip);
	if (ip->version != outer->family)
		set_own_address(outer);
	return outer->source[0] | outer->source[1] | outer->source[2] | outer->source[3] ? SENT_TO_OTHER_MEMBER
											 : DROP_NO_OWN_ADDRESS;
}

static __always_inline void write_ip4(struct iphdr *ip, const struct outer *outer, __u32 bytes)
{
	const __u16 *words = (const __u16 *)ip;
	__u64 sum = 0;

	*(__u8 *)ip = 0x45;
	ip->tos = outer->traffic_class;
	ip->tot_len = bpf_htons(sizeof(*ip) + bytes);
	ip->id = 0; /* RFC 6864: of no meaning where fragments are forbidden */
	ip->frag_off = IP_DF;
	ip->ttl = OUTER_HOP_LIMIT;
	ip->protocol = IPPROTO_UDP;
	ip->check = 0;
	ip->saddr = outer->source[0];
	ip->daddr = outer->destination[0];
	for (int word = 0; word < 10; word++)
		sum += words[word];
	ip->check = ~fold(sum);
}

static __always_inline void write_ip6(struct ipv6hdr *ip, const struct outer *outer, __u32 bytes)
{
	*(__be32 *)ip = bpf_htonl(6u << 28 | outer->traffic_class << 20);
	ip->payload_len = bpf_htons(bytes);
	ip->nexthdr = IPPROTO_UDP;
	ip->hop_limit = OUTER_HOP_LIMIT;
	__builtin_memcpy(&ip->saddr, outer->source, 16);
	__builtin_memcpy(&ip->daddr, outer->destination, 16);
}

static __always_inline enum decap_reason write_outer(struct xdp_md *ctx, const struct outer *outer, __u32 inner_bytes)
{
	struct ethhdr *eth = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end, *ip = eth + 1;
	__u32 bytes = sizeof(struct gue_packet) + inner_bytes;
	struct gue_packet *tunnel = ip + ip_header_size(outer->family);

	if ((void *)(tunnel + 1) > end || ip + sizeof(struct ipv6hdr) > end)
		return DROP_INNER_MALFORMED;
	__builtin_memcpy(eth->h_dest, outer->mac, 6);
	for (int byte = 0; byte < 6; byte++)
		eth->h_source[byte] = config.mark[byte];
	eth->h_proto = outer->family == 4 ? bpf_htons(ETH_P_IP) : bpf_htons(ETH_P_IPV6);
	tunnel->udp.source = outer->source_port;
	tunnel->udp.dest = config.gue_port;
	tunnel->udp.len = bpf_htons(bytes);
	tunnel->udp.check = 0; /* RFC 6935 */
	tunnel->gue = (struct gue_header){ .protocol = outer->inner_protocol };
	if (outer->family == 4)
		write_ip4(ip, outer, bytes);
	else
		write_ip6(ip, outer, bytes);
	return SENT_TO_OTHER_MEMBER;
}

/* Rebuilds an untagged frame that names another member, for that one. */
SLOW_PATH int send_elsewhere(struct xdp_md *ctx, __u32 outer_ip_size, __u32 inner_bytes)
{
	struct outer outer = {};
	enum decap_reason why;
	int removed;

	if (outer_ip_size > sizeof(struct ipv6hdr))
		return DROP_INNER_MALFORMED;
	why = read_outer(ctx, &outer, outer_ip_size);
	if (why != SENT_TO_OTHER_MEMBER)
		return why;
	removed = (int)outer_ip_size + (int)sizeof(struct second_chance) - (int)ip_header_size(outer.family);
	if (bpf_xdp_adjust_head(ctx, removed))
		return DROP_NO_ROOM;
	return write_outer(ctx, &outer, inner_bytes);
}

/* At tc ingress: what the other program has rebuilt goes out, everything else goes on. */
SEC("tc")
int decap_send(struct __sk_buff *skb)
{
	struct ethhdr *eth = (void *)(long)skb->data;
	__u32 differs = 0;

	if ((void *)(eth + 1) > (void *)(long)skb->data_end)
		return TC_ACT_UNSPEC;
	for (int byte = 0; byte < 6; byte++)
		differs |= eth->h_source[byte] ^ config.mark[byte];
	if (differs)
		return TC_ACT_UNSPEC;
	return skb->pkt_type == PACKET_HOST ? bpf_redirect_neigh(skb->ifindex, NULL, 0, 0) : TC_ACT_SHOT;
}
