// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * The end of a tunnel on a backend, without a tunnel device: IPIP and GUE packets for configured destinations lose their
 * outer headers and go up the local stack, what does not look like a client's packet is dropped, and what is no tunnel
 * packet of ours stays as it came. Each step returns a reason or goes on; all leave through verdict().
 *
 * The outer UDP checksum of GUE is not looked at (RFC 6935): the inner packet has its own.
 */
#include "decap.h"
#include "checksum.h"
#include "second_chance.h"
#include "vlan_tag.h"

#define GO_ON DECAPSULATED

enum ecn { /* RFC 3168 */
	NOT_ECT,
	ECT_1,
	ECT_0,
	CE,
};

struct tunnel {
	void *data;
	void *end;
	__u32 tags;	   /* VLAN, how many */
	__u32 removed;	   /* bytes from the outer IP header to the inner one */
	__u32 inner_room;  /* bytes from the inner IP header to the end of the outer packet */
	__u32 inner_bytes; /* of the inner packet, as it says itself */
	__u8 inner_protocol;
	__u8 outer_ecn;
	__u8 has_second_chance;
	__u32 kind;
};

static __always_inline void *outer_header(const struct tunnel *tunnel)
{
	return tunnel->data + sizeof(struct ethhdr) + tunnel->tags * sizeof(struct vlan_tag);
}

static __always_inline void *inner_header(const struct tunnel *tunnel)
{
	return outer_header(tunnel) + tunnel->removed;
}

/* The ethertype behind up to two tags; 0 where the frame ends before. */
static __always_inline __be16 find_ethertype(struct tunnel *tunnel)
{
	struct ethhdr *eth = tunnel->data;
	struct vlan_tag *tag = (void *)(eth + 1);
	__be16 ethertype;

	if ((void *)(eth + 1) > tunnel->end)
		return 0;
	ethertype = eth->h_proto;
#pragma unroll
	for (int tags = 0; tags < MAX_TAGS; tags++, tag++) {
		if (!is_tag(ethertype))
			break;
		if ((void *)(tag + 1) > tunnel->end)
			return 0;
		ethertype = tag->ethertype;
		tunnel->tags = tags + 1;
	}
	return ethertype;
}

/* The outer headers */

static __always_inline int may_be_tunnel(__u8 protocol)
{
	return protocol == IPPROTO_IPIP || protocol == IPPROTO_IPV6 || protocol == IPPROTO_UDP;
}

static __always_inline enum decap_reason parse_outer4(struct tunnel *tunnel)
{
	struct iphdr *ip = outer_header(tunnel);
	__u32 total;

	if ((void *)(ip + 1) > tunnel->end)
		return PASS_MALFORMED;
	if (!may_be_tunnel(ip->protocol))
		return PASS_NOT_A_TUNNEL;
	if (*(__u8 *)ip != 0x45)
		return ip->version == 4 && ip->ihl > 5 ? PASS_IP_OPTIONS : PASS_MALFORMED;
	if (ip->frag_off & (IP_MF | IP_OFFSET))
		return PASS_FRAGMENT;
	total = bounded_length(ip->tot_len);
	if (total < sizeof(*ip) || (void *)ip + total > tunnel->end)
		return PASS_MALFORMED;
	tunnel->removed = sizeof(*ip);
	tunnel->inner_room = total - sizeof(*ip);
	tunnel->inner_protocol = ip->protocol;
	tunnel->outer_ecn = ip->tos & 3;
	return GO_ON;
}

