"""The maps of one loaded object, and where in them each service lies.

Enters: a loaded object, desired services. Leaves: blocks of slots and of members for a service, and entries by which
packets find it. What is in force is read from the maps once, then kept in step with what is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

from lb.dataplane.allocation import Allocation, Layout, Sizes, server_ids
from lb.dataplane.flow_tables import FlowTables
from lb.dataplane.lookup_maps import LookupMaps
from lb.dataplane.members import MemberKey, MemberTable
from lb.dataplane.rings import Rings
from lb.dataplane.services import ServiceTable
from lb.errors import DataplaneError
from lb.model.state import Service
from lb.model.vip import Vip
from xdp.object import Loaded


class ServiceMaps:
    """`allocations` has the services in force. Methods raise XdpError and DataplaneError."""

    def __init__(self, obj: Loaded) -> None:
        self.obj = obj
        options = obj.types.enum("service_option")
        self.services = ServiceTable(obj.map("services").view(), obj.types.enum("mode"), options)
        self.members = MemberTable(obj.map("members").view(), obj.map("counters"), obj.types.enum("member_flag"))
        self.flows = FlowTables(obj)
        self.rings = Rings(obj.map("rings"), self.flows)
        self.lookups = LookupMaps(obj, obj.variable("control"))
        self.allocations = {allocation.vip: allocation for allocation in self.services}
        self._layout = Layout.of(
            self.allocations.values(),
            services=len(obj.map("services")),
            slots=len(self.rings),
            members=len(self.members),
        )

    # Where services lie

    def allocation_like(self, service: Service) -> Allocation | None:
        """That of the service in force; None also where it has another mode or ring size there."""
        allocation = self.allocations.get(service.vip)
        return allocation if allocation and allocation.is_like(service) else None

    def numbers(self, service: Service) -> dict[MemberKey, int]:
        """Of the members that it has in force."""
        allocation = self.allocation_like(service)
        return self.members.numbers(allocation) if allocation else {}

    def allocate(self, service: Service) -> Allocation:
        """Where the service lies from now on, with those of its members that it has already."""
        old, allocation = self.allocation_like(service), self._allocation_in(self._layout, service)
        if allocation is None:
            raise DataplaneError("maps full: load() grows them")
        if old is None or allocation.member_block != old.member_block:
            self.members.wipe(*allocation.member_block)
            if old:
                self.members.move(old, allocation)
        return allocation

    def _allocation_in(self, layout: Layout, service: Service) -> Allocation | None:
        return layout.allocate(service, self.allocation_like(service), held=len(self.numbers(service)))

    def write(self, allocation: Allocation, service: Service) -> None:
        """The service's entry; the block of members that it had before is free then, if it has another now."""
        self.services.write(allocation, service)
        before = self.allocations.get(allocation.vip)
        self.allocations[allocation.vip] = allocation
        if before and before.member_block != allocation.member_block:
            self.members.erase(before)
            self._layout.release_members(before)

    def set_changed(self, allocation: Allocation) -> None:
        """The time of the last change of the service's ring."""
        self.allocations[allocation.vip] = allocation
        self.services.set_changed(allocation)

    def erase(self, vip: Vip) -> None:
        """First no packet finds the service any more, then it goes."""
        allocation = self.allocations.pop(vip, None)
        if allocation is None:
            return
        self.lookups.forget(allocation.number)
        self.lookups.announce()
        self.services.erase(allocation)
        self.members.erase(allocation)
        self._layout.release(allocation)

    # How packets find them

    def publish(self, services: Sequence[Service]) -> None:
        """Have packets find these, which are all in force, and no others."""
        numbers = {vip: allocation.number for vip, allocation in self.allocations.items()}
        self.lookups.add(services, numbers, lambda vip: self.members.numbers(self.allocations[vip]))
        self._set_sources(services, numbers)
        self.lookups.announce()
        self.lookups.prune()
        self.lookups.announce()

    def _set_sources(self, services: Sequence[Service], numbers: Mapping[Vip, int]) -> None:
        with_sources = [service for service in services if service.options.sources]
        only = {numbers[s.vip] for s in with_sources if not s.vip.set}
        self.services.set_sources(some={numbers[s.vip.own] for s in with_sources}, only=only)

    # How large they are

    def sizes_for(self, services: Sequence[Service]) -> Sizes:
        """Those that the maps have, as long as all of these services fit in beside what is there."""
        held, wanted = Sizes.held_by(self.obj), Sizes.of(services)
        sizes = held.with_flow_tables_of(wanted)
        return sizes if self._fits(services, held) else sizes.with_room_for(wanted)

    def _fits(self, services: Sequence[Service], sizes: Sizes) -> bool:
        trial = self._layout.copy()
        vips = set(chain(self.allocations, (service.vip for service in services)))
        return (
            len(vips) <= sizes.services
            and self.lookups.server_ids + server_ids(services) <= sizes.server_ids
            and all(self._allocation_in(trial, service) for service in services)
        )
