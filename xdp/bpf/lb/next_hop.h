/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The last step of every mode: a hop less to live, and the addresses of the next link. */
#pragma once

#include "checksum.h"
#include "maps.h"
#include "packet.h"

static __always_inline int ttl_expired(const struct packet *pkt, int family)
{
	if (family == AF_INET)
		return ((struct iphdr *)pkt->ip)->ttl <= 1;
	return ((struct ipv6hdr *)pkt->ip)->hop_limit <= 1;
}

/* RFC 1141: the TTL is the high byte of its word, so one less is 0x0100 more in the complement. */
static __always_inline void decrement_ttl(struct packet *pkt, int family)
{
	if (family == AF_INET) {
		struct iphdr *ip = pkt->ip;
		__u32 check = ip->check + bpf_htons(0x0100);

		ip->check = check + (check >= 0xffff);
		ip->ttl--;
	} else {
		((struct ipv6hdr *)pkt->ip)->hop_limit--;
	}
}

static __always_inline void set_hop(struct packet *pkt, const struct hop *hop)
{
	__u32 *to = pkt->ip - sizeof(struct ethhdr);
	const __u32 *from = (const void *)hop->destination;

	/* Both addresses lie in the order of the header: three words. */
	to[0] = from[0];
	to[1] = from[1];
	to[2] = from[2];
	pkt->egress = hop->ifindex;
}

/* For a member whose neighbour has not answered user space yet: the kernel may know it by now, if it forwards at all. */
SLOW_PATH int look_up_hop(struct xdp_md *ctx, const struct member *member, struct hop *hop, int family)
{
	struct bpf_fib_lookup fib = { .family = family, .ifindex = ctx->ingress_ifindex };

	if (!member || !hop)
		return 0;
	copy_address(family == AF_INET ? &fib.ipv4_dst : fib.ipv6_dst, member->address, family);
	if (bpf_fib_lookup(ctx, &fib, sizeof(fib), 0) != BPF_FIB_LKUP_RET_SUCCESS)
		return 0;
	hop->ifindex = fib.ifindex;
	__builtin_memcpy(hop->destination, fib.dmac, 6);
	__builtin_memcpy(hop->source, fib.smac, 6);
	return 1;
}

/* NULL where the way is not known. `found` holds it if the kernel had to be asked. */
static __always_inline const struct hop *hop_to(struct xdp_md *ctx, const struct member *member, struct hop *found,
						int family)
{
	if (member->flags & MEMBER_RESOLVED)
		return &member->hop;
	return look_up_hop(ctx, member, found, family) ? found : NULL;
}