static __always_inline enum decap_reason parse_outer6(struct tunnel *tunnel)
{
	struct ipv6hdr *ip = outer_header(tunnel);

	if ((void *)(ip + 1) > tunnel->end)
		return PASS_MALFORMED;
	if (ip->nexthdr == IPPROTO_FRAGMENT)
		return PASS_FRAGMENT;
	if (!may_be_tunnel(ip->nexthdr))
		return PASS_NOT_A_TUNNEL;
	tunnel->inner_room = bounded_length(ip->payload_len);
	if (ip->version != 6 || (void *)(ip + 1) + tunnel->inner_room > tunnel->end)
		return PASS_MALFORMED;
	tunnel->removed = sizeof(*ip);
	tunnel->inner_protocol = ip->nexthdr;
	tunnel->outer_ecn = ip->flow_lbl[0] >> 4 & 3;
	tunnel->kind = IPIP_4_IN_6;
	return GO_ON;
}

/* Private data of someone else's are no second chance. */
static __always_inline int names_other_member(const struct gue_header *gue, void *end)
{
	const struct second_chance *chance = (const void *)(gue + 1);

	if (GUE_WORDS(gue->first) != SECOND_CHANCE_WORDS || (void *)(chance + 1) > end)
		return 0;
	if (chance->magic != bpf_htons(SECOND_CHANCE_MAGIC) || chance->zero)
		return 0;
	return chance->family == 4 || chance->family == 6;
}

static __always_inline enum decap_reason parse_gue(struct tunnel *tunnel)
{
	struct udphdr *udp = inner_header(tunnel);
	struct gue_header *gue = (void *)(udp + 1);
	__u32 headers;

	if ((void *)(udp + 1) > tunnel->end || udp->dest != config.gue_port)
		return PASS_NOT_A_TUNNEL;
	if ((void *)(gue + 1) > tunnel->end)
		return PASS_MALFORMED;
	if (GUE_NOT_DATA(gue->first) || gue->flags)
		return PASS_GUE_UNKNOWN;
	if (gue->protocol != IPPROTO_IPIP && gue->protocol != IPPROTO_IPV6)
		return PASS_GUE_UNKNOWN;
	headers = sizeof(*udp) + sizeof(*gue) + GUE_WORDS(gue->first) * 4;
	if (bpf_ntohs(udp->len) != tunnel->inner_room || headers > tunnel->inner_room)
		return PASS_MALFORMED;
	tunnel->has_second_chance = names_other_member(gue, tunnel->end);
	tunnel->removed += headers;
	tunnel->inner_room -= headers;
	tunnel->inner_protocol = gue->protocol;
	tunnel->kind += GUE_4_IN_4;
	return GO_ON;
}

static __always_inline enum decap_reason parse_tunnel(struct tunnel *tunnel)
{
	__be16 ethertype = find_ethertype(tunnel);
	enum decap_reason why;

	if (!ethertype)
		return PASS_MALFORMED;
	if (ethertype == bpf_htons(ETH_P_IP))
		why = parse_outer4(tunnel);
	else if (ethertype == bpf_htons(ETH_P_IPV6))
		why = parse_outer6(tunnel);
	else
		why = PASS_NOT_IP;
	return why || tunnel->inner_protocol != IPPROTO_UDP ? why : parse_gue(tunnel);
}

static __always_inline int outer_source_allowed(const struct tunnel *tunnel)
{
	void *outer = outer_header(tunnel);

	if (!config.check_outer_source)
		return 1;
	if ((void *)((struct iphdr *)outer + 1) > tunnel->end)
		return 0;
	if (((struct iphdr *)outer)->version == 4)
		return holds4(&config.source4, &sources4, ((struct iphdr *)outer)->saddr);
	if ((void *)((struct ipv6hdr *)outer + 1) > tunnel->end)
		return 0;
	return holds6(&config.source6, &sources6, &((struct ipv6hdr *)outer)->saddr);
}

/* The inner packet */

/* RFC 6040, figure 4. Negative where the packet has to go. */
static __always_inline int merged_ecn(int inner, int outer)
{
	if (outer == CE)
		return inner == NOT_ECT ? -1 : CE;
	return inner == ECT_0 && outer == ECT_1 ? ECT_1 : inner;
}

