/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Every struct that the decapsulating programs share with user space, which reads the layouts out of the object's BTF
 * (see maps.h, the balancer's).
 *
 * Addresses are four 32-bit words in network byte order; IPv4 uses word 0 and leaves the others zero.
 */
#pragma once

#include <linux/types.h>

/*
 * What became of a packet. PASS leaves it to the host as it came, everything from DROP_OUTER_SOURCE on is dropped. What is
 * NOTED is counted beside the packet's own reason. What is DECAPSULATED is counted by its tunnel instead.
 */
enum decap_reason {
	DECAPSULATED,
	SENT_TO_OTHER_MEMBER, /* the second chance was taken */
	PASS_NOT_IP,
	PASS_NOT_A_TUNNEL,
	PASS_MALFORMED,
	PASS_IP_OPTIONS,
	PASS_FRAGMENT,
	PASS_GUE_UNKNOWN, /* a variant, a flag, a control message or a protocol that is not spoken here */
	PASS_NOT_CONFIGURED,
	DROP_OUTER_SOURCE, /* not among those allowed */
	DROP_INNER_MALFORMED,
	DROP_SOURCE_UNSPECIFIED,
	DROP_SOURCE_LOOPBACK,
	DROP_SOURCE_MULTICAST,
	DROP_SOURCE_BROADCAST,
	DROP_SOURCE_LINK_LOCAL,
	DROP_SOURCE_IS_DESTINATION,
	DROP_SOURCE_IS_CONFIGURED, /* as a destination: the VIP's own packets do not come in through a tunnel */
	DROP_OTHER_MEMBER_MARTIAN, /* the second chance names an address that no backend can have */
	DROP_NOT_ECN_CAPABLE, /* RFC 6040: congestion was met on the way, and the sender cannot be told otherwise */
	DROP_NO_ROOM, /* the driver refuses to move the start of the packet */
	DROP_NO_OWN_ADDRESS, /* of the family in which it would have gone to the other member */
	NOTED_SECOND_CHANCE_KEPT, /* a socket here owns the flow, or it is none of TCP */
	DECAP_REASON_COUNT,
};

/* In this order: GUE or not, outer family, inner family. */
enum tunnel_kind {
	IPIP_4_IN_4,
	IPIP_6_IN_4,
	IPIP_4_IN_6,
	IPIP_6_IN_6,
	GUE_4_IN_4,
	GUE_6_IN_4,
	GUE_4_IN_6,
	GUE_6_IN_6,
	TUNNEL_KIND_COUNT,
};

/* Keys of the longest-prefix-match tries. */
struct prefix4 {
	__u32 length; /* in bits */
	__be32 address;
};

struct prefix6 {
	__u32 length;
	__be32 address[4];
};

struct decapsulated {
	__u64 packets;
	__u64 bytes; /* of the inner packets */
};

/* The only prefix of its kind and family, which needs no trie; a mask of zero: there is none, or several. */
struct only4 {
	__be32 network;
	__be32 mask;
};

struct only6 {
	__be32 network[4];
	__be32 mask[4];
};

/* What is fixed when the programs are loaded. */
struct decap_config {
	struct only4 destination4;
	struct only6 destination6;
	struct only4 source4;
	struct only6 source6;
	__be32 own_address4; /* outer source of what is sent to another member whose family is not the outer's; 0: none */
	__be32 own_address6[4];
	__be16 gue_port;
	__u8 check_outer_source;
	__u8 several_destinations; /* 0: each family has one address at most, so a source among them is the destination */
	__u8 mark[6]; /* MAC address, drawn by lot, by which one program tells the other what is to be sent on */
	__u8 zero[2];
};

/* Never read: it puts the enums, which user space knows by name, into the object's BTF. */
struct decap_names {
	enum decap_reason reason;
	enum tunnel_kind tunnel_kind;
};
