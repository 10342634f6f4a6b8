/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The constants that user space may set before the program is loaded, and the clock. */
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "types.h"

/* Ports below 32768 are outside the kernel's default ip_local_port_range: nat never meets the host's own connections. */
const volatile struct config config = {
	.hash_seed = 0x9e3779b97f4a7c15,
	.refresh_ns = 1000000000,
	.nat_opening_timeout_s = 60,
	.nat_closed_timeout_s = 60,
	.udp_timeout_s = 120,
	.recorded_syns_per_s = 10000,
	.too_big_per_s = 1000,
	.nat_port_first = 1024,
	.nat_port_count = 32768 - 1024,
};

const volatile struct names names = {};

volatile struct control control SEC(".data") = {};

static __always_inline __u64 now_ns(void)
{
	return config.test_clock ? control.test_clock_ns : bpf_ktime_get_coarse_ns();
}

/*
 * Maps are being handed on from one program to the next: a flow that is not there may come yet, its packets are sent again.
 * Nor does one that has ended tell anything, where a later connection between the same ports may have come meanwhile.
 */
static __always_inline int may_be_missing(void)
{
	return control.whole_ns && now_ns() < control.whole_ns;
}

static __always_inline int older_than(__u64 seen_ns, __u64 now, __u32 timeout_s)
{
	return now > seen_ns + timeout_s * 1000000000ull;
}
