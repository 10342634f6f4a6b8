"""Why a packet went where it went: from what is in the maps, and what the program did, to an explanation (pure).

Enters: a Packet, the tables that the programs read, and the outcome of a run. Leaves: a Choice, which is where the
packet goes by the tables, and whether that is where the program has sent it. What the program did is never worked out
here: only why. The order of the questions is that of xdp/bpf/lb: lb.bpf.c, flow_table.h, forward_nat.h, fragment.h.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

from lb.dataplane.allocation import Allocation
from lb.explain.packet import INNER, RST, Flow, Kind, Packet, read_ip, untagged
from lb.hashing import ring
from lb.hashing.flow_hash import flow_hash, slot_of
from lb.model.state import Mode
from lb.model.vip import Address, join_port

NS = 1_000_000_000
NAT_ENDED = 2 | 8  # enum nat_state: NAT_CLIENT_FIN, NAT_RESET
QUIC_LONG_HEADER = 0x80


class Source(StrEnum):
    """Where the member of a packet was found."""

    RING_CURRENT = "ring_current"
    RING_PREVIOUS = "ring_previous"
    FLOW_TABLE = "flow_table"
    NAT_TABLE = "nat_table"
    NAT_REPLY = "nat_reply"
    CONNECTION_ID = "connection_id"
    FRAGMENT_TABLE = "fragment_table"


# What the tables hold


@dataclass(frozen=True, slots=True)
class FoundService:
    """A service in force. options: names of enum service_option, in lower case and without their first word."""

    allocation: Allocation
    options: frozenset[str] = frozenset()
    quic_lengths: Sequence[int] = ()
    gue_port: int = 0

    def has(self, option: str) -> bool:
        return option in self.options


@dataclass(frozen=True, slots=True)
class Member:
    """A backend of a service that lives. ifindex, macs: its next hop, where it is resolved."""

    number: int
    address: Address
    port: int
    uid: int
    source: Address
    ifindex: int
    source_mac: bytes
    destination_mac: bytes
    is_resolved: bool

    def __str__(self) -> str:
        return join_port(self.address, self.port) if self.port else str(self.address)


@dataclass(frozen=True, slots=True)
class FlowEntry:
    """An entry of the flow table (closing), the nat table (port, state, timeout_s), or that of fragments."""

    member: int
    uid: int
    seen_ns: int = 0
    closing: bool = False
    port: int = 0
    state: int = 0
    timeout_s: int = 0
    service: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    """The other direction of a translated flow."""

    request: Flow
    member: int  # its place among all members
    ifindex: int
    client_mac: bytes
    own_mac: bytes


class Tables(Protocol):
    """What the programs look up. `None`: nothing is found."""

    @property
    def now_ns(self) -> int: ...

    @property
    def seed(self) -> int: ...

    @property
    def udp_timeout_s(self) -> int: ...

    def service_number(self, address: Address, port: int, protocol: int) -> int | None: ...

    def service_of_source(self, number: int, client: Address) -> int | None: ...

    def service(self, number: int) -> FoundService | None: ...

    def word(self, service: FoundService, slot: int) -> int: ...

    def member(self, service: FoundService, number: int) -> Member | None: ...

    def members(self, service: FoundService) -> list[Member]: ...

    def named_member(self, service: FoundService, config: int, server_id: bytes) -> int | None: ...

    def flow(self, flow: Flow) -> FlowEntry | None: ...

    def nat_flow(self, flow: Flow) -> FlowEntry | None: ...

    def nat_reply(self, flow: Flow) -> Reply | None: ...

    def fragment(self, packet: Packet) -> FlowEntry | None: ...

    def member_at(self, place: int) -> tuple[FoundService, Member] | None: ...


# The choice


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in a service's ring, and what its word says; `hash_value` is of the flow, or of the client."""

    hash_value: int
    number: int
    word: int

    @property
    def current(self) -> int:
        return ring.current_member(self.word)

    @property
    def previous(self) -> int:
        return ring.previous_member(self.word)

    @property
    def is_tracked(self) -> bool:
        return ring.is_tracked(self.word)


