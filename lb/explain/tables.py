"""The tables of a loaded balancer as lb.explain.reasons asks them, and what a test run leaves in them taken out again.

Enters: a loaded object. Leaves: values of lb.explain.reasons, and map entries as they were before.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address, ip_network
from typing import Any

from lb.dataplane import clock
from lb.dataplane.lookup import Key, NetworkKey, QuicKey, RangeKey, ServiceKey, SourceKey
from lb.dataplane.lookup_maps import Table
from lb.dataplane.members import address_words
from lb.dataplane.services import ServiceTable
from lb.explain.packet import Flow, Packet
from lb.explain.reasons import Choice, FlowEntry, FoundService, Member, Reply, client_of, source_words
from lb.hashing.flow_hash import flow_hash, mix
from lb.model.state import Mode
from lb.model.vip import Address
from xdp.maps import Map
from xdp.object import BpfObject

MASK = (1 << 64) - 1
# xdp/bpf/lb/nat.h: the ports that a flow may take from an entry that is there already.
NAT_LOOKED_AT = 4
SOURCE_PREFIX = {4: 24, 6: 64}  # struct source_prefix

Entry = tuple[Map, Any]
"""A map and a key."""


class KernelTables:
    """See lb.explain.reasons.Tables, which this implements. Methods raise XdpError."""

    def __init__(self, obj: BpfObject) -> None:
        self._object = obj
        self._config = obj.map(".rodata")[0].config
        self._services = obj.map("services").view()
        self._members = obj.map("members").view()
        self._lines = obj.map("rings").view()
        self._flags = obj.types.enum("member_flag")
        options = obj.types.enum("service_option")
        self._options = {bit: name.removeprefix("OPTION_").lower() for name, bit in options.items()}
        self._allocations = {
            allocation.number: allocation
            for allocation in ServiceTable(self._services, obj.types.enum("mode"), options)
        }

    @property
    def now_ns(self) -> int:
        return clock.now_ns()

    @property
    def seed(self) -> int:
        return int(self._config.hash_seed)

    @property
    def udp_timeout_s(self) -> int:
        return int(self._config.udp_timeout_s)

    # Services

    def service_number(self, address: Address, port: int, protocol: int) -> int | None:
        exact = self._value(f"services{address.version}", ServiceKey(address, port, protocol))
        return self._wide_service(address, port, protocol) if exact is None else exact

    def _wide_service(self, address: Address, port: int, protocol: int) -> int | None:
        bits = address.max_prefixlen
        length = self._value(f"networks{address.version}", NetworkKey(bits, address))
        if length is None:
            return None
        network = ip_network((address, length), strict=False).network_address
        key = RangeKey(bits + 32, network, length, protocol, port)
        return self._value(f"ranges{address.version}", key)

    def service_of_source(self, number: int, client: Address) -> int | None:
        key = SourceKey(32 + client.max_prefixlen, number, client)
        return self._value(f"sources{client.version}", key)

    def service(self, number: int) -> FoundService | None:
        allocation = self._allocations.get(number)
        if allocation is None:
            return None
        entry = self._services[number]
        options = frozenset(name for bit, name in self._options.items() if entry.options & bit)
        return FoundService(allocation, options, tuple(entry.quic_lengths), entry.gue_port)

    def _value(self, table: str, key: Key) -> int | None:
        found = self._object.map(table)
        value = found.get(found.key_type.from_buffer_copy(Table(found).key(key)))
        return None if value is None else int(value.value)

    # Rings and members

    def word(self, service: FoundService, slot: int) -> int:
        at = service.allocation.ring_base + slot
        words = len(self._lines[0].words)
        return int(self._lines[at // words].words[at % words])

    def member(self, service: FoundService, number: int) -> Member | None:
        if not number:
            return None
        entry = self._members[service.allocation.member_base + number]
        return self._member(entry, number) if entry.flags & self._flags["MEMBER_ALIVE"] else None

    def members(self, service: FoundService) -> list[Member]:
        found = (self.member(service, number) for number in range(1, service.allocation.member_count))
        return [member for member in found if member]

    def member_at(self, place: int) -> tuple[FoundService, Member] | None:
        for number, allocation in self._allocations.items():
            if allocation.member_base <= place < allocation.member_base + allocation.member_count:
                service = self.service(number)
                member = service and self.member(service, place - allocation.member_base)
                return (service, member) if service and member else None
        return None

    def named_member(self, service: FoundService, config: int, server_id: bytes) -> int | None:
        return self._value("quic_members", QuicKey(service.allocation.number, config, server_id))

    def _member(self, entry: Any, number: int) -> Member:
        size = 16 if entry.flags & self._flags["MEMBER_IP6"] else 4
        return Member(
            number=number,
            address=ip_address(bytes(entry.address)[:size]),
            port=entry.port,
            uid=entry.uid,
            source=ip_address(bytes(entry.source)[:size]),
            ifindex=entry.hop.ifindex,
            source_mac=bytes(entry.hop.source),
            destination_mac=bytes(entry.hop.destination),
            is_resolved=bool(entry.flags & self._flags["MEMBER_RESOLVED"]),
        )

    # Flows

    def flow(self, flow: Flow) -> FlowEntry | None:
        found = self._get(self.flow_entry("flows", flow))
        return found and FlowEntry(found.member, found.uid, found.seen_ns, bool(found.closing))

    def nat_flow(self, flow: Flow) -> FlowEntry | None:
        found = self._get(self.flow_entry("nat_flows", flow))
        return found and FlowEntry(
            found.member, found.uid, found.seen_ns, port=found.port, state=found.state, timeout_s=found.timeout_s
        )

    def nat_reply(self, flow: Flow) -> Reply | None:
        return self._reply_in(self.flow_entry("nat_replies", flow))

    def _reply_in(self, entry: Entry) -> Reply | None:
        found, key = self._get(entry), entry[1]
        if found is None:
            return None
        size = len(bytes(key.address)) // 2
        client, vip = ip_address(bytes(found.client)[:size]), ip_address(bytes(found.vip)[:size])
        return Reply(
            request=Flow(key.protocol, client, found.client_port, vip, found.vip_port),
            member=found.counter,
            ifindex=found.hop.ifindex,
            client_mac=bytes(found.hop.destination),
            own_mac=bytes(found.hop.source),
        )

    def fragment(self, packet: Packet) -> FlowEntry | None:
        found = self._get(self._fragment_entry(packet))
        return found and FlowEntry(found.member, found.uid, service=found.service)

    @staticmethod
    def _get(entry: Entry) -> Any | None:
        table, key = entry
        return table.get(key)

    def flow_entry(self, tables: str, flow: Flow) -> Entry:
        """tables: flows, nat_flows or nat_replies."""
        table = self._object.map(f"{tables}{flow.source.version}")
        return table, self._flow_key(table, flow)

    @staticmethod
    def _flow_key(table: Map, flow: Flow) -> Any:
        key = table.key_type(
            source_port=flow.source_port, destination_port=flow.destination_port, protocol=flow.protocol
        )
        words = 1 if flow.source.version == 4 else 4
        key.address[: 2 * words] = address_words(flow.source)[:words] + address_words(flow.destination)[:words]
        return key

    def _fragment_entry(self, packet: Packet) -> Entry:
        """Its ports are the datagram's ID: IPv4's 16 bits in the first, IPv6's 32 in both."""
        first, second = packet.datagram, 0
        if packet.version == 6:
            first, second = packet.datagram >> 16, packet.datagram & 0xFFFF
        table = self._object.map("fragments")
        flow = packet.flow._replace(source_port=first, destination_port=second)
        return table, self._flow_key(table, flow)

    # What a packet may change

    def way_to_client(self, packet: Packet, choice: Choice) -> Reply | None:
        """The reply direction of a flow that is translated already."""
        return next(filter(None, map(self._reply_in, self.replies_taken(packet, choice))), None)

    def touched_by(self, packet: Packet, choice: Choice) -> Iterator[Entry]:
        """The entries that a run may add or change: of the flow itself, and of its client."""
        flow = packet.flow
        yield self._fragment_entry(packet)
        for tables in ("flows", "nat_flows", "nat_replies"):
            yield self.flow_entry(tables, flow)
        if choice.request:
            yield self.flow_entry("nat_flows", choice.request)
        if choice.service is None:
            return
        if choice.service.has("affinity"):
            yield self.flow_entry("flows", client_of(flow, choice.service))
        if choice.service.has("syn_limit_of_source"):
            yield self._source_entry(choice.service, flow.source)
        if choice.service.allocation.mode is Mode.NAT:
            yield from self.replies_taken(packet, choice)
            if choice.member:
                yield from self._first_replies(flow, choice.member)

    def _source_entry(self, service: FoundService, client: Address) -> Entry:
        table = self._object.map("source_syn_times")
        network = ip_network((client, SOURCE_PREFIX[client.version]), strict=False).network_address
        key = table.key_type(service=service.allocation.number)
        key.address[:] = address_words(network)[:2]
        return table, key

    def _first_replies(self, flow: Flow, member: Member) -> Iterator[Entry]:
        """Of those ports that the flow may get although they have entries now."""
        for port in self._first_ports(flow):
            yield self.flow_entry("nat_replies", _reply_flow(flow, member, port))

    def _first_ports(self, flow: Flow) -> Iterator[int]:
        """As candidate_port() in xdp/bpf/lb/nat.h."""
        words = source_words(flow)
        own = flow_hash(self.seed, flow.protocol, socket.htons(flow.source_port), words)
        value = mix((own + socket.htons(flow.destination_port)) & MASK)
        for attempt in range(NAT_LOOKED_AT):
            offset = (value & 0xFFFFFFFF) + attempt * (value >> 32 | 1) & 0xFFFFFFFF
            yield self._config.nat_port_first + (offset * self._config.nat_port_count >> 32)

    def replies_taken(self, packet: Packet, choice: Choice) -> Iterator[Entry]:
        """That of the port that the flow has now, whoever its member is."""
        entry = self.nat_flow(packet.flow)
        if entry and choice.service and (member := self.member(choice.service, entry.member)):
            yield self.flow_entry("nat_replies", _reply_flow(packet.flow, member, entry.port))

    @contextmanager
    def leaving_no_trace(self, packet: Packet, choice: Choice) -> Iterator[None]:
        """Entries are as before at the end of the block, those that the packet added are gone.

        What a live packet of the very same flow writes meanwhile, some microseconds, may be lost.
        """
        before = [(table, key, table.get(key)) for table, key in self.touched_by(packet, choice)]
        known = {(table.name, bytes(key)) for table, key, _ in before}
        try:
            yield
        finally:
            taken = self.replies_taken(packet, choice)
            added = [(table, key, None) for table, key in taken if (table.name, bytes(key)) not in known]
            _restore([*before, *added])


def _restore(entries: Iterable[tuple[Map, Any, Any | None]]) -> None:
    for table, key, value in entries:
        if value is None:
            with suppress(KeyError):
                del table[key]
        elif (now := table.get(key)) is None or bytes(now) != bytes(value):
            table[key] = value


def _reply_flow(flow: Flow, member: Member, port: int) -> Flow:
    """As the member's packets carry it."""
    return Flow(flow.protocol, member.address, member.port or flow.destination_port, member.source, port)
