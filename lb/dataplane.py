"""The kernel side of the balancer: services, members and rings as BPF maps, programs on interfaces.

Enters: desired services and their next hops. Leaves: map contents that the programs act on, and what they have counted.
The kernel's maps are the only memory here: which number a member has, where a ring lies and what its slots say is read
from them, so that any process goes on where another stopped. (One that stays remembers what members were given, to put
it back where others write into the maps.) Writes go members first, then slots, then erasures; each
one leaves a state that the programs can work with.
"""

from __future__ import annotations

import functools
import socket
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from lb import maglev, ring
from lb.directory import Directory
from lb.errors import DataplaneError
from lb.flow_hash import Sought, recorded_slots
from lb.host_events import WayInForce
from lb.layout import FLOW_TABLES, Layout, Placed, Sizes, server_ids
from lb.lookup import TABLES as LOOKUP_TABLES
from lb.members import MemberKey, MemberTable, member_key, numbered
from lb.model import Backend, Interface, Mode, Service
from lb.paths import Paths
from lb.report import Attachment, NextHop, Statistics
from lb.services import ServiceTable
from lb.vip import Address, Vip
from xdp import attach as xdp_attach
from xdp.errors import LoadError, XdpError
from xdp.netlink import route_socket
from xdp.object import LB_OBJECT, BpfObject, Program, pinned_program, program_name
from xdp.pins import Pins
from xdp.stages import MAPS as STAGE_MAPS
from xdp.stages import Stages

__all__ = ["KernelDataplane", "route_socket"]

PROGRAM, BEHIND_STAGES = "xdp_lb", "xdp_balance"
MOST_EPOCHS = 2**32 - 1

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
class RingChange:
    """The slot words of one service before and after a change, and the numbers that its members have."""

    numbers: Mapping[MemberKey, int]
    old: array[int]
    new: array[int]

    @property
    def plan(self) -> ring.Plan:
        return ring.plan(self.old, self.new)

    @property
    def moved(self) -> set[int]:
        """The slots that get another member."""
        pairs = enumerate(zip(self.old, self.new, strict=True))
        return {slot for slot, (old, new) in pairs if ring.current_member(old) != ring.current_member(new)}


@dataclass(frozen=True, slots=True)
class Remembered:
    """What the members of a service were given when they were written last; the order is that of the backends."""

    backends: tuple[Backend, ...]
    numbers: array[int]
    uids: array[int]

    def by_key(self, given: array[int]) -> dict[MemberKey, int]:
        return dict(zip(map(member_key, self.backends), given, strict=True))


