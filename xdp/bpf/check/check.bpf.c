// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * Health checks through the real path of modes dr, ipip and gue. Each backend of each service has an address of its own
 * behind a veth pair: what this host sends there comes out of the pair's other end, where check_out makes it a packet
 * to the VIP, puts it into the mode's tunnel and sends it to that very backend. The backend answers from the VIP to this
 * host; check_in, at the interfaces on which that arrives, makes it an answer from the address that was asked.
 *
 * At tc, where the kernel finds the neighbours. The pair's sending end computes all checksums.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include "encap.h"
#include "ip.h"

#define MAX_TARGETS 65536 /* IPv4 and IPv6 addresses end with the number of the target */
#define MAX_FLOWS 65536
#define L3 sizeof(struct ethhdr)
#define ICMP_CHECKSUM 2 /* where it lies in the header, in both families */
#define ICMP_HEADER 8

enum check_mode {
	CHECK_NONE,
	CHECK_DR,
	CHECK_IPIP,
	CHECK_GUE,
};

/* Addresses are four 32-bit words in network byte order; IPv4 uses word 0. */
struct check_target {
	__be32 vip[4];
	__be32 backend[4];
	__be32 source[4]; /* of the tunnel */
	__u32 ifindex;	  /* towards the backend */
	__be16 gue_port;
	__u8 mode;   /* enum check_mode */
	__u8 family; /* of the backend: AF_INET or AF_INET6 */
	__u8 outer_checksum;
	__u8 zero[3];
};

/* A flow as its answers carry it. */
struct check_flow {
	__be32 vip[4];
	__be32 own[4];
	__be16 vip_port;
	__be16 own_port;
	__u8 protocol;
	__u8 zero[3];
};

struct check_config {
	__be32 network4;    /* with a number in the last 16 bits: the address of a target */
	__be32 network6[3]; /* with a number in word 3 */
	__u32 ifindex;	    /* the pair's end that this host sends to */
	__u8 mac[6];	    /* of that end */
	__u8 zero[2];
};

const volatile struct check_config check_config = {};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_TARGETS);
	__type(key, __u32);
	__type(value, struct check_target);
} check_targets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_FLOWS);
	__type(key, struct check_flow);
	__type(value, __u32);
} check_flows SEC(".maps");

/* Never read: it puts the enum into the object's BTF. */
const volatile enum check_mode check_names;

/* Where the fields of a packet lie, from the start of the frame. */
struct fields {
	__u32 source, destination; /* addresses */
	__u32 l4;
	__u8 protocol;
};

static __always_inline int read_fields(struct __sk_buff *skb, struct fields *found, int family, __u32 l3)
{
	__u8 first, protocol;

	if (bpf_skb_load_bytes(skb, l3 + (family == AF_INET ? 9 : 6), &protocol, 1) || bpf_skb_load_bytes(skb, l3, &first, 1))
		return -1;
	if (family == AF_INET && first != 0x45)
		return -1;
	found->source = l3 + (family == AF_INET ? 12 : 8);
	found->destination = found->source + (family == AF_INET ? 4 : 16);
	found->l4 = l3 + (family == AF_INET ? sizeof(struct iphdr) : sizeof(struct ipv6hdr));
	found->protocol = protocol;
	return 0;
}

static __always_inline __u32 checksum_place(const struct fields *found)
{
	if (found->protocol == IPPROTO_TCP)
		return found->l4 + __builtin_offsetof(struct tcphdr, check);
	if (found->protocol == IPPROTO_UDP)
		return found->l4 + __builtin_offsetof(struct udphdr, check);
	return found->l4 + ICMP_CHECKSUM;
}

static __always_inline __s64 difference(__be32 *was, __be32 *now, int family)
{
	return family == AF_INET ? bpf_csum_diff(was, 4, now, 4, 0) : bpf_csum_diff(was, 16, now, 16, 0);
}

/*
 * An address becomes another one, and the checksums over it follow. With IPv6 the kernel's own sum over the packet has to
 * see the address change; with IPv4 the header's checksum makes up for it.
 */
