/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* A lower maximum segment size in a SYN (RFC 9293, section 3.2), for ways back to the client that hold less than it thinks. */
#pragma once

#include "checksum.h"
#include "config.h"
#include "packet.h"

#define TCP_OPTION_END 0
#define TCP_OPTION_NOP 1
#define TCP_OPTION_MSS 2
#define TCP_OPTIONS_MOST 40

/* A value at an odd offset is in both bytes' other halves of the sum: it counts with its bytes swapped. */
static __always_inline __u16 as_summed(__u16 value, __u32 offset)
{
	return offset & 1 ? __builtin_bswap16(value) : value;
}

static __always_inline void lower_mss(struct tcphdr *tcp, __u8 *option, __u32 offset, __u16 mss)
{
	__u16 old = option[2] << 8 | option[3];
	__u64 difference;

	if (old <= mss)
		return;
	option[2] = mss >> 8;
	option[3] = mss & 0xff;
	difference = replaced16(0, as_summed(bpf_htons(old), offset), as_summed(bpf_htons(mss), offset));
	tcp->check = updated_checksum(tcp->check, difference);
}

/* Where the search for the option has come to. */
struct mss_search {
	struct xdp_md *ctx;
	__u32 at; /* behind the fixed header */
	__u16 mss;
	__u16 family;
};

/* One option; returns 1 when there is nothing more to look for. For bpf_loop(), so that the verifier sees it once. */
static long look_at_option(__u32 index, struct mss_search *search)
{
	struct tcphdr *tcp = (void *)(long)search->ctx->data + sizeof(struct ethhdr) +
			     (search->family == AF_INET ? sizeof(struct iphdr) : sizeof(struct ipv6hdr));
	void *end = frame_end(search->ctx);
	__u32 at = search->at & 63;
	__u8 *option = (void *)(tcp + 1) + at;

	(void)index;
	/* What does not fit into the header is payload. */
	if ((void *)(tcp + 1) > end || (void *)(option + 4) > end || at + sizeof(*tcp) + 4 > tcp->doff * 4u)
		return 1;
	if (option[0] == TCP_OPTION_MSS && option[1] == 4) {
		lower_mss(tcp, option, at, search->mss);
		return 1;
	}
	if (option[0] == TCP_OPTION_END || (option[0] != TCP_OPTION_NOP && option[1] < 2))
		return 1;
	search->at = at + (option[0] == TCP_OPTION_NOP ? 1 : option[1]);
	return search->at >= TCP_OPTIONS_MOST;
}

/* The IP header has no options; a SYN without the MSS option stays without it. */
static __always_inline void clamp_mss(struct xdp_md *ctx, __u16 mss, int family)
{
	/* Linux 6.1 verifies the first round only, and leaves out what it takes for dead: it must not know where that starts. */
	struct mss_search search = { .ctx = ctx, .at = control.nought, .mss = mss, .family = family };

	bpf_loop(TCP_OPTIONS_MOST, look_at_option, &search, 0);
}
