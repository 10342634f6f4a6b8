/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* A tag behind a frame's addresses: IEEE 802.1Q, or the outer one of two, 802.1ad. */
#pragma once

#include <linux/if_ether.h>
#include <linux/types.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define MAX_TAGS 2

struct vlan_tag {
	__be16 control;
	__be16 ethertype; /* of what is behind it */
};

static __always_inline int is_tag(__be16 ethertype)
{
	return ethertype == bpf_htons(ETH_P_8021Q) || ethertype == bpf_htons(ETH_P_8021AD);
}
