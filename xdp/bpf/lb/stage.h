/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Programs of others in a packet's path: in front of the balancer, and behind its verdict. Empty places of the map `stages`
 * cost a jump that is never taken; without any stage, only the flag is looked at.
 */
#pragma once

#include "config.h"
#include "maps.h"
#include "packet.h"

/*
 * Does not come back where there is a stage: the last one in front tail-calls the balancer. Nor where another balancer takes
 * over: it has all packets from one moment on, whichever of the two their interface runs.
 */
static __always_inline void run_front_stages(struct xdp_md *ctx)
{
	if (!(control.stages & (STAGES_IN_FRONT | STAGES_RELAY)))
		return;
	bpf_tail_call(ctx, &stages, STAGE_FILTER);
	bpf_tail_call(ctx, &stages, STAGE_USER);
	bpf_tail_call(ctx, &stages, STAGE_USER + 1);
	bpf_tail_call(ctx, &stages, STAGE_USER + 2);
	bpf_tail_call(ctx, &stages, STAGE_USER + 3);
	bpf_tail_call(ctx, &stages, STAGE_BALANCE);
}

static __always_inline void record_verdict(struct xdp_md *ctx, __u32 egress, enum reason why, int action)
{
	struct verdict *verdict;
	__u32 first = 0;

	verdict = bpf_map_lookup_elem(&verdicts, &first);
	if (!verdict)
		return;
	verdict->action = action;
	verdict->reason = why;
	verdict->egress = egress;
	verdict->bytes = frame_end(ctx) - (void *)(long)ctx->data;
}

/* The last stage behind returns the recorded action, or drops the packet. */
static __always_inline int run_exit_stages(struct xdp_md *ctx, __u32 egress, enum reason why, int action)
{
	if (!control.stages)
		return action;
	record_verdict(ctx, egress, why, action);
	if (!(control.stages & STAGES_BEHIND))
		return action;
	bpf_tail_call(ctx, &stages, STAGE_EXIT);
	bpf_tail_call(ctx, &stages, STAGE_EXIT + 1);
	bpf_tail_call(ctx, &stages, STAGE_EXIT + 2);
	bpf_tail_call(ctx, &stages, STAGE_EXIT + 3);
	return action;
}
