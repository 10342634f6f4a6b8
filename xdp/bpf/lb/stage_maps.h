/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Programs of others before and behind the balancer, and the verdict that they are told. */
#pragma once

#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>

/* Places in the map `stages`: programs that a packet goes through in this order, each handing it on to those behind. */
enum stage {
	STAGE_FILTER,
	STAGE_USER,	   /* and the three behind */
	STAGE_BALANCE = 5, /* the balancer, for those in front of it */
	STAGE_EXIT,	   /* and the three behind */
	STAGE_COUNT = 10,
};

enum stages_in_use {
	STAGES_IN_FRONT = 1,
	STAGES_BEHIND = 2,
	STAGES_RECORD = 4, /* `verdicts` is written, also for nobody behind */
	STAGES_RELAY = 8,  /* the balancer in STAGE_BALANCE is another one, which takes over */
};

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, STAGE_COUNT);
	__type(key, __u32);
	__type(value, __u32);
} stages SEC(".maps");

/* What the balancer made of the packet in hand, for the stages behind it and for captures. */
struct verdict {
	__u32 action; /* enum xdp_action; of XDP_REDIRECT, bpf_redirect() has been called */
	__u32 reason;
	__u32 egress; /* ifindex, where the packet is FORWARDED */
	__u32 bytes;  /* of the frame as it leaves */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct verdict);
} verdicts SEC(".maps");
