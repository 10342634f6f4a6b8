/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Internet checksums (RFC 1071), for the most part updated incrementally (RFC 1624): a difference gathers what left and
 * what came, in one's complement, and is folded into each checksum that covers it.
 */
#pragma once

#include <linux/types.h>
#include <bpf/bpf_helpers.h>

static __always_inline __u64 sum_words(__u64 sum, const __be32 *words, int count)
{
	for (int i = 0; i < count; i++)
		sum += words[i];
	return sum;
}

static __always_inline __u64 replaced(__u64 difference, __u32 old, __u32 new)
{
	return difference + (__u32)~old + new;
}

/* A lone 16-bit word, at an even offset, given as its bytes lie in memory. */
static __always_inline __u64 replaced16(__u64 difference, __u16 old, __u16 new)
{
	return difference + (__u16)~old + new;
}

static __always_inline __u16 fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

static __always_inline __u16 updated_checksum(__u16 check, __u64 difference)
{
	return ~fold((__u16)~check + difference);
}

/* RFC 768: zero means that there is none, so a sum of zero is sent as all ones. */
static __always_inline __u16 updated_udp_checksum(__u16 check, __u64 difference)
{
	__u16 updated = updated_checksum(check, difference);

	if (!check)
		return 0;
	return updated ? updated : 0xffff;
}
