/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What filters.pcapng does with each packet, in C: the Python functions there say what is done, and are the oracle of its
 * tests. Records come in whole, in the host's byte order, with metadata in front of each packet.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define NS_PER_SECOND 1000000000ull
#define ENHANCED_PACKET_BLOCK 6
#define NO_DIRECTION 0

struct record {
	uint32_t seconds, fraction, caplen, length;
};

struct metadata {
	uint32_t ifindex, point, action, reason, egress;
};

struct block {
	uint32_t type, size, interface, time_high, time_low, caplen, length;
};

/* What a file knows of its interfaces, and options that are ready to be copied. */
struct table {
	const uint32_t *ifindexes; /* by the number that an interface has in the file */
	uint32_t interfaces;
	const uint32_t *directions; /* by capture point: the value of the option epb_flags */
	const uint8_t *comments;    /* one for each action and reason, of a whole number of words */
	const uint32_t *comment_ends;
	uint32_t actions, reasons; /* the last of each stands for all that are larger */
};

static const uint32_t flags_option = 2 | 4u << 16, end_of_options;

static uint32_t padded(uint32_t size)
{
	return (size + 3) & ~3u;
}

static uint32_t at_most(uint32_t value, uint32_t bound)
{
	return value < bound ? value : bound;
}

static uint32_t interface_number(const struct table *table, uint32_t ifindex)
{
	for (uint32_t i = 0; i < table->interfaces; i++)
		if (table->ifindexes[i] == ifindex)
			return i;
	return 0;
}

static uint8_t *put(uint8_t *out, const void *what, size_t size)
{
	memcpy(out, what, size);
	return out + size;
}

static uint8_t *put_options(uint8_t *out, const struct table *table, const struct metadata *metadata)
{
	uint32_t direction = table->directions[metadata->point];
	uint32_t row = at_most(metadata->action, table->actions - 1) * table->reasons + at_most(metadata->reason, table->reasons - 1);
	uint32_t start = row ? table->comment_ends[row - 1] : 0, size = table->comment_ends[row] - start;

	if (direction != NO_DIRECTION) {
		out = put(out, &flags_option, sizeof(flags_option));
		out = put(out, &direction, sizeof(direction));
	}
	out = put(out, table->comments + start, size);
	return direction != NO_DIRECTION || size ? put(out, &end_of_options, sizeof(end_of_options)) : out;
}

static uint8_t *put_block(uint8_t *out, const struct table *table, const struct record *record, const uint8_t *packet)
{
	uint8_t *start = out;
	struct metadata metadata;
	struct block block = { .type = ENHANCED_PACKET_BLOCK };
	uint64_t time = record->seconds * NS_PER_SECOND + record->fraction;
	uint32_t zero = 0;

	memcpy(&metadata, packet, sizeof(metadata)); /* records are not aligned */
	block.interface = interface_number(table, metadata.ifindex);
	block.time_high = time >> 32;
	block.time_low = time;
	block.caplen = record->caplen - sizeof(metadata);
	block.length = record->length - sizeof(metadata);
	out = put(out + sizeof(block), packet + sizeof(metadata), block.caplen);
	out = put(out, &zero, padded(block.caplen) - block.caplen);
	out = put_options(out, table, &metadata);
	block.size = out - start + sizeof(block.size);
	put(start, &block, sizeof(block));
	return put(out, &block.size, sizeof(block.size));
}

/* All records as blocks; returns how many bytes they are. `out` has room for them. */
size_t to_blocks(const struct table *table, const uint8_t *at, const uint8_t *end, uint8_t *out)
{
	uint8_t *start = out;

	while (at < end) {
		struct record record;

		memcpy(&record, at, sizeof(record));
		out = put_block(out, table, &record, at + sizeof(record));
		at += sizeof(record) + record.caplen;
	}
	return out - start;
}

/* All records without their metadata; returns how many bytes they are. */
size_t strip_metadata(const uint8_t *at, const uint8_t *end, uint8_t *out)
{
	uint8_t *start = out;

	while (at < end) {
		const uint8_t *packet = at + sizeof(struct record) + sizeof(struct metadata);
		struct record record;

		memcpy(&record, at, sizeof(record));
		at += sizeof(record) + record.caplen;
		record.caplen -= sizeof(struct metadata);
		record.length -= sizeof(struct metadata);
		out = put(out, &record, sizeof(record));
		out = put(out, packet, record.caplen);
	}
	return out - start;
}

size_t count_records(const uint8_t *at, const uint8_t *end)
{
	size_t count = 0;

	while (at < end) {
		struct record record;

		memcpy(&record, at, sizeof(record));
		at += sizeof(record) + record.caplen;
		count++;
	}
	return count;
}
