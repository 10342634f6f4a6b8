// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * The balancer between a packet's making and its verdict, for BPF_PROG_TEST_RUN with `repeat`, which hands each run the
 * frame as the run before left it. Every program here first writes the next packet in full, then calls the balancer
 * inline; its floor writes the same packet and does no more. User space sets `traffic`, runs, and takes the difference.
 */

#include <linux/bpf.h>

/* The program itself, inlined: what runs is what is attached, without a call more. */
__attribute__((always_inline)) int xdp_lb(struct xdp_md *ctx);

#include "../xdp/bpf/lb.bpf.c"

#include "traffic.h"

/* What the balancer made of a request, as far as the reply needs it; IPv4. */
struct forwarded {
	__be32 source;
	__be32 destination;
	__be16 source_port;
	__be16 destination_port;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct forwarded);
} forwarded SEC(".maps");

static __always_inline struct forwarded *next_forwarded(void)
{
	__u32 place = traffic.sent++ & traffic.mask;

	return bpf_map_lookup_elem(&forwarded, &place);
}

/* What was kept lies in the order in which it is read here: this is not where the caches miss. */
static __always_inline int write_reply(struct xdp_md *ctx)
{
	struct forwarded *request = next_forwarded();
	__u32 *ip = write_template(ctx, IP4_WORDS);
	__be16 *ports;

	if (!request || !ip)
		return -1;
	ports = (__be16 *)(ip + IP4_PORTS);
	ip[IP4_SOURCE] = request->destination;
	ip[IP4_DESTINATION] = request->source;
	ports[0] = request->destination_port;
	ports[1] = request->source_port;
	return 0;
}

static __always_inline void keep(struct xdp_md *ctx)
{
	__u32 *ip = (void *)(long)ctx->data + sizeof(struct ethhdr);
	struct forwarded *request = next_forwarded();
	__be16 *ports = (__be16 *)(ip + IP4_PORTS);

	if (!request || (void *)(ip + IP4_WORDS) > (void *)(long)ctx->data_end)
		return;
	request->source = ip[IP4_SOURCE];
	request->destination = ip[IP4_DESTINATION];
	request->source_port = ports[0];
	request->destination_port = ports[1];
}

SEC("xdp")
int request(struct xdp_md *ctx)
{
	return write_request(ctx) ? XDP_ABORTED : xdp_lb(ctx);
}

SEC("xdp")
int request_floor(struct xdp_md *ctx)
{
	return write_request(ctx) ? XDP_ABORTED : XDP_TX;
}

/* A request whose reply is wanted later. */
SEC("xdp")
int request_kept(struct xdp_md *ctx)
{
	int verdict = write_request(ctx) ? XDP_ABORTED : xdp_lb(ctx);

	keep(ctx);
	return verdict;
}

SEC("xdp")
int reply(struct xdp_md *ctx)
{
	return write_reply(ctx) ? XDP_ABORTED : xdp_lb(ctx);
}

SEC("xdp")
int reply_floor(struct xdp_md *ctx)
{
	return write_reply(ctx) ? XDP_ABORTED : XDP_TX;
}
