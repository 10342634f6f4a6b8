/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The backends of services, and what leads from a flow to one of them: ring, or server ID. */
#pragma once

#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>
#include "slot_word.h"

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct slot_words);
} rings SEC(".maps");

/* Where a frame goes. */
struct hop {
	__u32 ifindex;
	__u8 destination[6];
	__u8 source[6];
};

enum member_flag {
	MEMBER_ALIVE = 1,
	MEMBER_RESOLVED = 2,
	MEMBER_IP6 = 4,
};

/* A backend within one service. One cache line. */
struct member {
	__be32 address[4];
	__be32 source[4]; /* nat: the balancer's address towards this backend; tunnels: the outer source */
	struct hop hop;
	__u32 uid; /* never used twice, so that an entry about an earlier member in this place is not taken for it */
	__u32 index; /* its own in `members` and `counters` */
	__be16 port; /* 0: the port the client asked for */
	__u16 flags;
	__u16 mtu;	  /* of the way there */
	__u8 source_bits; /* tunnels: so many low bits of `source` are the flow's, modulo 64 */
	__u8 zero;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct member);
} members SEC(".maps");

struct quic_key {
	__u32 service;
	__u8 config; /* rotation codepoint */
	__u8 zero[3];
	__u8 server_id[16]; /* padded with zeros */
};

/* Server ID -> member, local to the service. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, struct quic_key);
	__type(value, __u32);
} quic_members SEC(".maps");
