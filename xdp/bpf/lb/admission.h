/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What is asked of a packet before it is balanced: where it comes from, how many connections are opened, its MSS. */
#pragma once

#include "config.h"
#include "mss.h"
#include "packet.h"
#include "service.h"
#include "source.h"

#define OPTIONS_OF_ADMISSION \
	(OPTION_SOURCES | OPTION_ONLY_SOURCES | OPTION_SYN_LIMIT | OPTION_SYN_LIMIT_OF_SOURCE | OPTION_MSS)

static __always_inline __u32 *source_entry(__u32 service, const __be32 *client, int family)
{
	if (family == AF_INET) {
		struct source_key4 key = { .prefix_length = 64, .service = service, .address = client[0] };

		return bpf_map_lookup_elem(&sources4, &key);
	} else {
		struct source_key6 key = { .prefix_length = 160, .service = service };

		copy_address(key.address, client, AF_INET6);
		return bpf_map_lookup_elem(&sources6, &key);
	}
}

/* The number of the service that this client has here; NO_SERVICE where it is not allowed. */
SLOW_PATH __u32 service_of_source(const struct service *service, struct flow_key *flow, int family)
{
	__u32 *number;

	if (!service || !flow)
		return NO_SERVICE;
	number = source_entry(service->number, flow_source(flow), family);
	if (number)
		return *number;
	return service->options & OPTION_ONLY_SOURCES ? NO_SERVICE : service->number;
}

/*
 * The generic cell rate algorithm (ITU-T I.371): `time` is when the next opening would be in time if they came evenly; a
 * second's worth of them may come early. Where two CPUs meet, one goes uncounted.
 */
static __always_inline int exceeds_rate(__u64 *time, __u32 per_s, __u64 now)
{
	__u64 due = *time;
	__u64 next = (due > now ? due : now) + 1000000000ull / per_s;

	if (next > now + 1000000000ull)
		return 1;
	__sync_val_compare_and_swap(time, due, next);
	return 0;
}

static __always_inline int exceeds_source_limit(const struct service *service, const struct flow_key *flow, __u64 now,
						int family)
{
	struct source_prefix key = { .service = service->number };
	__u64 *time, start = now + 1000000000ull / service->syn_limit_of_source;

	key.address[0] = family == AF_INET ? flow->address[0] & bpf_htonl(0xffffff00) : flow->address[0];
	key.address[1] = family == AF_INET ? 0 : flow->address[1];
	time = bpf_map_lookup_elem(&source_syn_times, &key);
	if (time)
		return exceeds_rate(time, service->syn_limit_of_source, now);
	bpf_map_update_elem(&source_syn_times, &key, &start, BPF_ANY);
	return 0;
}

/* For the opening of a connection; the reason to drop it, or GO_ON. The source's limit first: it spares the service's. */
static __always_inline int check_syn_limits(const struct service *service, struct flow_key *flow, int family)
{
	__u32 number = service->number;
	__u64 *time, now = now_ns();

	if (service->options & OPTION_SYN_LIMIT_OF_SOURCE && exceeds_source_limit(service, flow, now, family))
		return DROP_SYN_LIMIT_OF_SOURCE;
	if (!(service->options & OPTION_SYN_LIMIT))
		return GO_ON;
	time = bpf_map_lookup_elem(&syn_times, &number);
	return time && exceeds_rate(time, service->syn_limit, now) ? DROP_SYN_LIMIT : GO_ON;
}

/*
 * The number of the service that takes the packet: this one, or that of its client's member set. Or, negative, the reason
 * not to take it.
 */
SLOW_PATH int admit(struct xdp_md *ctx, const struct service *service, struct flow_key *flow, int opens, int family)
{
	__u32 number;
	int why;

	if (!service || !flow)
		return -DROP_NO_BACKEND;
	if (source_is_vip(ctx, family))
		return -DROP_MARTIAN_SOURCE;
	number = service->number;
	if (service->options & (OPTION_SOURCES | OPTION_ONLY_SOURCES))
		number = service_of_source(service, flow, family);
	service = service_numbered(number);
	if (!service)
		return -DROP_SOURCE_NOT_ALLOWED;
	if (!opens)
		return number;
	why = check_syn_limits(service, flow, family);
	if (why)
		return -why;
	if (service->options & OPTION_MSS)
		clamp_mss(ctx, service->mss, family);
	return number;
}
