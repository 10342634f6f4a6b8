/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What the decapsulating programs have in common: configuration, maps, and the start of a frame. */
#pragma once

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include "decap_types.h"
#include "ip.h"
#include "tunnel.h"
#include "verifier.h"

const volatile struct decap_config config = {
	.gue_port = bpf_htons(GUE_PORT),
	.several_destinations = 1,
};

const volatile struct decap_names names = {};

/* Inner destinations, and outer sources that may send. The sizes here are the least. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct prefix4);
	__type(value, __u8);
} destinations4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct prefix6);
	__type(value, __u8);
} destinations6 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct prefix4);
	__type(value, __u8);
} sources4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct prefix6);
	__type(value, __u8);
} sources6 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, DECAP_REASON_COUNT);
	__type(key, __u32);
	__type(value, __u64);
} reasons SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, TUNNEL_KIND_COUNT);
	__type(key, __u32);
	__type(value, struct decapsulated);
} tunnels SEC(".maps");

static __always_inline void count_reason(__u32 why)
{
	__u64 *packets = bpf_map_lookup_elem(&reasons, &why);

	if (packets)
		*packets += 1;
}

/* The verifier knows what is in `only`, and drops one of the two ways. */
static __always_inline int holds4(const volatile struct only4 *only, void *prefixes, __be32 address)
{
	struct prefix4 key = { .length = 32, .address = address };

	if (only->mask)
		return (address & only->mask) == only->network;
	return bpf_map_lookup_elem(prefixes, &key) != NULL;
}

static __always_inline int is_within6(const volatile struct only6 *only, const __be32 *words)
{
	return (words[0] & only->mask[0]) == only->network[0] && (words[1] & only->mask[1]) == only->network[1] &&
	       (words[2] & only->mask[2]) == only->network[2] && (words[3] & only->mask[3]) == only->network[3];
}

static __always_inline int holds6(const volatile struct only6 *only, void *prefixes, const struct in6_addr *address)
{
	struct prefix6 key = { .length = 128 };

	if (only->mask[0])
		return is_within6(only, address->in6_u.u6_addr32);
	__builtin_memcpy(key.address, address, 16);
	return bpf_map_lookup_elem(prefixes, &key) != NULL;
}
