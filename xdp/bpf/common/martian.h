/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Addresses that no packet of a single host may come from, or be sent on to (RFC 1122, 3.2.1.3; RFC 1812, 5.3.7). */
#pragma once

#include <linux/types.h>
#include <bpf/bpf_endian.h>
#include "ip.h"

/* 0/8, 127/8, 224/4, 240/4: all that the first byte tells. */
static __always_inline int is_martian4(__be32 address)
{
	__u8 first = bpf_ntohl(address) >> 24;

	return first == 0 || first == 127 || first >= 224;
}

/* ::/64, which has ::, ::1 and mapped IPv4 addresses; fe80::/10 (RFC 4291, 2.5.6); ff00::/8. */
static __always_inline int is_martian6(const __be32 *address)
{
	__u32 first = bpf_ntohl(address[0]);

	return !(address[0] | address[1]) || first >> 24 == 0xff || first >> 22 == 0xfe80 >> 6;
}

static __always_inline int is_martian(const __be32 *address, int family)
{
	return family == AF_INET ? is_martian4(address[0]) : is_martian6(address);
}
