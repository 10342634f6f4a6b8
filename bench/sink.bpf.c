// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * The end of the road: counts and drops the packets for one port, which are the generator's. Whatever else
 * comes in is the host's.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define IP4_DESTINATION_PORT 22 /* behind a header without options */
#define IP6_DESTINATION_PORT 42

struct arrived {
	__u64 packets;
};

/* Of the packets that are counted. */
struct counted {
	__be16 port;
};

const volatile struct counted counted = {};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct arrived);
} arrived SEC(".maps");

static __always_inline int has_port(const void *place, const void *end)
{
	return place + sizeof(__be16) <= end && *(const __be16 *)place == counted.port;
}

static __always_inline int is_counted(const struct ethhdr *eth, const void *end)
{
	const void *ip = eth + 1;

	if (ip > end)
		return 0;
	if (eth->h_proto == bpf_htons(ETH_P_IP))
		return has_port(ip + IP4_DESTINATION_PORT, end);
	return eth->h_proto == bpf_htons(ETH_P_IPV6) && has_port(ip + IP6_DESTINATION_PORT, end);
}

SEC("xdp")
int sink(struct xdp_md *ctx)
{
	struct arrived *count;
	__u32 zero = 0;

	if (!is_counted((void *)(long)ctx->data, (void *)(long)ctx->data_end))
		return XDP_PASS;
	count = bpf_map_lookup_elem(&arrived, &zero);
	if (count)
		count->packets++;
	return XDP_DROP;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
