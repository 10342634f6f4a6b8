// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * The balancer between a packet's making and its verdict, for BPF_PROG_TEST_RUN with `repeat`, which hands each run the
 * frame as the run before left it. Every program here first writes the next packet in full, then calls the balancer
 * inline; its floor writes the same packet and does no more. User space sets `traffic`, runs, and takes the difference.
 */

#include <linux/bpf.h>

/* The program itself, inlined: what runs is what is attached, without a call more. */
__attribute__((always_inline)) int xdp_lb(struct xdp_md *ctx);

#include "../xdp/bpf/lb/lb.bpf.c"

#include "traffic.h"

/* What is done before and behind the balancer. One program does it all: the verifier takes its time over each copy. */
struct around {
	__u32 replies;	/* not to make requests, but the replies to what was kept */
	__u32 keeps;	/* what the replies need of each request */
	__u32 overhead; /* the least bytes that the tunnel puts in front; 0: there is none */
	__u32 bytes;	/* of the frame, without them */
	__u32 bare;	/* packets, since user space last set it to zero, that came back without a tunnel */
};

volatile struct around around = { .bytes = 64 };

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

/* In place of the tunnel's end: what is in front of the packet goes, and the next one is written where this one was. */
static __always_inline void take_off_tunnel(struct xdp_md *ctx)
{
	__u64 bytes = frame_end(ctx) - (void *)(long)ctx->data;
	int added;

	barrier_var(bytes); /* else a number is added to the pointers first, in 32 bits, which the verifier forbids */
	added = (int)bytes - (int)around.bytes;
	if (added < (int)around.overhead)
		around.bare++;
	bpf_xdp_adjust_head(ctx, added);
}

static __always_inline int write_packet(struct xdp_md *ctx)
{
	return around.replies ? write_reply(ctx) : write_request(ctx);
}

SEC("xdp")
int balanced(struct xdp_md *ctx)
{
	int verdict = write_packet(ctx) ? XDP_ABORTED : xdp_lb(ctx);

	if (around.keeps)
		keep(ctx);
	if (around.overhead)
		take_off_tunnel(ctx);
	return verdict;
}

/* What any tunnel has to do is in it: the start of the frame is moved. */
SEC("xdp")
int balanced_floor(struct xdp_md *ctx)
{
	if (write_packet(ctx))
		return XDP_ABORTED;
	if (around.overhead) {
		if (bpf_xdp_adjust_head(ctx, -(int)around.overhead))
			return XDP_ABORTED;
		take_off_tunnel(ctx);
	}
	return XDP_TX;
}
