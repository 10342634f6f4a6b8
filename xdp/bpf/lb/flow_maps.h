/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Flows that are recorded while their slots are in transition, and datagrams whose fragments follow the first. */
#pragma once

#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>
#include "flow_types.h"
#include "ip.h"

/* `family` is a constant wherever speed counts, and the branch is gone. */
#define MAP(name, family) ((family) == AF_INET ? (void *)&name##4 : (void *)&name##6)

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, struct flow_key4);
	__type(value, struct flow);
} flows4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, struct flow_key);
	__type(value, struct flow);
} flows6 SEC(".maps");

/* Where the first fragment of a datagram went. The key is a struct flow_key whose ports are the datagram's ID. */
struct fragment {
	__u32 service;
	__u32 member; /* local to the service */
	__u32 uid;
	__u32 hash; /* of the flow */
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, struct flow_key);
	__type(value, struct fragment);
} fragments SEC(".maps");
