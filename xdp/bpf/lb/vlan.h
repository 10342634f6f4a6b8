/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Up to two VLAN tags (IEEE 802.1Q, 802.1ad) are set aside while the packet is balanced and put back whatever becomes of
 * it, so that the plain path knows untagged frames only.
 */
#pragma once

#include "config.h"
#include "packet.h"
#include "vlan_tag.h"

struct tags {
	__u32 words[MAX_TAGS]; /* as they lie in the frame, after the source address; 0: there is none */
};

/* The frame's addresses and nothing else move, by so many tags towards its end (or, < 0, towards its start). */
static __always_inline __u32 *move_addresses(struct xdp_md *ctx, int tags)
{
	__u32 *frame = (void *)(long)ctx->data, addresses[3];

	if ((void *)(frame + 3) > frame_end(ctx))
		return NULL;
	__builtin_memcpy(addresses, frame, sizeof(addresses));
	if (bpf_xdp_adjust_head(ctx, tags * (int)sizeof(struct vlan_tag)))
		return NULL;
	frame = (void *)(long)ctx->data;
	if ((void *)(frame + 3 + MAX_TAGS) > frame_end(ctx))
		return NULL;
	__builtin_memcpy(frame, addresses, sizeof(addresses));
	return frame;
}

/* Returns nonzero where there is nothing behind the tags, or a third one: that frame is left as it is. */
SLOW_PATH int remove_vlan_tags(struct xdp_md *ctx, struct tags *tags)
{
	__u32 *frame = (void *)(long)ctx->data;
	int two;

	if (!tags || (void *)(frame + 4 + 2 * MAX_TAGS) > frame_end(ctx))
		return -1;
	two = is_tag((__be16)frame[4]);
	if (two && is_tag((__be16)frame[5]))
		return -1;
	tags->words[0] = frame[3];
	tags->words[1] = two ? frame[4] : 0;
	if (move_addresses(ctx, two ? 2 : 1))
		return 0;
	tags->words[0] = 0;
	return -1;
}

SLOW_PATH int restore_vlan_tags(struct xdp_md *ctx, struct tags *tags)
{
	__u32 *frame;

	if (!tags)
		return -1;
	frame = move_addresses(ctx, tags->words[1] ? -2 : -1);
	if (!frame)
		return -1;
	frame[3] = tags->words[0];
	if (tags->words[1])
		frame[4] = tags->words[1];
	return 0;
}
