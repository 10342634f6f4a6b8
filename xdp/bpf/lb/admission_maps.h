/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Which clients a service takes, into which of its member sets, and how many connections they open. */
#pragma once

#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>
#include "prefix_maps.h"

/* Which service a client of service `service` has. */
struct source_key4 {
	__u32 prefix_length;
	__u32 service;
	__be32 address;
};

struct source_key6 {
	__u32 prefix_length;
	__u32 service;
	__be32 address[4];
};

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PREFIXES);
	__type(key, struct source_key4);
	__type(value, __u32);
} sources4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PREFIXES);
	__type(key, struct source_key6);
	__type(value, __u32);
} sources6 SEC(".maps");

/* Per service, and per service and client prefix: when the next connection opening would be in time. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} syn_times SEC(".maps");

/* Connection openings of one client prefix: 24 bits of IPv4, 64 of IPv6. */
struct source_prefix {
	__u32 service;
	__be32 address[2];
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, struct source_prefix);
	__type(value, __u64);
} source_syn_times SEC(".maps");
