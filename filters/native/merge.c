/* SPDX-License-Identifier: Apache-2.0 */
/*
 * filters.merge once more in C, for captures on several CPUs at millions of packets a second. The Python function there
 * says what is done and is the oracle of its tests.
 *
 * Sources come in by address; each has whole records in the order of time, in the host's byte order.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct record {
	uint32_t seconds, fraction, caplen, length;
};

struct source {
	const uint8_t *at, *end;
};

static const uint64_t never = UINT64_MAX;

static struct record header(const uint8_t *at)
{
	struct record record;

	memcpy(&record, at, sizeof(record)); /* records are not aligned */
	return record;
}

static uint64_t time_of_next(const struct source *source)
{
	if (source->at >= source->end)
		return never;
	struct record record = header(source->at);

	return (uint64_t)record.seconds << 32 | record.fraction;
}

/* The first of the earliest sources; `until` is when another one has its turn. */
static struct source *earliest(struct source *sources, uint32_t count, uint64_t *until)
{
	struct source *found = NULL;
	uint64_t first = never, second = never;

	for (uint32_t i = 0; i < count; i++) {
		uint64_t next = time_of_next(&sources[i]);

		if (next < first) {
			second = first;
			first = next;
			found = &sources[i];
		} else if (next < second) {
			second = next;
		}
	}
	*until = second;
	return found;
}

/* Steps over the records before a time, one at least. */
static const uint8_t *run_end(const struct source *source, uint64_t until)
{
	struct source rest = *source;

	do
		rest.at += sizeof(struct record) + header(rest.at).caplen;
	while (time_of_next(&rest) < until);
	return rest.at;
}

/* Writes all records to `out`, which has room for them, in the order of time; of equal ones those of the first source
 * come first. */
void merge_records(struct source *sources, uint32_t count, uint8_t *out)
{
	struct source *source;
	uint64_t until;

	while ((source = earliest(sources, count, &until))) {
		const uint8_t *end = run_end(source, until);

		memcpy(out, source->at, end - source->at);
		out += end - source->at;
		source->at = end;
	}
}
