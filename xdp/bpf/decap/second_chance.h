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
#include "decap.h"
#include "encap.h"
#include "martian.h"

#define PACKET_HOST 0 /* <linux/if_packet.h> */

/* From the outer IP header's end to the inner one. */
#define GUE_WITH_SECOND_CHANCE (sizeof(struct udphdr) + sizeof(struct gue_header) + sizeof(struct second_chance))

/* What is kept of a packet's old outer headers for its new ones. */
struct old_headers {
	__be32 source[4]; /* of the new ones */
	__be32 destination[4];
	__u8 mac[6];
	__u8 traffic_class;
	__u8 inner_protocol;
	__be16 source_port;
	int family; /* of the new outer header */
};

/* Is the flow a socket's of this host, or (at a listener) a new one, or one that a SYN cookie stands for? */
static __always_inline int has_socket(struct xdp_md *ctx, struct bpf_sock_tuple *tuple, __u32 tuple_size, void *ip,
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

static __always_inline int has_socket4(struct xdp_md *ctx, struct iphdr *ip, void *end)
{
	struct bpf_sock_tuple tuple = {};
	struct tcphdr *tcp;

	if ((void *)(ip + 1) > end || ip->protocol != IPPROTO_TCP || ip->frag_off & (IP_MF | IP_OFFSET))
		return 1;
	tcp = (void *)ip + ip->ihl * 4;
	if ((void *)(tcp + 1) > end)
		return 1;
	tuple.ipv4.saddr = ip->saddr;
	tuple.ipv4.daddr = ip->daddr;
	tuple.ipv4.sport = tcp->source;
	tuple.ipv4.dport = tcp->dest;
	return has_socket(ctx, &tuple, sizeof(tuple.ipv4), ip, sizeof(*ip), tcp);
}

static __always_inline int has_socket6(struct xdp_md *ctx, struct ipv6hdr *ip, void *end)
{
	struct bpf_sock_tuple tuple = {};
	struct tcphdr *tcp = (void *)(ip + 1);

	if ((void *)(tcp + 1) > end || ip->nexthdr != IPPROTO_TCP)
		return 1;
	__builtin_memcpy(tuple.ipv6.saddr, &ip->saddr, 16);
	__builtin_memcpy(tuple.ipv6.daddr, &ip->daddr, 16);
	tuple.ipv6.sport = tcp->source;
	tuple.ipv6.dport = tcp->dest;
	return has_socket(ctx, &tuple, sizeof(tuple.ipv6), ip, sizeof(*ip), tcp);
}

/* Whether the inner packet is TCP of a flow that no socket of this host has. The frame is untagged. */
SLOW_PATH int has_no_socket(struct xdp_md *ctx, __u32 outer_ip_size)
{
	void *inner = (void *)(long)ctx->data + sizeof(struct ethhdr) + GUE_WITH_SECOND_CHANCE, *end = frame_end(ctx);

	if (outer_ip_size > sizeof(struct ipv6hdr))
		return 0;
	inner += outer_ip_size;
	if (inner + 1 > end)
		return 0;
	return *(__u8 *)inner >> 4 == 4 ? !has_socket4(ctx, inner, end) : !has_socket6(ctx, inner, end);
}

static __always_inline void read_outer_ip(struct old_headers *old, const void *ip, int family)
{
	old->traffic_class = traffic_class(ip, family);
	if (family == AF_INET)
		old->source[0] = ((const struct iphdr *)ip)->daddr;
	else
		__builtin_memcpy(old->source, &((const struct ipv6hdr *)ip)->daddr, 16);
}

static __always_inline void set_own_address(struct old_headers *old)
{
	__builtin_memset(old->source, 0, sizeof(old->source));
	if (old->family == AF_INET)
		old->source[0] = config.own_address4;
	else
		for (int word = 0; word < 4; word++)
			old->source[word] = config.own_address6[word];
}

/* The source is the address under which the balancer knows this host, unless the other member is of another family. */
static __always_inline enum decap_reason read_old_headers(struct xdp_md *ctx, struct old_headers *old, __u32 outer_ip_size)
{
	void *data = (void *)(long)ctx->data, *end = frame_end(ctx);
	struct ethhdr *eth = data;
	struct udphdr *udp = data + sizeof(*eth) + outer_ip_size;
	struct gue_header *gue = (void *)(udp + 1);
	struct second_chance *chance = (void *)(gue + 1);
	struct ipv6hdr *ip = (void *)(eth + 1);
	int family;

	if ((void *)(ip + 1) > end || (void *)(chance + 1) > end)
		return DROP_INNER_MALFORMED;
	__builtin_memcpy(old->mac, eth->h_dest, 6);
	__builtin_memcpy(old->destination, chance->address, 16);
	old->family = chance->family == 4 ? AF_INET : AF_INET6;
	old->source_port = udp->source;
	old->inner_protocol = gue->protocol;
	family = ip->version == 4 ? AF_INET : AF_INET6;
	read_outer_ip(old, ip, family);
	if (is_martian(old->destination, old->family))
		return DROP_OTHER_MEMBER_MARTIAN;
	if (family != old->family)
		set_own_address(old);
	return old->source[0] | old->source[1] | old->source[2] | old->source[3] ? SENT_TO_OTHER_MEMBER : DROP_NO_OWN_ADDRESS;
}

static __always_inline enum decap_reason write_new_headers(struct xdp_md *ctx, const struct old_headers *old,
							   __u32 inner_bytes, int family)
{
	struct encap encap = {
		.source = old->source,
		.destination = old->destination,
		.inner_bytes = inner_bytes,
		.source_port = old->source_port,
		.destination_port = config.gue_port,
		.traffic_class = old->traffic_class,
		.inner_protocol = old->inner_protocol,
		.is_gue = 1,
	};
	struct ethhdr *eth = (void *)(long)ctx->data;
	void *ip = eth + 1, *behind = ip + ip_header_size(family);

	if (behind + gue_bytes(1, 0) > frame_end(ctx))
		return DROP_INNER_MALFORMED;
	__builtin_memcpy(eth->h_dest, old->mac, 6);
	for (int byte = 0; byte < 6; byte++)
		eth->h_source[byte] = config.mark[byte];
	eth->h_proto = family == AF_INET ? bpf_htons(ETH_P_IP) : bpf_htons(ETH_P_IPV6);
	write_outer_ip(ip, &encap, family);
	write_gue(behind, &encap, ip, family);
	return SENT_TO_OTHER_MEMBER;
}

/* Rebuilds an untagged frame that names another member, for that one. */
SLOW_PATH int redirect_to_other_member(struct xdp_md *ctx, __u32 outer_ip_size, __u32 inner_bytes)
{
	struct old_headers old = {};
	enum decap_reason why;
	int removed;

	if (outer_ip_size > sizeof(struct ipv6hdr))
		return DROP_INNER_MALFORMED;
	why = read_old_headers(ctx, &old, outer_ip_size);
	if (why != SENT_TO_OTHER_MEMBER)
		return why;
	removed = (int)outer_ip_size + (int)sizeof(struct second_chance) - ip_header_size(old.family);
	if (bpf_xdp_adjust_head(ctx, removed))
		return DROP_NO_ROOM;
	return old.family == AF_INET ? write_new_headers(ctx, &old, inner_bytes, AF_INET)
				     : write_new_headers(ctx, &old, inner_bytes, AF_INET6);
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
