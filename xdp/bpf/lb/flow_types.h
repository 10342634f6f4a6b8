/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Flows as map keys, and what is recorded of one. User space's C includes this too. */
#pragma once

#include <linux/types.h>

/*
 * A flow as its packets carry it. IPv4 uses address[0] and address[1] as source and destination, and the map key ends
 * there; IPv6 uses address[0..3] and address[4..7].
 */
struct flow_key {
	__be16 source_port;
	__be16 destination_port;
	__u8 protocol;
	__u8 zero[3];
	__be32 address[8];
};

struct flow_key4 {
	__be16 source_port;
	__be16 destination_port;
	__u8 protocol;
	__u8 zero[3];
	__be32 address[2];
};

/* A flow recorded while its slot is in transition. */
struct flow {
	__u64 seen_ns; /* CLOCK_MONOTONIC_COARSE, to the second */
	__u32 uid;
	__u16 member; /* local to the service */
	__u16 closing;
};
