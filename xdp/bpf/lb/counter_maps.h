/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What is counted: packets by reason and by member, and the SYNs by which repetitions are known. */
#pragma once

#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>

/*
 * Why a packet left the way it did. What is ANSWERED goes back where it came from; everything from DROP_MALFORMED on is
 * dropped. What is NOTED is counted beside the packet's own reason.
 */
enum reason {
	GO_ON,
	FORWARDED,
	ANSWERED_ECHO,
	ANSWERED_TOO_BIG,
	ANSWERED_TTL_EXPIRED,
	PASS_NOT_IP,
	PASS_NOT_TCP_OR_UDP,
	PASS_NOT_A_SERVICE,
	PASS_MALFORMED,
	PASS_FRAGMENT,
	PASS_IPV6_EXTENSION,
	PASS_ICMP,
	PASS_ICMP_NO_FLOW,
	PASS_GROUP_MAC,
	DROP_MALFORMED,
	DROP_FRAGMENT,
	DROP_IP_OPTIONS,
	DROP_MARTIAN_SOURCE,
	DROP_TTL_EXPIRED,
	DROP_NO_BACKEND,
	DROP_NO_NEIGHBOUR,
	DROP_NAT_NO_FLOW,
	DROP_NAT_NO_PORT,
	DROP_SOURCE_NOT_ALLOWED,
	DROP_SYN_LIMIT,
	DROP_SYN_LIMIT_OF_SOURCE,
	DROP_TOO_BIG, /* for the tunnel, and the sender has been told often enough this second */
	DROP_NO_HEADROOM,
	NOTED_SYN_NOT_RECORDED, /* the flow table takes so many a second: the connection may stray at the next change */
	REASON_COUNT,
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, REASON_COUNT);
	__type(key, __u32);
	__type(value, __u64);
} reasons SEC(".maps");

static __always_inline void count_reason(__u32 why)
{
	__u64 *packets = bpf_map_lookup_elem(&reasons, &why);

	if (packets)
		*packets += 1;
}

struct counter {
	__u64 packets;
	__u64 bytes;
	__u64 reply_packets;
	__u64 reply_bytes;
	__u64 connections;
	__u64 repeated_syns;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct counter);
} counters SEC(".maps");

static __always_inline struct counter *counter_of(__u32 index)
{
	return bpf_map_lookup_elem(&counters, &index);
}

#define SIGNATURES 16

/* SYNs that a CPU has sent on: a cache line of them. */
struct seen_syns {
	__u32 signatures[SIGNATURES];
};

#define SEEN_BITS 11 /* 128 KiB a CPU: of 10,000 SYNs a second, three in four are still there after that second */

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1 << SEEN_BITS);
	__type(key, __u32);
	__type(value, struct seen_syns);
} seen_syns SEC(".maps");
