"""The kernel side of the balancer: services, members and rings as BPF maps, programs on interfaces.

Enters: desired services and their next hops. Leaves: map contents that the programs act on, and what they have counted.
The kernel's maps are the only memory here: which number a member has, where a ring lies and what its slots say is read
from them, so that any process goes on where another stopped. Writes go members first, then slots, then erasures; each
one leaves a state that the programs can work with.
"""

from __future__ import annotations

import ctypes
import functools
import secrets
import socket
import struct
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from lb import maglev, ring
from lb.blocks import Blocks, member_block_size
from lb.errors import DataplaneError
from lb.flow_hash import Sought, recorded_slots
from lb.model import Address, Backend, Interface, Mode, Protocol, Service, Vip
from lb.paths import Paths
from lb.report import Attachment, Counters, NextHop, Statistics
from xdp import attach as xdp_attach
from xdp.errors import LoadError, XdpError
from xdp.netlink import route_socket
from xdp.object import LB_OBJECT, BpfObject, Program, pinned_program, program_name
from xdp.pins import Pins

__all__ = ["KernelDataplane", "route_socket"]

PROGRAM = "xdp_lb"

# What maps hold at least. Rings: 64 services of the default size, 4 MiB. A translated flow has two entries, together
# about 260 bytes for IPv4.
LEAST_SERVICES = 256
LEAST_SLOTS = 1 << 20
LEAST_MEMBERS = 1 << 13
TRACKED_FLOWS = 1 << 17
NAT_FLOWS = 1 << 18

_SLOTS_A_LINE = 16
_NS = 1_000_000_000

P = ParamSpec("P")
R = TypeVar("R")


def _translated(method: Callable[P, R]) -> Callable[P, R]:
    """The one edge where errors of the xdp package become the balancer's."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except XdpError as error:
            raise DataplaneError(str(error)) from error

    return call


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many entries the maps hold."""

    services: int
    slots: int
    members: int
    nat4: int
    nat6: int

    @classmethod
    def of(cls, services: Sequence[Service]) -> Sizes:
        """Room for twice what is asked for; the tables of mode nat only where a service uses them."""
        nat = {s.vip.address.version for s in services if s.mode is Mode.NAT}
        return cls(
            services=_room(LEAST_SERVICES, len(services)),
            slots=_room(LEAST_SLOTS, sum(s.ring_size for s in services)),
            members=_room(LEAST_MEMBERS, sum(member_block_size(len(s.backends)) for s in services)),
            nat4=NAT_FLOWS if 4 in nat else 1,
            nat6=NAT_FLOWS if 6 in nat else 1,
        )

    @classmethod
    def held_by(cls, obj: BpfObject) -> Sizes:
        return cls(
            services=len(obj.map("services4")),
            slots=len(obj.map("rings")) * _SLOTS_A_LINE,
            members=len(obj.map("members")),
            nat4=len(obj.map("nat_flows4")),
            nat6=len(obj.map("nat_flows6")),
        )

    def by_map(self) -> dict[str, int]:
        return {
            "services4": self.services,
            "services6": self.services,
            "rings": self.slots // _SLOTS_A_LINE,
            "members": self.members,
            "counters": self.members,
            "flows4": TRACKED_FLOWS,
            "flows6": TRACKED_FLOWS,
            "nat_flows4": self.nat4,
            "nat_replies4": self.nat4,
            "nat_flows6": self.nat6,
            "nat_replies6": self.nat6,
        }


_FLOW_TABLES = ("flows4", "flows6", "nat_flows4", "nat_flows6", "nat_replies4", "nat_replies6")


def _room(least: int, asked: int) -> int:
    return max(least, 1 << (2 * asked).bit_length())


@dataclass(frozen=True, slots=True)
class Placed:
    """A service as the kernel holds it: struct service and its key."""

    vip: Vip
    mode: Mode
    ring_base: int
    ring_size: int
    member_base: int
    member_count: int
    flow_timeout_s: int
    changed_ns: int

    @property
    def ring_block(self) -> tuple[int, int]:
        return self.ring_base, self.ring_size

    @property
    def member_block(self) -> tuple[int, int]:
        return self.member_base, self.member_count


