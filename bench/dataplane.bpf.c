// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * The balancer between a packet's making and its verdict, for BPF_PROG_TEST_RUN with `repeat`, which hands each run the
 * frame as the run before left it. Every program here first writes the next packet in full, then calls the balancer
 * inline; its floor writes the same packet and does no more. User space sets `traffic`, runs, and takes the difference.
 *
 * The packet is written field by field: a field read across two stores still in flight stalls, as it never would on a
 * packet that came from a network card.
 */

#include <linux/bpf.h>

/* The program itself, inlined: what runs is what is attached, without a call more. */
__attribute__((always_inline)) int xdp_lb(struct xdp_md *ctx);

#include "../xdp/bpf/lb.bpf.c"

#define MAC_WORDS 3
#define IP4_SOURCE 3 /* words from the IP header on */
#define IP4_DESTINATION 4
#define IP4_PORTS 5
#define IP4_WORDS 10 /* as far as TCP's checksum, rounded up */
#define IP6_SOURCE_END 5
#define IP6_PORTS 10
#define IP6_WORDS 15

/* Clients share their addresses among 2^15 ports each. */
#define CLIENT_PORT_BITS 15
#define CLIENT_PORT_FIRST 1024

struct traffic {
	__u32 flow;	  /* the next one; flow = (flow * multiplier + increment) & mask visits all in turn */
	__u32 multiplier; /* 1 visits them in order; 1 modulo 4, in no order that a cache could foresee */
	__u32 increment;  /* odd */
	__u32 mask;	  /* number of flows - 1, which are a power of two */
	__u32 sent;	  /* packets since user space last set it to zero */
	__u32 family;
	__be32 client;			/* the last word of the first client's address */
	__u32 macs[MAC_WORDS];		/* of every packet */
	__u32 packet[IP6_WORDS];	/* every packet, but for the client's address and port */
};

volatile struct traffic traffic = { .multiplier = 1, .increment = 1, .family = AF_INET };

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

static __always_inline __u32 next_flow(void)
{
	__u32 flow = traffic.flow;

	traffic.flow = (flow * traffic.multiplier + traffic.increment) & traffic.mask;
	return flow;
}

static __always_inline __be32 client_address(__u32 flow)
{
	return bpf_htonl(bpf_ntohl(traffic.client) + (flow >> CLIENT_PORT_BITS));
}

static __always_inline __be16 client_port(__u32 flow)
{
	return bpf_htons(CLIENT_PORT_FIRST + (flow & ((1 << CLIENT_PORT_BITS) - 1)));
}

static __always_inline void write_words(__u32 *to, const volatile __u32 *from, __u32 words)
{
	__u32 i;

#pragma unroll
	for (i = 0; i < words; i++)
		to[i] = from[i];
}

/* The template from `traffic`; returns the IP header, or NULL if the frame is too short for it. */
static __always_inline __u32 *write_template(struct xdp_md *ctx, __u32 words)
{
	struct ethhdr *eth = (void *)(long)ctx->data;
	__u32 *ip = (void *)(eth + 1);

	if ((void *)(ip + words) > (void *)(long)ctx->data_end)
		return NULL;
	write_words((void *)eth, traffic.macs, MAC_WORDS);
	write_words(ip, traffic.packet, words);
	return ip;
}

static __always_inline int write_request_in(struct xdp_md *ctx, __u32 words, __u32 source, __u32 ports)
{
	__u32 flow = next_flow();
	__u32 *ip = write_template(ctx, words);

	if (!ip)
		return -1;
	ip[source] = client_address(flow);
	*(__be16 *)(ip + ports) = client_port(flow);
	return 0;
}

static __always_inline int write_request(struct xdp_md *ctx)
{
	if (traffic.family == AF_INET)
		return write_request_in(ctx, IP4_WORDS, IP4_SOURCE, IP4_PORTS);
	return write_request_in(ctx, IP6_WORDS, IP6_SOURCE_END, IP6_PORTS);
}

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
