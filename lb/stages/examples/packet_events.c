/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* A line for each packet: IPv4 through perf buffers, one a CPU; IPv6 through a ring buffer, one for all. */

#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>
#include <uapi/linux/in6.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>

struct packet4 {
	struct in_addr source;
	struct in_addr destination;
	u32 protocol;
	u32 bytes;
};

struct packet6 {
	struct in6_addr source;
	struct in6_addr destination;
	u32 protocol;
	u32 bytes;
};

BPF_PERF_OUTPUT(packets4);
BPF_RINGBUF_OUTPUT(packets6, 64);

int stage(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *ethernet = data;
	struct iphdr *ip4 = data + sizeof(*ethernet);
	struct ipv6hdr *ip6 = data + sizeof(*ethernet);

	if ((void *)(ethernet + 1) > end)
		return XDP_PASS;
	if (ethernet->h_proto == bpf_htons(ETH_P_IP) && (void *)(ip4 + 1) <= end) {
		struct packet4 packet = {
			.source = { .s_addr = ip4->saddr },
			.destination = { .s_addr = ip4->daddr },
			.protocol = ip4->protocol,
			.bytes = end - data,
		};

		packets4.perf_submit(ctx, &packet, sizeof(packet));
	}
	if (ethernet->h_proto == bpf_htons(ETH_P_IPV6) && (void *)(ip6 + 1) <= end) {
		struct packet6 packet = {
			.source = ip6->saddr,
			.destination = ip6->daddr,
			.protocol = ip6->nexthdr,
			.bytes = end - data,
		};

		packets6.ringbuf_output(&packet, sizeof(packet), 0);
	}
	return XDP_PASS;
}
