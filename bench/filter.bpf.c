// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * The filters of bench/expressions.py as one would write them by hand: what an expression accepts is dropped, all else
 * passes. They mean what tcpdump means: ports are those of packets that are no later fragment, and addresses those of
 * IP and ARP alike.
 *
 * Beside them stand the two programs that look at nothing.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define FRAGMENT_OFFSET bpf_htons(0x1fff)
#define TCP_SYN 0x02 /* in the byte of the flags, the 14th */
#define TCP_FLAGS 13

#define HOST bpf_htonl(0xc6130001) /* 198.19.0.1 */
#define NET bpf_htonl(0x0a000000)  /* 10.0.0.0/8 */
#define NET_MASK bpf_htonl(0xff000000)

struct frame {
	const struct ethhdr *eth;
	const void *end;
};

/* ARP for IPv4, RFC 826; <linux/if_arp.h> leaves the addresses out. Also the reverse one, RFC 903. */
struct arp4 {
	__be16 formats[4];
	__u8 sender_mac[ETH_ALEN];
	__u8 sender[4];
	__u8 target_mac[ETH_ALEN];
	__u8 target[4];
};

static __always_inline struct frame frame_of(const struct xdp_md *ctx)
{
	return (struct frame){ (void *)(long)ctx->data, (void *)(long)ctx->data_end };
}

static __always_inline int is_of_type(struct frame frame, __be16 type)
{
	return (const void *)(frame.eth + 1) <= frame.end && frame.eth->h_proto == type;
}

static __always_inline const struct iphdr *ip4_of(struct frame frame)
{
	const struct iphdr *ip = (const void *)(frame.eth + 1);

	return is_of_type(frame, bpf_htons(ETH_P_IP)) && (const void *)(ip + 1) <= frame.end ? ip : NULL;
}

static __always_inline const struct ipv6hdr *ip6_of(struct frame frame)
{
	const struct ipv6hdr *ip = (const void *)(frame.eth + 1);

	return is_of_type(frame, bpf_htons(ETH_P_IPV6)) && (const void *)(ip + 1) <= frame.end ? ip : NULL;
}

/* What stands behind the IP header of a packet of that protocol, `size` bytes at least. */
static __always_inline const void *behind_ip4(const struct iphdr *ip, __u8 protocol, __u32 size, const void *end)
{
	const void *behind = (const void *)ip + ip->ihl * 4;

	if (ip->protocol != protocol || ip->frag_off & FRAGMENT_OFFSET || behind + size > end)
		return NULL;
	return behind;
}

static __always_inline const void *behind_ip6(const struct ipv6hdr *ip, __u8 protocol, __u32 size, const void *end)
{
	const void *behind = ip + 1;

	return ip->nexthdr == protocol && behind + size <= end ? behind : NULL;
}

static __always_inline int verdict(int accepted)
{
	return accepted ? XDP_DROP : XDP_PASS;
}

SEC("xdp")
int bare_drop(struct xdp_md *ctx)
{
	return XDP_DROP;
}

SEC("xdp")
int bare_pass(struct xdp_md *ctx)
{
	return XDP_PASS;
}

static __always_inline int has_port(const struct udphdr *udp, __be16 port)
{
	return udp && (udp->source == port || udp->dest == port);
}

SEC("xdp")
int udp_53(struct xdp_md *ctx)
{
	struct frame frame = frame_of(ctx);
	const struct ipv6hdr *ip6;
	const struct iphdr *ip4;

	ip4 = ip4_of(frame);
	if (ip4)
		return verdict(has_port(behind_ip4(ip4, IPPROTO_UDP, 8, frame.end), bpf_htons(53)));
	ip6 = ip6_of(frame);
	return verdict(ip6 && has_port(behind_ip6(ip6, IPPROTO_UDP, 8, frame.end), bpf_htons(53)));
}

SEC("xdp")
int tcp_syn(struct xdp_md *ctx)
{
	struct frame frame = frame_of(ctx);
	const struct iphdr *ip = ip4_of(frame);
	const __u8 *tcp = ip ? behind_ip4(ip, IPPROTO_TCP, TCP_FLAGS + 1, frame.end) : NULL;

	return verdict(tcp && tcp[TCP_FLAGS] & TCP_SYN);
}

SEC("xdp")
int ip6_tcp_443(struct xdp_md *ctx)
{
	struct frame frame = frame_of(ctx);
	const struct ipv6hdr *ip = ip6_of(frame);
	const struct tcphdr *tcp = ip ? behind_ip6(ip, IPPROTO_TCP, 4, frame.end) : NULL;

	return verdict(tcp && tcp->dest == bpf_htons(443));
}

SEC("xdp")
int source_net(struct xdp_md *ctx)
{
	const struct iphdr *ip = ip4_of(frame_of(ctx));

	return verdict(ip && (ip->saddr & NET_MASK) == NET);
}

static __always_inline int has_arp_address(struct frame frame, __be32 address)
{
	const struct arp4 *arp = (const void *)(frame.eth + 1);

	if ((const void *)(arp + 1) > frame.end)
		return 0;
	return *(const __be32 *)arp->sender == address || *(const __be32 *)arp->target == address;
}

SEC("xdp")
int host(struct xdp_md *ctx)
{
	struct frame frame = frame_of(ctx);
	const struct iphdr *ip = ip4_of(frame);

	if (ip)
		return verdict(ip->saddr == HOST || ip->daddr == HOST);
	if (is_of_type(frame, bpf_htons(ETH_P_ARP)) || is_of_type(frame, bpf_htons(ETH_P_RARP)))
		return verdict(has_arp_address(frame, HOST));
	return XDP_PASS;
}

/* Packets of HTTP that carry something: the total length less both headers. */
SEC("xdp")
int http_payload(struct xdp_md *ctx)
{
	struct frame frame = frame_of(ctx);
	const struct iphdr *ip = ip4_of(frame);
	const struct tcphdr *tcp = ip ? behind_ip4(ip, IPPROTO_TCP, 13, frame.end) : NULL;

	if (!tcp || (tcp->source != bpf_htons(80) && tcp->dest != bpf_htons(80)))
		return XDP_PASS;
	return verdict(bpf_ntohs(ip->tot_len) - ip->ihl * 4 - (((const __u8 *)tcp)[12] >> 4) * 4 != 0);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
