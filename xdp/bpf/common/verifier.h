/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What the code says for the verifier's sake: of Linux 6.1, the oldest kernel that has to take it, and of later ones. */
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

/*
 * A function that is rarely called and verified once, by itself, whatever its callers know. Its pointers are unknown to
 * the verifier, so each one is tested for NULL. Linux 6.1 takes no map key from such a pointer: a function that looks up
 * its caller's key is `static`, hence verified with each caller.
 */
#define SLOW_PATH __attribute__((noinline))

/*
 * Where the frame ends. Each call loads it anew: a value that the compiler keeps it may copy as the 32 bits that the struct
 * says it has, and then the verifier takes it for a number.
 */
static __always_inline void *frame_end(struct xdp_md *ctx)
{
	void *end;

	asm volatile("%0 = *(u32 *)(%1 + %2)" : "=r"(end) : "r"(ctx), "i"(__builtin_offsetof(struct xdp_md, data_end)));
	return end;
}

/*
 * A length in host order that may be added to a packet pointer. The verifiers of Linux 6.1 and 6.12 forget all bounds in a
 * byte swap, and the compiler, which knows them, would leave the mask out.
 */
static __always_inline __u32 bounded_length(__be16 length)
{
	__u32 bytes = bpf_ntohs(length);

	asm volatile("" : "+r"(bytes));
	return bytes & 0xffff;
}
