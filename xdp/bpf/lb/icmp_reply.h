/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What the balancer says itself, in the VIP's name: echo replies, and that a packet is too big or has come too far. */
#pragma once

#include "checksum.h"
#include "config.h"
#include "maps.h"
#include "packet.h"
#include "service.h"
#include "source.h"

#define ANSWER_TTL 64

#define ICMP4_ECHO 8
#define ICMP4_ECHO_REPLY 0
#define ICMP4_UNREACHABLE 3
#define ICMP4_FRAGMENTATION_NEEDED 4
#define ICMP4_TIME_EXCEEDED 11
#define ICMP6_PACKET_TOO_BIG 2
#define ICMP6_TIME_EXCEEDED 3
#define ICMP6_ECHO 128
#define ICMP6_ECHO_REPLY 129

/* What an error quotes of the packet: more than every receiver needs, in one size so that the verifier can follow. */
#define QUOTED4 128
#define QUOTED6 256
/* Of one that may be short: the IP header and 8 bytes (RFC 792). */
#define QUOTED_SHORT4 28
#define QUOTED_SHORT6 48

static __always_inline void swap_ethernet(struct ethhdr *to, const struct ethhdr *from)
{
	struct ethhdr old = *from;

	__builtin_memcpy(to->h_dest, old.h_source, 6);
	__builtin_memcpy(to->h_source, old.h_dest, 6);
	to->h_proto = old.h_proto;
}

static __always_inline void swap_ip4(struct iphdr *ip)
{
	__be32 source = ip->saddr;
	__u16 before, after;

	ip->saddr = ip->daddr;
	ip->daddr = source;
	__builtin_memcpy(&before, &ip->ttl, 2);
	ip->ttl = ANSWER_TTL;
	__builtin_memcpy(&after, &ip->ttl, 2);
	ip->check = updated_checksum(ip->check, replaced16(0, before, after));
}

static __always_inline void swap_ip6(struct ipv6hdr *ip)
{
	struct in6_addr source = ip->saddr;

	ip->saddr = ip->daddr;
	ip->daddr = source;
	ip->hop_limit = ANSWER_TTL;
}

static __always_inline enum reason answer_echo_in(struct xdp_md *ctx, struct flow_key *flow, int family)
{
	void *data = (void *)(long)ctx->data, *end = frame_end(ctx);
	__u8 protocol = family == AF_INET ? IPPROTO_ICMP : IPPROTO_ICMPV6;
	struct icmp_header *icmp = data + sizeof(struct ethhdr) + ip_header_size(family);
	__u8 request = family == AF_INET ? ICMP4_ECHO : ICMP6_ECHO;

	if ((void *)(icmp + 1) > end || icmp->type != request || icmp->code)
		return PASS_ICMP;
	if (!exact_service(flow_destination(flow, family), 0, protocol, family) || source_is_vip(ctx, family))
		return PASS_ICMP;
	swap_ethernet(data, data);
	if (family == AF_INET)
		swap_ip4(data + sizeof(struct ethhdr));
	else
		swap_ip6(data + sizeof(struct ethhdr));
	icmp->type = family == AF_INET ? ICMP4_ECHO_REPLY : ICMP6_ECHO_REPLY;
	/* 0 and 0xffff are one number to RFC 1071, but a message of zeros alone adds up to the first: so it needs the second. */
	icmp->checksum = updated_checksum(icmp->checksum, replaced16(0, request, icmp->type)) ?: 0xffff;
	return ANSWERED_ECHO;
}

/* An ICMP message that is no error: the flow has its addresses. */
SLOW_PATH int answer_echo(struct xdp_md *ctx, struct flow_key *flow, int family)
{
	if (!flow)
		return PASS_ICMP;
	return family == AF_INET ? answer_echo_in(ctx, flow, AF_INET) : answer_echo_in(ctx, flow, AF_INET6);
}

/* Cuts the frame after what is quoted and makes room for the error's headers. GO_ON, or why it cannot be. */
static __always_inline enum reason make_room(struct xdp_md *ctx, __u32 quoted, __u32 headers, enum reason too_short)
{
	__u32 bytes = ctx->data_end - ctx->data, wanted = sizeof(struct ethhdr) + quoted;

	if (bytes < wanted || bpf_xdp_adjust_tail(ctx, (int)(wanted - bytes)))
		return too_short;
	return bpf_xdp_adjust_head(ctx, -(int)headers) ? DROP_NO_HEADROOM : GO_ON;
}

/* RFC 792. `bytes` of the packet are quoted; it is dropped for `too_short` where it does not have them. */
static __always_inline enum reason send_error4(struct xdp_md *ctx, struct icmp_header error, __u32 bytes,
					       enum reason too_short)
{
	enum reason why = make_room(ctx, bytes, sizeof(struct iphdr) + sizeof(struct icmp_header), too_short);
	void *data = (void *)(long)ctx->data, *end = frame_end(ctx);
	struct iphdr *ip = data + sizeof(struct ethhdr), *quoted;
	struct icmp_header *icmp = (void *)(ip + 1);