static __always_inline int replace_address(struct __sk_buff *skb, const struct fields *found, __u32 place, __be32 *was,
					   __be32 *now, int family)
{
	__u64 flags = BPF_F_PSEUDO_HDR | (found->protocol == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0);
	__s64 sum = difference(was, now, family);

	if (family == AF_INET &&
	    bpf_l3_csum_replace(skb, L3 + __builtin_offsetof(struct iphdr, check), 0, sum, 0))
		return -1;
	if (!(family == AF_INET && found->protocol == IPPROTO_ICMP) &&
	    bpf_l4_csum_replace(skb, checksum_place(found), 0, sum, flags))
		return -1;
	if (family == AF_INET)
		return bpf_skb_store_bytes(skb, place, now, 4, 0);
	return bpf_skb_store_bytes(skb, place, now, 16, BPF_F_RECOMPUTE_CSUM);
}

static __always_inline int load_address(struct __sk_buff *skb, __u32 place, __be32 *words, int family)
{
	return family == AF_INET ? bpf_skb_load_bytes(skb, place, words, 4) : bpf_skb_load_bytes(skb, place, words, 16);
}

static __always_inline void target_address(__u32 number, __be32 *words, int family)
{
	if (family == AF_INET) {
		words[0] = check_config.network4 | bpf_htonl(number);
		return;
	}
	words[0] = check_config.network6[0];
	words[1] = check_config.network6[1];
	words[2] = check_config.network6[2];
	words[3] = bpf_htonl(number);
}

static __always_inline __u32 target_number(const __be32 *words, int family)
{
	return bpf_ntohl(words[family == AF_INET ? 0 : 3]) & (MAX_TARGETS - 1);
}

/* Out */

/*
 * The sum over the packet that gets into the tunnel. Behind its IP header, where the transport checksum makes up for all
 * of the data, it is that of the pseudo header, negated; an IPv4 header has a sum of nothing.
 */
static __always_inline __u32 inner_sum(struct __sk_buff *skb, int family)
{
	__be32 pseudo[10] = {};
	__be32 header[10] = {};
	__u32 bytes = skb->len - L3;

	if (family == AF_INET) {
		if (bpf_skb_load_bytes(skb, L3, header, sizeof(struct iphdr)))
			return 0;
		pseudo[0] = header[3];
		pseudo[1] = header[4];
		pseudo[2] = bpf_htonl((__u32)((struct iphdr *)header)->protocol << 16 | (bytes - sizeof(struct iphdr)));
		return bpf_csum_diff(pseudo, 12, NULL, 0, 0);
	}
	if (bpf_skb_load_bytes(skb, L3, header, sizeof(struct ipv6hdr)))
		return 0;
	__builtin_memcpy(pseudo, header + 2, 32);
	pseudo[8] = bpf_htonl(bytes - sizeof(struct ipv6hdr));
	pseudo[9] = bpf_htonl(((struct ipv6hdr *)header)->nexthdr);
	return bpf_csum_diff(pseudo, 40, header, 40, 0);
}

/* The room for the outer headers, in front of which the frame's own stay. */
static __always_inline int make_room(struct __sk_buff *skb, __u32 bytes, int is_gue, int outer_family)
{
	__be16 ethertype = outer_family == AF_INET ? bpf_htons(ETH_P_IP) : bpf_htons(ETH_P_IPV6);
	__u64 flags = BPF_F_ADJ_ROOM_NO_CSUM_RESET |
		      (outer_family == AF_INET ? BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 : BPF_F_ADJ_ROOM_ENCAP_L3_IPV6) |
		      (is_gue ? BPF_F_ADJ_ROOM_ENCAP_L4_UDP : 0);

	if (bpf_skb_adjust_room(skb, bytes, BPF_ADJ_ROOM_MAC, flags))
		return -1;
	return bpf_skb_store_bytes(skb, L3 - 2, &ethertype, 2, 0);
}