@dataclass(frozen=True, slots=True)
class Choice:
    """Where a packet goes by the tables. refused: its client is none of those that the service is for.

    affinity: slot and flow are those that all of the client's flows share. request: what a reply answers to.
    """

    service: FoundService | None = None
    source: Source | None = None
    member: Member | None = None
    slot: Slot | None = None
    affinity: bool = False
    refused: bool = False
    request: Flow | None = None


def choose(packet: Packet, tables: Tables) -> Choice:
    if packet.kind is Kind.OTHER:
        return Choice(service=_service_of(packet.flow, tables))
    if packet.kind is Kind.LATER_FRAGMENT:
        return _follow_fragment(packet, tables)
    service = _service_of(packet.flow, tables)
    if service is None:
        return _reply(packet, tables)
    found = _service_for_client(service, packet, tables)
    if found is None:
        return Choice(service, refused=True)
    if packet.kind is Kind.FIRST_FRAGMENT and found.allocation.mode is Mode.NAT:
        return Choice(found)
    chosen = _translated(packet, found, tables) if found.allocation.mode is Mode.NAT else _select(packet, found, tables)
    return replace(chosen, service=found)


def _service_of(flow: Flow, tables: Tables) -> FoundService | None:
    number = tables.service_number(flow.destination, flow.destination_port, flow.protocol)
    return None if number is None else tables.service(number)


def _service_for_client(service: FoundService, packet: Packet, tables: Tables) -> FoundService | None:
    if not (service.has("sources") or service.has("only_sources")):
        return service
    number = tables.service_of_source(service.allocation.number, packet.flow.source)
    if number is not None:
        return tables.service(number)
    return None if service.has("only_sources") else service


def _reply(packet: Packet, tables: Tables) -> Choice:
    reply = tables.nat_reply(packet.flow)
    if reply is None:
        return Choice()
    service, member = tables.member_at(reply.member) or (None, None)
    return Choice(service, Source.NAT_REPLY, member, request=reply.request)


def _follow_fragment(packet: Packet, tables: Tables) -> Choice:
    first = tables.fragment(packet)
    service = tables.service(first.service) if first else None
    if first is None or service is None:
        return Choice()
    return Choice(service, Source.FRAGMENT_TABLE, _recorded_member(first, service, tables))


def _recorded_member(entry: FlowEntry, service: FoundService, tables: Tables) -> Member | None:
    member = tables.member(service, entry.member)
    return member if member and member.uid == entry.uid else None


def _is_older(seen_ns: int, timeout_s: int, tables: Tables) -> bool:
    return tables.now_ns > seen_ns + timeout_s * NS


# Mode nat


def _translated(packet: Packet, service: FoundService, tables: Tables) -> Choice:
    known = _known_translation(packet, service, tables)
    if known and not _names_another(packet, service, known, tables):
        return Choice(source=Source.NAT_TABLE, member=known, slot=_slot(packet.flow, service, tables))
    if packet.kind is Kind.ICMP_ERROR or packet.tcp_flags & RST:
        return Choice()
    return _select_untracked(packet, service, tables)


def _known_translation(packet: Packet, service: FoundService, tables: Tables) -> Member | None:
    entry = tables.nat_flow(packet.flow)
    if entry is None or _is_older(entry.seen_ns, entry.timeout_s, tables):
        return None
    if packet.opens and entry.state & NAT_ENDED:
        return None
    return _recorded_member(entry, service, tables)


def _names_another(packet: Packet, service: FoundService, member: Member, tables: Tables) -> bool:
    named = _named(packet, service, tables)
    return named is not None and named.number != member.number


