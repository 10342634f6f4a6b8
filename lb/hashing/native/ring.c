/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The loops of lb.maglev, lb.ring and lb.flow_hash, once more in C, for rings that change often. The Python functions
 * of those modules say what each one does and are the oracle of its tests; lb/hashing/native/__init__.py calls it from there.
 *
 * Arrays come in and go out by address; the caller has checked that their lengths agree.
 */
#include <arpa/inet.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "flow_types.h"
#include "slot_word.h"

#define NUMBERS (1u << 15) /* 0 and the members of a service */
#define PREVIOUS_SHIFT 15

/* A backend's next turn, due at time number / weight: 32 fractional bits, rounded down. Adding the exact quotient and
 * carrying the remainder saves the division. */
struct turn {
	uint64_t due, interval;
	uint32_t remainder, interval_remainder, weight;
};

/* Where a backend stands in its permutation. */
struct walk {
	uint32_t slot, skip;
};

static struct turn first_turn(uint32_t weight)
{
	const uint64_t one = 1ull << 32;

	return (struct turn){ .interval = one / weight, .interval_remainder = one % weight, .weight = weight };
}

static void next_turn(struct turn *turn)
{
	turn->due += turn->interval;
	turn->remainder += turn->interval_remainder;
	if (turn->remainder >= turn->weight) {
		turn->remainder -= turn->weight;
		turn->due++;
	}
}

/* Moves the smaller child up into the hole at the root, and so on down; returns where the hole ends, at a leaf. */
static uint32_t sink_hole(uint64_t *heap, uint32_t count)
{
	uint32_t hole = 0, child;

	for (; (child = 2 * hole + 2) < count; hole = child) {
		child -= heap[child - 1] < heap[child];
		heap[hole] = heap[child];
	}
	if (child == count) {
		heap[hole] = heap[child - 1];
		hole = child - 1;
	}
	return hole;
}

/* Puts `key` in the place of the smallest of a binary heap. A backend's next turn is late among the others', so the way
 * up from a leaf is short. */
static void replace_smallest(uint64_t *heap, uint32_t count, uint64_t key)
{
	uint32_t place = sink_hole(heap, count);

	for (; place && heap[(place - 1) / 2] > key; place = (place - 1) / 2)
		heap[place] = heap[(place - 1) / 2];
	heap[place] = key;
}

/* The bits that tell `count` indices apart. */
static uint32_t index_bits(uint32_t count)
{
	return count > 1 ? 32 - __builtin_clz(count - 1) : 0;
}

/* The next free slot of a backend. Where to go on is computed without a branch, which would be guessed wrong. */
static uint32_t claim(struct walk *walk, uint8_t *taken, uint32_t size)
{
	uint32_t slot = walk->slot, skip = walk->skip;

	while (taken[slot]) {
		uint32_t next = slot + skip, wrapped = next - size;

		slot = next < wrapped ? next : wrapped;
	}
	taken[slot] = 1;
	walk->slot = slot;
	return slot;
}

/* The backends and their table, in the making. */
struct claims {
	const uint32_t *weights;
	struct walk *walks;
	const uint16_t *labels;
	uint32_t backends, size;
	uint16_t *table;
	struct turn *turns;
	uint64_t *heap;
	uint8_t *taken;
};

static void claim_for(struct claims *claims, uint32_t backend)
{
	claims->table[claim(&claims->walks[backend], claims->taken, claims->size)] = claims->labels[backend];
}

static int has_equal_weights(const struct claims *claims)
{
	uint32_t backend = 1;

	while (backend < claims->backends && claims->weights[backend] == claims->weights[0])
		backend++;
	return backend == claims->backends;
}

/* Turns of equal weights go round and round: half the time of take_turns, in the most frequent case. */
static void take_rounds(struct claims *claims)
{
	for (uint32_t k = 0, backend = 0; k < claims->size; k++) {
		claim_for(claims, backend);
		backend = backend + 1 < claims->backends ? backend + 1 : 0;
	}
}

/*
 * Keys order turns by time, then by index. A turn is due before size / backends + 1, so a key is below
 * 2 * (size + backends) << 32: far from overflow.
 */
static void take_turns(struct claims *claims)
{
	uint32_t bits = index_bits(claims->backends);

	for (uint32_t backend = 0; backend < claims->backends; backend++) {
		claims->turns[backend] = first_turn(claims->weights[backend]);
		claims->heap[backend] = backend;
	}
	for (uint32_t k = 0; k < claims->size; k++) {
		uint32_t backend = claims->heap[0] & ((1ull << bits) - 1);
		struct turn *turn = &claims->turns[backend];

		claim_for(claims, backend);
		next_turn(turn);
		replace_smallest(claims->heap, claims->backends, turn->due << bits | backend);
	}
}

/* walks: changed. Returns 0, or -1 where memory is short. */
int maglev_claims(const uint32_t *weights, struct walk *walks, const uint16_t *labels, uint32_t backends, uint32_t size,
		  uint16_t *table)
{
	struct claims claims = {
		weights, walks, labels, backends, size, table,
		.turns = calloc(backends, sizeof(struct turn)),
		.heap = calloc(backends, sizeof(uint64_t)),
		.taken = calloc(size, 1),
	};
	int result = claims.turns && claims.heap && claims.taken ? 0 : -1;

	if (!result)
		(has_equal_weights(&claims) ? take_rounds : take_turns)(&claims);
	free(claims.turns);
	free(claims.heap);
	free(claims.taken);
	return result;
}

