"""The rings of all services in the kernel: which slot words a service gets, and when a transition of theirs ends.

Enters: a service, where it lies, the numbers that its members have. Leaves: slot words in the map `rings`, each
written as a whole; lb.hashing.ring says what they mean.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass

from lb.dataplane import clock
from lb.dataplane.allocation import Allocation
from lb.dataplane.flow_tables import FlowTables
from lb.dataplane.members import MemberKey, member_key, member_keys, numbered
from lb.hashing import maglev, ring
from lb.model.state import Service
from xdp.maps import Map


@dataclass(frozen=True, slots=True)
class RingChange:
    """The slot words of one service before and after a change, and the numbers that its members have."""

    numbers: Mapping[MemberKey, int]
    old: array[int]
    new: array[int]

    @property
    def plan(self) -> ring.Plan:
        return ring.plan(self.old, self.new)


def first_ring(service: Service) -> RingChange:
    """The change of a service that has no ring yet."""
    numbers, empty = numbered({}, member_keys(service)), array("I", bytes(4 * service.ring_size))
    return RingChange(numbers, empty, _successors(empty, service, numbers))


class Rings:
    """The map `rings` as slot words in host byte order. Methods raise XdpError."""

    def __init__(self, rings: Map, flows: FlowTables) -> None:
        self._words = memoryview(rings.bytes()).cast("B").cast("I")
        self._flows = flows

    def __len__(self) -> int:
        """Slots."""
        return len(self._words)

    def slot_words(self, allocation: Allocation) -> array[int]:
        """A copy of the service's."""
        start = allocation.ring_base
        return array("I", self._words[start : start + allocation.ring_size].tobytes())

    def change(self, allocation: Allocation, service: Service, held: Mapping[MemberKey, int]) -> RingChange:
        """From the ring in force to that of `service`; nothing is written. held: the members in force."""
        numbers, old = numbered(held, member_keys(service)), self.slot_words(allocation)
        return RingChange(numbers, old, _successors(self._without_expired(allocation, old), service, numbers))

    def write(self, allocation: Allocation, words: array[int]) -> None:
        """Those that differ from what is there."""
        new, base = memoryview(words), allocation.ring_base
        for start, stop in ring.changed_runs(self.slot_words(allocation), words):
            self._words[base + start : base + stop] = new[start:stop]

    def expire(self, allocation: Allocation) -> bool:
        """End the transitions that have had their time, but for slots with flows that are open still: whether every
        slot is stable now."""
        words = self._without_expired(allocation, self.slot_words(allocation))
        self.write(allocation, words)
        return _all_stable(words)

    def _without_expired(self, allocation: Allocation, words: array[int]) -> array[int]:
        if not allocation.is_due(clock.now_ns()) or _all_stable(words):
            return words
        return ring.expire(words, self._flows.tracked_slots(allocation))

    def differing_slots(self, allocation: Allocation, service: Service, numbers: Mapping[MemberKey, int]) -> int:
        """How many slots of a service that was put would not stay as they are if it were put again."""
        words = self.slot_words(allocation)
        wanted = _successors(words, service, numbers)
        return 0 if words == wanted else sum(old != new for old, new in zip(words, wanted, strict=True))

    def slots_in_transition(self, allocation: Allocation) -> int:
        words = self.slot_words(allocation)
        if _all_stable(words):
            return 0
        return sum(word > ring.MEMBER_MASK and ring.previous_member(word) != 0 for word in words)


def _all_stable(words: array[int]) -> bool:
    return max(words) <= ring.MEMBER_MASK


def _successors(words: array[int], service: Service, numbers: Mapping[MemberKey, int]) -> array[int]:
    """The slot words that put the service in force where `words` are."""
    alive = frozenset(numbers[member_key(b)] for b in service.backends if not b.down)
    return ring.transition(words, _maglev_table(service, numbers), alive)


def _maglev_table(service: Service, numbers: Mapping[MemberKey, int]) -> array[int]:
    """Slot -> the number of the member wanted there, 0 = none."""
    members = [numbers[member_key(b)] for b in service.backends]
    weights = {str(b): b.ring_weight for b in service.backends}
    return maglev.table(weights, service.ring_size, members) or array("H", bytes(2 * service.ring_size))