def _select_untracked(packet: Packet, service: FoundService, tables: Tables) -> Choice:
    if chosen := _select_by_option(packet, service, tables):
        return chosen
    slot = _slot(packet.flow, service, tables)
    previous = tables.member(service, slot.previous)
    if packet.flow.protocol == socket.IPPROTO_TCP and not packet.opens and previous:
        return Choice(source=Source.RING_PREVIOUS, member=previous, slot=slot)
    return Choice(source=Source.RING_CURRENT, member=tables.member(service, slot.current), slot=slot)


# The other modes


def _select(packet: Packet, service: FoundService, tables: Tables) -> Choice:
    return _select_by_option(packet, service, tables) or _select_by_hash(packet.flow, packet, service, tables)


def _select_by_option(packet: Packet, service: FoundService, tables: Tables) -> Choice | None:
    if named := _named(packet, service, tables):
        return Choice(source=Source.CONNECTION_ID, member=named)
    if not service.has("affinity"):
        return None
    chosen = _select_by_hash(client_of(packet.flow, service), packet, service, tables)
    return replace(chosen, affinity=True) if chosen.member else None


def client_of(flow: Flow, service: FoundService) -> Flow:
    """What stands for all flows of a client to a service with affinity."""
    vip = service.allocation.vip
    return Flow(flow.protocol, flow.source, 0, vip.address, vip.port)


def _select_by_hash(flow: Flow, packet: Packet, service: FoundService, tables: Tables) -> Choice:
    slot = _slot(flow, service, tables)
    if slot.is_tracked and (member := _tracked_member(flow, packet, service, tables)):
        return Choice(source=Source.FLOW_TABLE, member=member, slot=slot)
    previous = tables.member(service, slot.previous)
    if slot.is_tracked and previous and _belongs_to_previous(packet, service, tables):
        return Choice(source=Source.RING_PREVIOUS, member=previous, slot=slot)
    return Choice(source=Source.RING_CURRENT, member=tables.member(service, slot.current), slot=slot)


def _slot(flow: Flow, service: FoundService, tables: Tables) -> Slot:
    value = flow_hash(tables.seed, flow.protocol, socket.htons(flow.source_port), source_words(flow))
    number = slot_of(value, service.allocation.ring_size)
    return Slot(value, number, tables.word(service, number))


def source_words(flow: Flow) -> tuple[int, ...]:
    """The client's address as lb.hashing.flow_hash wants it."""
    packed = flow.source.packed
    return struct.unpack(f"={len(packed) // 4}I", packed)


def _tracked_member(flow: Flow, packet: Packet, service: FoundService, tables: Tables) -> Member | None:
    entry = tables.flow(flow)
    if entry is None or _has_ended(entry, packet, service, tables):
        return None
    return _recorded_member(entry, service, tables)


def _has_ended(entry: FlowEntry, packet: Packet, service: FoundService, tables: Tables) -> bool:
    if packet.opens and entry.closing:
        return True
    if packet.opens and service.has("affinity") and _is_older(entry.seen_ns, service.allocation.affinity_s, tables):
        return True
    return _is_older(entry.seen_ns, service.allocation.flow_timeout_s, tables)


def _belongs_to_previous(packet: Packet, service: FoundService, tables: Tables) -> bool:
    allocation = service.allocation
    if service.has("affinity"):
        return not _is_older(allocation.changed_ns, allocation.affinity_s, tables)
    if packet.flow.protocol == socket.IPPROTO_TCP:
        return not packet.opens
    return not _is_older(allocation.changed_ns, tables.udp_timeout_s, tables)


def _named(packet: Packet, service: FoundService, tables: Tables) -> Member | None:
    """By the plaintext form of QUIC-LB, as xdp/bpf/lb/quic.h."""
    if not service.has("quic") or packet.kind is not Kind.UDP or len(packet.payload) < 7:
        return None
    is_long = bool(packet.payload[0] & QUIC_LONG_HEADER)
    at = 6 if is_long else 1
    config = packet.payload[at] >> 5
    length = service.quic_lengths[config]
    server_id = packet.payload[at + 1 : at + 1 + length]
    if not length or len(server_id) < length or (is_long and packet.payload[5] < 1 + length):
        return None
    number = tables.named_member(service, config, server_id)
    return None if number is None else tables.member(service, number)


