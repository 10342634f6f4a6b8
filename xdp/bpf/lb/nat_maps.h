/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The translation table: what nat knows of each direction of a flow. */
#pragma once

#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>
#include "flow_maps.h"
#include "member_maps.h"

enum nat_state {
	NAT_ESTABLISHED = 1,
	NAT_CLIENT_FIN = 2,
	NAT_BACKEND_FIN = 4,
	NAT_RESET = 8,
};

/* Client -> VIP. */
struct nat_flow {
	__u64 seen_ns;
	__u32 uid;
	__u16 member;
	__be16 port; /* the source port towards the backend */
	__u32 timeout_s;
	__u32 state;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, struct flow_key4);
	__type(value, struct nat_flow);
} nat_flows4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, struct flow_key);
	__type(value, struct nat_flow);
} nat_flows6 SEC(".maps");

/* Backend -> balancer. */
struct nat_reply {
	__u64 seen_ns;
	__be32 client[4];
	__be32 vip[4];
	__be16 client_port;
	__be16 vip_port;
	struct hop hop; /* back to where the client's packets come from */
	__u32 counter;
	__u32 timeout_s;
	__u32 state;
	__u32 uid; /* of the member */
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, struct flow_key4);
	__type(value, struct nat_reply);
} nat_replies4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, struct flow_key);
	__type(value, struct nat_reply);
} nat_replies6 SEC(".maps");
