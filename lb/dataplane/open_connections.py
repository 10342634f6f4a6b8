"""How many connections are open now, by backend.

Enters: services in force. Leaves: numbers, each exact, estimated or unknown. In mode nat every connection is in the
translation table. In the other modes the programs record flows on slots in transition alone (xdp/bpf/lb/flow_table.h):
- A member that new flows reach through a slot not in transition has flows that nobody records: unknown.
- All flows of any other member are recorded, those older than the change once they send a packet: as long as it is the
  previous member of a slot, none recorded does not mean none open.
With affinity a flow stands for all of a client, and connection IDs lead past the ring: unknown too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from lb.dataplane.flow_tables import Owner, owner
from lb.dataplane.members import member_key
from lb.dataplane.service_maps import ServiceMaps
from lb.hashing.ring import current_member, previous_member
from lb.model.forwarding import UNKNOWN, OpenConnections
from lb.model.state import Mode, Service
from lb.model.vip import Vip


@dataclass(frozen=True, slots=True)
class _InForce:
    """A service, its backends in force (name -> number, and owner of its flows), and the words that its ring has."""

    service: Service
    members: Mapping[str, tuple[int, Owner]]
    words: frozenset[int]

    @property
    def is_translated(self) -> bool:
        return self.service.mode is Mode.NAT

    @property
    def unrecorded(self) -> set[int]:
        """The numbers of members with flows that are not recorded."""
        if self.service.options.affinity_s or self.service.quic_lengths:
            return {number for number, _ in self.members.values()}
        return {current_member(word) for word in self.words if not previous_member(word)}

    def recorded_owners(self) -> set[Owner]:
        """The owners all of whose flows are recorded sooner or later."""
        unrecorded = self.unrecorded
        return {by for number, by in self.members.values() if number not in unrecorded}

    def results(self, counts: Counter[Owner]) -> dict[str, OpenConnections]:
        if self.is_translated:
            return {name: OpenConnections(counts[by]) for name, (_, by) in self.members.items()}
        unrecorded, previous = self.unrecorded, set(map(previous_member, self.words))
        return {
            name: UNKNOWN
            if number in unrecorded or (number in previous and not counts[by])
            else OpenConnections(counts[by], estimated=True)
            for name, (number, by) in self.members.items()
        }


def open_connections(maps: ServiceMaps, services: Iterable[Service]) -> dict[Vip, dict[str, OpenConnections]]:
    """VIP -> name of the backend -> its connections; backends that are not in force are left out. Each table is read
    once, and only if it tells something: a million entries take about a second. Raises XdpError."""
    found = list(_in_force(maps, services))
    counts: Counter[Owner] = Counter()
    if any(each.is_translated for each in found):
        counts += maps.flows.open_translations()
    oldest_ns: dict[Owner, int] = {}
    for each in found:
        if not each.is_translated and (owners := each.recorded_owners()):
            oldest_ns |= dict.fromkeys(owners, maps.flows.oldest_open_ns(each.service))
    if oldest_ns:
        counts += maps.flows.open_recorded(oldest_ns)
    return {each.service.vip: each.results(counts) for each in found}


def _in_force(maps: ServiceMaps, services: Iterable[Service]) -> Iterator[_InForce]:
    for service in services:
        if allocation := maps.allocation_like(service):
            numbers = maps.members.numbers(allocation)
            held = {str(b): numbers[key] for b in service.backends if (key := member_key(b)) in numbers}
            owners = map(owner, maps.members.uids(allocation, held.values()), held.values())
            members = dict(zip(held, zip(held.values(), owners, strict=True), strict=True))
            words = () if service.mode is Mode.NAT else maps.rings.slot_words(allocation)
            yield _InForce(service, members, frozenset(words))
