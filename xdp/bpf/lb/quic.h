/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Which member a QUIC packet's destination connection ID names, in the plaintext form of QUIC-LB
 * (draft-ietf-quic-load-balancers): config rotation codepoint in three bits, server ID, nonce. So a connection stays with
 * its server when the client's address or port changes.
 */
#pragma once

#include "config.h"
#include "maps.h"
#include "packet.h"

#define QUIC_LONG_HEADER 0x80
#define QUIC_CONFIG(first) ((first) >> 5)
#define QUIC_SERVER_ID_MOST 15

/* Where the ID starts, behind the UDP header: RFC 9000, 17.2 and 17.3; RFC 8999 for both. */
static __always_inline __u32 connection_id_offset(__u8 first)
{
	return first & QUIC_LONG_HEADER ? 6 : 1;
}

/* The member's number, 0 for none: the flow's hash decides then. Of packets that parse_udp() has seen. */
SLOW_PATH __u32 quic_member(struct xdp_md *ctx, const struct service *service, int family)
{
	__u32 at = sizeof(struct ethhdr) + ip_header_size(family) + sizeof(struct udphdr);
	__u8 *quic = (void *)(long)ctx->data + at;
	struct quic_key key = {};
	__u32 last, *number;
	__u8 *id;

	if (!service || (void *)(quic + 7) > frame_end(ctx))
		return 0;
	id = quic + connection_id_offset(quic[0]);
	key.service = service->number;
	key.config = QUIC_CONFIG(id[0]);
	last = service->quic_lengths[key.config & (QUIC_CONFIGS - 1)] - 1;
	asm volatile("" : "+r"(last)); /* Linux 6.1 learns nothing from a comparison with 0, but from adding 1 */
	if (last >= QUIC_SERVER_ID_MOST || (quic[0] & QUIC_LONG_HEADER && quic[5] < 2 + last))
		return 0;
	if (bpf_xdp_load_bytes(ctx, at + connection_id_offset(quic[0]) + 1, key.server_id, last + 1))
		return 0;
	number = bpf_map_lookup_elem(&quic_members, &key);
	return number ? *number : 0;
}
