/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What user space sets, before the program is loaded or while it runs, and the clock. */
#pragma once

#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>

#define VIP_FILTER_BITS 12 /* 512 bytes: of 100 VIPs, one client in 40 is looked up in vain */

/* What is fixed when the program is loaded; the verifier drops the branches that are off. */
struct config {
	__u64 hash_seed; /* the same on every node */
	__u64 refresh_ns;
	__u32 nat_opening_timeout_s;
	__u32 nat_closed_timeout_s;
	__u32 udp_timeout_s;
	__u32 recorded_syns_per_s; /* by each CPU */
	__u32 icmp_errors_per_s;   /* of each kind, by each CPU */
	__u16 nat_port_first;
	__u16 nat_port_count;
	__u8 test_clock;
	__u8 zero[7];
};

/* What user space changes while the program runs. */
struct control {
	__u64 generation;	 /* of the stored state that is applied in full; 0: unknown */
	__u64 test_clock_ns;	 /* the time, when config.test_clock is set */
	__u32 wide_services;	 /* how many services have more than one port or address */
	__u32 echo_addresses;	 /* how many addresses have their echo requests answered */
	__u32 epoch;		 /* of services4 and services6: another one after each change; never 0 */
	__u32 stages;		 /* enum stages_in_use */
	__u64 nought;		 /* always 0, unknown to the verifier */
	__u64 vip_filter[1 << (VIP_FILTER_BITS - 6)]; /* a bit for each hash of an address that may be a VIP's */
	__u64 whole_ns;		 /* until then, flows of the program before may be missing in this one's tables; 0: none are */
};

/* Ports below 32768 are outside the kernel's default ip_local_port_range: nat never meets the host's own connections. */
const volatile struct config config = {
	.hash_seed = 0x9e3779b97f4a7c15,
	.refresh_ns = 1000000000,
	.nat_opening_timeout_s = 60,
	.nat_closed_timeout_s = 60,
	.udp_timeout_s = 120,
	.recorded_syns_per_s = 10000,
	.icmp_errors_per_s = 1000,
	.nat_port_first = 1024,
	.nat_port_count = 32768 - 1024,
};

volatile struct control control SEC(".data") = {};

static __always_inline __u64 now_ns(void)
{
	return config.test_clock ? control.test_clock_ns : bpf_ktime_get_coarse_ns();
}

/*
 * Maps are being handed on from one program to the next: a flow that is not there may come yet, its packets are sent again.
 * Nor does one that has ended tell anything, where a later connection between the same ports may have come meanwhile.
 */
static __always_inline int flow_may_be_missing(void)
{
	return control.whole_ns && now_ns() < control.whole_ns;
}

static __always_inline int older_than(__u64 seen_ns, __u64 now, __u32 timeout_s)
{
	return now > seen_ns + timeout_s * 1000000000ull;
}
