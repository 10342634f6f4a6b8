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
from lb.layout import Layout, Placed, Sizes, server_ids
from lb.members import MemberKey, MemberTable, member_key, numbered
from lb.model import Backend, Interface, Mode, Service
from lb.paths import Paths
from lb.report import Attachment, NextHop, Statistics
from lb.services import ServiceTable
from lb.vip import Address, Vip
from xdp import attach as xdp_attach
from xdp.errors import CannotCarry, LoadError, NotPermitted, XdpError
from xdp.migrate import Succession, catch_up, check_meanings
from xdp.netlink import route_socket
from xdp.object import (
    LB_OBJECT,
    BpfObject,
    Loaded,
    PinnedObject,
    Program,
    fingerprint,
    in_one_line,
    pinned_program,
    program_name,
)
from xdp.pins import Pins
from xdp.stages import MAPS as STAGE_MAPS
from xdp.stages import Stages

__all__ = ["KernelDataplane", "route_socket"]

PROGRAM, BEHIND_STAGES, CARRY = "xdp_lb", "xdp_balance", "xdp_carry"
REFUSED = "the installed program cannot take over, the one in force goes on"
MOST_EPOCHS = 2**32 - 1

_NS = 1_000_000_000
MOST_CATCHING_UP_NS = (
    2 * _NS
)  # packets that belong to no flow wait no longer than this, whatever becomes of the process
SETTLE_AGAIN_NS = 600 * _NS  # flows that are open still keep their slots tracked; to look for them takes up to 35 ms

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
        self._object: Loaded | None = None
        self._pinned_in: Path | None = None  # the object's generation
        self._unusable: XdpError | None = None
        self._placed: dict[Vip, Placed] = {}
        self._remembered: dict[Vip, Remembered] = {}
        self._announced_writes = 0
        self._settle_again_ns: dict[Vip, int] = {}
        self._alone = False  # no other generation is pinned, as this process has seen
        if generation := self._generation_in_force():
            self._adopt(generation)

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
            self._settle_again_ns.pop(placed.vip, None)
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

    def due(self) -> list[Vip]:
        now = _now_ns()
        waiting = (p for p in self._placed.values() if p.changed_ns and p.is_due(now))
        return [p.vip for p in waiting if now >= self._settle_again_ns.get(p.vip, 0)]

    @_translated
    def settle(self, vip: Vip) -> None:
        placed = self._placed.get(vip)
        if placed is None or not (placed.changed_ns and placed.is_due(_now_ns())):
            return
        old = self._words_of(placed)
        new = self._expired(placed, old)
        self._write_words(placed, RingChange({}, old, new))
        if max(new) <= ring.MEMBER_MASK:
            self._placed[vip] = replace(placed, changed_ns=0)
            self._services.set_changed(self._placed[vip])
        else:
            self._settle_again_ns[vip] = _now_ns() + SETTLE_AGAIN_NS

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
            maps={name: self._obj.map(name).memory for name in self._obj.map_names},
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
    def _obj(self) -> Loaded:
        if self._unusable:
            can_follow = self._object and not isinstance(self._unusable, CannotCarry)
            mend = "xdp-lb attach IFACE" if can_follow else "xdp-lb detach, then xdp-lb attach IFACE"
            raise DataplaneError(f"the programs in force are of another version of xdp-lb ({self._unusable}): {mend}")
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

    def _generation_in_force(self) -> Path | None:
        """The one that balances: a process that was killed may have left it to be made `current`."""
        current = self._pins.current()
        if current is None:
            return None
        return next((each for each in self._pins.others() if _balances(each)), current)

    def _adopt(self, generation: Path) -> None:
        """Of another version's, `upgrade` knows what to do, or if they are incomplete, detach() and unload()."""
        self._pinned_in = generation
        try:
            self._object = PinnedObject.open(str(generation), LB_OBJECT)
            if self.outdated:
                _check_meanings(self._object)
            self._use(self._object)
        except NotPermitted:
            raise
        except XdpError as error:
            self._unusable = error

    def _use(self, obj: Loaded) -> None:
        """Makes a loaded or adopted object the one that all methods work on."""
        self._object, self._unusable = obj, None
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
            self._install(Sizes.of(services))
        elif (sizes := self._sizes_for(services)) != Sizes.held_by(self._obj):
            self._replace(sizes)
        if not self._alone and self._pins.others():
            self._leave_older_generations()
        self._alone = True
        for vip in self.due():
            self.settle(vip)

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

    def _install(self, sizes: Sizes) -> None:
        """Where there is nothing yet."""
        obj = _sized(sizes)
        obj.load()
        self._alone = False
        generation = self._pins.prepare()
        obj.pin(str(generation))
        self._pins.put_in_force(generation)
        self._pinned_in = generation
        self._use(obj)
        self._balance_behind_stages()

    def _balance_behind_stages(self) -> None:
        self.stages.set(self.stages.balance, self._obj.program(BEHIND_STAGES).fd)

    # From one program to the next

    @property
    def outdated(self) -> str:
        if self._object is None or self._object.fingerprint == fingerprint(LB_OBJECT):
            return ""
        return self._object.version

    @_translated
    def upgrade(self) -> bool:
        if not self.outdated:
            return False
        assert self._object
        try:
            self._replace(Sizes.held_by(self._object))
        except CannotCarry as error:
            raise DataplaneError(f"{REFUSED}: {error}: xdp-lb detach, then xdp-lb attach IFACE") from error
        except XdpError as error:
            raise DataplaneError(f"{REFUSED}: {in_one_line(error)}") from error
        return True

    def _replace(self, sizes: Sizes) -> None:
        """The installed program, on maps of these sizes with the same contents, in the place of the one in force: no
        packet is lost, and none is counted twice or never. If it fails, nothing has changed."""
        old, new = self._object, _sized(sizes)
        assert old
        self._alone = False
        generation = None
        try:
            succession = Succession(old, new, STAGE_MAPS)
            new.load()
            succession.copy()
            generation = self._pins.prepare()
            new.pin(str(generation))
            catch_up(old, new)  # with what came while all was copied: what is left for later takes a moment
        except BaseException:
            new.close()
            if generation:
                self._pins.discard(generation)
            raise
        self._take_over(old, new, succession, generation)

    def _take_over(self, old: Loaded, new: BpfObject, succession: Succession, generation: Path) -> None:
        """From the relay on, the new program has all packets. A process that is killed before is forgotten; one that is
        killed behind it, the next one goes on for."""
        control = new.variable("control")
        if succession.has_to_catch_up:
            control.whole_ns = _now_ns() + MOST_CATCHING_UP_NS
        Stages(old).relay(new.program(BEHIND_STAGES).fd)
        self._pinned_in = generation
        self._use(new)
        self._leave_older_generations()
        for name, index, more in succession.counted_since():
            _add(new, name, index, more)
        old.close()

    def _leave_older_generations(self) -> None:
        """Have all our interfaces run the program in force; also ends an exchange that was cut short."""
        assert self._pinned_in
        if self._pins.current() != self._pinned_in:
            self._pins.put_in_force(self._pinned_in)
        self._catch_up()
        for name in self.attachments():
            self.attach(Interface(name))
        self._balance_behind_stages()
        self.stages.end_relay()
        for generation in self._pins.others():
            self._pins.discard(generation)

    def _catch_up(self) -> None:
        """With the tables of flows of the generations before."""
        assert self._pinned_in
        before = (each for each in self._pins.others() if int(each.name) < int(self._pinned_in.name))
        for generation in before:
            with suppress(LoadError), PinnedObject(str(generation)) as old:
                catch_up(old, self._obj)
        self._control.whole_ns = 0

    def close(self) -> None:
        """Gives up this process's hold; what is pinned and attached stays."""
        if self._object:
            self._object.close()
            self._object = None

    @_translated
    def unload(self) -> None:
        self.close()
        self._unusable, self._placed, self._remembered = None, {}, {}
        self._pinned_in = None
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
        """By id: ours, and what is still pinned of other generations."""
        own = [self._program] if self._object and not self._unusable else []
        mine = [self._pinned_in] if own else []
        pinned = (each for each in (self._pins.current(), *self._pins.others()) if each not in mine)
        return {program.id: program for program in (*own, *self._pinned_programs(pinned))}

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


def _sized(sizes: Sizes) -> BpfObject:
    """The installed object, its maps of these sizes, not loaded yet."""
    obj = BpfObject.open(LB_OBJECT)
    for name, entries in sizes.by_map().items():
        obj.resize(name, entries)
    return obj


def _check_meanings(old: Loaded) -> None:
    with BpfObject.open(LB_OBJECT) as installed:
        check_meanings(old.types, installed.types)


def _balances(generation: Path) -> bool:
    """Whether packets that are relayed go to this generation's program."""
    try:
        with PinnedObject(str(generation)) as obj:
            stages = Stages(obj)
            place = stages.map.get(stages.balance)
            return place is not None and place.value == obj.program(BEHIND_STAGES).id
    except LoadError:  # it is not complete, so it was never in force
        return False


def _add(obj: Loaded, name: str, index: int, more: Any) -> None:
    """To what the program counts, while it does so."""
    is_reason = name == "reasons"
    carried = obj.types.struct("carried")(is_reason=is_reason, index=index)
    if is_reason:
        carried.more.packets = more
    else:
        carried.more = more
    obj.program(CARRY).run_syscall(carried)
