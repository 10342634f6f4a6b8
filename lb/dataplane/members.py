"""The members of services in the kernel: which backend has which number, and what the programs count of each.

Enters: where a service lies, its backends and their next hops. Leaves: entries of the maps `members` and `counters`.
Slot words and flow entries name a member by its number in the service's block, so it keeps that as long as it lives;
number 0 means "none".
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from ipaddress import ip_address
from typing import Any, Protocol, TypeVar

from lb.dataplane.allocation import Allocation
from lb.hashing import ring
from lb.model.forwarding import Counters, InstalledNextHop, NextHop
from lb.model.options import Network, Options
from lb.model.state import Backend, Service
from lb.model.vip import Address

MAX_MTU = 65535  # of IP
MAX_VARIED_BITS = 32
ONE_SOURCE = 64

MemberKey = tuple[bytes, int]  # address, port: what tells one backend from another

K = TypeVar("K")


def member_key(backend: Backend) -> MemberKey:
    return backend.address.packed, backend.port


def member_keys(service: Service) -> list[MemberKey]:
    """Of its backends, in their order."""
    return [member_key(b) for b in service.backends]


def numbered(held: Mapping[K, int], wanted: Sequence[K]) -> dict[K, int]:
    """A number for each: the one it has, or the lowest one that no member has now."""
    used = set(held.values())
    free = (number for number in ring.MEMBERS if number not in used)
    return {key: held[key] if key in held else next(free) for key in wanted}


def _free_bits(prefix: Network | None) -> int:
    """How many bits of the outer source follow the flow: of IPv6, only the last 32 do. A single address differs from
    no prefix at all by a number that means none of the bits as well."""
    if prefix is None:
        return 0
    return min(prefix.max_prefixlen - prefix.prefixlen, MAX_VARIED_BITS) or ONE_SOURCE


def _new_uid() -> int:
    return 1 + secrets.randbelow(2**32 - 1)


def address_words(address: Address) -> list[int]:
    """An address as the maps have it: four words, IPv4 in the first."""
    return list(struct.unpack("!4I", address.packed.ljust(16, b"\0")))


class CounterMap(Protocol):
    """A per-CPU array of struct counter, such as xdp.maps.Map."""

    value_type: Any

    def total(self, index: int, /) -> Any: ...

    def set_total(self, index: int, value: Any, /) -> None: ...


class MemberTable:
    """The blocks of members of all services, and a counter for each place in them.

    members: a live ctypes array of struct member. counters: as long. flags: enum member_flag, name -> bit.
    """

    def __init__(self, members: Any, counters: CounterMap, flags: Mapping[str, int]) -> None:
        self._members, self._counters = members, counters
        self._struct = members._type_
        self._alive, self._resolved, self._ip6 = (flags[f"MEMBER_{name}"] for name in ("ALIVE", "RESOLVED", "IP6"))

    def __len__(self) -> int:
        return len(self._members)

    def numbers(self, allocation: Allocation) -> dict[MemberKey, int]:
        """Those alive in the service's block, with their numbers."""
        found = {}
        for number in range(1, allocation.member_count):
            member = self._members[allocation.member_base + number]
            if member.flags & self._alive:
                size = 16 if member.flags & self._ip6 else 4
                found[bytes(member.address)[:size], member.port] = number
        return found

    def indices(self, allocation: Allocation) -> dict[MemberKey, int]:
        """Those alive in the service's block, with their indices in both maps."""
        return {key: allocation.member_base + number for key, number in self.numbers(allocation).items()}

    def write(
        self,
        allocation: Allocation,
        service: Service,
        numbers: Mapping[MemberKey, int],
        hops: Mapping[Address, NextHop],
    ) -> None:
        """The counters of one that is new start at zero. One without a next hop in `hops` stays as it is."""
        for backend in service.backends:
            if backend.address not in hops:
                continue
            index = allocation.member_base + numbers[member_key(backend)]
            member = self._member(backend, self._with_known_mac(hops[backend.address], index), service.options)
            member.index = index
            self._put(member)

    def _with_known_mac(self, hop: NextHop, index: int) -> NextHop:
        """One that is silent keeps the MAC address that it had, on the same link: nobody knows a better one."""
        old = self._members[index]
        if hop.dst_mac is None and old.flags & self._resolved and old.hop.ifindex == hop.ifindex:
            return replace(hop, dst_mac=bytes(old.hop.destination))
        return hop

    def _member(self, backend: Backend, hop: NextHop, options: Options) -> Any:
        flags = self._alive | (self._resolved if hop.dst_mac else 0) | self._ip6 * (backend.address.version == 6)
        source = options.tunnel_source(backend.address.version)
        member = self._struct(port=backend.port, flags=flags, mtu=min(hop.mtu, MAX_MTU), source_bits=_free_bits(source))
        member.address[:] = address_words(backend.address)
        member.source[:] = address_words(source.network_address if source else hop.source)
        member.hop.ifindex = hop.ifindex
        member.hop.source[:] = hop.src_mac
        member.hop.destination[:] = hop.dst_mac or bytes(6)
        return member

    def _put(self, member: Any) -> None:
        index = member.index
        old = self._members[index]
        if old.flags & self._alive:
            member.uid = old.uid
        else:
            member.uid = _new_uid()
            self._counters.set_total(index, self._counters.value_type())
        if bytes(member) != bytes(old):
            self._members[index] = member

    def is_whole(self, allocation: Allocation, numbers: Mapping[MemberKey, int]) -> bool:
        """Those alive are these, under their numbers; next hops are not looked at."""
        return self.numbers(allocation) == numbers and all(
            self._members[allocation.member_base + number].index == allocation.member_base + number
            for number in numbers.values()
        )

    def restore(
        self,
        allocation: Allocation,
        service: Service,
        numbers: Mapping[MemberKey, int],
        uids: Mapping[MemberKey, int],
        hops: Mapping[Address, NextHop],
    ) -> None:
        """Each under its number again, whatever others have made of the block, with its uid as far as it is known, so
        that its flows are found, and with what it has counted."""
        wanted = {number: key for key, number in numbers.items()}
        for key, number in self.numbers(allocation).items():
            if wanted.get(number) != key:
                self._members[allocation.member_base + number] = self._struct()
        for backend in service.backends:
            if hop := hops.get(backend.address):
                member = self._member(backend, hop, service.options)
                member.index = allocation.member_base + numbers[member_key(backend)]
                member.uid = uids.get(member_key(backend), self._members[member.index].uid) or _new_uid()
                self._members[member.index] = member

    def uids(self, allocation: Allocation, numbers: Iterable[int]) -> Iterator[int]:
        return (self._members[allocation.member_base + number].uid for number in numbers)

    def follow(
        self,
        allocation: Allocation,
        numbers: Iterable[tuple[Backend, int]],
        options: Options,
        hops: Mapping[Address, NextHop],
    ) -> set[Address]:
        """Where entries of these backends say something else than `hops`, they are written; of which backends."""
        changed = set()
        for backend, number in numbers:
            index = allocation.member_base + number
            old = self._members[index]
            if not old.flags & self._alive:
                continue
            member = self._member(backend, self._with_known_mac(hops[backend.address], index), options)
            member.index, member.uid = index, old.uid
            if bytes(member) != bytes(old):
                self._members[index] = member
                changed.add(backend.address)
        return changed

    def next_hops(self, allocation: Allocation) -> Iterator[InstalledNextHop]:
        for (address, _), index in self.indices(allocation).items():
            member = self._members[index]
            mac = bytes(member.hop.destination) if member.flags & self._resolved else None
            yield InstalledNextHop(ip_address(address), member.hop.ifindex, mac)

    def disown_flows(self, allocation: Allocation, keys: Container[MemberKey]) -> None:
        """What is recorded as theirs, in whatever table, is a miss from now on; they keep what they have counted."""
        for key, index in self.indices(allocation).items():
            if key in keys:
                self._members[index].uid = _new_uid()

    def move(self, old: Allocation, new: Allocation) -> None:
        """Copies members to another block, each under its number and with what it has counted."""
        for number in self.numbers(old).values():
            member = self._struct.from_buffer_copy(self._members[old.member_base + number])
            index = new.member_base + number
            self._counters.set_total(index, self._counters.total(member.index))
            member.index = index
            self._members[index] = member

    def wipe(self, base: int, count: int) -> None:
        """A process that was killed may have left members in a block that no service has."""
        for index in range(base, base + count):
            if self._members[index].flags:
                self._members[index] = self._struct()

    def erase(self, allocation: Allocation, keep: Container[MemberKey] = ()) -> None:
        for key, index in self.indices(allocation).items():
            if key not in keep:
                self._members[index] = self._struct()

    def counters(self, allocation: Allocation) -> dict[Backend, Counters]:
        return {
            Backend(ip_address(address), port): self._totals(index)
            for (address, port), index in self.indices(allocation).items()
        }

    def _totals(self, index: int) -> Counters:
        total = self._counters.total(index)
        return Counters(
            total.packets,
            total.bytes,
            total.reply_packets,
            total.reply_bytes,
            total.connections,
            total.repeated_syns,
        )

    def is_sourced(self, allocation: Allocation, options: Options) -> bool:
        """Whether the outer sources that it has are those of the options."""
        for index in self.indices(allocation).values():
            member = self._members[index]
            source = options.tunnel_source(6 if member.flags & self._ip6 else 4)
            if member.source_bits != _free_bits(source):
                return False
            if source and list(member.source) != address_words(source.network_address):
                return False
        return True

    def resolved(self, allocation: Allocation) -> dict[MemberKey, bool]:
        """Member -> whether its next hop is known; else the programs have to look it up."""
        return {
            key: bool(self._members[index].flags & self._resolved) for key, index in self.indices(allocation).items()
        }
