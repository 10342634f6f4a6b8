/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* How many frames there are of each size, by powers of two. */

BPF_HISTOGRAM(frame_bytes);

int stage(struct xdp_md *ctx)
{
	frame_bytes.atomic_increment(bpf_log2l(ctx->data_end - ctx->data));
	return XDP_PASS;
}
