/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* IPv4 and IPv6 in one manner: `family` is a constant wherever speed counts, and the branch is gone. */
#pragma once

#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

/* <sys/socket.h> is libc's. */
#define AF_INET 2
#define AF_INET6 10

#define IP_DF bpf_htons(0x4000)
#define IP_MF bpf_htons(0x2000)
#define IP_OFFSET bpf_htons(0x1fff)

static __always_inline int ip_header_size(int family)
{
	return family == AF_INET ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);
}

/* DSCP and ECN. */
static __always_inline __u8 traffic_class(const void *ip, int family)
{
	if (family == AF_INET)
		return ((const struct iphdr *)ip)->tos;
	return bpf_ntohs(*(const __be16 *)ip) >> 4;
}