static __always_inline int encapsulate(struct __sk_buff *skb, const struct check_target *target, __be16 port, int family,
				       int outer_family)
{
	__be32 headers[(sizeof(struct ipv6hdr) + GUE_MOST) / 4] = {};
	void *gue = (void *)headers + ip_header_size(outer_family);
	struct encap encap = {
		.source = target->source,
		.destination = target->backend,
		.inner_bytes = skb->len - L3,
		.source_port = port | bpf_htons(GUE_SOURCE_PORTS), /* one for each flow */
		.destination_port = target->gue_port,
		.inner_protocol = family == AF_INET ? IPPROTO_IPIP : IPPROTO_IPV6,
		.is_gue = target->mode == CHECK_GUE,
	};

	if (encap.is_gue && target->outer_checksum)
		encap.inner_sum = fold(0xffff + (__u64)inner_sum(skb, family)); /* nothing, as its other form, which is not 0 */
	if (make_room(skb, ip_header_size(outer_family) + gue_bytes(encap.is_gue, 0), encap.is_gue, outer_family))
		return -1;
	write_outer_ip(headers, &encap, outer_family);
	if (bpf_skb_store_bytes(skb, L3, headers, ip_header_size(outer_family), BPF_F_INVALIDATE_HASH))
		return -1;
	if (!encap.is_gue)
		return 0;
	write_gue(gue, &encap, headers, outer_family);
	return bpf_skb_store_bytes(skb, L3 + ip_header_size(outer_family), gue, gue_bytes(1, 0), 0);
}

/* By the way to the backend: of what is not encapsulated, the backend is the neighbour. */
static __always_inline int redirect_to_backend(const struct check_target *target, int family)
{
	struct bpf_redir_neigh neighbour = { .nh_family = family };

	if (target->mode != CHECK_DR)
		return bpf_redirect_neigh(target->ifindex, NULL, 0, 0);
	if (family == AF_INET)
		neighbour.ipv4_nh = target->backend[0];
	else
		__builtin_memcpy(neighbour.ipv6_nh, target->backend, 16);
	return bpf_redirect_neigh(target->ifindex, &neighbour, sizeof(neighbour), 0);
}

static __always_inline int handle_request(struct __sk_buff *skb, int family)
{
	struct check_target *target;
	struct check_flow flow = {};
	struct fields found = {};
	__be32 asked[4] = {};
	__be16 ports[2];
	__u32 number;

	if (read_fields(skb, &found, family, L3))
		return TC_ACT_SHOT;
	if (found.protocol != IPPROTO_TCP && found.protocol != IPPROTO_UDP)
		return TC_ACT_SHOT;
	if (load_address(skb, found.destination, asked, family) || load_address(skb, found.source, flow.own, family) ||
	    bpf_skb_load_bytes(skb, found.l4, ports, sizeof(ports)))
		return TC_ACT_SHOT;
	number = target_number(asked, family);
	target = bpf_map_lookup_elem(&check_targets, &number);
	if (!target || target->mode == CHECK_NONE)
		return TC_ACT_SHOT;
	__builtin_memcpy(flow.vip, target->vip, 16);
	flow.own_port = ports[0];
	flow.vip_port = ports[1];
	flow.protocol = found.protocol;
	bpf_map_update_elem(&check_flows, &flow, &number, BPF_ANY);
	if (replace_address(skb, &found, found.destination, asked, target->vip, family))
		return TC_ACT_SHOT;
	if (target->mode != CHECK_DR && (target->family == AF_INET ? encapsulate(skb, target, ports[0], family, AF_INET)
								   : encapsulate(skb, target, ports[0], family, AF_INET6)))
		return TC_ACT_SHOT;
	return redirect_to_backend(target, family);
}

/* At the pair's end where all that this host sends to targets comes in. Nothing gets past it. */
SEC("tc")
int check_out(struct __sk_buff *skb)
{
	if (skb->protocol == bpf_htons(ETH_P_IP))
		return handle_request(skb, AF_INET);
	return skb->protocol == bpf_htons(ETH_P_IPV6) ? handle_request(skb, AF_INET6) : TC_ACT_SHOT;
}

