/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * From an address, port and protocol to the service that has them: one with just this address and port, else of those
 * whose address prefix is the longest, the one with the narrowest range of ports.
 */
#pragma once

#include "config.h"
#include "maps.h"
#include "packet.h"

static __always_inline struct service *service_numbered(__u32 number)
{
	return bpf_map_lookup_elem(&services, &number);
}

static __always_inline __u32 *exact_service(const __be32 *address, __be16 port, __u8 protocol, int family)
{
	if (family == AF_INET) {
		__u64 key = address[0] | (__u64)key_word(port, protocol) << 32; /* struct service_key4 */

		return bpf_map_lookup_elem(&services4, &key);
	} else {
		struct service_key6 key;

		copy_address(key.address, address, AF_INET6);
		*(__u32 *)&key.port = key_word(port, protocol);
		return bpf_map_lookup_elem(&services6, &key);
	}
}

static __always_inline __be32 masked(__be32 word, __s32 bits)
{
	if (bits <= 0)
		return 0;
	return bits >= 32 ? word : word & bpf_htonl(~0u << (32 - bits));
}

/* The start of a range's key is the key of its network: one stays in its place, since the stack is short. */
static __always_inline __u32 *wide_service4(const __be32 *address, __be16 port, __u8 protocol)
{
	struct range_key4 key = { .prefix_length = 32, .network = address[0], .protocol = protocol, .port = port };
	__u32 *length = bpf_map_lookup_elem(&networks4, &key);

	if (!length)
		return NULL;
	key.prefix_length = 8 * (sizeof(key) - sizeof(key.prefix_length));
	key.network = masked(key.network, *length);
	key.network_length = *length;
	return bpf_map_lookup_elem(&ranges4, &key);
}

static __always_inline __u32 *wide_service6(const __be32 *address, __be16 port, __u8 protocol)
{
	struct range_key6 key = { .prefix_length = 128, .protocol = protocol, .port = port };
	__u32 *length;

	copy_address(key.network, address, AF_INET6);
	length = bpf_map_lookup_elem(&networks6, &key);
	if (!length)
		return NULL;
	key.prefix_length = 8 * (sizeof(key) - sizeof(key.prefix_length));
	key.network[0] = masked(key.network[0], *length);
	key.network[1] = masked(key.network[1], *length - 32);
	key.network[2] = masked(key.network[2], *length - 64);
	key.network[3] = masked(key.network[3], *length - 96);
	key.network_length = *length;
	return bpf_map_lookup_elem(&ranges6, &key);
}

/* For functions that the verifier takes by themselves: as many words as IPv6 has. */
struct address {
	__be32 words[4];
};

/* Returns its number, or NO_SERVICE. */
SLOW_PATH __u32 wide_service(const struct address *address, __u16 port, __u8 protocol, int family)
{
	__u32 *number;

	if (!address)
		return NO_SERVICE;
	number = family == AF_INET ? wide_service4(address->words, port, protocol)
				   : wide_service6(address->words, port, protocol);
	return number ? *number : NO_SERVICE;
}

/* `address` has four words to read, of which IPv4 uses one. */
static __always_inline struct service *find_service(const __be32 *address, __be16 port, __u8 protocol, int family)
{
	__u32 *number = exact_service(address, port, protocol, family);

	if (number)
		return service_numbered(*number);
	if (!control.wide_services)
		return NULL;
	return service_numbered(wide_service((const struct address *)address, port, protocol, family));
}
