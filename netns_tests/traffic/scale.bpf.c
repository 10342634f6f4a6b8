// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * The clients of a busy balancer, for BPF_PROG_TEST_RUN with `repeat`: each run is the turn of the next connection. Its
 * packet is written into the frame, handed to the balancer, and the backend that it left for (the end of the MAC address)
 * remembered, or compared with what was remembered. User space sets `walk` and reads there what went wrong.
 */

#include <linux/bpf.h>

/* The program itself, inlined. */
__attribute__((always_inline)) int xdp_lb(struct xdp_md *ctx);

#include "../../xdp/bpf/lb/lb.bpf.c"

/* Clients share their addresses among 2^15 ports each. */
#define CLIENT_PORT_BITS 15
#define CLIENT_PORT_FIRST 1024
#define LIFE_SHIFT 16
#define TCP_FLAGS 13 /* offset in the header */
#define BACKEND 4    /* offset in a MAC address */
#define TTL 64

#define UNUSED __attribute__((unused))

struct connection {
	__u16 backend;
	__u16 life; /* the client's next connection comes from another address */
};

struct walk {
	__u32 number; /* of the connection whose turn it is */
	__u32 next;
	__u32 share;   /* every share-th connection has its turn, the first of them is `first` */
	__u32 first;
	__u32 only_on; /* the backend whose connections alone have their turn; 0: all */
	__u32 tcp_flags;
	__u32 strayed;	    /* packets that went to another backend than their connection's */
	__u32 last_strayed; /* the connection */
	__u32 flow_timeout_s;
	__u32 entries;	/* of flows that have not timed out */
	__u32 decisive; /* those without which the flow's next packet would go elsewhere */
};

volatile struct walk walk = { .share = 1 };

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct connection);
} connections SEC(".maps");

static __always_inline int has_its_turn(__u32 number, const struct connection *connection)
{
	return number % walk.share == walk.first && (!walk.only_on || connection->backend == walk.only_on);
}

/* The frame is the one before, as it left; what differs, and what the balancer has changed, is written. */
static __always_inline int write_packet(struct xdp_md *ctx, __u32 number, const struct connection *connection)
{
	struct iphdr *ip = (void *)(long)ctx->data + sizeof(struct ethhdr);
	struct tcphdr *tcp = (void *)(ip + 1);

	if ((void *)(tcp + 1) > (void *)(long)ctx->data_end)
		return -1;
	ip->ttl = TTL;
	ip->saddr = bpf_htonl(10 << 24 | connection->life << LIFE_SHIFT | number >> CLIENT_PORT_BITS);
	tcp->source = bpf_htons(CLIENT_PORT_FIRST + (number & ((1 << CLIENT_PORT_BITS) - 1)));
	((__u8 *)tcp)[TCP_FLAGS] = walk.tcp_flags;
	return 0;
}

static __always_inline __u16 receiver(struct xdp_md *ctx, int verdict)
{
	struct ethhdr *eth = (void *)(long)ctx->data;

	if (verdict != XDP_TX || (void *)(eth + 1) > (void *)(long)ctx->data_end)
		return 0;
	return eth->h_dest[BACKEND] << 8 | eth->h_dest[BACKEND + 1];
}

/* Nonzero: it is not its turn. Apart, as is remember(), since the balancer leaves next to nothing of the stack. */
SLOW_PATH int prepare(struct xdp_md *ctx)
{
	__u32 number = walk.number;
	struct connection *connection = bpf_map_lookup_elem(&connections, &number);

	if (!connection || !has_its_turn(number, connection))
		return -1;
	if (walk.tcp_flags == TCP_SYN)
		connection->life++;
	return write_packet(ctx, number, connection);
}

SLOW_PATH int remember(struct xdp_md *ctx, int verdict)
{
	__u32 number = walk.number;
	struct connection *connection = bpf_map_lookup_elem(&connections, &number);

	if (!connection)
		return -1;
	if (walk.tcp_flags == TCP_SYN) {
		connection->backend = receiver(ctx, verdict);
	} else if (connection->backend != receiver(ctx, verdict)) {
		walk.strayed++;
		walk.last_strayed = number;
	}
	return 0;
}

SEC("xdp")
int take_turn(struct xdp_md *ctx)
{
	walk.number = walk.next++;
	return prepare(ctx) ? XDP_PASS : remember(ctx, xdp_lb(ctx)) ? XDP_ABORTED : XDP_PASS;
}

/* The number of the member that the flow of an entry would go to without it; 0: none. */
static __always_inline __u32 untracked_member(const struct flow_key4 *key)
{
	struct flow_key flow = {
		.source_port = key->source_port,
		.destination_port = key->destination_port,
		.protocol = key->protocol,
		.address = { key->address[0], key->address[1] },
	};
	struct service *service = find_service(&flow.address[1], flow.destination_port, flow.protocol, AF_INET);
	struct member *member;
	__u32 word;

	if (!service)
		return 0;
	word = slot_word(service, flow_hash(&flow, AF_INET));
	member = live_member(service, RING_PREVIOUS(word));
	if (!member)
		member = live_member(service, RING_CURRENT(word));
	return member ? member->index - service->member_base : 0;
}

static long count_entry(UNUSED void *map, const struct flow_key4 *key, const struct flow *flow, UNUSED void *context)
{
	if (older_than(flow->seen_ns, now_ns(), walk.flow_timeout_s))
		return 0;
	walk.entries++;
	walk.decisive += untracked_member(key) != flow->member;
	return 0;
}

SEC("xdp")
int count_entries(UNUSED struct xdp_md *ctx)
{
	walk.entries = walk.decisive = 0;
	bpf_for_each_map_elem(&flows4, count_entry, NULL, 0);
	return XDP_PASS;
}
