/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * What balancer and decapsulation say to each other: GUE (draft-ietf-intarea-gue, variant 0) with, on slots in transition,
 * private data that name the other member which may own the flow. Plain IPIP (RFC 2003, 2473, 4213) needs no definition.
 *
 * Addresses are four 32-bit words in network byte order; IPv4 uses word 0.
 */
#pragma once

#include <linux/types.h>

#define GUE_PORT 6080 /* IANA */

/* Byte 0 of the header: variant (2 bits, 0), control (1 bit, 0), length of what follows the header in 32-bit words. */
#define GUE_WORDS(first) ((first) & 0x1f)
#define GUE_NOT_DATA(first) ((first) & 0xe0)

struct gue_header {
	__u8 first;
	__u8 protocol; /* IPPROTO_IPIP or IPPROTO_IPV6 */
	__be16 flags;  /* 0 */
};

#define SECOND_CHANCE_MAGIC 0x5832 /* "X2" */

struct second_chance {
	__be16 magic;
	__u8 family; /* of the address: 4 or 6 */
	__u8 zero;
	__be32 address[4];
};

#define SECOND_CHANCE_WORDS (sizeof(struct second_chance) / 4)
