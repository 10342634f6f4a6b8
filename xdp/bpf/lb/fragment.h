/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Fragments of UDP: the first one has the ports, finds its member and is remembered under the datagram's ID; those behind
 * it follow. One that comes before the first is left to the host. Modes that keep the packet's addresses only: translated
 * fragments of two clients could meet under one ID.
 */
#pragma once

#include "admission.h"
#include "flow_table.h"

/* The datagram's key: a flow whose ports are the ID. */
static __always_inline void set_datagram(struct flow_key *key, __be32 id)
{
	key->source_port = (__u16)id;
	key->destination_port = id >> 16;
}

static __always_inline int follow_first_fragment(struct flow_key *key, __be32 id, struct fragment *found)
{
	struct fragment *first;

	set_datagram(key, id);
	first = bpf_map_lookup_elem(&fragments, key);
	if (!first)
		return PASS_FRAGMENT;
	*found = *first;
	return GO_ON;
}

static __always_inline struct service *fragment_service(struct flow_key *flow, int family)
{
	struct service *service = find_service(flow_destination(flow, family), flow->destination_port, IPPROTO_UDP, family);

	if (service && service->options & (OPTION_SOURCES | OPTION_ONLY_SOURCES))
		service = service_numbered(service_of_source(service, flow, family));
	return service && service->mode != MODE_NAT ? service : NULL;
}

static __always_inline int send_first_fragment(struct xdp_md *ctx, struct flow_key *flow, const struct udphdr *udp, __be32 id,
					       struct fragment *found, int family)
{
	struct packet pkt = { .flow = flow, .l4_kind = L4_UDP };
	struct member *member = NULL;
	struct service *service;

	set_ends(flow, udp->source, udp->dest, IPPROTO_UDP);
	service = fragment_service(flow, family);
	if (!service)
		return DROP_FRAGMENT;
	if (source_is_vip(ctx, family))
		return DROP_MARTIAN_SOURCE;
	pkt.hash = flow_hash(flow, family);
	if (service->options & OPTION_AFFINITY)
		member = live_member(service, affine_member(service, flow, KIND(L4_UDP, 0), family));
	if (!member)
		member = hashed_member(service, &pkt, family);
	if (!member)
		return DROP_NO_BACKEND;
	found->service = service->number;
	found->member = member->index - service->member_base;
	found->uid = member->uid;
	found->hash = pkt.hash;
	set_datagram(flow, id);
	bpf_map_update_elem(&fragments, flow, found, BPF_ANY);
	return GO_ON;
}

static __always_inline int find_fragment4(struct xdp_md *ctx, struct flow_key *flow, struct fragment *found)
{
	struct iphdr *ip = (void *)(long)ctx->data + sizeof(struct ethhdr);
	struct udphdr *udp = (void *)(ip + 1);

	if ((void *)udp > frame_end(ctx))
		return PASS_FRAGMENT;
	flow->protocol = ip->protocol;
	if (ip->frag_off & IP_OFFSET)
		return follow_first_fragment(flow, ip->id, found);
	if ((void *)(udp + 1) > frame_end(ctx))
		return PASS_FRAGMENT;
	return ip->protocol == IPPROTO_UDP ? send_first_fragment(ctx, flow, udp, ip->id, found, AF_INET) : DROP_FRAGMENT;
}

static __always_inline int find_fragment6(struct xdp_md *ctx, struct flow_key *flow, struct fragment *found)
{
	struct ipv6hdr *ip = (void *)(long)ctx->data + sizeof(struct ethhdr);
	struct fragment_header *header = (void *)(ip + 1);
	struct udphdr *udp = (void *)(header + 1);

	if ((void *)udp > frame_end(ctx))
		return PASS_FRAGMENT;
	flow->protocol = header->next;
	if (header->offset & IP6_OFFSET)
		return follow_first_fragment(flow, header->id, found);
	if ((void *)(udp + 1) > frame_end(ctx))
		return PASS_FRAGMENT;
	return header->next == IPPROTO_UDP ? send_first_fragment(ctx, flow, udp, header->id, found, AF_INET6) : DROP_FRAGMENT;
}

/* Fills in where the fragment goes, and returns GO_ON, or the reason why it goes nowhere. flow: its addresses. */
static SLOW_PATH int find_fragment(struct xdp_md *ctx, struct flow_key *flow, struct fragment *found, int family)
{
	if (!flow || !found)
		return PASS_FRAGMENT;
	return family == AF_INET ? find_fragment4(ctx, flow, found) : find_fragment6(ctx, flow, found);
}