# What the program did


@dataclass(frozen=True, slots=True)
class Stage:
    """A program in the packet's path that is not the balancer's. rule: which of the filter's, in words."""

    place: str
    program_id: int
    program: str
    rule: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """A run. reason: of enum reason, in lower case; None where the balancer gave none, because one of `stages` had
    ended the packet's way. egress: index and name of an interface."""

    action: str
    reason: str | None
    frame: bytes
    egress: tuple[int, str] | None = None
    stages: tuple[Stage, ...] = ()


@dataclass(frozen=True, slots=True)
class Explanation:
    """interface: where the packet came in. member: whom it went to, or by the tables would have, or, of a reply, whom
    it comes from. slot_members: current and previous one by name, of those that live. hop_interface: by which the
    member is reached. disagreement: a sentence where program and tables differ."""

    interface: str
    frame: bytes
    packet: Packet | None
    outcome: Outcome
    choice: Choice
    member: Member | None = None
    slot_members: tuple[str | None, str | None] = (None, None)
    hop_interface: str | None = None
    disagreement: str | None = None
    notes: tuple[str, ...] = ()


def found_by(service: FoundService) -> str:
    vip = service.allocation.vip
    how = ["exact address" if vip.is_one_address else f"prefix {vip.network}"]
    if vip.port == 0:
        how.append("any port")
    else:
        how.append("exact port" if vip.port == vip.last_port else f"ports {vip.port}-{vip.last_port}")
    if vip.set:
        how.append(f"set {vip.set} by the client's prefix")
    return ", ".join(how)


def members_reached(outcome: Outcome, packet: Packet, service: FoundService, tables: Tables) -> list[Member]:
    """Those to whom the bytes out can have gone: more than one where they are told apart by nothing in the frame."""
    return [m for m in tables.members(service) if _reaches(outcome, packet, service.allocation.mode, m)]


def _reaches(outcome: Outcome, packet: Packet, mode: Mode, member: Member) -> bool:
    if mode is Mode.DR:
        is_its_hop = outcome.frame[:6] == member.destination_mac and outcome.egress
        return not member.is_resolved or bool(is_its_hop and is_its_hop[0] == member.ifindex)
    _, ethertype, data = untagged(outcome.frame)
    ip = read_ip(data, 4 if ethertype == 0x0800 else 6)
    if ip is None or ip.destination != member.address:
        return False
    if mode is Mode.NAT and packet.kind in (Kind.TCP, Kind.UDP):
        port = member.port or packet.flow.destination_port
        return int.from_bytes(ip.payload[2:4], "big") == port
    return mode is Mode.NAT or ip.protocol in (*INNER, socket.IPPROTO_UDP)


def disagreement(choice: Choice, outcome: Outcome, reached: Sequence[Member]) -> str | None:
    """A sentence if the program did what the tables do not account for."""
    by_tables = str(choice.member) if choice.member else "none"
    if outcome.reason == "forwarded" and choice.source is not Source.NAT_REPLY:
        if choice.service and choice.member in reached:
            return None
        chosen = " or ".join(map(str, reached)) or "none of the service's members"
        return f"the program chose {chosen}; according to the maps it is {by_tables}"
    if outcome.reason == "drop_no_backend" and choice.member:
        return f"the program found no backend; according to the maps it is {by_tables}"
    if outcome.reason == "pass_not_a_service" and choice.source:
        return f"the program found no service; according to the maps it is {_by_tables(choice)}"
    return None


def _by_tables(choice: Choice) -> str:
    return str(choice.request or (choice.service and choice.service.allocation.vip))


