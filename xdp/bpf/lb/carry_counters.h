/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Counters handed on from one program to the next while both have counted: user space runs this with what is to be added.
 * Each addition is one instruction, which no packet on this CPU can come in between of.
 */
#pragma once

#include "maps.h"

/* What the program counted that this one has replaced. */
struct carried {
	__u32 is_reason; /* `index` is of `reasons`, and `more` has packets only */
	__u32 index;
	struct counter more;
};

#define COUNTER_WORDS (sizeof(struct counter) / sizeof(__u64))

static __always_inline void add_words(__u64 *to, const __u64 *more)
{
	__u32 word;

#pragma unroll
	for (word = 0; word < COUNTER_WORDS; word++)
		__sync_fetch_and_add(&to[word], more[word]);
}

SEC("syscall")
int xdp_carry(struct carried *context)
{
	struct carried carried = *context;
	__u32 index = carried.index;
	struct counter *counter;
	__u64 *packets;

	if (carried.is_reason) {
		packets = bpf_map_lookup_elem(&reasons, &index);
		if (packets)
			__sync_fetch_and_add(packets, carried.more.packets);
		return packets ? 0 : -1;
	}
	counter = counter_of(index);
	if (counter)
		add_words((__u64 *)counter, (const __u64 *)&carried.more);
	return counter ? 0 : -1;
}
