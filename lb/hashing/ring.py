"""Old slot words + new Maglev table -> new slot words, and what the change costs.

In come the ring of one service as it is in the kernel, the members that a new table wants in its
slots and the members that still live; out go the words to write, so that a connection stays on its
member as long as that member lives. Nothing here touches a map.

A slot word is a u32 in host byte order, read by xdp/bpf/lb/ring.h:

    bits  0-14  current: the member that new flows go to, 0 = none
    bits 15-29  previous: the member of flows older than the change, 0 = none
    bit  30     TRACK: look flows up in the flow table, record new ones

Members count from 1 within their service. A slot is stable (current alone), in transition
(previous and TRACK) or tracked (TRACK alone: no older flows are waited for, but recorded ones may
be on other members). For a packet on a TRACK slot the data path first asks the flow table; a hit
with a live member decides. On a miss, a flow that starts (TCP SYN) goes to current and is
recorded; any other goes to previous where there is one, and is recorded, else to current. So those
open flows of living members that are not recorded must all be on one member: previous where there
is one, else current. `successor` keeps that true.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Container, Sequence
from dataclasses import dataclass
from functools import cache

from lb.hashing import native

MEMBERS = range(1, 1 << 15)
MEMBER_MASK = 0x7FFF
PREVIOUS_SHIFT = 15
TRACK = 1 << 30

RUN_GAP = 64  # words: copying so many is cheaper than starting another write


def pack(current: int, previous: int = 0, track: bool = False) -> int:
    """A slot word of members within MEMBERS, or 0 for none."""
    return current | previous << PREVIOUS_SHIFT | (TRACK if track else 0)


def current_member(word: int) -> int:
    return word & MEMBER_MASK


def previous_member(word: int) -> int:
    return word >> PREVIOUS_SHIFT & MEMBER_MASK


def is_tracked(word: int) -> bool:
    return bool(word & TRACK)


@native.compiled(native.transition)
def transition(words: array[int], table: Sequence[int], alive: Collection[int]) -> array[int]:
    """The words that put `table` in force while flows of living members stay where they are.

    words: the ring in force, type "I"; all zeros for a new service.
    table: the member wanted in each slot, 0 = none (no backend is left), as many as words.
    alive: the members whose connections go on. A draining one is alive although no table has it.

    Raises ValueError if the lengths differ or the table names a member out of range.
    """
    _check_members(table)

    @cache  # a ring knows few different pairs
    def follow(word: int, current: int) -> int:
        return successor(word, current, alive)

    return array(
        "I",
        [word if word == current else follow(word, current) for word, current in zip(words, table, strict=True)],
    )


def _check_members(table: Sequence[int]) -> None:
    for member in (min(table, default=0), max(table, default=0)):
        if member and member not in MEMBERS:
            raise ValueError(f"member {member}: not in 0..{MEMBERS[-1]}")


def successor(word: int, current: int, alive: Container[int]) -> int:
    """The word that follows `word` once new flows of its slot go to `current`.

    The open flows that are not recorded belong to previous, if that lives: since it was replaced,
    every flow of a later member has been recorded. If it is dead, so are they, and those of the old
    current come next: all of its flows if the slot was stable, those that the flow table could not
    take if it was in transition. TRACK stays where it was: the slot may have recorded flows.
    """
    candidates = previous_member(word), current_member(word)
    oldest = next((member for member in candidates if member and member in alive), 0)
    previous = 0 if oldest == current else oldest
    return pack(current, previous, track=bool(previous) or is_tracked(word))


@native.compiled(native.expire)
def expire(words: array[int], tracked: Collection[int] = ()) -> array[int]:
    """The words after the flow timeout: no slot has a previous member any more.

    Call it only once every open flow older than the last change is recorded: any that sent a packet
    since is, so wait for the flow timeout after the change.

    tracked: the slots (indices into words) with live entries in the flow table; such a slot keeps
    TRACK if it had it. All others become stable, and a later transition must not believe what is
    left of their entries: erase these, or have them be misses by age.
    """
    kept = frozenset(tracked)
    return array(
        "I",
        [
            word & (MEMBER_MASK | TRACK if word > MEMBER_MASK and slot in kept else MEMBER_MASK)
            for slot, word in enumerate(words)
        ],
    )


@dataclass(frozen=True)
class Plan:
    """What a change of the ring costs, in slots."""

    slots: int
    moved: int  # new flows go to another member
    minimum: int  # the fewest that any scheme must move to give each member its new share
    in_transition: int  # older flows are looked up, now or still


def plan(old: array[int], new: array[int]) -> Plan:
    """The cost of replacing the words `old` by `new`; ValueError if their lengths differ."""
    moved, minimum, in_transition = costs(old, new)
    return Plan(len(new), moved, minimum, in_transition)


@native.compiled(native.costs)
def costs(old: array[int], new: array[int]) -> tuple[int, int, int]:
    """The slots moved, the minimum and those in transition of a Plan."""
    before, after = [*map(current_member, old)], [*map(current_member, new)]
    return (
        sum(b != a for b, a in zip(before, after, strict=True)),
        (Counter(after) - Counter(before)).total(),
        sum(previous_member(word) != 0 for word in new),
    )


def changed_runs(old: array[int], new: array[int]) -> list[tuple[int, int]]:
    """The parts [start, stop) of the ring to write so that `old` becomes `new`, in order.

    Changes with fewer than RUN_GAP equal words between them share a run. ValueError if the lengths
    differ.
    """
    return runs(old, new, RUN_GAP)


@native.compiled(native.runs)
def runs(old: array[int], new: array[int], gap: int) -> list[tuple[int, int]]:
    """Where the words differ, in parts with at least `gap` equal words between them."""
    found: list[tuple[int, int]] = []
    for slot in _changed_slots(old, new):
        if found and slot - found[-1][1] < gap:
            found[-1] = (found[-1][0], slot + 1)
        else:
            found.append((slot, slot + 1))
    return found


def _changed_slots(old: array[int], new: array[int]) -> list[int]:
    pairs = zip(old, new, strict=True)
    return [slot for slot, (before, after) in enumerate(pairs) if before != after]