static __always_inline enum decap_reason merge_ecn4(struct iphdr *ip, int outer)
{
	int ecn = merged_ecn(ip->tos & 3, outer);
	__u16 *word = (__u16 *)ip, before = *word;

	if (ecn < 0)
		return DROP_NOT_ECN_CAPABLE;
	ip->tos = (ip->tos & ~3) | ecn;
	ip->check = updated_checksum(ip->check, replaced16(0, before, *word));
	return GO_ON;
}

static __always_inline enum decap_reason merge_ecn6(struct ipv6hdr *ip, int outer)
{
	int ecn = merged_ecn(ip->flow_lbl[0] >> 4 & 3, outer);

	if (ecn < 0)
		return DROP_NOT_ECN_CAPABLE;
	ip->flow_lbl[0] = (ip->flow_lbl[0] & ~0x30) | ecn << 4;
	return GO_ON;
}

static __always_inline enum decap_reason check_source4(__be32 source, __be32 destination)
{
	__u32 first = bpf_ntohl(source) >> 24;

	if (source == 0xffffffff)
		return DROP_SOURCE_BROADCAST;
	if (first == 0)
		return DROP_SOURCE_UNSPECIFIED;
	if (first == 127)
		return DROP_SOURCE_LOOPBACK;
	if (first >> 4 == 0xe)
		return DROP_SOURCE_MULTICAST;
	if (source == destination)
		return DROP_SOURCE_IS_DESTINATION;
	if (config.several_destinations && holds4(&config.destination4, &destinations4, source))
		return DROP_SOURCE_IS_CONFIGURED;
	return GO_ON;
}

