// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * The balancer: a packet's story. Parsed once, it finds its service, the service's mode sends it on; what is for no
 * service is a reply of a translated flow, or the host's. Each step returns a reason or goes on, and all leave through
 * verdict(). The story is compiled once for each address family.
 */
#include "forward_dr.h"
#include "forward_nat.h"

/* The flow of a packet that parse() refused, found the slow way: behind IP options or a fragment header. */
static __always_inline int refused_flow(struct xdp_md *ctx, struct flow_key *flow, int family)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	void *l3 = data + sizeof(struct ethhdr);
	__be16 *ports;

	if (l3 + ip_header_size(family) + sizeof(struct fragment_header) > end)
		return -1;
	if (family == AF_INET) {
		struct iphdr *ip = l3;

		flow->protocol = ip->protocol;
		flow->address[0] = ip->saddr;
		flow->address[1] = ip->daddr;
		ports = l3 + ip->ihl * 4;
	} else {
		struct ipv6hdr *ip = l3;
		struct fragment_header *fragment = l3 + sizeof(*ip);
		int fragmented = ip->nexthdr == IPPROTO_FRAGMENT;

		flow->protocol = fragmented ? fragment->next : ip->nexthdr;
		__builtin_memcpy(flow->address, &ip->saddr, 32);
		ports = (void *)fragment + (fragmented ? sizeof(*fragment) : 0);
	}
	if ((void *)(ports + 2) > end)
		return -1;
	flow->source_port = ports[0];
	flow->destination_port = ports[1];
	return 0;
}

static __always_inline enum reason refuse_in(struct xdp_md *ctx, enum reason why, int family)
{
	struct flow_key flow = {};

	if (refused_flow(ctx, &flow, family))
		return PASS_MALFORMED;
	if (find_service(flow_destination(&flow, family), flow.destination_port, flow.protocol, family))
		return why;
	return bpf_map_lookup_elem(MAP(nat_replies, family), &flow) ? why : PASS_NOT_A_SERVICE;
}

/*
 * A packet that cannot be balanced (malformed, a fragment, with IP options) is dropped where a service or a translated
 * flow would have had it, and is the host's otherwise.
 */
SLOW_PATH int refuse(struct xdp_md *ctx, int why, int family)
{
	return family == AF_INET ? refuse_in(ctx, why, AF_INET) : refuse_in(ctx, why, AF_INET6);
}

static __always_inline enum reason balance(struct xdp_md *ctx, struct packet *pkt, int family)
{
	enum reason why = parse(ctx, pkt, family);
	struct service *service;

	if (why >= DROP_MALFORMED)
		return refuse(ctx, why, family);
	if (why)
		return why;
	service = find_service(flow_destination(pkt->flow, family), pkt->flow->destination_port, pkt->flow->protocol, family);
	if (!service)
		return forward_reply(pkt, family);
	if (service->mode == MODE_NAT)
		return forward_nat(ctx, service, pkt, family);
	return forward_dr(ctx, service, pkt, family);
}

SEC("xdp")
int xdp_lb(struct xdp_md *ctx)
{
	struct ethhdr *eth = (void *)(long)ctx->data;
	struct flow_key flow = {};
	struct packet pkt = { .flow = &flow };
	enum reason why = PASS_NOT_IP;

	if ((void *)(eth + 1) > (void *)(long)ctx->data_end)
		why = PASS_MALFORMED;
	else if (eth->h_proto == bpf_htons(ETH_P_IP))
		why = balance(ctx, &pkt, AF_INET);
	else if (eth->h_proto == bpf_htons(ETH_P_IPV6))
		why = balance(ctx, &pkt, AF_INET6);
	return verdict(ctx, &pkt, why);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