MemberKey = tuple[bytes, int]  # address, port: what tells one backend from another


def _member_key(backend: Backend) -> MemberKey:
    return backend.address.packed, backend.port


@dataclass(frozen=True, slots=True)
class RingChange:
    """The slot words of one service before and after a change, and the numbers that its members have."""

    numbers: Mapping[MemberKey, int]
    old: array[int]
    new: array[int]

    @property
    def plan(self) -> ring.Plan:
        return ring.plan(self.old, self.new)


class KernelDataplane:
    """See lb.balancer.Dataplane, which this implements. Every method raises DataplaneError."""

    def __init__(self, pins: Pins) -> None:
        self._pins = pins
        self._object: BpfObject | None = None
        self._unusable: LoadError | None = None
        self._placed: dict[Vip, Placed] = {}
        if current := pins.current():
            self._adopt(current)

    @classmethod
    @_translated
    def open(cls, paths: Paths) -> KernelDataplane:
        """What an earlier process pinned, or nothing yet; either way nothing is written."""
        return cls(Pins(paths.run_dir, paths.netns))

    # Programs and maps

    @property
    def loaded(self) -> bool:
        return self._object is not None or self._unusable is not None

    @property
    def _obj(self) -> BpfObject:
        if self._unusable:
            raise DataplaneError(
                f"the programs in force are of another version of xdp-lb ({self._unusable}):"
                " xdp-lb detach, then xdp-lb attach IFACE"
            )
        if self._object is None:
            raise DataplaneError("nothing is loaded: xdp-lb attach IFACE does it")
        return self._object

    @property
    def _program(self) -> Program:
        return self._obj.program(PROGRAM)

    @property
    def _control(self) -> Any:
        return self._obj.variable("control")

    def _adopt(self, generation: Path) -> None:
        """Of pins that another version of xdp-lb has left, only detach() and unload() know what to do."""
        obj = BpfObject.open(LB_OBJECT)
        try:
            obj.adopt(str(generation))
        except LoadError as error:
            obj.close()
            self._unusable = error
        else:
            self._use(obj)

    def _use(self, obj: BpfObject) -> None:
        """Makes a loaded or adopted object the one that all methods work on."""
        if self._object:
            self._object.close()
        self._object = obj
        self._modes = {
            value: Mode(name.removeprefix("MODE_").lower()) for name, value in obj.types.enum("mode").items()
        }
        self._mode_values = {mode: value for value, mode in self._modes.items()}
        flags = obj.types.enum("member_flag")
        self._alive, self._resolved = flags["MEMBER_ALIVE"], flags["MEMBER_RESOLVED"]
        self._members = obj.map("members").view()
        self._words = memoryview(obj.map("rings").bytes()).cast("B").cast("I")
        self._counters = obj.map("counters")
        self._placed = {placed.vip: placed for placed in self._read_services()}
        self._ring_blocks = Blocks((p.ring_block for p in self._placed.values()), len(self._words))
        self._member_blocks = Blocks((p.member_block for p in self._placed.values()), len(self._members))

    @_translated
    def load(self, services: Sequence[Service]) -> None:
        if not self.loaded:
            self._install(self._new_object(Sizes.of(services)))
        elif (sizes := self._sizes_for(services)) != Sizes.held_by(self._obj):
            self._grow(sizes)
        if self._pins.others():
            self._leave_older_generations()
        self._end_transitions()

    def _sizes_for(self, services: Sequence[Service]) -> Sizes:
        """Those of the maps in force, as long as everything fits."""
        held, wanted = Sizes.held_by(self._obj), Sizes.of(services)
        sizes = replace(held, nat4=max(held.nat4, wanted.nat4), nat6=max(held.nat6, wanted.nat6))
        if self._fits(services):
            return sizes
        return replace(
            sizes,
            services=held.services + wanted.services,
            slots=held.slots + wanted.slots,
            members=held.members + wanted.members,
        )

    def _fits(self, services: Sequence[Service]) -> bool:
        """Whether every service finds room, on top of all that is there."""
        rings, members = self._ring_blocks.copy(), self._member_blocks.copy()
        for service in services:
            placed = self._alike(service)
            if not placed and rings.take(service.ring_size) is None:
                return False
            if not self._has_room(placed, service) and members.take(self._block_size(placed, service)) is None:
                return False
        vips = self._placed.keys() | {service.vip for service in services}
        return len(vips) <= Sizes.held_by(self._obj).services

    def _alike(self, service: Service) -> Placed | None:
        """The service as it is in force; None also where it has another mode or ring size there."""
        placed = self._placed.get(service.vip)
        if placed and (placed.mode, placed.ring_size) == (service.mode, service.ring_size):
            return placed
        return None

    def _has_room(self, placed: Placed | None, service: Service) -> bool:
        """Whether the service's block of members can hold those it has and those that replace them."""
        return placed is not None and placed.member_count > len(self._members_held(placed)) + len(service.backends)

    def _block_size(self, placed: Placed | None, service: Service) -> int:
        """Of a new block for what `_has_room` speaks of; a process that was killed may have left many members."""
        held = len(self._members_held(placed)) if placed else 0
        return member_block_size(max(len(service.backends), (held + len(service.backends) + 1) // 2))

    @staticmethod
    def _new_object(sizes: Sizes, keep: BpfObject | None = None) -> BpfObject:
        """A loaded object; tables of flows that have the right size already are taken from `keep`."""
        obj = BpfObject.open(LB_OBJECT)
        for name, entries in sizes.by_map().items():
            obj.resize(name, entries)
            if keep and name in _FLOW_TABLES and len(keep.map(name)) == entries:
                obj.reuse(name, keep.map(name).fd)
        obj.load()
        return obj

    def _install(self, obj: BpfObject) -> None:
        """Pins a loaded object and puts it in force."""
        generation = self._pins.prepare()
        obj.pin(str(generation))
        self._pins.put_in_force(generation)
        self._use(obj)

    def _grow(self, sizes: Sizes) -> None:
        """Larger maps with the same contents, and programs that use them in the place of the old: nothing is dropped.

        The old program counts on until it is replaced; what it counts between the copy and then is lost.
        """
        obj = self._new_object(sizes, keep=self._obj)
        places = (p.member_base + number for p in self._placed.values() for number in self._members_held(p).values())
        _copy_contents(self._obj, obj, places)
        self._install(obj)

    def _leave_older_generations(self) -> None:
        """Have all our interfaces run the program in force; also ends a growth that was cut short."""
        for name in self.attachments():
            self.attach(Interface(name))
        for generation in self._pins.others():
            self._pins.discard(generation)

    def close(self) -> None:
        """Gives up this process's hold; what is pinned and attached stays."""
        if self._object:
            self._object.close()
            self._object = None

    @_translated
    def unload(self) -> None:
        self.close()
        self._unusable, self._placed = None, {}
        self._pins.remove()

    @property
    def generation(self) -> int:
        return int(self._control.generation) if self.loaded else 0

    @generation.setter
    def generation(self, value: int) -> None:
        if self._object:
            self._control.generation = value

    # Interfaces

    def _our_programs(self) -> dict[int, Program]:
        """By id: ours, and what is still pinned of earlier generations."""
        own = [self._program] if self._object else self._pinned_programs([self._pins.current()])
        return {program.id: program for program in (*own, *self._pinned_programs(self._pins.others()))}

    @staticmethod
    def _pinned_programs(generations: Iterable[Path | None]) -> Iterator[Program]:
        """Where there is none, the process that should have pinned it was killed before it could be attached."""
        for generation in filter(None, generations):
            with suppress(LoadError):
                yield pinned_program(str(generation), PROGRAM)

    @_translated
    def attach(self, interface: Interface) -> Attachment:
        ifindex = socket.if_nametoindex(interface.name)
        running = xdp_attach.attached(ifindex)
        ours = self._our_programs()
        done = xdp_attach.attach(
            ifindex,
            self._program.fd,
            self._program.id,
            interface.xdp_mode.value,
            replace_fd=ours[running.program_id].fd if running and running.program_id in ours else None,
            describe=lambda number: f"id {number}, name {program_name(number)}",
        )
        return Attachment(interface.name, done.mode, done.program_id, done.warning)

    @_translated
    def detach(self, name: str) -> None:
        try:
            ifindex = socket.if_nametoindex(name)
        except OSError:
            return
        running = xdp_attach.attached(ifindex)
        if running and running.program_id in (ours := self._our_programs()):
            xdp_attach.detach(ifindex, ours[running.program_id].fd)

    @_translated
    def attachments(self) -> Mapping[str, Attachment]:
        if not self.loaded:
            return {}
        ours = self._our_programs()
        return {
            name: Attachment(name, running.mode, running.program_id)
            for name, running in xdp_attach.all_attached().items()
            if running.program_id in ours
        }

    # Services

    def vips(self) -> Set[Vip]:
        return self._placed.keys()

    @_translated
    def plan(self, service: Service) -> ring.Plan:
        return self._ring_change(service).plan

    @_translated
    def put(self, service: Service, hops: Mapping[Address, NextHop]) -> ring.Plan:
        if not self._alike(service):
            self.remove(service.vip)
        change = self._ring_change(service)
        placed = self._place(service)
        self._write_members(placed, service, change.numbers, hops)
        if placed.vip in self._placed:  # the time of the change first: UDP is told old from new by it
            self._write_service(
                replace(placed, changed_ns=_now_ns() if change.old != change.new else placed.changed_ns)
            )
            self._write_words(placed, change)
        else:
            self._write_words(placed, change)
            self._write_service(placed)
        self._erase_members(placed, change.numbers)
        return change.plan

    @_translated
    def remove(self, vip: Vip) -> None:
        placed = self._placed.pop(vip, None)
        if placed is None:
            return
        del self._services(vip)[self._service_key(vip)]
        self._count_any_port()
        self._erase_members(placed, {})
        self._ring_blocks.release(*placed.ring_block)
        self._member_blocks.release(*placed.member_block)

    def _ring_change(self, service: Service) -> RingChange:
        placed = self._alike(service)
        held = self._members_held(placed) if placed else {}
        numbers = _numbered(held, [_member_key(b) for b in service.backends])
        old = self._words_of(placed) if placed else array("I", bytes(4 * service.ring_size))
        members = [numbers[_member_key(b)] for b in service.backends]
        weights = {str(b): b.ring_weight for b in service.backends}
        wanted = maglev.table(weights, service.ring_size, members) or array("H", bytes(2 * service.ring_size))
        start = self._expired(placed, old) if placed else old
        return RingChange(numbers, old, ring.transition(start, wanted, frozenset(numbers.values())))

    def _words_of(self, placed: Placed) -> array[int]:
        return array("I", self._words[placed.ring_base : placed.ring_base + placed.ring_size].tobytes())

    def _expired(self, placed: Placed, words: array[int]) -> array[int]:
        """The words without the transitions that have had their time."""
        if _now_ns() < placed.changed_ns + placed.flow_timeout_s * _NS or max(words) <= ring.MEMBER_MASK:
            return words
        return ring.expire(words, self._tracked_slots(placed))

    def _end_transitions(self) -> None:
        """Makes stable, in all services, what has been in transition for the flow timeout."""
        for placed in [p for p in self._placed.values() if p.changed_ns]:
            old = self._words_of(placed)
            new = self._expired(placed, old)
            self._write_words(placed, RingChange({}, old, new))
            if max(new) <= ring.MEMBER_MASK:
                self._write_service(replace(placed, changed_ns=0))

    def _tracked_slots(self, placed: Placed) -> set[int]:
        """The slots with flows in the flow table that have not timed out."""
        table = self._obj.map(f"flows{placed.vip.address.version}")
        sought = Sought(
            address=placed.vip.address.packed,
            port=placed.vip.port,
            protocol=placed.vip.protocol,
            oldest_ns=_now_ns() - placed.flow_timeout_s * _NS,
            seed=self._seed(),
            ring_size=placed.ring_size,
        )
        return set().union(*(recorded_slots(keys, flows, sought) for keys, flows in table.batches()))

    def _seed(self) -> int:
        return int(self._obj.map(".rodata")[0].config.hash_seed)

    def _place(self, service: Service) -> Placed:
        """Where the service lies: where it was, with a larger block of members if need be, or in new blocks."""
        old = self._placed.get(service.vip)
        if old and self._has_room(old, service):
            return replace(old, flow_timeout_s=service.flow_timeout_s)
        members = self._block_size(old, service)
        member_base = _found(self._member_blocks.take(members))
        self._wipe_members(member_base, members)
        if old:
            self._move_members(old, member_base)
            return replace(old, flow_timeout_s=service.flow_timeout_s, member_base=member_base, member_count=members)
        ring_base = _found(self._ring_blocks.take(service.ring_size))
        return Placed(
            service.vip, service.mode, ring_base, service.ring_size, member_base, members, service.flow_timeout_s, 0
        )

    def _wipe_members(self, base: int, count: int) -> None:
        """A process that was killed may have left members in a block that no service has."""
        for index in range(base, base + count):
            if self._members[index].flags:
                self._members[index] = type(self._members[0])()

    def _move_members(self, old: Placed, base: int) -> None:
        for number in self._members_held(old).values():
            member = type(self._members[0]).from_buffer_copy(self._members[old.member_base + number])
            self._counters.set_total(base + number, self._counters.total(member.counter))
            member.counter = base + number
            self._members[base + number] = member

    # Members

    def _members_held(self, placed: Placed) -> dict[MemberKey, int]:
        """Those alive in the service's block: address and port -> number."""
        size = 4 if placed.vip.address.version == 4 else 16
        found = {}
        for number in range(1, placed.member_count):
            member = self._members[placed.member_base + number]
            if member.flags & self._alive:
                found[bytes(member.address)[:size], member.port] = number
        return found

    def _write_members(
        self,
        placed: Placed,
        service: Service,
        numbers: Mapping[MemberKey, int],
        hops: Mapping[Address, NextHop],
    ) -> None:
        for backend in service.backends:
            number = numbers[_member_key(backend)]
            index = placed.member_base + number
            old = self._members[index]
            if not old.flags & self._alive:
                self._counters.set_total(index, self._counters.value_type())
            new = self._member(backend, hops[backend.address])
            new.number, new.counter = number, index
            new.uid = old.uid if old.flags & self._alive else 1 + secrets.randbelow(2**32 - 1)
            if bytes(new) != bytes(old):
                self._members[index] = new

    def _member(self, backend: Backend, hop: NextHop) -> Any:
        member = type(self._members[0])(port=backend.port, flags=self._alive | (self._resolved if hop.dst_mac else 0))
        member.address[:] = _words(backend.address)
        member.source[:] = _words(hop.source)
        member.hop.ifindex = hop.ifindex
        member.hop.source[:] = hop.src_mac
        member.hop.destination[:] = hop.dst_mac or bytes(6)
        return member

    def _erase_members(self, placed: Placed, keep: Mapping[MemberKey, int]) -> None:
        for key, number in self._members_held(placed).items():
            if key not in keep:
                self._members[placed.member_base + number] = type(self._members[0])()

    # Rings

    def _write_words(self, placed: Placed, change: RingChange) -> None:
        new, base = memoryview(change.new), placed.ring_base
        before = change.old if placed.vip in self._placed else self._words_of(placed)
        for start, stop in ring.changed_runs(before, change.new):
            self._words[base + start : base + stop] = new[start:stop]

    # The map of services

    def _services(self, vip: Vip) -> Any:
        return self._obj.map(f"services{vip.address.version}")

    def _service_key(self, vip: Vip) -> Any:
        key = self._services(vip).key_type(port=vip.port, protocol=vip.protocol)
        if vip.address.version == 4:
            key.address = int(vip.address)
        else:
            key.address[:] = _words(vip.address)
        return key

    def _write_service(self, placed: Placed) -> None:
        services = self._services(placed.vip)
        services[self._service_key(placed.vip)] = services.value_type(
            mode=self._mode_values[placed.mode],
            **{
                name: getattr(placed, name)
                for name in ("ring_base", "ring_size", "member_base", "member_count", "flow_timeout_s", "changed_ns")
            },
        )
        before = self._placed.get(placed.vip)
        self._placed[placed.vip] = placed
        if before and before.member_block != placed.member_block:
            self._erase_members(before, {})
            self._member_blocks.release(*before.member_block)
        self._count_any_port()

    def _count_any_port(self) -> None:
        self._control.any_port_services = sum(vip.port == 0 for vip in self._placed)

    def _read_services(self) -> Iterator[Placed]:
        for version in (4, 6):
            for key, value in self._obj.map(f"services{version}").items():
                vip = Vip(_address(key.address, version), key.port, Protocol(key.protocol))
                yield Placed(
                    vip=vip,
                    mode=self._modes[value.mode],
                    **{
                        name: getattr(value, name)
                        for name in (
                            "ring_base",
                            "ring_size",
                            "member_base",
                            "member_count",
                            "flow_timeout_s",
                            "changed_ns",
                        )
                    },
                )

    # What is counted

    @_translated
    def statistics(self) -> Statistics:
        names = self._obj.types.enum("reason")
        totals = self._obj.map("reasons").totals()
        return Statistics(
            backends={vip: self._backend_counters(placed) for vip, placed in self._placed.items()},
            slots_in_transition={
                vip: sum(word > ring.MEMBER_MASK and ring.previous_member(word) != 0 for word in self._words_of(placed))
                for vip, placed in self._placed.items()
            },
            reasons={
                name.lower(): totals[number] for name, number in names.items() if name.startswith(("PASS_", "DROP_"))
            },
            unresolved={address for placed in self._placed.values() for address in self._unresolved(placed)},
        )

    def _unresolved(self, placed: Placed) -> Iterator[Address]:
        for (address, _), number in self._members_held(placed).items():
            if not self._members[placed.member_base + number].flags & self._resolved:
                yield _unpacked(address, placed.vip.address.version)

    def _backend_counters(self, placed: Placed) -> dict[Backend, Counters]:
        version = placed.vip.address.version
        return {
            Backend(_unpacked(address, version), port): self._member_counters(placed.member_base + number)
            for (address, port), number in self._members_held(placed).items()
        }

    def _member_counters(self, index: int) -> Counters:
        total = self._counters.total(index)
        return Counters(total.packets, total.bytes, total.reply_packets, total.reply_bytes, total.connections)


def _now_ns() -> int:
    """The clock of the programs: bpf_ktime_get_coarse_ns()."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


def _found(base: int | None) -> int:
    if base is None:
        raise DataplaneError("the maps are full: load() makes them larger")
    return base


def _numbered(held: Mapping[MemberKey, int], wanted: Sequence[MemberKey]) -> dict[MemberKey, int]:
    """A number for each: the one it has, or the lowest one that no member has now."""
    used = set(held.values())
    free = (number for number in ring.MEMBERS if number not in used)
    return {key: held[key] if key in held else next(free) for key in wanted}


def _words(address: Address) -> list[int]:
    """An address as the maps have it: four words, IPv4 in the first."""
    return list(struct.unpack("!4I", address.packed.ljust(16, b"\0")))


def _unpacked(packed: bytes, version: int) -> Address:
    return IPv4Address(packed) if version == 4 else IPv6Address(packed)


def _address(field: Any, version: int) -> Address:
    return IPv4Address(field) if version == 4 else IPv6Address(bytes(field))


def _copy_contents(old: BpfObject, new: BpfObject, members: Iterable[int]) -> None:
    """Everything but the tables of flows that both share. members: the places in use, whose counters are copied."""
    resized = [name for name in _FLOW_TABLES if len(old.map(name)) != len(new.map(name))]
    for name in ("services4", "services6", *resized):
        new.map(name).copy_from(old.map(name))
    for name in ("rings", "members"):
        source, target = old.map(name).bytes(), new.map(name).bytes()
        target[: len(source)] = source[:]
    for index in members:
        new.map("counters").set_total(index, old.map("counters").total(index))
    for reason, packets in enumerate(old.map("reasons").totals()):
        new.map("reasons").set_total(reason, packets)
    control, same = old.variable("control"), new.variable("control")  # named: each keeps its memory mapped
    ctypes.memmove(ctypes.addressof(same), ctypes.addressof(control), ctypes.sizeof(control))
