/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* How many packets arrive with each TTL or hop limit, and so from how far away. */

#include <uapi/linux/if_ether.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>

BPF_HISTOGRAM(ttls, int, 256);
BPF_HISTOGRAM(hop_limits, int, 256);

int stage(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *ethernet = data;
	struct iphdr *ip4 = data + sizeof(*ethernet);
	struct ipv6hdr *ip6 = data + sizeof(*ethernet);

	if ((void *)(ethernet + 1) > end)
		return XDP_PASS;
	if (ethernet->h_proto == bpf_htons(ETH_P_IP) && (void *)(ip4 + 1) <= end)
		ttls.atomic_increment(ip4->ttl);
	if (ethernet->h_proto == bpf_htons(ETH_P_IPV6) && (void *)(ip6 + 1) <= end)
		hop_limits.atomic_increment(ip6->hop_limit);
	return XDP_PASS;
}
