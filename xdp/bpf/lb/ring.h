/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* From a flow to its slot word, and from a slot word's member number to the member. */
#pragma once

#include "config.h"
#include "maps.h"
#include "packet.h"

/* Finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA'14; constants by D. Stafford): every input bit reaches every output bit. */
static __always_inline __u64 mix(__u64 x)
{
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
	x = (x ^ x >> 27) * 0x94d049bb133111eb;
	return x ^ x >> 31;
}

/* The client's address, port and protocol: the same on every node with the same seed. */
static __always_inline __u64 flow_hash(const struct flow_key *flow, int family)
{
	__u64 ports = (__u64)flow->protocol << 48 | (__u64)flow->source_port << 32;
	__u64 hash;

	if (family == AF_INET)
		return mix(config.hash_seed ^ (ports | flow->address[0]));
	hash = mix(config.hash_seed ^ (ports | flow->address[0]));
	return mix(hash ^ ((__u64)flow->address[1] << 32) ^ flow->address[2] ^ mix(hash + flow->address[3]));
}

/* hash * size >> 32 spreads evenly over any size, needs no division, and keeps its bounds in the verifier's eyes. */
static __always_inline __u32 slot_word(const struct service *service, __u64 hash)
{
	__u32 slot = service->ring_base + ((hash >> 32) * service->ring_size >> 32);
	__u32 line = slot / SLOT_WORDS;
	struct slot_words *words = bpf_map_lookup_elem(&rings, &line);

	return words ? words->words[slot % SLOT_WORDS] : 0;
}

/* Place 0 of a service's block is never alive: number 0 stands for "none". */
static __always_inline struct member *live_member(const struct service *service, __u32 number)
{
	__u32 index = service->member_base + number;
	struct member *member = bpf_map_lookup_elem(&members, &index);

	return member && member->flags & MEMBER_ALIVE ? member : NULL;
}

/* The member that an entry made earlier is about: none, if it died or its place has been given to another. */
static __always_inline struct member *recorded_member(const struct service *service, __u32 number, __u32 uid)
{
	struct member *member = live_member(service, number);

	return member && member->uid == uid ? member : NULL;
}
