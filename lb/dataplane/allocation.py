"""How many entries the kernel's maps hold, and where in them each service lies (pure).

Enters: services, and what the maps in force hold. Leaves: the sizes that maps must have, and blocks of slots and of
members that no two services share.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Protocol, Self

from lb.model.state import Mode, Service
from lb.model.vip import Protocol as Transport
from lb.model.vip import Vip

# What maps hold at least. Rings: 64 services of the default size, 4 MiB. A translated flow has two entries, together
# about 260 bytes for IPv4.
MIN_SERVICES = 256
MIN_SLOTS = 1 << 20
MIN_MEMBERS = 1 << 13
MIN_SERVER_IDS = 1 << 10
TRACKED_FLOWS = 1 << 17
NAT_FLOWS = 1 << 18
FRAGMENTED_DATAGRAMS = 1 << 14
LIMITED_SOURCES = 1 << 16

FLOW_TABLES = ("flows4", "flows6", "nat_flows4", "nat_flows6", "nat_replies4", "nat_replies6", "fragments")

_SLOTS_A_LINE = 16


class Maps(Protocol):
    """Maps by name, such as xdp.object.BpfObject; the length of one is how many entries it can hold."""

    def map(self, name: str, /) -> Sized: ...


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many entries the maps hold."""

    services: int
    slots: int
    members: int
    server_ids: int
    nat4: int
    nat6: int

    @classmethod
    def of(cls, services: Sequence[Service]) -> Sizes:
        """Room for twice what they need; the tables of mode nat only where a service uses them."""
        nat = {s.vip.address.version for s in services if s.mode is Mode.NAT}
        return cls(
            services=_room(MIN_SERVICES, len(services)),
            slots=_room(MIN_SLOTS, sum(s.ring_size for s in services)),
            members=_room(MIN_MEMBERS, sum(member_block_size(len(s.backends)) for s in services)),
            server_ids=_room(MIN_SERVER_IDS, server_ids(services)),
            nat4=NAT_FLOWS if 4 in nat else 1,
            nat6=NAT_FLOWS if 6 in nat else 1,
        )

    @classmethod
    def held_by(cls, maps: Maps) -> Sizes:
        return cls(
            services=len(maps.map("services")),
            slots=len(maps.map("rings")) * _SLOTS_A_LINE,
            members=len(maps.map("members")),
            server_ids=len(maps.map("quic_members")),
            nat4=len(maps.map("nat_flows4")),
            nat6=len(maps.map("nat_flows6")),
        )

    def with_flow_tables_of(self, wanted: Sizes) -> Sizes:
        return replace(self, nat4=max(self.nat4, wanted.nat4), nat6=max(self.nat6, wanted.nat6))

    def with_room_for(self, wanted: Sizes) -> Sizes:
        """All that is there stays until what is wanted has been written."""
        return replace(
            self,
            services=self.services + wanted.services,
            slots=self.slots + wanted.slots,
            members=self.members + wanted.members,
            server_ids=self.server_ids + wanted.server_ids,
        )

    def by_map(self) -> dict[str, int]:
        return {
            "services": self.services,
            "syn_times": self.services,
            "services4": 3 * self.services,  # each may have an address of its own, whose echo requests are answered
            "services6": 3 * self.services,
            "rings": self.slots // _SLOTS_A_LINE,
            "members": self.members,
            "counters": self.members,
            "quic_members": self.server_ids,
            "source_syn_times": LIMITED_SOURCES,
            "fragments": FRAGMENTED_DATAGRAMS,
            "flows4": TRACKED_FLOWS,
            "flows6": TRACKED_FLOWS,
            "nat_flows4": self.nat4,
            "nat_replies4": self.nat4,
            "nat_flows6": self.nat6,
            "nat_replies6": self.nat6,
        }


def server_ids(services: Iterable[Service]) -> int:
    """How many there are. Only UDP services have any: the backends of the others are not looked at."""
    return sum(len(b.server_ids) for s in services if s.vip.protocol is Transport.UDP for b in s.backends)


def _room(least: int, wanted: int) -> int:
    return max(least, 1 << (2 * wanted).bit_length())


