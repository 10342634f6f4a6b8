/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The words that a ring consists of. User space's C includes this too. */
#pragma once

#include <linux/types.h>

#define RING_CURRENT(word) ((word) & 0x7fff)
#define RING_PREVIOUS(word) ((word) >> 15 & 0x7fff)
#define RING_PREVIOUS_MASK (0x7fffu << 15)
#define RING_TRACK (1u << 30)

#define SLOT_WORDS 16

/* A cache line of slot words. An array map pads each value to 8 bytes, so a value a word would waste every other one. */
struct slot_words {
	__u32 words[SLOT_WORDS];
};
