// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * The end of a tunnel between a packet's making and its verdict, for BPF_PROG_TEST_RUN with `repeat`: as dataplane.bpf.c,
 * but each packet is put behind the outer headers in `encapsulation` before the program, inlined, takes them off. The
 * floor writes the same packet and headers, and only moves the start of the frame back.
 */

#include <linux/bpf.h>

__attribute__((always_inline)) int xdp_decap(struct xdp_md *ctx);

#include "../xdp/bpf/decap/decap.bpf.c"

#include "traffic.h"

/* The ethertype lies across the border of two words, so the frame's start is written in halves of them. */
#define ETHERNET_HALVES 7
#define OUTER_WORDS 13 /* of the longest: IPv6, UDP, GUE */

struct encapsulation {
	__u32 words; /* from the outer IP header to the inner one */
	__u16 ethernet[ETHERNET_HALVES];
	__u32 outer[OUTER_WORDS];
};

const volatile struct encapsulation encapsulation = { .words = sizeof(struct iphdr) / 4 };

static __always_inline int write_encapsulation(struct xdp_md *ctx, __u32 words)
{
	__u16 *ethernet;
	int i;

	if (bpf_xdp_adjust_head(ctx, -(int)(words * 4)))
		return -1;
	ethernet = (void *)(long)ctx->data;
	if ((void *)(ethernet + ETHERNET_HALVES) + words * 4 > (void *)(long)ctx->data_end)
		return -1;
#pragma unroll
	for (i = 0; i < ETHERNET_HALVES; i++)
		ethernet[i] = encapsulation.ethernet[i];
	write_words((void *)(ethernet + ETHERNET_HALVES), encapsulation.outer, words);
	return 0;
}

/* One of these is left once the constant is known. */
static __always_inline int encapsulate(struct xdp_md *ctx)
{
	switch (encapsulation.words) {
	case 5: /* IPv4 */
		return write_encapsulation(ctx, 5);
	case 8: /* IPv4, UDP, GUE */
		return write_encapsulation(ctx, 8);
	case 10: /* IPv6 */
		return write_encapsulation(ctx, 10);
	case 13: /* IPv6, UDP, GUE */
		return write_encapsulation(ctx, 13);
	}
	return -1;
}

static __always_inline int write_encapsulated(struct xdp_md *ctx)
{
	return write_request(ctx) || encapsulate(ctx);
}

SEC("xdp")
int encapsulated(struct xdp_md *ctx)
{
	return write_encapsulated(ctx) ? XDP_ABORTED : xdp_decap(ctx);
}

SEC("xdp")
int encapsulated_floor(struct xdp_md *ctx)
{
	if (write_encapsulated(ctx) || bpf_xdp_adjust_head(ctx, encapsulation.words * 4))
		return XDP_ABORTED;
	return XDP_PASS;
}
