/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The wait of filters.ring between two harvests in C: a look at the rings in Python costs more than writing out a
 * thousand packets. The Python function there says what is done.
 *
 * Rings come in by the addresses of what their writers and their reader move.
 */
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

struct ring {
	const volatile uint64_t *head, *tail, *wrap;
};

/* Bytes that nobody has read. */
static uint64_t unread(const struct ring *ring)
{
	uint64_t head = *ring->head, tail = *ring->tail;

	return head >= tail ? head - tail : *ring->wrap - tail + head;
}

static bool any_holds(const struct ring *rings, uint32_t count, uint64_t enough)
{
	for (uint32_t i = 0; i < count; i++) {
		if (unread(&rings[i]) >= enough)
			return true;
	}
	return false;
}

/* Sleeps, so many times at most, until a ring holds so many bytes or a signal comes. */
void wait_for_records(const struct ring *rings, uint32_t count, uint64_t enough, uint64_t nap_ns, uint32_t naps)
{
	struct timespec nap = { .tv_sec = nap_ns / 1000000000, .tv_nsec = nap_ns % 1000000000 };

	while (naps-- && !any_holds(rings, count, enough) && !nanosleep(&nap, NULL))
		;
}
