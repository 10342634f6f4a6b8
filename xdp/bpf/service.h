/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* From an address, port and protocol to the service that has them. */
#pragma once

#include "config.h"
#include "maps.h"
#include "packet.h"

static __always_inline struct service *exact_service(const __be32 *address, __be16 port, __u8 protocol, int family)
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

static __always_inline struct service *find_service(const __be32 *address, __be16 port, __u8 protocol, int family)
{
	struct service *service = exact_service(address, port, protocol, family);

	if (!service && control.any_port_services)
		service = exact_service(address, 0, protocol, family);
	return service;
}