@dataclass(frozen=True, slots=True)
class Allocation:
    """A service as the kernel holds it: struct service and its key."""

    vip: Vip
    mode: Mode
    number: int
    ring_base: int
    ring_size: int
    member_base: int
    member_count: int
    flow_timeout_s: int
    affinity_s: int
    changed_ns: int  # CLOCK_MONOTONIC; 0: every slot is stable

    @property
    def ring_block(self) -> tuple[int, int]:
        return self.ring_base, self.ring_size

    @property
    def member_block(self) -> tuple[int, int]:
        return self.member_base, self.member_count

    def is_due(self, now_ns: int) -> bool:
        """Whether its transitions have had their time."""
        return now_ns >= self.changed_ns + self.flow_timeout_s * 1_000_000_000

    def is_like(self, service: Service) -> bool:
        """Whether it can become the service: what its flows depend on never changes."""
        return (self.mode, self.ring_size, bool(self.affinity_s)) == (
            service.mode,
            service.ring_size,
            bool(service.options.affinity_s),
        )


class Layout:
    """The numbers of services, and the blocks that they have in the maps of slots and of members."""

    def __init__(self, numbers: Blocks, rings: Blocks, members: Blocks) -> None:
        self._numbers, self._rings, self._members = numbers, rings, members

    @classmethod
    def of(cls, allocations: Iterable[Allocation], services: int, slots: int, members: int) -> Layout:
        """Of maps that hold so many services, slots and members."""
        found = list(allocations)
        return cls(
            Blocks(((each.number, 1) for each in found), services),
            Blocks((each.ring_block for each in found), slots),
            Blocks((each.member_block for each in found), members),
        )

    def copy(self) -> Layout:
        return Layout(self._numbers.copy(), self._rings.copy(), self._members.copy())

    def allocate(self, service: Service, old: Allocation | None, held: int) -> Allocation | None:
        """Where it lies: where it was, with a larger block of members if need be, or in new blocks; None: no room.

        old: the service in force, which is like this one. held: how many members its block has now; there must be room
        for these and for those that replace them.
        """
        wanted = len(service.backends)
        if old and old.member_count > held + wanted:
            return replace(old, flow_timeout_s=service.flow_timeout_s, affinity_s=service.options.affinity_s)
        member_count = _block_size(held, wanted)
        member_base = self._members.take(member_count)
        ring_base = old.ring_base if old else self._rings.take(service.ring_size)
        number = old.number if old else self._numbers.take(1)
        if member_base is None or ring_base is None or number is None:
            return None
        return Allocation(
            service.vip,
            service.mode,
            number,
            ring_base,
            service.ring_size,
            member_base,
            member_count,
            service.flow_timeout_s,
            service.options.affinity_s,
            old.changed_ns if old else 0,
        )

    def release(self, allocation: Allocation) -> None:
        self._numbers.release(allocation.number, 1)
        self._rings.release(*allocation.ring_block)
        self.release_members(allocation)

    def release_members(self, allocation: Allocation) -> None:
        self._members.release(*allocation.member_block)


def _block_size(held: int, wanted: int) -> int:
    """Room for both at once; a process that was killed may have left many members."""
    return member_block_size(max(wanted, (held + wanted + 1) // 2))


class Blocks:
    """The blocks in use of an array of `capacity` elements. First fit: what was freed is filled before the end."""

    def __init__(self, used: Iterable[tuple[int, int]], capacity: int) -> None:
        self._used = sorted(used)
        self._capacity = capacity

    def copy(self) -> Self:
        return type(self)(self._used, self._capacity)

    def take(self, size: int) -> int | None:
        """The base of a new block; None where there is no room."""
        base = 0
        for start, length in self._used:
            if start - base >= size:
                break
            base = start + length
        if base + size > self._capacity:
            return None
        insort(self._used, (base, size))
        return base

    def release(self, base: int, size: int) -> None:
        self._used.remove((base, size))


def member_block_size(members: int) -> int:
    """A power of two with room to grow: twice the members, and place 0, which means "none"."""
    return max(32, 1 << (2 * members).bit_length())
