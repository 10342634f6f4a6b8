/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* TCP connections opened by each /24; with -D LIMIT=N, what is beyond N in a second is dropped. */

#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/tcp.h>

#define SECOND_NS 1000000000ULL

/* The prefixes that have been silent longest make room for new ones. */
BPF_TABLE("lru_hash", struct in_addr, u64, syns, 16384);
#ifdef LIMIT
BPF_TABLE("lru_hash", struct in_addr, u64, dropped, 16384);

/* The second that is running, and the SYNs in it. The name begins with an underscore: it is not shown. */
struct window {
	u64 second;
	u64 syns;
};

BPF_TABLE("lru_hash", struct in_addr, struct window, _windows, 16384);

static int is_beyond_limit(struct in_addr *prefix)
{
	u64 second = bpf_ktime_get_ns() / SECOND_NS;
	struct window none = {}, *window = _windows.lookup_or_try_init(prefix, &none);

	if (!window)
		return 0;
	if (window->second != second) {
		window->second = second;
		window->syns = 0;
	}
	lock_xadd(&window->syns, 1);
	return window->syns > LIMIT;
}
#endif

static void add_one(u64 *count)
{
	if (count)
		lock_xadd(count, 1);
}

int stage(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *ethernet = data;
	struct iphdr *ip = data + sizeof(*ethernet);
	struct tcphdr *tcp;
	struct in_addr prefix;
	u64 zero = 0;

	if ((void *)(ip + 1) > end || ethernet->h_proto != bpf_htons(ETH_P_IP) || ip->protocol != IPPROTO_TCP)
		return XDP_PASS;
	tcp = (void *)ip + 4 * ip->ihl;
	if ((void *)(tcp + 1) > end || !tcp->syn || tcp->ack)
		return XDP_PASS;
	prefix.s_addr = ip->saddr & bpf_htonl(0xffffff00);
	add_one(syns.lookup_or_try_init(&prefix, &zero));
#ifdef LIMIT
	if (is_beyond_limit(&prefix)) {
		add_one(dropped.lookup_or_try_init(&prefix, &zero));
		return XDP_DROP;
	}
#endif
	return XDP_PASS;
}
