/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The services that a CPU found last. To call a hash map's helper costs a third of a packet in mode dr; an array is looked
 * up in line. What is known holds as long as user space has not raised control.epoch, as it does after each change of
 * services4 and services6.
 */
#pragma once

#include "config.h"
#include "maps.h"
#include "packet.h"
#include "service.h"

/* Fibonacci hashing (Knuth, TAOCP, 6.4). */
static __always_inline __u32 cache_index(const __be32 *address, __u32 ends, int family)
{
	__u32 word = family == AF_INET ? address[0] : address[1] ^ address[3];

	return ((__u64)ends << 32 | word) * 0x9e3779b97f4a7c15 >> (64 - KNOWN_BITS);
}

static __always_inline void cache_service4(const __be32 *address, __u32 ends, __u32 number, __u32 epoch)
{
	__u32 place = cache_index(address, ends, AF_INET);
	struct known_service4 *known = bpf_map_lookup_elem(&known4, &place);

	if (known)
		*known = (struct known_service4){ address[0] | (__u64)ends << 32, number, epoch };
}

static __always_inline void cache_service6(const __be32 *address, __u32 ends, __u32 number, __u32 epoch)
{
	__u32 place = cache_index(address, ends, AF_INET6);
	struct known_service6 *known = bpf_map_lookup_elem(&known6, &place);

	if (!known)
		return;
	copy_address(known->address, address, AF_INET6);
	known->ends = ends;
	known->number = number;
	known->epoch = epoch;
}

/* What find_service() finds, by its number. A VIP prefix or a range of ports would have too many keys to know them. */
SLOW_PATH __u32 look_up_and_cache(const struct address *address, __u16 port, __u8 protocol, int family)
{
	__u32 epoch = control.epoch, *number;

	if (!address)
		return NO_SERVICE;
	number = family == AF_INET ? exact_service(address->words, port, protocol, AF_INET)
				   : exact_service(address->words, port, protocol, AF_INET6);
	if (!number)
		return control.wide_services ? wide_service(address, port, protocol, family) : NO_SERVICE;
	if (family == AF_INET)
		cache_service4(address->words, key_word(port, protocol), *number, epoch);
	else
		cache_service6(address->words, key_word(port, protocol), *number, epoch);
	return *number;
}

static __always_inline __u32 cached_service(const __be32 *address, __u32 ends, int family)
{
	__u32 place = cache_index(address, ends, family);

	if (family == AF_INET) {
		struct known_service4 *known = bpf_map_lookup_elem(&known4, &place);

		if (known && known->key == (address[0] | (__u64)ends << 32) && known->epoch == control.epoch)
			return known->number;
	} else {
		struct known_service6 *known = bpf_map_lookup_elem(&known6, &place);

		if (known && same_address(known->address, address, AF_INET6) && known->ends == ends &&
		    known->epoch == control.epoch)
			return known->number;
	}
	return NO_SERVICE;
}

/* find_service(), for the plain path. */
static __always_inline struct service *find_service_cached(const __be32 *address, __be16 port, __u8 protocol, int family)
{
	__u32 number = cached_service(address, key_word(port, protocol), family);

	if (number == NO_SERVICE)
		number = look_up_and_cache((const struct address *)address, port, protocol, family);
	return service_numbered(number);
}
