"""The kernel side of the balancer: services, members and rings as BPF maps; its programs are in lb.dataplane.programs.

Enters: desired services and their next hops. Leaves: map contents that the programs act on, and what they have counted.
The kernel's maps are the only memory here: which number a member has, where a ring lies and what its slots say is read
from them, so that any process goes on where another stopped. (One that stays remembers what members were given, to put
it back where others write into the maps.) Writes go members first, then slots, then erasures; each
one leaves a state that the programs can work with.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Self

from lb.dataplane import clock
from lb.dataplane.allocation import Allocation, Sizes
from lb.dataplane.errors import translated
from lb.dataplane.members import MemberKey, member_key, member_keys, numbered
from lb.dataplane.open_connections import open_connections
from lb.dataplane.programs import Programs
from lb.dataplane.rings import RingChange, first_ring
from lb.dataplane.service_maps import ServiceMaps
from lb.hashing import ring
from lb.model.forwarding import Attachment, InstalledNextHop, NextHop, OpenConnections, Statistics
from lb.model.state import Backend, Interface, Service
from lb.model.vip import Address, Vip
from lb.paths import Paths
from xdp.pins import Pins

SETTLE_AGAIN_NS = 600_000_000_000  # flows that are open still keep their slots tracked; to look for them takes to 35 ms


@dataclass(frozen=True, slots=True)
class AssignedMembers:
    """What the members of a service were given when they were written last; the order is that of the backends."""

    backends: tuple[Backend, ...]
    numbers: array[int]
    uids: array[int]

    def by_key(self, given: array[int]) -> dict[MemberKey, int]:
        return dict(zip(map(member_key, self.backends), given, strict=True))


class KernelDataplane:
    """See lb.control.contracts.Dataplane, which this implements. Every method raises DataplaneError."""

    def __init__(self, pins: Pins) -> None:
        self.programs = Programs(pins)
        self._maps: ServiceMaps | None = None
        self._assigned: dict[Vip, AssignedMembers] = {}
        self._settle_again_ns: dict[Vip, int] = {}

    @classmethod
    @translated()
    def open(cls, paths: Paths) -> Self:
        """What an earlier process pinned, or nothing yet; either way nothing is written."""
        return cls(Pins(paths.run_dir, paths.netns))

    @property
    def maps(self) -> ServiceMaps:
        """Those of the programs in force: others after an upgrade, and after a load() that made them larger."""
        obj = self.programs.obj
        if self._maps is None or self._maps.obj is not obj:
            with translated():
                self._maps = ServiceMaps(obj)
        return self._maps

    @property
    def _allocations(self) -> Mapping[Vip, Allocation]:
        """None where nothing is loaded, or what this version cannot work on."""
        return self.maps.allocations if self.programs.usable_obj else {}

    def _allocation_like(self, service: Service) -> Allocation | None:
        """Likewise."""
        return self.maps.allocation_like(service) if self.programs.usable_obj else None

    # Programs: see Programs

    @property
    def loaded(self) -> bool:
        return self.programs.loaded

    @property
    def generation(self) -> int:
        return self.programs.generation

    @generation.setter
    def generation(self, value: int) -> None:
        self.programs.generation = value

    @property
    def outdated(self) -> str:
        return self.programs.outdated

    @translated()
    def load(self, services: Sequence[Service]) -> None:
        self.programs.load(self.maps.sizes_for(services) if self.loaded else Sizes.of(services))
        for vip in self.due():
            self.settle(vip)

    def recover(self, interfaces: Collection[Interface]) -> None:
        self.programs.recover(interfaces)

    def restore_pins(self) -> list[str]:
        return self.programs.restore_pins()

    def upgrade(self) -> bool:
        return self.programs.upgrade()

    def close(self) -> None:
        """Gives up this process's hold; what is pinned and attached stays."""
        self.programs.close()

    def unload(self) -> None:
        self.programs.unload()
        self._maps = None
        self._assigned = {}

    def attach(self, interface: Interface) -> Attachment:
        return self.programs.attach(interface)

    def detach(self, name: str) -> None:
        self.programs.detach(name)

    def attachments(self) -> Mapping[str, Attachment]:
        return self.programs.attachments()

    def program_ids(self) -> Mapping[str, int]:
        return self.programs.program_ids()

    # Services

    def vips(self) -> Set[Vip]:
        return self._allocations.keys()

    @translated()
    def plan(self, service: Service) -> ring.Plan:
        return self._ring_change(service).plan

    def _ring_change(self, service: Service) -> RingChange:
        allocation = self._allocation_like(service)
        if allocation is None:
            return first_ring(service)
        return self.maps.rings.change(allocation, service, self.maps.members.numbers(allocation))

    @translated()
    def put(self, service: Service, hops: Mapping[Address, NextHop]) -> ring.Plan:
        if not self._allocation_like(service):
            self.remove(service.vip)
        maps, change = self.maps, self._ring_change(service)
        allocation = maps.allocate(service)
        maps.members.write(allocation, service, change.numbers, hops)
        self._put_in_force(allocation, service, change)
        maps.members.disown_flows(allocation, {member_key(b) for b in service.backends if b.down})
        maps.members.erase(allocation, keep=change.numbers)
        self._remember(allocation, service, change.numbers)
        return change.plan

    def _put_in_force(self, allocation: Allocation, service: Service, change: RingChange) -> None:
        """Of a service that is there already, the time of the change before the ring: UDP is told old from new by it.
        A new one no packet finds before it is published."""
        if allocation.vip in self._allocations and change.old != change.new:
            allocation = replace(allocation, changed_ns=clock.now_ns())
            self._settle_again_ns.pop(allocation.vip, None)
        self.maps.write(allocation, service)
        self.maps.rings.write(allocation, change.new)

    def unknown(self, service: Service) -> Set[Address]:
        allocation = self._allocation_like(service)
        is_sourced = allocation and self._is_sourced(allocation, service)
        resolved = self.maps.members.resolved(allocation) if allocation and is_sourced else {}
        return {b.address for b in service.backends if not resolved.get(member_key(b))}

    def _is_sourced(self, allocation: Allocation, service: Service) -> bool:
        return not service.mode.is_tunnel or self.maps.members.is_sourced(allocation, service.options)

    @translated()
    def remove(self, vip: Vip) -> None:
        self._assigned.pop(vip, None)
        if vip in self._allocations:
            self.maps.erase(vip)

    @translated()
    def publish(self, services: Sequence[Service]) -> None:
        self.maps.publish(services)

    # Transitions

    def due(self) -> list[Vip]:
        now = clock.now_ns()
        waiting = (each.vip for each in self._allocations.values() if each.changed_ns and each.is_due(now))
        return [vip for vip in waiting if now >= self._settle_again_ns.get(vip, 0)]

    @translated()
    def settle(self, vip: Vip) -> None:
        allocation = self._allocations.get(vip)
        if allocation is None or not (allocation.changed_ns and allocation.is_due(clock.now_ns())):
            return
        if self.maps.rings.expire(allocation):
            self.maps.set_changed(replace(allocation, changed_ns=0))
        else:
            self._settle_again_ns[vip] = clock.now_ns() + SETTLE_AGAIN_NS

    # What others have changed

    @translated()
    def restore_lookups(self, services: Sequence[Service]) -> list[str]:
        found = []
        if changed := self.maps.lookups.reread():
            found.append(f"lookups: {changed} {'entry' if changed == 1 else 'entries'} changed by another process")
        self.publish(services)
        return found + self.programs.restore_stages()

    @translated()
    def differences(self, service: Service) -> list[str]:
        allocation = self._allocation_like(service)
        if allocation is None:
            return ["was missing"]
        found = [] if self.maps.services.holds(allocation, service) else ["map entry was modified"]
        numbers = self._assigned_numbers(service)
        if not self.maps.members.is_whole(allocation, numbers):
            found.append("backend entries were modified")
        elif service.vip not in self._assigned:
            self._remember(allocation, service, numbers)
        if slots := self.maps.rings.differing_slots(allocation, service, numbers):
            found.append(f"{slots} of {allocation.ring_size} slots {'was' if slots == 1 else 'were'} modified")
        return found

    def _remember(self, allocation: Allocation, service: Service, numbers: Mapping[MemberKey, int]) -> None:
        given = array("H", map(numbers.__getitem__, member_keys(service)))
        uids = array("I", self.maps.members.uids(allocation, given))
        self._assigned[allocation.vip] = AssignedMembers(service.backends, given, uids)

    def _assigned_numbers(self, service: Service) -> dict[MemberKey, int]:
        """Those that were given last, whatever the kernel's entries say now."""
        assigned = self._assigned.get(service.vip)
        held = assigned.by_key(assigned.numbers) if assigned else self.maps.numbers(service)
        return numbered(held, member_keys(service))

    @translated()
    def repair(self, service: Service, hops: Mapping[Address, NextHop]) -> ring.Plan:
        """As `put`; members that are lost get the numbers that they had, which slots and flows name."""
        if allocation := self._allocation_like(service):
            assigned = self._assigned.get(service.vip)
            uids = assigned.by_key(assigned.uids) if assigned else {}
            self.maps.members.restore(allocation, service, self._assigned_numbers(service), uids, hops)
        return self.put(service, hops)

    @translated()
    def follow(self, service: Service, hops: Mapping[Address, NextHop]) -> set[Address]:
        allocation = self._allocation_like(service)
        if allocation is None:
            return set()
        if service.vip not in self._assigned:
            self._remember(allocation, service, self._assigned_numbers(service))
        assigned = self._assigned[service.vip]
        numbers = ((b, n) for b, n in zip(assigned.backends, assigned.numbers, strict=True) if b.address in hops)
        return self.maps.members.follow(allocation, numbers, service.options, hops)

    def installed_next_hops(self) -> Iterator[InstalledNextHop]:
        for allocation in self._allocations.values():
            yield from self.maps.members.next_hops(allocation)

    # What is counted

    @translated()
    def statistics(self) -> Statistics:
        maps, obj = self.maps, self.programs.obj
        services = maps.allocations.items()
        return Statistics(
            reasons=self._reasons(),
            backends={vip: maps.members.counters(allocation) for vip, allocation in services},
            slots_in_transition={vip: maps.rings.slots_in_transition(allocation) for vip, allocation in services},
            unresolved={
                ip_address(address)
                for _, allocation in services
                for (address, _), is_resolved in maps.members.resolved(allocation).items()
                if not is_resolved
            },
            maps={name: obj.map(name).memory for name in obj.map_names},
        )

    @translated()
    def open_connections(self, services: Collection[Service]) -> dict[Vip, dict[str, OpenConnections]]:
        return open_connections(self.maps, services) if self.programs.usable_obj else {}

    def _reasons(self) -> dict[str, int]:
        obj = self.programs.obj
        totals = obj.map("reasons").totals()
        return {
            name.lower(): totals[number]
            for name, number in obj.types.enum("reason").items()
            if name.startswith(("ANSWERED_", "PASS_", "DROP_", "NOTED_"))
        }
