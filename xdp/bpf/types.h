/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Every struct that the programs share with user space. This file is the only definition: user space reads the
 * layouts, and from the typedef names the byte order, out of the object's BTF.
 *
 * Addresses are four 32-bit words in network byte order; IPv4 uses word 0 and leaves the others zero.
 */
#pragma once

#include <linux/types.h>

#define RING_CURRENT(word) ((word) & 0x7fff)
#define RING_PREVIOUS(word) ((word) >> 15 & 0x7fff)
#define RING_TRACK (1u << 30)

#define SLOT_WORDS 16

/* A cache line of slot words. An array map pads each value to 8 bytes, so a value a word would waste every other one. */
struct slot_words {
	__u32 words[SLOT_WORDS];
};

/*
 * Why a packet left the way it did. Everything from DROP_MALFORMED on is dropped. What is NOTED is counted beside the
 * packet's own reason.
 */
enum reason {
	GO_ON,
	FORWARDED,
	PASS_NOT_IP,
	PASS_NOT_TCP_OR_UDP,
	PASS_NOT_A_SERVICE,
	PASS_MALFORMED,
	PASS_FRAGMENT,
	PASS_IPV6_EXTENSION,
	PASS_ICMP,
	PASS_ICMP_NO_FLOW,
	DROP_MALFORMED,
	DROP_FRAGMENT,
	DROP_IP_OPTIONS,
	DROP_TTL_EXPIRED,
	DROP_NO_BACKEND,
	DROP_NO_NEIGHBOUR,
	DROP_NAT_NO_FLOW,
	DROP_NAT_NO_PORT,
	NOTED_SYN_NOT_RECORDED, /* the flow table takes so many a second: the connection may stray at the next change */
	REASON_COUNT,
};

enum mode {
	MODE_NAT,
	MODE_DR,
};

struct service_key4 {
	__be32 address;
	__be16 port; /* 0: every port that has no entry of its own */
	__u8 protocol;
	__u8 zero;
};

struct service_key6 {
	__be32 address[4];
	__be16 port;
	__u8 protocol;
	__u8 zero;
};

struct service {
	__u32 ring_base; /* in words */
	__u32 ring_size;
	__u32 member_base;
	__u32 member_count; /* size of the block, not of the set: for the allocator in user space */
	__u32 flow_timeout_s;
	__u8 mode;
	__u8 zero[3];
	__u64 changed_ns; /* when the ring last changed, CLOCK_MONOTONIC */
};

/* Where a frame goes. */
struct hop {
	__u32 ifindex;
	__u8 destination[6];
	__u8 source[6];
};

enum member_flag {
	MEMBER_ALIVE = 1,
	MEMBER_RESOLVED = 2,
};

/* A backend within one service. One cache line. */
struct member {
	__be32 address[4];
	__be32 source[4]; /* nat: the balancer's address towards this backend */
	struct hop hop;
	__u32 uid; /* never used twice, so that an entry about an earlier member in this place is not taken for it */
	__u32 counter;
	__be16 port; /* 0: the port the client asked for */
	__u16 flags;
	__u32 number; /* its place in the service's block, as slot words and flow entries name it */
};

struct counter {
	__u64 packets;
	__u64 bytes;
	__u64 reply_packets;
	__u64 reply_bytes;
	__u64 connections;
};

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

/* What one CPU has recorded in the second that runs. */
struct pace {
	__u64 second;
	__u64 connections;
};

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

/* What user space changes while the program runs. */
struct control {
	__u64 generation;	 /* of the stored state that is applied in full; 0: unknown */
	__u64 test_clock_ns;	 /* the time, when config.test_clock is set */
	__u32 any_port_services; /* how many services have port 0 */
	__u32 zero;
};

/* What is fixed when the program is loaded; the verifier drops the branches that are off. */
struct config {
	__u64 hash_seed; /* the same on every node */
	__u64 refresh_ns;
	__u32 nat_opening_timeout_s;
	__u32 nat_closed_timeout_s;
	__u32 udp_timeout_s;
	__u32 recorded_syns_per_s; /* by each CPU */
	__u16 nat_port_first;
	__u16 nat_port_count;
	__u8 test_clock;
	__u8 zero[3];
};

/* Never read: it puts the enums, which user space knows by name, into the object's BTF. */
struct names {
	enum reason reason;
	enum mode mode;
	enum member_flag member_flag;
	enum nat_state nat_state;
};