class KernelDataplane:
    """See lb.ports.Dataplane, which this implements. Every method raises DataplaneError."""

    def __init__(self, pins: Pins) -> None:
        self._pins = pins
        self._object: BpfObject | None = None
        self._unusable: LoadError | None = None
        self._placed: dict[Vip, Placed] = {}
        self._remembered: dict[Vip, Remembered] = {}
        self._announced_writes = 0
        self._alone = False  # no other generation is pinned, as this process has seen
        if current := pins.current():
            self._adopt(current)

    @classmethod
    @_translated
    def open(cls, paths: Paths) -> KernelDataplane:
        """What an earlier process pinned, or nothing yet; either way nothing is written."""
        return cls(Pins(paths.run_dir, paths.netns))

    # Services

    def vips(self) -> Set[Vip]:
        return self._placed.keys()

    @_translated
    def plan(self, service: Service) -> ring.Plan:
        change, placed = self._ring_change(service), self._alike(service)
        if placed is None or service.mode is not Mode.NAT:
            return change.plan
        return replace(change.plan, flows=self._flows_on(placed, change.moved))

    @_translated
    def put(self, service: Service, hops: Mapping[Address, NextHop]) -> ring.Plan:
        if not self._alike(service):
            self.remove(service.vip)
        change = self._ring_change(service)
        placed = self._place(service)
        self._members.write(placed, service, change.numbers, hops)
        self._put_in_force(placed, service, change)
        self._members.disown_flows(placed, {member_key(b) for b in service.backends if b.down})
        self._members.erase(placed, keep=change.numbers)
        self._remember(placed, service, change.numbers)
        return change.plan

    def unknown(self, service: Service) -> Set[Address]:
        placed = self._alike(service)
        resolved = self._members.resolved(placed) if placed and self._is_sourced(placed, service) else {}
        return {b.address for b in service.backends if not resolved.get(member_key(b))}

    @_translated
    def remove(self, vip: Vip) -> None:
        placed = self._placed.pop(vip, None)
        self._remembered.pop(vip, None)
        if placed is None:
            return
        self._directory.forget(placed.number)
        self._announce_directory()
        self._services.erase(placed)
        self._members.erase(placed)
        self._layout.release(placed)

    def _is_sourced(self, placed: Placed, service: Service) -> bool:
        return not service.mode.is_tunnel or self._members.is_sourced(placed, service.options)

    @_translated
    def publish(self, services: Sequence[Service]) -> None:
        numbers = {vip: placed.number for vip, placed in self._placed.items()}
        self._directory.add(services, numbers, lambda vip: self._members.held(self._placed[vip]))
        self._set_sources(services, numbers)
        self._announce_directory()
        self._directory.prune()
        self._announce_directory()

    def _set_sources(self, services: Sequence[Service], numbers: Mapping[Vip, int]) -> None:
        with_sources = [service for service in services if service.options.sources]
        only = {numbers[s.vip] for s in with_sources if not s.vip.set}
        self._services.set_sources(some={numbers[s.vip.own] for s in with_sources}, only=only)

    def _announce_directory(self) -> None:
        """Tells the programs what they need not look for, and to forget what they know."""
        if self._directory.exact_writes != self._announced_writes:
            self._announced_writes = self._directory.exact_writes
            self._control.epoch = self._control.epoch % MOST_EPOCHS + 1
        self._control.wide_services = self._directory.wide_services
        self._control.echo_addresses = self._directory.echo_addresses

    def _alike(self, service: Service) -> Placed | None:
        """The service as it is in force; None also where it has another mode or ring size there."""
        placed = self._placed.get(service.vip)
        return placed if placed and placed.is_like(service) else None

    def _held(self, placed: Placed | None) -> dict[MemberKey, int]:
        return self._members.held(placed) if placed else {}

    def _place(self, service: Service) -> Placed:
        """Where the service lies from now on, with those of its members that it has already."""
        old, placed = self._alike(service), self._find_place(self._layout, service)
        if placed is None:
            raise DataplaneError("the maps are full: load() makes them larger")
        if old is None or placed.member_block != old.member_block:
            self._members.wipe(*placed.member_block)
            if old:
                self._members.move(old, placed)
        return placed

    def _find_place(self, layout: Layout, service: Service) -> Placed | None:
        old = self._alike(service)
        return layout.place(service, old, held=len(self._held(old)))

    def _put_in_force(self, placed: Placed, service: Service, change: RingChange) -> None:
        """Of a service that is there already, the time of the change before the ring: UDP is told old from new by it.
        A new one no packet finds before it is published."""
        if placed.vip in self._placed and change.old != change.new:
            placed = replace(placed, changed_ns=_now_ns())
        self._write_service(placed, service)
        self._write_words(placed, change)

    # Rings

    def _ring_change(self, service: Service) -> RingChange:
        placed = self._alike(service)
        numbers = numbered(self._held(placed), _keys(service))
        old = self._words_of(placed) if placed else array("I", bytes(4 * service.ring_size))
        start = self._expired(placed, old) if placed else old
        return RingChange(numbers, old, ring.transition(start, _table(service, numbers), _alive(service, numbers)))

    def _words_of(self, placed: Placed) -> array[int]:
        return array("I", self._words[placed.ring_base : placed.ring_base + placed.ring_size].tobytes())

    def _write_words(self, placed: Placed, change: RingChange) -> None:
        new, base = memoryview(change.new), placed.ring_base
        for start, stop in ring.changed_runs(self._words_of(placed), change.new):
            self._words[base + start : base + stop] = new[start:stop]

    def _expired(self, placed: Placed, words: array[int]) -> array[int]:
        """The words without the transitions that have had their time."""
        if not placed.is_due(_now_ns()) or max(words) <= ring.MEMBER_MASK:
            return words
        return ring.expire(words, self._tracked_slots(placed))

    def _end_transitions(self) -> None:
        """Makes stable, in all services, what has been in transition for the flow timeout."""
        now = _now_ns()
        for placed in [p for p in self._placed.values() if p.changed_ns and p.is_due(now)]:
            old = self._words_of(placed)
            new = self._expired(placed, old)
            self._write_words(placed, RingChange({}, old, new))
            if max(new) <= ring.MEMBER_MASK:
                self._placed[placed.vip] = replace(placed, changed_ns=0)
                self._services.set_changed(self._placed[placed.vip])

    def _tracked_slots(self, placed: Placed) -> set[int]:
        """The slots with flows in the flow table that have not timed out."""
        table, sought = self._obj.map(f"flows{placed.vip.address.version}"), self._sought(placed)
        return set().union(*(recorded_slots(keys, flows, sought) for keys, flows in table.batches()))

    def _flows_on(self, placed: Placed, slots: Set[int]) -> int:
        """How many translated connections that are open have their slot among these."""
        table, sought, now = self._obj.map(f"nat_flows{placed.vip.address.version}"), self._sought(placed), _now_ns()
        closing = ~self._obj.types.enum("nat_state")["NAT_ESTABLISHED"]
        return sum(
            sought.slot(key) in slots
            for key, flow in table.items()
            if sought.includes(key, flow) and now <= flow.seen_ns + flow.timeout_s * _NS and not flow.state & closing
        )

    def _sought(self, placed: Placed) -> Sought:
        return Sought(
            address=placed.vip.address.packed,
            prefix_length=placed.vip.prefix_length,
            ports=placed.vip.ports,
            protocol=placed.vip.protocol,
            oldest_ns=_now_ns() - placed.flow_timeout_s * _NS,
            seed=self._seed(),
            ring_size=placed.ring_size,
        )

    def _seed(self) -> int:
        return int(self._obj.map(".rodata")[0].config.hash_seed)

    def _write_service(self, placed: Placed, service: Service) -> None:
        self._services.write(placed, service)
        before = self._placed.get(placed.vip)
        self._placed[placed.vip] = placed
        if before and before.member_block != placed.member_block:
            self._members.erase(before)
            self._layout.release_members(before)

    # What others have changed

    @_translated
    def restore_lookups(self, services: Sequence[Service]) -> list[str]:
        found = []
        if changed := self._directory.reread():
            found.append(f"lookups: {changed} {'entry' if changed == 1 else 'entries'} changed by someone else")
        self.publish(services)
        stages, behind = self.stages, self._obj.program(BEHIND_STAGES)
        if stages.balance not in stages.map or stages.map[stages.balance].value != behind.id:
            self._balance_behind_stages()
            found.append("stages: the balancer was taken out from behind them")
        return found

    @_translated
    def differences(self, service: Service) -> list[str]:
        placed = self._alike(service)
        if placed is None:
            return ["was not there"]
        found = [] if self._services.holds(placed, service) else ["its entry was changed"]
        numbers = self._known_numbers(placed, service)
        if not self._members.is_whole(placed, numbers):
            found.append("entries of its backends were changed")
        elif service.vip not in self._remembered:
            self._remember(placed, service, numbers)
        if slots := self._slots_changed(placed, service, numbers):
            found.append(f"{slots} of its {placed.ring_size} slots {'was' if slots == 1 else 'were'} changed")
        return found

    def _remember(self, placed: Placed, service: Service, numbers: Mapping[MemberKey, int]) -> None:
        given = array("H", map(numbers.__getitem__, _keys(service)))
        self._remembered[placed.vip] = Remembered(
            service.backends, given, array("I", self._members.uids(placed, given))
        )

    def _known_numbers(self, placed: Placed, service: Service) -> dict[MemberKey, int]:
        """Those that were given last, whatever the kernel's entries say now."""
        remembered = self._remembered.get(service.vip)
        return numbered(remembered.by_key(remembered.numbers) if remembered else self._held(placed), _keys(service))

    def _slots_changed(self, placed: Placed, service: Service, numbers: Mapping[MemberKey, int]) -> int:
        """What was put would stay as it is if it were put again."""
        words, alive = self._words_of(placed), _alive(service, numbers)
        wanted = ring.transition(words, _table(service, numbers), alive)
        return 0 if words == wanted else sum(old != new for old, new in zip(words, wanted, strict=True))

    @_translated
    def repair(self, service: Service, hops: Mapping[Address, NextHop]) -> ring.Plan:
        """As `put`; members that are lost get the numbers that they had, which slots and flows name."""
        if placed := self._alike(service):
            remembered = self._remembered.get(service.vip)
            uids = remembered.by_key(remembered.uids) if remembered else {}
            self._members.restore(placed, service, self._known_numbers(placed, service), uids, hops)
        return self.put(service, hops)

    @_translated
    def follow(self, service: Service, hops: Mapping[Address, NextHop]) -> set[Address]:
        placed = self._alike(service)
        if placed is None:
            return set()
        if service.vip not in self._remembered:
            self._remember(placed, service, self._known_numbers(placed, service))
        remembered = self._remembered[service.vip]
        numbers = ((b, n) for b, n in zip(remembered.backends, remembered.numbers, strict=True) if b.address in hops)
        return self._members.follow(placed, numbers, service.options, hops)

    def ways(self) -> Iterator[WayInForce]:
        for placed in self._placed.values():
            yield from self._members.ways(placed)

    # What is counted

    @_translated
    def statistics(self) -> Statistics:
        services = self._placed.items()
        return Statistics(
            reasons=self._reasons(),
            backends={vip: self._members.counters(placed) for vip, placed in services},
            slots_in_transition={vip: _in_transition(self._words_of(placed)) for vip, placed in services},
            unresolved={
                ip_address(address)
                for _, placed in services
                for (address, _), known in self._members.resolved(placed).items()
                if not known
            },
        )

    def _reasons(self) -> dict[str, int]:
        totals = self._obj.map("reasons").totals()
        names = self._obj.types.enum("reason").items()
        return {
            name.lower(): totals[number]
            for name, number in names
            if name.startswith(("ANSWERED_", "PASS_", "DROP_", "NOTED_"))
        }

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
    def stages(self) -> Stages:
        return Stages(self._obj)

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
        options = obj.types.enum("service_option")
        self._services = ServiceTable(obj.map("services").view(), obj.types.enum("mode"), options)
        self._directory = Directory(obj)
        self._announced_writes = 0
        self._words = memoryview(obj.map("rings").bytes()).cast("B").cast("I")
        self._members = MemberTable(obj.map("members").view(), obj.map("counters"), obj.types.enum("member_flag"))
        self._placed = {placed.vip: placed for placed in self._services}
        self._layout = Layout.of(
            self._placed.values(),
            services=len(obj.map("services")),
            slots=len(self._words),
            members=len(self._members),
        )

    @_translated
    def load(self, services: Sequence[Service]) -> None:
        if not self.loaded:
            self._install(self._new_object(Sizes.of(services)))
        elif (sizes := self._sizes_for(services)) != Sizes.held_by(self._obj):
            self._grow(sizes)
        if not self._alone and self._pins.others():
            self._leave_older_generations()
        self._alone = True
        self._end_transitions()

    def _sizes_for(self, services: Sequence[Service]) -> Sizes:
        """Those of the maps in force, as long as everything fits."""
        held, wanted = Sizes.held_by(self._obj), Sizes.of(services)
        sizes = held.with_flow_tables_of(wanted)
        return sizes if self._fits(services, held) else sizes.with_room_for(wanted)

    def _fits(self, services: Sequence[Service], sizes: Sizes) -> bool:
        """Whether every service finds room, on top of all that is there."""
        trial = self._layout.copy()
        vips = self._placed.keys() | {service.vip for service in services}
        return (
            len(vips) <= sizes.services
            and self._directory.server_ids + server_ids(services) <= sizes.server_ids
            and all(self._find_place(trial, service) for service in services)
        )

    @staticmethod
    def _new_object(sizes: Sizes, keep: BpfObject | None = None) -> BpfObject:
        """A loaded object; `keep` hands on its stages and control, and tables of flows of the right size."""
        obj = BpfObject.open(LB_OBJECT)
        for name, entries in sizes.by_map().items():
            obj.resize(name, entries)
            if keep and name in FLOW_TABLES and len(keep.map(name)) == entries:
                obj.reuse(name, keep.map(name).fd)
        if keep:
            for name in STAGE_MAPS:
                obj.reuse(name, keep.map(name).fd)
        obj.load()
        return obj

    def _install(self, obj: BpfObject) -> None:
        """Pins a loaded object and puts it in force."""
        self._alone = False
        generation = self._pins.prepare()
        obj.pin(str(generation))
        self._pins.put_in_force(generation)
        self._use(obj)
        self._balance_behind_stages()

    def _balance_behind_stages(self) -> None:
        self.stages.set(self.stages.balance, self._obj.program(BEHIND_STAGES).fd)

    def _grow(self, sizes: Sizes) -> None:
        """Larger maps with the same contents, and programs that use them in the place of the old: nothing is dropped.

        The old program counts on until it is replaced; what it counts between the copy and then is lost.
        """
        obj = self._new_object(sizes, keep=self._obj)
        places = (index for placed in self._placed.values() for index in self._members.places(placed).values())
        _copy_contents(self._obj, obj, places)
        self._install(obj)

    def _leave_older_generations(self) -> None:
        """Have all our interfaces run the program in force; also ends a growth that was cut short."""
        for name in self.attachments():
            self.attach(Interface(name))
        self._balance_behind_stages()
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
        self._unusable, self._placed, self._remembered = None, {}, {}
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

    @_translated
    def programs(self) -> Mapping[str, int]:
        return {name: running.program_id for name, running in xdp_attach.all_attached().items()}