static __always_inline enum decap_reason check_source6(const struct in6_addr *source, const struct in6_addr *destination)
{
	const __be32 *words = source->in6_u.u6_addr32, *others = destination->in6_u.u6_addr32;

	if (!(words[0] | words[1] | words[2])) {
		if (!words[3])
			return DROP_SOURCE_UNSPECIFIED;
		if (words[3] == bpf_htonl(1))
			return DROP_SOURCE_LOOPBACK;
	}
	if ((words[0] & bpf_htonl(0xff000000)) == bpf_htonl(0xff000000))
		return DROP_SOURCE_MULTICAST;
	if ((words[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000))
		return DROP_SOURCE_LINK_LOCAL;
	if (words[0] == others[0] && words[1] == others[1] && words[2] == others[2] && words[3] == others[3])
		return DROP_SOURCE_IS_DESTINATION;
	if (config.several_destinations && holds6(&config.destination6, &destinations6, source))
		return DROP_SOURCE_IS_CONFIGURED;
	return GO_ON;
}

static __always_inline enum decap_reason check_inner4(struct tunnel *tunnel)
{
	struct iphdr *ip = inner_header(tunnel);
	enum decap_reason why;

	if ((void *)(ip + 1) > tunnel->end || tunnel->inner_room < sizeof(*ip) || ip->version != 4)
		return PASS_MALFORMED;
	if (!holds4(&config.destination4, &destinations4, ip->daddr))
		return PASS_NOT_CONFIGURED;
	if (!outer_source_allowed(tunnel))
		return DROP_OUTER_SOURCE;
	tunnel->inner_bytes = bpf_ntohs(ip->tot_len);
	if (ip->ihl < 5 || tunnel->inner_bytes < ip->ihl * 4 || tunnel->inner_bytes > tunnel->inner_room)
		return DROP_INNER_MALFORMED;
	why = check_source4(ip->saddr, ip->daddr);
	if (why || !tunnel->outer_ecn)
		return why;
	return merge_ecn4(ip, tunnel->outer_ecn);
}

static __always_inline enum decap_reason check_inner6(struct tunnel *tunnel)
{
	struct ipv6hdr *ip = inner_header(tunnel);
	enum decap_reason why;

	if ((void *)(ip + 1) > tunnel->end || tunnel->inner_room < sizeof(*ip) || ip->version != 6)
		return PASS_MALFORMED;
	if (!holds6(&config.destination6, &destinations6, &ip->daddr))
		return PASS_NOT_CONFIGURED;
	if (!outer_source_allowed(tunnel))
		return DROP_OUTER_SOURCE;
	tunnel->inner_bytes = sizeof(*ip) + bpf_ntohs(ip->payload_len);
	if (tunnel->inner_bytes > tunnel->inner_room)
		return DROP_INNER_MALFORMED;
	why = check_source6(&ip->saddr, &ip->daddr);
	if (why || !tunnel->outer_ecn)
		return why;
	return merge_ecn6(ip, tunnel->outer_ecn);
}

/* The way out */

/*
 * The Ethernet header, tags included, moves up to the inner packet before the start of the frame does: no pointer has to
 * be looked for again. From its end to its start, since the places may overlap.
 */
static __always_inline enum decap_reason remove_outer(struct xdp_md *ctx, const struct tunnel *tunnel)
{
	__u32 *from = tunnel->data, *to = tunnel->data + tunnel->removed;
	struct ethhdr *moved = (void *)to;
	__u32 mac[3];

	if ((void *)(moved + 1) + MAX_TAGS * sizeof(struct vlan_tag) > tunnel->end)
		return DROP_NO_ROOM;
	/* Six bytes of addresses twice, and four a tag: words, and the ethertype behind them. */
	*(__be16 *)(to + 3 + tunnel->tags) = tunnel->inner_protocol == IPPROTO_IPIP ? bpf_htons(ETH_P_IP)
										    : bpf_htons(ETH_P_IPV6);
	if (tunnel->tags > 1)
		to[4] = from[4];
	if (tunnel->tags > 0)
		to[3] = from[3];
	__builtin_memcpy(mac, from, sizeof(mac));
	__builtin_memcpy(to, mac, sizeof(mac));
	return bpf_xdp_adjust_head(ctx, tunnel->removed) ? DROP_NO_ROOM : DECAPSULATED;
}

static __always_inline void count_decapsulated(const struct tunnel *tunnel)
{
	__u32 kind = tunnel->kind;
	struct decapsulated *counted = bpf_map_lookup_elem(&tunnels, &kind);

	if (counted) {
		counted->packets++;
		counted->bytes += tunnel->inner_bytes;
	}
}

/* Of a tagged frame only the host knows the interface on which it would go on. */
static __always_inline int takes_second_chance(struct xdp_md *ctx, const struct tunnel *tunnel)
{
	if (!tunnel->tags && has_no_socket(ctx, tunnel->removed - GUE_WITH_SECOND_CHANCE))
		return 1;
	count_reason(NOTED_SECOND_CHANCE_KEPT);
	return 0;
}

static __always_inline enum decap_reason decapsulate(struct xdp_md *ctx, struct tunnel *tunnel)
{
	enum decap_reason why = parse_tunnel(tunnel);

	if (why)
		return why;
	if (tunnel->inner_protocol == IPPROTO_IPIP) {
		why = check_inner4(tunnel);
	} else {
		tunnel->kind++;
		why = check_inner6(tunnel);
	}
	if (why)
		return why;
	if (tunnel->has_second_chance && takes_second_chance(ctx, tunnel))
		return redirect_to_other_member(ctx, tunnel->removed - GUE_WITH_SECOND_CHANCE, tunnel->inner_bytes);
	why = remove_outer(ctx, tunnel);
	if (!why)
		count_decapsulated(tunnel);
	return why;
}

SEC("xdp")
int xdp_decap(struct xdp_md *ctx)
{
	struct tunnel tunnel = { .data = (void *)(long)ctx->data, .end = (void *)(long)ctx->data_end };
	enum decap_reason why = decapsulate(ctx, &tunnel);

	if (why == DECAPSULATED)
		return XDP_PASS;
	count_reason(why);
	return why >= DROP_OUTER_SOURCE ? XDP_DROP : XDP_PASS;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
