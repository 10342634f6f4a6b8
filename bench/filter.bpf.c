// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * The filters of bench/filter.py as one would write them by hand: what an expression accepts is dropped, all else
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

#define UNUSED __attribute__((unused))

#define FRAGMENT_OFFSET bpf_htons(0x1fff)
#define PORTS 4 /* bytes, as of TCP */
#define TCP_DATA_OFFSET 12
#define TCP_FLAGS 13
#define TCP_SYN 0x02

#define HOST bpf_htonl(0xc6130001) /* 198.19.0.1 */
#define NET bpf_htonl(0x0a000000)  /* 10.0.0.0/8 */
#define NET_MASK bpf_htonl(0xff000000)

#define ARP_SENDER 14 /* the IPv4 addresses in a packet of ARP (RFC 826), and of the reverse one (RFC 903) */
#define ARP_TARGET 24
#define ARP_SIZE 28

/* 0 for a frame too short to have one. In one load: struct ethhdr is packed, and clang would take it byte by byte. */
static __always_inline __be16 ethertype(const struct ethhdr *eth, const void *end)
{
	return (const void *)(eth + 1) <= end ? ((const __be16 *)eth)[6] : 0;
}

/* Of a packet of that protocol: what stands behind the header. NULL for others and for later fragments. */
static __always_inline const void *behind_ip4(const struct iphdr *ip, const void *end, __u8 protocol)
{
	if ((const void *)(ip + 1) > end || ip->protocol != protocol || ip->frag_off & FRAGMENT_OFFSET)
		return NULL;
	return (const void *)ip + ip->ihl * 4;
}

static __always_inline const void *behind_ip6(const struct ipv6hdr *ip, const void *end, __u8 protocol)
{
	return (const void *)(ip + 1) <= end && ip->nexthdr == protocol ? ip + 1 : NULL;
}

static __always_inline int has_port(const struct udphdr *udp, const void *end, __be16 port)
{
	if (!udp || (const void *)udp + PORTS > end)
		return 0;
	return udp->source == port || udp->dest == port;
}

SEC("xdp")
int bare_drop(struct xdp_md *ctx UNUSED)
{
	return XDP_DROP;
}

SEC("xdp")
int bare_pass(struct xdp_md *ctx UNUSED)
{
	return XDP_PASS;
}

static __always_inline int is_udp_53(const struct ethhdr *eth, const void *packet, const void *end)
{
	__be16 type = ethertype(eth, end);
	const struct udphdr *udp = NULL;

	if (type == bpf_htons(ETH_P_IP))
		udp = behind_ip4(packet, end, IPPROTO_UDP);
	else if (type == bpf_htons(ETH_P_IPV6))
		udp = behind_ip6(packet, end, IPPROTO_UDP);
	return has_port(udp, end, bpf_htons(53));
}

static __always_inline int is_tcp_syn(const struct ethhdr *eth, const void *packet, const void *end)
{
	const __u8 *tcp;

	if (ethertype(eth, end) != bpf_htons(ETH_P_IP))
		return 0;
	tcp = behind_ip4(packet, end, IPPROTO_TCP);
	return tcp && (const void *)(tcp + TCP_FLAGS + 1) <= end && tcp[TCP_FLAGS] & TCP_SYN;
}

static __always_inline int is_ip6_tcp_443(const struct ethhdr *eth, const void *packet, const void *end)
{
	const struct tcphdr *tcp;

	if (ethertype(eth, end) != bpf_htons(ETH_P_IPV6))
		return 0;
	tcp = behind_ip6(packet, end, IPPROTO_TCP);
	return tcp && (const void *)tcp + PORTS <= end && tcp->dest == bpf_htons(443);
}

static __always_inline int is_source_net(const struct ethhdr *eth, const void *packet, const void *end)
{
	const struct iphdr *ip = packet;

	if (ethertype(eth, end) != bpf_htons(ETH_P_IP) || (const void *)(ip + 1) > end)
		return 0;
	return (ip->saddr & NET_MASK) == NET;
}

static __always_inline int is_host(const struct ethhdr *eth, const void *packet, const void *end)
{
	const struct iphdr *ip = packet;

	switch (ethertype(eth, end)) {
	case bpf_htons(ETH_P_IP):
		return (const void *)(ip + 1) <= end && (ip->saddr == HOST || ip->daddr == HOST);
	case bpf_htons(ETH_P_ARP):
	case bpf_htons(ETH_P_RARP):
		return packet + ARP_SIZE <= end &&
		       (*(const __be32 *)(packet + ARP_SENDER) == HOST || *(const __be32 *)(packet + ARP_TARGET) == HOST);
	}
	return 0;
}

/* The packet holds more than its headers. */
static __always_inline int is_http_payload(const struct ethhdr *eth, const void *packet, const void *end)
{
	const struct iphdr *ip = packet;
	const struct tcphdr *tcp;

	if (ethertype(eth, end) != bpf_htons(ETH_P_IP))
		return 0;
	tcp = behind_ip4(packet, end, IPPROTO_TCP);
	if (!tcp || (const void *)tcp + TCP_DATA_OFFSET + 1 > end)
		return 0;
	if (tcp->source != bpf_htons(80) && tcp->dest != bpf_htons(80))
		return 0;
	return bpf_ntohs(ip->tot_len) != ip->ihl * 4 + (((const __u8 *)tcp)[TCP_DATA_OFFSET] >> 4) * 4;
}

#define FILTER(name)                                                                                                   \
	SEC("xdp")                                                                                                      \
	int name(struct xdp_md *ctx)                                                                                    \
	{                                                                                                               \
		const void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;                         \
                                                                                                                        \
		return is_##name(data, data + sizeof(struct ethhdr), end) ? XDP_DROP : XDP_PASS;                        \
	}

FILTER(udp_53)
FILTER(tcp_syn)
FILTER(ip6_tcp_443)
FILTER(source_net)
FILTER(host)
FILTER(http_payload)

char LICENSE[] SEC("license") = "Dual BSD/GPL";