def _now_ns() -> int:
    """The clock of the programs: bpf_ktime_get_coarse_ns()."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


def _keys(service: Service) -> list[MemberKey]:
    return [member_key(b) for b in service.backends]


def _alive(service: Service, numbers: Mapping[MemberKey, int]) -> frozenset[int]:
    return frozenset(numbers[member_key(b)] for b in service.backends if not b.down)


def _table(service: Service, numbers: Mapping[MemberKey, int]) -> array[int]:
    """Slot -> the number of the member wanted there, 0 = none."""
    members = [numbers[member_key(b)] for b in service.backends]
    weights = {str(b): b.ring_weight for b in service.backends}
    return maglev.table(weights, service.ring_size, members) or array("H", bytes(2 * service.ring_size))


def _in_transition(words: array[int]) -> int:
    if max(words) <= ring.MEMBER_MASK:
        return 0
    return sum(word > ring.MEMBER_MASK and ring.previous_member(word) != 0 for word in words)


def _copy_contents(old: BpfObject, new: BpfObject, members: Iterable[int]) -> None:
    """Everything but the tables of flows that both share. members: the places in use, whose counters are copied."""
    resized = [name for name in FLOW_TABLES if len(old.map(name)) != len(new.map(name))]
    for name in (*LOOKUP_TABLES, *resized):
        new.map(name).copy_from(old.map(name))
    for name in ("services", "rings", "members"):
        source, target = old.map(name).bytes(), new.map(name).bytes()
        target[: len(source)] = source[:]
    for index in members:
        new.map("counters").set_total(index, old.map("counters").total(index))
    for reason, packets in enumerate(old.map("reasons").totals()):
        new.map("reasons").set_total(reason, packets)
