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
#define RING_PREVIOUS_MASK (0x7fffu << 15)
#define RING_TRACK (1u << 30)

#define SLOT_WORDS 16

/* A cache line of slot words. An array map pads each value to 8 bytes, so a value a word would waste every other one. */
struct slot_words {
	__u32 words[SLOT_WORDS];
};

/*
 * Why a packet left the way it did. What is ANSWERED goes back where it came from; everything from DROP_MALFORMED on is
 * dropped. What is NOTED is counted beside the packet's own reason.
 */
enum reason {
	GO_ON,
	FORWARDED,
	ANSWERED_ECHO,
	ANSWERED_TOO_BIG,
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
	DROP_SOURCE_NOT_ALLOWED,
	DROP_SYN_LIMIT,
	DROP_SYN_LIMIT_OF_SOURCE,
	DROP_TOO_BIG, /* for the tunnel, and the sender has been told often enough this second */
	DROP_NO_HEADROOM,
	NOTED_SYN_NOT_RECORDED, /* the flow table takes so many a second: the connection may stray at the next change */
	REASON_COUNT,
};

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

/* What the balancer made of the packet in hand, for the stages behind it and for captures. */
struct verdict {
	__u32 action; /* enum xdp_action; of XDP_REDIRECT, bpf_redirect() has been called */
	__u32 reason;
	__u32 egress; /* ifindex, where the packet is FORWARDED */
	__u32 bytes;  /* of the frame as it leaves */
};

enum mode {
	MODE_NAT,
	MODE_DR,
	MODE_IPIP,
	MODE_GUE,
};

