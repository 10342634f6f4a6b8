"""The kernel side of the balancer: services, members and rings as BPF maps; its programs are in lb.dataplane.programs.

Enters: desired services and their next hops. Leaves: map contents that the programs act on, and what they have counted.
The kernel's maps are the only memory here: which number a member has, where a ring lies and what its slots say is read
from them, so that any process goes on where another stopped. (One that stays remembers what members were given, to put
it back where others write into the maps.) Writes go members first, then slots, then erasures; each
one leaves a state that the programs can work with.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from ipaddress import ip_address

from lb.dataplane.allocation import Allocation, Layout, Sizes, server_ids
from lb.dataplane.errors import translated
from lb.dataplane.lookup_maps import Directory
from lb.dataplane.members import MemberKey, MemberTable, member_key, numbered
from lb.dataplane.programs import BEHIND_STAGES, Programs, now_ns
from lb.dataplane.services import ServiceTable
from lb.errors import DataplaneError
from lb.hashing import maglev, ring
from lb.hashing.flow_query import FlowQuery
from lb.hashing.recorded import recorded_slots
from lb.model.forwarding import InstalledNextHop, NextHop, Statistics
from lb.model.state import Backend, Mode, Service
from lb.model.vip import Address, Vip
from lb.paths import Paths
from xdp.netlink import route_socket
from xdp.object import Loaded
from xdp.pins import Pins

__all__ = ["KernelDataplane", "route_socket"]

MOST_EPOCHS = 2**32 - 1

_NS = 1_000_000_000
SETTLE_AGAIN_NS = 600 * _NS  # flows that are open still keep their slots tracked; to look for them takes up to 35 ms


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
class AssignedMembers:
    """What the members of a service were given when they were written last; the order is that of the backends."""

    backends: tuple[Backend, ...]
    numbers: array[int]
    uids: array[int]

    def by_key(self, given: array[int]) -> dict[MemberKey, int]:
        return dict(zip(map(member_key, self.backends), given, strict=True))


class KernelDataplane(Programs):
    """See lb.control.contracts.Dataplane, which this implements. Every method raises DataplaneError."""

    def __init__(self, pins: Pins) -> None:
        self._placed: dict[Vip, Allocation] = {}
        self._remembered: dict[Vip, AssignedMembers] = {}
        self._announced_writes = 0
        self._settle_again_ns: dict[Vip, int] = {}
        super().__init__(pins)

    @classmethod
    @translated()
    def open(cls, paths: Paths) -> KernelDataplane:
        """What an earlier process pinned, or nothing yet; either way nothing is written."""
        return cls(Pins(paths.run_dir, paths.netns))

    # Services

    def vips(self) -> Set[Vip]:
        return self._placed.keys()

    @translated()
    def plan(self, service: Service) -> ring.Plan:
        change, placed = self._ring_change(service), self._alike(service)
        if placed is None or service.mode is not Mode.NAT:
            return change.plan
        return replace(change.plan, flows=self._flows_on(placed, change.moved))

    @translated()
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

    @translated()
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

    def _is_sourced(self, placed: Allocation, service: Service) -> bool:
        return not service.mode.is_tunnel or self._members.is_sourced(placed, service.options)

    @translated()
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

    def _alike(self, service: Service) -> Allocation | None:
        """The service as it is in force; None also where it has another mode or ring size there."""
        placed = self._placed.get(service.vip)
        return placed if placed and placed.is_like(service) else None

    def _held(self, placed: Allocation | None) -> dict[MemberKey, int]:
        return self._members.held(placed) if placed else {}

    def _place(self, service: Service) -> Allocation:
        """Where the service lies from now on, with those of its members that it has already."""
        old, placed = self._alike(service), self._find_place(self._layout, service)
        if placed is None:
            raise DataplaneError("maps full: load() grows them")
        if old is None or placed.member_block != old.member_block:
            self._members.wipe(*placed.member_block)
            if old:
                self._members.move(old, placed)
        return placed

    def _find_place(self, layout: Layout, service: Service) -> Allocation | None:
        old = self._alike(service)
        return layout.place(service, old, held=len(self._held(old)))

    def _put_in_force(self, placed: Allocation, service: Service, change: RingChange) -> None:
        """Of a service that is there already, the time of the change before the ring: UDP is told old from new by it.
        A new one no packet finds before it is published."""
        if placed.vip in self._placed and change.old != change.new:
            placed = replace(placed, changed_ns=now_ns())
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

    def _words_of(self, placed: Allocation) -> array[int]:
        return array("I", self._words[placed.ring_base : placed.ring_base + placed.ring_size].tobytes())

    def _write_words(self, placed: Allocation, change: RingChange) -> None:
        new, base = memoryview(change.new), placed.ring_base
        for start, stop in ring.changed_runs(self._words_of(placed), change.new):
            self._words[base + start : base + stop] = new[start:stop]

    def _expired(self, placed: Allocation, words: array[int]) -> array[int]:
        """The words without the transitions that have had their time."""
        if not placed.is_due(now_ns()) or max(words) <= ring.MEMBER_MASK:
            return words
        return ring.expire(words, self._tracked_slots(placed))

    def due(self) -> list[Vip]:
        now = now_ns()
        waiting = (p for p in self._placed.values() if p.changed_ns and p.is_due(now))
        return [p.vip for p in waiting if now >= self._settle_again_ns.get(p.vip, 0)]

    @translated()
    def settle(self, vip: Vip) -> None:
        placed = self._placed.get(vip)
        if placed is None or not (placed.changed_ns and placed.is_due(now_ns())):
            return
        old = self._words_of(placed)
        new = self._expired(placed, old)
        self._write_words(placed, RingChange({}, old, new))
        if max(new) <= ring.MEMBER_MASK:
            self._placed[vip] = replace(placed, changed_ns=0)
            self._services.set_changed(self._placed[vip])
        else:
            self._settle_again_ns[vip] = now_ns() + SETTLE_AGAIN_NS

    def _tracked_slots(self, placed: Allocation) -> set[int]:
        """The slots with flows in the flow table that have not timed out."""
        table, sought = self._obj.map(f"flows{placed.vip.address.version}"), self._sought(placed)
        return set().union(*(recorded_slots(keys, flows, sought) for keys, flows in table.batches()))

    def _flows_on(self, placed: Allocation, slots: Set[int]) -> int:
        """How many translated connections that are open have their slot among these."""
        table, sought, now = self._obj.map(f"nat_flows{placed.vip.address.version}"), self._sought(placed), now_ns()
        closing = ~self._obj.types.enum("nat_state")["NAT_ESTABLISHED"]
        return sum(
            sought.slot(key) in slots
            for key, flow in table.items()
            if sought.includes(key, flow) and now <= flow.seen_ns + flow.timeout_s * _NS and not flow.state & closing
        )

    def _sought(self, placed: Allocation) -> FlowQuery:
        return FlowQuery(
            address=placed.vip.address.packed,
            prefix_length=placed.vip.prefix_length,
            ports=placed.vip.ports,
            protocol=placed.vip.protocol,
            oldest_ns=now_ns() - placed.flow_timeout_s * _NS,
            seed=self._seed(),
            ring_size=placed.ring_size,
        )

    def _seed(self) -> int:
        return int(self._obj.map(".rodata")[0].config.hash_seed)

    def _write_service(self, placed: Allocation, service: Service) -> None:
        self._services.write(placed, service)
        before = self._placed.get(placed.vip)
        self._placed[placed.vip] = placed
        if before and before.member_block != placed.member_block:
            self._members.erase(before)
            self._layout.release_members(before)

    # What others have changed

    @translated()
    def restore_lookups(self, services: Sequence[Service]) -> list[str]:
        found = []
        if changed := self._directory.reread():
            found.append(f"lookups: {changed} {'entry' if changed == 1 else 'entries'} changed by another process")
        self.publish(services)
        stages, behind = self.stages, self._obj.program(BEHIND_STAGES)
        if stages.balance not in stages.map or stages.map[stages.balance].value != behind.id:
            self._balance_behind_stages()
            found.append("stages: the balancer was missing at the end of the chain")
        return found

    @translated()
    def differences(self, service: Service) -> list[str]:
        placed = self._alike(service)
        if placed is None:
            return ["was missing"]
        found = [] if self._services.holds(placed, service) else ["map entry was modified"]
        numbers = self._known_numbers(placed, service)
        if not self._members.is_whole(placed, numbers):
            found.append("backend entries were modified")
        elif service.vip not in self._remembered:
            self._remember(placed, service, numbers)
        if slots := self._slots_changed(placed, service, numbers):
            found.append(f"{slots} of {placed.ring_size} slots {'was' if slots == 1 else 'were'} modified")
        return found

    def _remember(self, placed: Allocation, service: Service, numbers: Mapping[MemberKey, int]) -> None:
        given = array("H", map(numbers.__getitem__, _keys(service)))
        self._remembered[placed.vip] = AssignedMembers(
            service.backends, given, array("I", self._members.uids(placed, given))
        )

    def _known_numbers(self, placed: Allocation, service: Service) -> dict[MemberKey, int]:
        """Those that were given last, whatever the kernel's entries say now."""
        remembered = self._remembered.get(service.vip)
        return numbered(remembered.by_key(remembered.numbers) if remembered else self._held(placed), _keys(service))

    def _slots_changed(self, placed: Allocation, service: Service, numbers: Mapping[MemberKey, int]) -> int:
        """What was put would stay as it is if it were put again."""
        words, alive = self._words_of(placed), _alive(service, numbers)
        wanted = ring.transition(words, _table(service, numbers), alive)
        return 0 if words == wanted else sum(old != new for old, new in zip(words, wanted, strict=True))

    @translated()
    def repair(self, service: Service, hops: Mapping[Address, NextHop]) -> ring.Plan:
        """As `put`; members that are lost get the numbers that they had, which slots and flows name."""
        if placed := self._alike(service):
            remembered = self._remembered.get(service.vip)
            uids = remembered.by_key(remembered.uids) if remembered else {}
            self._members.restore(placed, service, self._known_numbers(placed, service), uids, hops)
        return self.put(service, hops)

    @translated()
    def follow(self, service: Service, hops: Mapping[Address, NextHop]) -> set[Address]:
        placed = self._alike(service)
        if placed is None:
            return set()
        if service.vip not in self._remembered:
            self._remember(placed, service, self._known_numbers(placed, service))
        remembered = self._remembered[service.vip]
        numbers = ((b, n) for b, n in zip(remembered.backends, remembered.numbers, strict=True) if b.address in hops)
        return self._members.follow(placed, numbers, service.options, hops)

    def ways(self) -> Iterator[InstalledNextHop]:
        for placed in self._placed.values():
            yield from self._members.ways(placed)

    # What is counted

    @translated()
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

    # Maps

    def _use(self, obj: Loaded) -> None:
        super()._use(obj)
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

    @translated()
    def load(self, services: Sequence[Service]) -> None:
        self._load(self._sizes_for(services) if self.loaded else Sizes.of(services))
        for vip in self.due():
            self.settle(vip)

    @translated()
    def unload(self) -> None:
        super().unload()
        self._placed, self._remembered = {}, {}

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