/* In */

static __always_inline __u32 *target_of(struct __sk_buff *skb, const struct fields *found, __u32 vip, __u32 own, int swapped,
					int family)
{
	struct check_flow flow = {};
	__be16 ports[2];

	if (load_address(skb, vip, flow.vip, family) || load_address(skb, own, flow.own, family) ||
	    bpf_skb_load_bytes(skb, found->l4, ports, sizeof(ports)))
		return NULL;
	flow.vip_port = ports[swapped];
	flow.own_port = ports[!swapped];
	flow.protocol = found->protocol;
	return bpf_map_lookup_elem(&check_flows, &flow);
}

static __always_inline int deliver(struct __sk_buff *skb, const struct fields *found, __u32 number, int family)
{
	__be32 was[4] = {}, now[4] = {};
	__u8 mac[6];

	target_address(number, now, family);
	for (int i = 0; i < 6; i++)
		mac[i] = check_config.mac[i];
	if (bpf_skb_store_bytes(skb, 0, mac, sizeof(mac), 0)) /* else the packet is another host's there */
		return TC_ACT_SHOT;
	if (load_address(skb, found->source, was, family) || replace_address(skb, found, found->source, was, now, family))
		return TC_ACT_SHOT;
	return bpf_redirect(check_config.ifindex, BPF_F_INGRESS);
}

/*
 * An ICMP error about a check comes from anywhere, and quotes what was sent. The quoted address becomes the one that was
 * asked, as the socket knows it, and so does the source, which may be the VIP: this host's own, and no source for others.
 */
static __always_inline int handle_icmp_error(struct __sk_buff *skb, const struct fields *found, int family)
{
	__be32 was[4] = {}, now[4] = {};
	struct fields quoted = {};
	__u32 *number;

	if (read_fields(skb, &quoted, family, found->l4 + ICMP_HEADER))
		return TC_ACT_OK;
	if (quoted.protocol != IPPROTO_TCP && quoted.protocol != IPPROTO_UDP)
		return TC_ACT_OK;
	number = target_of(skb, &quoted, quoted.destination, quoted.source, 1, family);
	if (!number)
		return TC_ACT_OK;
	target_address(*number, now, family);
	if (load_address(skb, quoted.destination, was, family) ||
	    bpf_l4_csum_replace(skb, found->l4 + ICMP_CHECKSUM, 0, difference(was, now, family), 0))
		return TC_ACT_SHOT;
	if (family == AF_INET ? bpf_skb_store_bytes(skb, quoted.destination, now, 4, BPF_F_RECOMPUTE_CSUM)
			      : bpf_skb_store_bytes(skb, quoted.destination, now, 16, BPF_F_RECOMPUTE_CSUM))
		return TC_ACT_SHOT;
	return deliver(skb, found, *number, family);
}

static __always_inline int handle_answer(struct __sk_buff *skb, int family)
{
	struct fields found = {};
	__u32 *number;

	if (read_fields(skb, &found, family, L3))
		return TC_ACT_OK;
	if (found.protocol == (family == AF_INET ? IPPROTO_ICMP : IPPROTO_ICMPV6))
		return handle_icmp_error(skb, &found, family);
	if (found.protocol != IPPROTO_TCP && found.protocol != IPPROTO_UDP)
		return TC_ACT_OK;
	number = target_of(skb, &found, found.source, found.destination, 0, family);
	return number ? deliver(skb, &found, *number, family) : TC_ACT_OK;
}

/* Where the backends' answers arrive. All else goes on as if this were not there. */
SEC("tc")
int check_in(struct __sk_buff *skb)
{
	if (skb->protocol == bpf_htons(ETH_P_IP))
		return handle_answer(skb, AF_INET);
	return skb->protocol == bpf_htons(ETH_P_IPV6) ? handle_answer(skb, AF_INET6) : TC_ACT_OK;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
