/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Services, and which of them has an address and port. */
#pragma once

#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>

enum mode {
	MODE_NAT,
	MODE_DR,
	MODE_IPIP,
	MODE_GUE,
};

/* What a service asks for beyond the plain path; the plain path tests for all of them at once. */
enum service_option {
	OPTION_SOURCES = 1,	  /* the map `sources` says which service a client has, this one or another */
	OPTION_ONLY_SOURCES = 2,  /* a client that is not in `sources` has none */
	OPTION_SYN_LIMIT = 4,
	OPTION_SYN_LIMIT_OF_SOURCE = 8,
	OPTION_MSS = 16,
	OPTION_AFFINITY = 32,	  /* all flows of a client address go together */
	OPTION_QUIC = 64,	  /* server IDs in connection IDs */
	OPTION_OUTER_CHECKSUM = 128,
	OPTION_SECOND_CHANCE = 256,
};

#define NO_SERVICE (~0u) /* the value of an address, under protocol ICMP, whose echo requests are answered */

#define SET_NAME_SIZE 40
#define QUIC_CONFIGS 8

/* Two cache lines: what the plain path reads is in the first. */
struct service {
	__u32 ring_base; /* in words */
	__u32 ring_size;
	__u32 member_base;
	__u32 member_count; /* size of the block, not of the set: for the allocator in user space */
	__u64 changed_ns;   /* when the ring last changed, CLOCK_MONOTONIC */
	__u32 flow_timeout_s;
	__u32 affinity_s;
	__u16 options; /* enum service_option */
	__u8 mode;     /* enum mode */
	__u8 in_use;
	__u16 mss;	 /* what the MSS option of SYNs is at most */
	__be16 gue_port; /* the UDP destination port */
	__u32 syn_limit; /* a second */
	__u32 syn_limit_of_source;
	__u32 number;	     /* of the service */
	__u8 zero[4];
	__u8 quic_lengths[QUIC_CONFIGS]; /* config rotation codepoint -> length of its server IDs, 0: none */
	__be32 address[4];		 /* the VIP */
	__be16 first_port;
	__be16 last_port;
	__u8 prefix_length;
	__u8 family; /* AF_INET or AF_INET6 */
	__u8 protocol;
	__u8 zero1;
	char set[SET_NAME_SIZE]; /* which set of members of this VIP; empty: the VIP's own */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct service);
} services SEC(".maps");

/* Address and port of a service -> its number. */
struct service_key4 {
	__be32 address;
	__be16 port; /* 0: every port that has no entry of its own */
	__u8 protocol;
	__u8 zero;
};

struct service_key6 {
	__be32 address[4];
	__be16 port;
	__u8 protocol;
	__u8 zero;
};

/* The service with just this address and port; VIP prefixes and port ranges are in the four maps below. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, struct service_key4);
	__type(value, __u32);
} services4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, struct service_key6);
	__type(value, __u32);
} services6 SEC(".maps");

/* What a CPU found last in services4 or services6. */
struct known_service4 {
	__u64 key; /* struct service_key4 */
	__u32 number;
	__u32 epoch;
};

struct known_service6 {
	__be32 address[4];
	__u32 ends; /* port and protocol, as in the key */
	__u32 number;
	__u32 epoch;
	__u32 zero;
};

#define KNOWN_BITS 8

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1 << KNOWN_BITS);
	__type(key, __u32);
	__type(value, struct known_service4);
} known4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1 << KNOWN_BITS);
	__type(key, __u32);
	__type(value, struct known_service6);
} known6 SEC(".maps");
