/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What a CPU does no more than so often a second. */
#pragma once

#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>

enum paced {
	PACED_RECORDS,
	PACED_TOO_BIG,
	PACED_TTL_EXPIRED,
	PACED_COUNT,
};

/* What one CPU has done in the second that runs. */
struct pace {
	__u64 second;
	__u64 done;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, PACED_COUNT);
	__type(key, __u32);
	__type(value, struct pace);
} paces SEC(".maps");

/* Whether this CPU may do it once more in this second. */
static __always_inline int within_pace(__u32 what, __u32 per_s, __u64 now)
{
	struct pace *pace = bpf_map_lookup_elem(&paces, &what);
	__u64 second = now / 1000000000;

	if (!pace)
		return 1;
	if (pace->second != second)
		*pace = (struct pace){ .second = second };
	return ++pace->done <= per_s;
}
