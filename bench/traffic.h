/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Clients' packets, made where they are sent: user space sets `traffic`, and write_request() writes the next client's
 * packet, in full, over whatever the frame held.
 *
 * The packet is written field by field: a field read across two stores still in flight stalls, as it never would on a
 * packet that came from a network card.
 */
#pragma once

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include "ip.h"

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
	*(__be16 *)((__u32 *)eth + MAC_WORDS) = words == IP4_WORDS ? bpf_htons(ETH_P_IP) : bpf_htons(ETH_P_IPV6);
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
