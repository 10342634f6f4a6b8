/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Services whose VIP is a prefix, or that have a range of ports. */
#pragma once

#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>

#define MAX_PREFIXES (1 << 20) /* of a trie, which takes memory for those that it has */

/* VIP prefixes and port ranges: the longest prefix of the address, and then, under it, of the port. */
struct network_key4 {
	__u32 prefix_length;
	__be32 address;
};

struct network_key6 {
	__u32 prefix_length;
	__be32 address[4];
};

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PREFIXES);
	__type(key, struct network_key4);
	__type(value, __u32);
} networks4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PREFIXES);
	__type(key, struct network_key6);
	__type(value, __u32);
} networks6 SEC(".maps");

struct range_key4 {
	__u32 prefix_length;
	__be32 network;
	__u8 network_length;
	__u8 protocol;
	__be16 port;
};

struct range_key6 {
	__u32 prefix_length;
	__be32 network[4];
	__u8 network_length;
	__u8 protocol;
	__be16 port;
};

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PREFIXES);
	__type(key, struct range_key4);
	__type(value, __u32);
} ranges4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PREFIXES);
	__type(key, struct range_key6);
	__type(value, __u32);
} ranges6 SEC(".maps");