# Reasons as text

REASON_TEXTS: dict[str, tuple[str, str | None]] = {
    "forwarded": ("forwarded", None),
    "answered_echo": ("ICMP echo request answered by the balancer", None),
    "answered_too_big": (
        "too big for the tunnel: answered with an ICMP error that gives the MTU",
        "raise the MTU on the path to the backends, or lower the service's --mss",
    ),
    "answered_ttl_expired": (
        "TTL or hop limit expired: answered with an ICMP error",
        "traceroute sends such packets; if it is not one, look for a routing loop",
    ),
    "pass_not_ip": ("passed to the host: neither IPv4 nor IPv6", None),
    "pass_not_tcp_or_udp": ("passed to the host: neither TCP nor UDP", None),
    "pass_not_a_service": (
        "passed to the host: no matching service or NAT flow",
        "if it should be balanced, compare address, port and protocol with xdp-lb vip list",
    ),
    "pass_malformed": ("passed to the host: truncated headers", None),
    "pass_fragment": (
        "passed to the host: fragment, first fragment not seen",
        "check that the network does not reorder fragments; better, use path MTU discovery on the sender",
    ),
    "pass_ipv6_extension": ("passed to the host: IPv6 extension header", None),
    "pass_icmp": ("passed to the host: ICMP, not an error for a balanced flow", None),
    "pass_icmp_no_flow": ("passed to the host: ICMP error for an unknown flow", None),
    "pass_group_mac": (
        "passed to the host: sent to a multicast or broadcast MAC address",
        "check which device floods it: the VIP should resolve to this host's MAC address",
    ),
    "drop_malformed": (
        "dropped: inconsistent length fields",
        "find the device that corrupts it",
    ),
    "drop_fragment": (
        "dropped: fragment of a packet that cannot be balanced in fragments",
        "send smaller packets: set --mss for TCP, the payload size for UDP",
    ),
    "drop_ip_options": ("dropped: IPv4 options in a packet to a service", "disable IP options on the sender"),
    "drop_martian_source": (
        "dropped: source address that no client can have: martian, or a VIP",
        "spoofed: filter it where it enters the network (BCP 38)",
    ),
    "drop_ttl_expired": ("dropped: TTL or hop limit expired", "look for a routing loop"),
    "drop_no_backend": (
        "dropped: no backend available",
        "add a backend, or set a weight above 0: see xdp-lb backend list",
    ),
    "drop_no_neighbour": (
        "dropped: the backend's next hop is unresolved",
        "ping the backend from this host; xdp-lb status lists unresolved backends",
    ),
    "drop_nat_no_flow": ("dropped: TCP RST without a NAT flow", None),
    "drop_nat_no_port": (
        "dropped: no free NAT port for the backend",
        "add backends, or use --mode dr, ipip or gue, which need no ports",
    ),
    "drop_source_not_allowed": (
        "dropped: client not in the service's allowed prefixes",
        "xdp-lb vip set VIP --allow PREFIX,..., or --allow any",
    ),
    "drop_syn_limit": (
        "dropped: service's SYN limit exceeded",
        "wait a second, or xdp-lb vip set VIP --syn-limit N",
    ),
    "drop_syn_limit_of_source": (
        "dropped: SYN limit per source exceeded",
        "wait a second, or xdp-lb vip set VIP --syn-limit-of-source N",
    ),
    "drop_too_big": (
        "dropped: too big for the tunnel",
        "raise the MTU on the path to the backends, or lower the service's --mss",
    ),
    "drop_no_headroom": (
        "dropped: not enough headroom in the driver's buffer",
        "xdp-lb attach IFACE --xdp-mode generic",
    ),
}


def reason_text(reason: str) -> tuple[str, str | None]:
    """A reason in a sentence, and what to do about it."""
    return REASON_TEXTS.get(reason, (reason.replace("_", " "), None))
