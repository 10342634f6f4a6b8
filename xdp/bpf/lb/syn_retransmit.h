/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Who opens a connection and hears nothing sends the same SYN again (RFC 9293, 3.8.1): counted for the member that has had
 * it before, this tells how backends treat real clients, beside what health checks find. Each CPU knows its own SYNs, since
 * a NIC keeps a flow on one of them; one whose place a later one has taken is not known again.
 */
#pragma once

#include "config.h"
#include "maps.h"
#include "ring.h"

#define MAX_OUTER_BYTES 0xff /* of a tunnel's headers; one less than a power of two */

/* Flow, sequence number and member make the hash: where a client uses a port anew, the sequence number is another one. */
static __always_inline int seen_before(__u64 hash)
{
	__u32 line = hash >> (64 - SEEN_BITS);
	__u32 place = hash >> 32 & (SIGNATURES - 1);
	struct seen_syns *seen = bpf_map_lookup_elem(&seen_syns, &line);
	__u32 signature = hash;
	int before;

	if (!seen)
		return 0;
	before = seen->signatures[place] == signature;
	seen->signatures[place] = signature;
	return before;
}

static __always_inline int is_syn_retransmit(struct xdp_md *ctx, const struct member *member, const struct flow_key *flow,
					     __u32 outer_bytes, int family)
{
	void *ip = (void *)(long)ctx->data + sizeof(struct ethhdr) + (outer_bytes & MAX_OUTER_BYTES);
	struct tcphdr *tcp = ip + ip_header_size(family);

	if ((void *)(tcp + 1) > frame_end(ctx))
		return 0;
	return seen_before(mix(flow_hash(flow, family) ^ ((__u64)member->uid << 32 | tcp->seq)));
}

/*
 * For a SYN on its way to the member, behind so many bytes of a tunnel's headers. It finds the sequence number by itself:
 * Linux 6.1 has no room left on its callers' stack.
 */
SLOW_PATH int count_syn_retransmit(struct xdp_md *ctx, const struct member *member, const struct flow_key *flow, __u32 outer_bytes,
				   int family)
{
	struct counter *counter;
	int repeated;

	if (!member || !flow)
		return 0;
	repeated = family == AF_INET ? is_syn_retransmit(ctx, member, flow, outer_bytes, AF_INET)
				     : is_syn_retransmit(ctx, member, flow, outer_bytes, AF_INET6);
	counter = repeated ? counter_of(member->index) : NULL;
	if (counter)
		counter->repeated_syns++;
	return repeated;
}
