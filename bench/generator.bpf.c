// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * The traffic generator: BPF_PROG_TEST_RUN with BPF_F_TEST_XDP_LIVE_FRAMES runs it once for each frame, and the frame
 * leaves by the interface. Frames are recycled as their last reader left them, so each is written in full.
 *
 * The checksums in the template are those of source port 0 and of an address whose last word is 0.
 */
#include "traffic.h"

#define IP4_CHECKSUM 5 /* in halves of words from the IP header on */
#define IP4_TCP_CHECKSUM 18
#define IP4_UDP_CHECKSUM 13
#define IP6_TCP_CHECKSUM 28
#define IP6_UDP_CHECKSUM 23

struct way {
	__u32 ifindex; /* that the frames leave by */
	__u32 udp;
	__u64 made;
};

volatile struct way way SEC(".data") = {};

/* RFC 1624: what was counted as zero is now `added`, the sum of some 16-bit words. */
static __always_inline void complete(__sum16 *checksum, __u32 added)
{
	__u32 sum = (__u16)~*checksum + added;

	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	*checksum = (__u16)~sum ?: 0xffff;
}

static __always_inline void complete_checksums4(__u32 *ip)
{
	__sum16 *halves = (void *)ip;
	__u32 address = (ip[IP4_SOURCE] & 0xffff) + (ip[IP4_SOURCE] >> 16);

	complete(halves + IP4_CHECKSUM, address);
	complete(halves + (way.udp ? IP4_UDP_CHECKSUM : IP4_TCP_CHECKSUM), address + *(__be16 *)(ip + IP4_PORTS));
}

static __always_inline void complete_checksums6(__u32 *ip)
{
	__sum16 *halves = (void *)ip;
	__u32 address = (ip[IP6_SOURCE_END] & 0xffff) + (ip[IP6_SOURCE_END] >> 16);

	complete(halves + (way.udp ? IP6_UDP_CHECKSUM : IP6_TCP_CHECKSUM), address + *(__be16 *)(ip + IP6_PORTS));
}

static __always_inline int complete_checksums(struct xdp_md *ctx)
{
	__u32 *ip = (void *)(long)ctx->data + sizeof(struct ethhdr);
	void *end = (void *)(long)ctx->data_end;

	if (traffic.family == AF_INET && (void *)(ip + IP4_WORDS) <= end)
		complete_checksums4(ip);
	else if (traffic.family != AF_INET && (void *)(ip + IP6_WORDS) <= end)
		complete_checksums6(ip);
	else
		return -1;
	return 0;
}

SEC("xdp")
int generate(struct xdp_md *ctx)
{
	if (write_request(ctx) || complete_checksums(ctx))
		return XDP_ABORTED;
	way.made++;
	return bpf_redirect(way.ifindex, 0);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
