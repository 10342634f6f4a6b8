/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Who sends most: packets and bytes of each source address. */

#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>
#include <uapi/linux/in6.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>

struct traffic {
	u64 packets;
	u64 bytes;
};

/* The addresses that have been silent longest make room for new ones. */
BPF_TABLE("lru_hash", struct in_addr, struct traffic, sources4, 16384);
BPF_TABLE("lru_hash", struct in6_addr, struct traffic, sources6, 16384);

static void count(struct traffic *traffic, u64 bytes)
{
	if (!traffic)
		return;
	lock_xadd(&traffic->packets, 1);
	lock_xadd(&traffic->bytes, bytes);
}

int stage(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *ethernet = data;
	struct iphdr *ip4 = data + sizeof(*ethernet);
	struct ipv6hdr *ip6 = data + sizeof(*ethernet);
	struct traffic none = {};

	if ((void *)(ethernet + 1) > end)
		return XDP_PASS;
	if (ethernet->h_proto == bpf_htons(ETH_P_IP) && (void *)(ip4 + 1) <= end) {
		struct in_addr source = { .s_addr = ip4->saddr };

		count(sources4.lookup_or_try_init(&source, &none), end - data);
	}
	if (ethernet->h_proto == bpf_htons(ETH_P_IPV6) && (void *)(ip6 + 1) <= end) {
		struct in6_addr source = ip6->saddr;

		count(sources6.lookup_or_try_init(&source, &none), end - data);
	}
	return XDP_PASS;
}
