/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Says hello to each packet. */

int stage(struct xdp_md *ctx)
{
	bpf_trace_printk("hello, packet of %d bytes\n", ctx->data_end - ctx->data);
	return XDP_PASS;
}