/* What a service asks for beyond the plain path; the plain path tests for all of them at once. */
enum service_option {
	OPTION_SOURCES = 1,	  /* the map `sources` says which service a client has, this one or another */
	OPTION_ONLY_SOURCES = 2,  /* a client that is not in `sources` has none */
	OPTION_SYN_LIMIT = 4,
	OPTION_SYN_LIMIT_OF_SOURCE = 8,
	OPTION_MSS = 16,
	OPTION_AFFINITY = 32,	  /* all flows of a client address go together */
	OPTION_QUIC = 64,	  /* server IDs in connection IDs */
	OPTION_OUTER_CHECKSUM = 128,
	OPTION_SECOND_CHANCE = 256,
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

/* What a CPU found last in services4 or services6. */
struct known_service4 {
	__u64 key; /* struct service_key4 */
	__u32 number;
	__u32 epoch;
};

struct known_service6 {
	__be32 address[4];
	__u32 ends; /* port and protocol, as in the key */
	__u32 number;
	__u32 epoch;
	__u32 zero;
};

struct address {
	__be32 words[4];
};

/* Where to find a service: its number, an index into the map `services`. */
#define NO_SERVICE (~0u) /* the value of an address, under protocol ICMP, whose echo requests are answered */

#define SET_NAME_SIZE 40
#define QUIC_CONFIGS 8

/* Two cache lines: what the plain path reads is in the first. */
struct service {
	__u32 ring_base; /* in words */
	__u32 ring_size;
	__u32 member_base;
	__u32 member_count; /* size of the block, not of the set: for the allocator in user space */
	__u64 changed_ns;   /* when the ring last changed, CLOCK_MONOTONIC */
	__u32 flow_timeout_s;
	__u32 affinity_s;
	__u16 options; /* enum service_option */
	__u8 mode;     /* enum mode */
	__u8 in_use;
	__u16 mss;	 /* what the MSS option of SYNs is at most */
	__be16 gue_port; /* the UDP destination port */
	__u32 syn_limit; /* a second */
	__u32 syn_limit_of_source;
	__u32 number;	     /* of the service */
	__u8 zero[4];
	__u8 quic_lengths[QUIC_CONFIGS]; /* config rotation codepoint -> length of its server IDs, 0: none */
	__be32 address[4];		 /* the VIP */
	__be16 first_port;
	__be16 last_port;
	__u8 prefix_length;
	__u8 family; /* AF_INET or AF_INET6 */
	__u8 protocol;
	__u8 zero1;
	char set[SET_NAME_SIZE]; /* which set of members of this VIP; empty: the VIP's own */
};

/* VIP prefixes and port ranges: the longest prefix of the address, and then, under it, of the port. */
struct network_key4 {
	__u32 prefix_length;
	__be32 address;
};

struct network_key6 {
	__u32 prefix_length;
	__be32 address[4];
};

struct range_key4 {
	__u32 prefix_length;
	__be32 network;
	__u8 network_length;
	__u8 protocol;
	__be16 port;
};

struct range_key6 {
	__u32 prefix_length;
	__be32 network[4];
	__u8 network_length;
	__u8 protocol;
	__be16 port;
};

/* Which service a client of service `service` has. */
struct source_key4 {
	__u32 prefix_length;
	__u32 service;
	__be32 address;
};

struct source_key6 {
	__u32 prefix_length;
	__u32 service;
	__be32 address[4];
};

/* Connection openings of one client prefix: 24 bits of IPv4, 64 of IPv6. */
struct source_prefix {
	__u32 service;
	__be32 address[2];
};

struct quic_key {
	__u32 service;
	__u8 config; /* rotation codepoint */
	__u8 zero[3];
	__u8 server_id[16]; /* padded with zeros */
};

/* Where the first fragment of a datagram went. The key is a struct flow_key whose ports are the datagram's ID. */
struct fragment {
	__u32 service;
	__u32 member; /* local to the service */
	__u32 uid;
	__u32 hash; /* of the flow */
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
	MEMBER_IP6 = 4,
};

/* A backend within one service. One cache line. */
struct member {
	__be32 address[4];
	__be32 source[4]; /* nat: the balancer's address towards this backend; tunnels: the outer source */
	struct hop hop;
	__u32 uid; /* never used twice, so that an entry about an earlier member in this place is not taken for it */
	__u32 index; /* its own in `members` and `counters` */
	__be16 port; /* 0: the port the client asked for */
	__u16 flags;
	__u16 mtu;	  /* of the way there */
	__u8 source_bits; /* tunnels: so many low bits of `source` are the flow's, modulo 64 */
	__u8 zero;
};

struct counter {
	__u64 packets;
	__u64 bytes;
	__u64 reply_packets;
	__u64 reply_bytes;
	__u64 connections;
	__u64 repeated_syns;
};

#define SIGNATURES 16

/* SYNs that a CPU has sent on: a cache line of them. */
struct seen_syns {
	__u32 signatures[SIGNATURES];
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

/* What a CPU does no more than so often a second. */
enum paced {
	PACED_RECORDS,
	PACED_TOO_BIG,
	PACED_COUNT,
};

/* What one CPU has done in the second that runs. */
struct pace {
	__u64 second;
	__u64 done;
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
	__u32 wide_services;	 /* how many services have more than one port or address */
	__u32 echo_addresses;	 /* how many addresses have their echo requests answered */
	__u32 epoch;		 /* of services4 and services6: another one after each change; never 0 */
	__u32 stages;		 /* enum stages_in_use */
	__u64 nought;		 /* always 0, unknown to the verifier */
	__u64 whole_ns;		 /* until then, flows of the program before may be missing in this one's tables; 0: none are */
};

/* What is fixed when the program is loaded; the verifier drops the branches that are off. */
struct config {
	__u64 hash_seed; /* the same on every node */
	__u64 refresh_ns;
	__u32 nat_opening_timeout_s;
	__u32 nat_closed_timeout_s;
	__u32 udp_timeout_s;
	__u32 recorded_syns_per_s; /* by each CPU */
	__u32 too_big_per_s;	   /* ICMP errors, by each CPU */
	__u16 nat_port_first;
	__u16 nat_port_count;
	__u8 test_clock;
	__u8 zero[7];
};

/* What the program counted that this one has replaced. */
struct carried {
	__u32 is_reason; /* `index` is of `reasons`, and `more` has packets only */
	__u32 index;
	struct counter more;
};

/*
 * To be raised where something in a map gets another meaning and neither its type nor a name above tells. Maps of another
 * schema are not handed on from program to program.
 */
enum schema {
	SCHEMA = 1,
};

/* Never read: it puts the enums, which user space knows by name, into the object's BTF. */
struct names {
	enum reason reason;
	enum mode mode;
	enum service_option service_option;
	enum member_flag member_flag;
	enum nat_state nat_state;
	enum stage stage;
	enum stages_in_use stages_in_use;
	enum schema schema;
};
