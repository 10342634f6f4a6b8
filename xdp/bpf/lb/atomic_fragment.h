/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * IPv6 packets in one fragment, which is all of them (RFC 6946; RFC 8200, 4.5): translators and some resolvers send them.
 * They are no fragments to anybody, so their header goes, and what is left is the packet that it was.
 */
#pragma once

#include "packet.h"

#define IP6_MORE bpf_htons(0x0001)

static __always_inline int has_fragment_header(struct xdp_md *ctx)
{
	struct ipv6hdr *ip = (void *)(long)ctx->data + sizeof(struct ethhdr);

	return (void *)(ip + 1) <= frame_end(ctx) && ip->nexthdr == IPPROTO_FRAGMENT;
}

SLOW_PATH int is_atomic_fragment(struct xdp_md *ctx)
{
	struct ipv6hdr *ip = (void *)(long)ctx->data + sizeof(struct ethhdr);
	struct fragment_header *fragment = (void *)(ip + 1);

	if ((void *)(fragment + 1) > frame_end(ctx) || (void *)(ip + 1) + bounded_length(ip->payload_len) > frame_end(ctx))
		return 0;
	return ip->version == 6 && bpf_ntohs(ip->payload_len) >= sizeof(*fragment) &&
	       !(fragment->offset & (IP6_OFFSET | IP6_MORE));
}

/* Moves what is in front of it towards the end, the last word first. Nonzero: nothing has changed. */
SLOW_PATH int cut_fragment_header(struct xdp_md *ctx)
{
	__u16 *words = (void *)(long)ctx->data;
	struct ipv6hdr *ip = (void *)words + sizeof(struct ethhdr);
	struct fragment_header *fragment = (void *)(ip + 1);

	if ((void *)(fragment + 1) > frame_end(ctx))
		return -1;
	ip->nexthdr = fragment->next;
	ip->payload_len = bpf_htons(bpf_ntohs(ip->payload_len) - sizeof(*fragment));
#pragma unroll
	for (int at = (sizeof(struct ethhdr) + sizeof(*ip)) / 2 - 1; at >= 0; at--)
		words[at + sizeof(*fragment) / 2] = words[at];
	return bpf_xdp_adjust_head(ctx, sizeof(*fragment)); /* which no driver refuses */
}