	quoted = (void *)(icmp + 1);
	if (why)
		return why;
	if ((void *)quoted + bytes > end)
		return too_short;
	swap_ethernet(data, (void *)quoted - sizeof(struct ethhdr));
	*ip = (struct iphdr){
		.version = 4,
		.ihl = 5,
		.tot_len = bpf_htons(sizeof(*ip) + sizeof(*icmp) + bytes),
		.ttl = ANSWER_TTL,
		.protocol = IPPROTO_ICMP,
		.saddr = quoted->daddr,
		.daddr = quoted->saddr,
	};
	ip->check = ~fold(bpf_csum_diff(NULL, 0, (void *)ip, sizeof(*ip), 0));
	*icmp = error;
	icmp->checksum = ~fold(bpf_csum_diff(NULL, 0, (void *)icmp, sizeof(*icmp) + bytes, 0));
	return GO_ON;
}

/* RFC 4443, likewise. */
static __always_inline enum reason send_error6(struct xdp_md *ctx, struct icmp_header error, __u32 bytes,
					       enum reason too_short)
{
	enum reason why = make_room(ctx, bytes, sizeof(struct ipv6hdr) + sizeof(struct icmp_header), too_short);
	void *data = (void *)(long)ctx->data, *end = frame_end(ctx);
	struct ipv6hdr *ip = data + sizeof(struct ethhdr), *quoted;
	struct icmp_header *icmp = (void *)(ip + 1);
	__u32 payload = sizeof(*icmp) + bytes;
	__u64 sum;

	quoted = (void *)(icmp + 1);
	if (why)
		return why;
	if ((void *)quoted + bytes > end)
		return too_short;
	swap_ethernet(data, (void *)quoted - sizeof(struct ethhdr));
	*(__be32 *)ip = bpf_htonl(0x60000000);
	ip->payload_len = bpf_htons(payload);
	ip->nexthdr = IPPROTO_ICMPV6;
	ip->hop_limit = ANSWER_TTL;
	ip->saddr = quoted->daddr;
	ip->daddr = quoted->saddr;
	*icmp = error;
	sum = bpf_csum_diff(NULL, 0, (void *)icmp, payload, bpf_htonl(payload + IPPROTO_ICMPV6));
	sum += (__u32)bpf_csum_diff(NULL, 0, (void *)&ip->saddr, 32, 0);
	icmp->checksum = ~fold(sum);
	return GO_ON;
}

/* RFC 1191; RFC 4443, section 3.2. */
static __always_inline enum reason too_big(struct xdp_md *ctx, __u32 mtu, int family)
{
	struct icmp_header error4 = { ICMP4_UNREACHABLE, ICMP4_FRAGMENTATION_NEEDED, 0, bpf_htonl(mtu & 0xffff) };
	struct icmp_header error6 = { ICMP6_PACKET_TOO_BIG, 0, 0, bpf_htonl(mtu) };

	return family == AF_INET ? send_error4(ctx, error4, QUOTED4, DROP_TOO_BIG)
				 : send_error6(ctx, error6, QUOTED6, DROP_TOO_BIG);
}

/* mtu: what fits into the tunnel. So many a second are told; the packet is unchanged until then. */
SLOW_PATH int answer_too_big(struct xdp_md *ctx, __u32 mtu, int family)
{
	enum reason why;

	if (!within_pace(PACED_TOO_BIG, config.icmp_errors_per_s, now_ns()))
		return DROP_TOO_BIG;
	why = family == AF_INET ? too_big(ctx, mtu, AF_INET) : too_big(ctx, mtu, AF_INET6);
	return why ?: ANSWERED_TOO_BIG;
}

static __always_inline enum reason too_far(struct xdp_md *ctx, int family)
{
	struct icmp_header error = { .type = family == AF_INET ? ICMP4_TIME_EXCEEDED : ICMP6_TIME_EXCEEDED };

	return family == AF_INET ? send_error4(ctx, error, QUOTED_SHORT4, DROP_TTL_EXPIRED)
				 : send_error6(ctx, error, QUOTED_SHORT6, DROP_TTL_EXPIRED);
}

/* For a packet of TCP or UDP whose next hop would be one too many: by this, traceroute sees the balancer. */
SLOW_PATH int answer_ttl_expired(struct xdp_md *ctx, int family)
{
	enum reason why;

	if (!within_pace(PACED_TTL_EXPIRED, config.icmp_errors_per_s, now_ns()))
		return DROP_TTL_EXPIRED;
	why = family == AF_INET ? too_far(ctx, AF_INET) : too_far(ctx, AF_INET6);
	return why ?: ANSWERED_TTL_EXPIRED;
}