/* The first of `members` that is out of range, or `slots`. */
static uint32_t find_out_of_range(const uint16_t *members, uint32_t slots)
{
	uint32_t slot = 0;

	while (slot < slots && members[slot] < NUMBERS)
		slot++;
	return slot;
}

static uint32_t successor(uint32_t word, uint32_t current, const uint8_t *alive)
{
	uint32_t previous = RING_PREVIOUS(word);

	if (!alive[previous])
		previous = alive[RING_CURRENT(word)] ? RING_CURRENT(word) : 0;
	if (previous == current)
		previous = 0;
	return current | previous << PREVIOUS_SHIFT | (previous ? RING_TRACK : word & RING_TRACK);
}

/* alive: a flag for each number, 0 for number 0. Returns -1 where the table names a member out of range. */
int ring_transition(const uint32_t *words, const uint16_t *table, const uint8_t *alive, uint32_t slots, uint32_t *next)
{
	if (find_out_of_range(table, slots) < slots)
		return -1;
	for (uint32_t slot = 0; slot < slots; slot++)
		next[slot] = words[slot] == table[slot] ? words[slot] : successor(words[slot], table[slot], alive);
	return 0;
}

/* tracked: slots, those beyond the ring count for nothing. */
void ring_expire(const uint32_t *words, uint32_t slots, const uint32_t *tracked, uint32_t count, uint32_t *next)
{
	for (uint32_t slot = 0; slot < slots; slot++)
		next[slot] = RING_CURRENT(words[slot]);
	for (uint32_t i = 0; i < count; i++)
		if (tracked[i] < slots && words[tracked[i]] >= NUMBERS)
			next[tracked[i]] |= words[tracked[i]] & RING_TRACK;
}

/* costs: moved, minimum, in transition. */
void ring_costs(const uint32_t *old, const uint32_t *new, uint32_t slots, uint32_t *costs)
{
	int32_t gained[NUMBERS] = {};

	for (uint32_t slot = 0; slot < slots; slot++) {
		gained[RING_CURRENT(new[slot])]++;
		gained[RING_CURRENT(old[slot])]--;
		costs[0] += RING_CURRENT(old[slot]) != RING_CURRENT(new[slot]);
		costs[2] += RING_PREVIOUS(new[slot]) != 0;
	}
	for (uint32_t number = 0; number < NUMBERS; number++)
		costs[1] += gained[number] > 0 ? gained[number] : 0;
}

/* runs: pairs of start and stop, room for slots / (gap + 1) + 1 of them. Returns how many there are. */
uint32_t ring_changed_runs(const uint32_t *old, const uint32_t *new, uint32_t slots, uint32_t gap, uint32_t *runs)
{
	uint32_t count = 0;

	for (uint32_t slot = 0; slot < slots; slot++) {
		if (old[slot] == new[slot])
			continue;
		if (!count || slot - runs[2 * count - 1] >= gap)
			runs[2 * count++] = slot;
		runs[2 * count - 1] = slot + 1;
	}
	return count;
}

static uint64_t mix(uint64_t x)
{
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
	x = (x ^ x >> 27) * 0x94d049bb133111eb;
	return x ^ x >> 31;
}

static uint64_t flow_hash(const struct flow_key *key, uint32_t words, uint64_t seed)
{
	const uint32_t *source = key->address;
	uint64_t hash = mix(seed ^ ((uint64_t)key->protocol << 48 | (uint64_t)key->source_port << 32 | source[0]));

	if (words == 1)
		return hash;
	return mix(hash ^ (uint64_t)source[1] << 32 ^ source[2] ^ mix(hash + source[3]));
}

/* Which flows are asked for. */
struct sought {
	uint64_t seed, oldest_ns;
	uint32_t ring_size, words; /* of an address */
	uint32_t address[4];	   /* the VIP's first */
	uint32_t mask[4];	   /* which bits of it count */
	uint16_t first_port, last_port;
	uint8_t protocol;
};

static int is_in_network(const struct sought *sought, const uint32_t *address)
{
	for (uint32_t i = 0; i < sought->words; i++)
		if ((address[i] & sought->mask[i]) != sought->address[i])
			return 0;
	return 1;
}

static int is_sought(const struct sought *sought, const struct flow_key *key, const struct flow *flow)
{
	uint16_t port = ntohs(key->destination_port);

	return flow->seen_ns >= sought->oldest_ns && key->protocol == sought->protocol && port >= sought->first_port &&
	       port <= sought->last_port && is_in_network(sought, key->address + sought->words);
}

/* keys: struct flow_key, or flow_key4, which ends earlier. slots: room for `count`. Returns how many are found. */
uint32_t flow_recorded_slots(const struct sought *sought, const uint8_t *keys, const struct flow *flows, uint32_t count,
			     uint32_t *slots)
{
	uint32_t key_size = offsetof(struct flow_key, address) + 8 * sought->words, found = 0;

	for (uint32_t i = 0; i < count; i++) {
		const struct flow_key *key = (const void *)(keys + i * (size_t)key_size);

		if (is_sought(sought, key, &flows[i]))
			slots[found++] = (flow_hash(key, sought->words, sought->seed) >> 32) *
						 sought->ring_size >> 32;
	}
	return found;
}
