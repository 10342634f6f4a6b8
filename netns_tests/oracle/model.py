"""What the balancer's program is meant to do with a frame, written slowly: the oracle it is compared with.

Services and members go in, then frames with the interface they came in on; out comes an Outcome. Flows and translations
are dicts. Addresses are in network byte order (4 or 16 bytes), ports plain integers, times nanoseconds.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from socket import IPPROTO_TCP, IPPROTO_UDP
from typing import Literal

from netns_tests.oracle.packets import ETHERNET_HEADER_SIZE, Verdict
from netns_tests.oracle.wire import (
    FIN,
    ICMP_OF,
    QUOTED,
    RST,
    Ends,
    Flow,
    Gue,
    Hop,
    Packet,
    Tunnel,
    addresses_at,
    clamp_mss,
    echo_reply,
    encapsulated,
    is_atomic_fragment,
    is_echo_request,
    is_martian,
    outer_size,
    packet_between,
    parse,
    quic_server_id,
    refused_flow,
    send_to,
    set_ports,
    tags_and_frame,
    time_exceeded_answer,
    too_big_answer,
    translate,
    ttl,
    version_of,
    without_fragment_header,
)

SECOND_NS = 1_000_000_000
HASHED_TRIES = 16
LOOKED_AT = 4
MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1
SEEN_BITS, SIGNATURES = 11, 16  # places for SYNs: lines, and in each line
NOT_RECORDED = "NOTED_SYN_NOT_RECORDED"

State = Literal["established", "client-fin", "backend-fin", "reset"]
Mode = Literal["nat", "dr", "ipip", "gue"]
Prefix = tuple[bytes, int]  # address and length in bits
CounterName = tuple[int, int]  # the numbers of a service and of a member of it


@dataclass(frozen=True)
class Outcome:
    """`reason` is the name in `enum reason`, `noted` that of one counted beside it."""

    verdict: Verdict
    reason: str
    frame: bytes
    noted: str = ""


@dataclass(frozen=True)
class Settings:
    """`struct config`, by its names."""

    hash_seed: int = 0x0123456789ABCDEF
    refresh_ns: int = SECOND_NS
    nat_opening_timeout_s: int = 60
    nat_closed_timeout_s: int = 30
    udp_timeout_s: int = 120
    recorded_syns_per_s: int = 1 << 31
    icmp_errors_per_s: int = 1 << 31
    nat_port_first: int = 1024
    nat_port_count: int = 256


@dataclass
class Member:
    """A backend in a service. Port 0: the one the client asked for. source_bits: how many low bits of a tunnel's source
    are the flow's; mtu: of the way there."""

    uid: int
    address: bytes
    source: bytes
    hop: Hop
    port: int = 0
    alive: bool = True
    resolved: bool = True
    mtu: int = 1500
    source_bits: int = 0


@dataclass
class Slot:
    """Members by number; 0 stands for none."""

    current: int
    previous: int = 0
    track: bool = False


@dataclass
class Service:
    """Port 0: every port. A set is found through the sources of another service only.

    sources: which service a client has by the longest prefix of its address, as a number: the place in the list of
    services. server_ids: (config rotation codepoint, server ID) of QUIC -> member; of a codepoint, all of one length.
    """

    address: bytes
    port: int
    protocol: int
    mode: Mode
    members: dict[int, Member]
    slots: list[Slot]
    flow_timeout_s: int = 3600
    changed_ns: int = 0
    last_port: int = 0  # 0: there is one port
    prefix_bits: int | None = None  # None: all of the address
    is_set: bool = False
    sources: Mapping[Prefix, int] = field(default_factory=dict)
    only_sources: bool = False
    syn_limit: int = 0
    syn_limit_of_source: int = 0
    mss: int = 0
    affinity_s: int = 0
    server_ids: Mapping[tuple[int, bytes], int] = field(default_factory=dict)
    outer_checksum: bool = False
    second_chance: bool = False
    gue_port: int = 6080

    @property
    def ports(self) -> range:
        return range(self.port, (self.last_port or self.port) + 1) if self.port else range(1 << 16)

    @property
    def prefix_length(self) -> int:
        return 8 * len(self.address) if self.prefix_bits is None else self.prefix_bits

    @property
    def is_wide(self) -> bool:
        """More than one address or port."""
        return self.prefix_length < 8 * len(self.address) or len(self.ports) > 1

    @property
    def quic_lengths(self) -> dict[int, int]:
        return {config: len(server_id) for config, server_id in self.server_ids}

    def has(self, address: bytes) -> bool:
        return contains((self.address, self.prefix_length), address)

    def live(self, number: int) -> Member | None:
        member = self.members.get(number)
        return member if member and member.alive else None

    def recorded(self, number: int, uid: int) -> Member | None:
        """The member that an entry is about, unless it died or another one took its number."""
        member = self.live(number)
        return member if member and member.uid == uid else None

    def number_of(self, member: Member) -> int:
        return next(number for number, other in self.members.items() if other is member)


@dataclass
class Recorded:
    """Where a flow went while its slot was in transition."""

    seen_ns: int
    uid: int
    number: int
    closing: bool = False


@dataclass
class Request:
    """Client to VIP: the member, and the balancer's port towards it."""

    seen_ns: int
    uid: int
    number: int
    port: int
    timeout_s: int
    state: set[State] = field(default_factory=set)


@dataclass
class Reply:
    """Backend to balancer: the client's flow, and the way back to the client."""

    seen_ns: int
    request: Flow
    hop: Hop
    counter: CounterName
    uid: int
    timeout_s: int
    state: set[State] = field(default_factory=set)


@dataclass
class Count:
    packets: int = 0
    bytes: int = 0
    reply_packets: int = 0
    reply_bytes: int = 0
    connections: int = 0
    repeated_syns: int = 0


class Undetermined(Exception):
    """The program chooses at random here; what it does next, the model cannot know."""


# Hashing


def mix(x: int) -> int:
    """SplitMix64's finaliser."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK64
    return x ^ x >> 31


def machine_word(data: bytes) -> int:
    """Network bytes as the program's CPU loads them."""
    return int.from_bytes(data, sys.byteorder)


def port_word(port: int) -> int:
    return machine_word(port.to_bytes(2, "big"))


def flow_hash(flow: Flow, seed: int) -> int:
    """The client's address and port and the protocol, the same on every node that has the seed."""
    words = [machine_word(flow.source[at : at + 4]) for at in range(0, len(flow.source), 4)]
    first = mix(seed ^ flow.protocol << 48 ^ port_word(flow.source_port) << 32 ^ words[0])
    if len(words) == 1:
        return first
    return mix(first ^ words[1] << 32 ^ words[2] ^ mix(first + words[3] & MASK64))


def scaled(hash32: int, size: int) -> int:
    """A 32-bit hash onto 0..size-1."""
    return hash32 * size >> 32


def contains(prefix: Prefix, address: bytes) -> bool:
    network, length = prefix
    rest = 8 * len(address) - length
    same_family = len(network) == len(address)
    return same_family and int.from_bytes(network, "big") >> rest == int.from_bytes(address, "big") >> rest


def narrowest(services: Iterable[Service]) -> Service | None:
    """The one of a single address and port, or that with the longest prefix, and under it with the fewest ports."""
    return min(services, key=lambda s: (s.is_wide, -s.prefix_length, len(s.ports)), default=None)


@dataclass(frozen=True)
class Way:
    """Where a packet goes. slot: the one that says so; None, where something else does."""

    service: Service
    member: Member
    slot: Slot | None
    hash32: int


@dataclass(frozen=True)
class FirstFragment:
    """Where the first fragment of a datagram went."""

    service: Service
    number: int
    uid: int
    hash32: int


# The balancer


class Model:
    """The balancer's state, and what it does with frames. Services and `now_ns` may be changed between frames.

    echo: the addresses whose echo requests are answered.
    """

    def __init__(self, settings: Settings, services: list[Service], echo: Collection[bytes] = ()) -> None:
        self.settings, self.services, self.echo = settings, services, echo
        self.now_ns = 0
        self.flows: dict[Flow, Recorded] = {}
        self.requests: dict[Flow, Request] = {}
        self.replies: dict[Flow, Reply] = {}
        self.fragments: dict[tuple[Flow, bytes], FirstFragment] = {}
        self.syn_times: dict[object, int] = {}
        self.seen_syns: dict[tuple[int, int], int] = {}
        self.done: dict[tuple[str, int], int] = {}
        self.counts: dict[CounterName, Count] = {}
        self._noted = ""

    def receive(self, frame: bytes, ingress_ifindex: int) -> Outcome:
        """What becomes of a frame of at least 14 bytes."""
        tags, untagged = tags_and_frame(frame)
        verdict, reason = self._story(untagged, ingress_ifindex)
        noted, self._noted = self._noted, ""
        return Outcome(verdict, reason, bytes(untagged[:12] + tags + untagged[12:]), noted)

    def _story(self, frame: bytearray, ingress_ifindex: int) -> tuple[Verdict, str]:
        """Changes the frame into the one that leaves."""
        try:
            egress = self._balance(frame, ingress_ifindex)
        except Ends as end:
            verdicts = {"DROP": Verdict.DROP, "PASS": Verdict.PASS, "ANSWERED": Verdict.TX}
            return verdicts[end.reason.split("_")[0]], end.reason
        return Verdict.TX if egress == ingress_ifindex else Verdict.REDIRECT, "FORWARDED"

    def _balance(self, frame: bytearray, ingress_ifindex: int) -> int:
        packet = self._parse(frame)
        if packet.fragment:
            return self._forward_fragment(packet)
        service = self._service_at(packet.flow.destination, packet.flow.destination_port, packet.flow.protocol)
        if service is None:
            return self._to_client(packet)
        self._check_source(packet)
        self._check_is_no_vip(packet)
        service = self._admit(service, packet)
        if service.mode == "nat":
            return self._to_member(service, packet, ingress_ifindex)
        if ttl(packet) <= 1:
            self._answer_expired(packet)
        return self._send_whole(self._way(service, packet), packet)

    def _check_source(self, packet: Packet) -> None:
        """Of a packet that the balancer would send on or answer."""
        source, _ = addresses_at(packet.frame, ETHERNET_HEADER_SIZE, packet.version)
        if packet.frame[0] & 1:
            raise Ends("PASS_GROUP_MAC")
        if is_martian(source) or packet.flow.source == packet.flow.destination:
            raise Ends("DROP_MARTIAN_SOURCE")

    def _check_is_no_vip(self, packet: Packet) -> None:
        if addresses_at(packet.frame, ETHERNET_HEADER_SIZE, packet.version)[0] in self._vips():
            raise Ends("DROP_MARTIAN_SOURCE")

    def _vips(self) -> Iterator[bytes]:
        """Those that are single addresses."""
        yield from (s.address for s in self.services if s.prefix_length == 8 * len(s.address) and not s.is_set)

    def _parse(self, frame: bytearray) -> Packet:
        if is_atomic_fragment(frame) and self._refused(frame, "DROP_FRAGMENT") == "DROP_FRAGMENT":
            frame[:] = without_fragment_header(frame)
        try:
            return parse(frame)
        except Ends as end:
            if end.reason == "PASS_ICMP":
                self._answer_echo(frame)
            raise Ends(self._refused(frame, end.reason)) from None

    def _answer_echo(self, frame: bytearray) -> None:
        packet = parse_addresses(frame)
        if packet.flow.destination not in self.echo or not is_echo_request(packet):
            return
        try:
            self._check_source(packet)
            self._check_is_no_vip(packet)
        except Ends:
            return
        frame[:] = echo_reply(frame)
        raise Ends("ANSWERED_ECHO")

    def _refused(self, frame: bytearray, reason: str) -> str:
        """What cannot be balanced is dropped only where a service or a translated flow would have had it."""
        if reason.startswith("PASS"):
            return reason
        flow = refused_flow(frame)
        if flow is None:
            return "PASS_MALFORMED"
        service = self._service_at(flow.destination, flow.destination_port, flow.protocol)
        return reason if service or flow in self.replies else "PASS_NOT_A_SERVICE"

    def _service_at(self, destination: bytes, port: int, protocol: int) -> Service | None:
        here = [s for s in self.services if not s.is_set and s.has(destination) and s.protocol == protocol]
        return narrowest([s for s in here if port in s.ports])

    def _check_ttl(self, packet: Packet) -> None:
        if ttl(packet) <= 1:
            raise Ends("DROP_TTL_EXPIRED")

    def _older_than(self, seen_ns: int, timeout_s: int) -> bool:
        return self.now_ns > seen_ns + timeout_s * SECOND_NS

    def _may(self, what: str, per_s: int) -> bool:
        """So often a second, as seconds are counted from the clock's zero."""
        second = what, self.now_ns // SECOND_NS
        self.done[second] = self.done.get(second, 0) + 1
        return self.done[second] <= per_s

    def _hash(self, flow: Flow) -> int:
        return flow_hash(flow, self.settings.hash_seed)

    def _slot(self, service: Service, flow: Flow) -> Slot:
        return service.slots[scaled(self._hash(flow) >> 32, len(service.slots))]

    def _counter_name(self, service: Service, member: Member) -> CounterName:
        return self._number(service), service.number_of(member)

    def _number(self, service: Service) -> int:
        return next(number for number, other in enumerate(self.services) if other is service)

    def _count(self, service: Service, member: Member, packet: Packet, opens: bool) -> int:
        """The interface it leaves on."""
        count = self.counts.setdefault(self._counter_name(service, member), Count())
        count.packets += 1
        count.bytes += len(packet.frame)
        count.connections += opens
        count.repeated_syns += packet.opens and self._was_seen(member, packet)
        return member.hop.ifindex

    def _was_seen(self, member: Member, packet: Packet) -> bool:
        """Whether it is the latest SYN in its place, there being so many."""
        sequence = machine_word(bytes(packet.frame[packet.l4 + 4 : packet.l4 + 8]))
        seen = mix(self._hash(packet.flow) ^ (member.uid << 32 | sequence))
        place, signature = (seen >> 64 - SEEN_BITS, seen >> 32 & SIGNATURES - 1), seen & MASK32
        before, self.seen_syns[place] = self.seen_syns.get(place), signature
        return before == signature

    # What a service asks of a packet

    def _admit(self, service: Service, packet: Packet) -> Service:
        service = self._service_of_source(service, packet.flow.source)
        if packet.opens:
            self._check_syn_limits(service, packet.flow.source)
            if service.mss:
                clamp_mss(packet, service.mss)
        return service

    def _service_of_source(self, service: Service, client: bytes) -> Service:
        prefixes = [prefix for prefix in service.sources if contains(prefix, client)]
        if prefixes:
            return self.services[service.sources[max(prefixes, key=lambda prefix: prefix[1])]]
        if service.only_sources:
            raise Ends("DROP_SOURCE_NOT_ALLOWED")
        return service

    def _check_syn_limits(self, service: Service, client: bytes) -> None:
        number = self._number(service)
        of_source = number, client[: 3 if len(client) == 4 else 8]
        if service.syn_limit_of_source and self._too_early(of_source, service.syn_limit_of_source):
            raise Ends("DROP_SYN_LIMIT_OF_SOURCE")
        if service.syn_limit and self._too_early(number, service.syn_limit):
            raise Ends("DROP_SYN_LIMIT")

    def _too_early(self, name: object, per_s: int) -> bool:
        """The generic cell rate algorithm (ITU-T I.371): a second's worth may come at once."""
        due = max(self.syn_times.get(name, 0), self.now_ns) + SECOND_NS // per_s
        if due > self.now_ns + SECOND_NS:
            return True
        self.syn_times[name] = due
        return False

    # Selection

    def _way(self, service: Service, packet: Packet) -> Way:
        """In every mode but nat."""
        member, slot = self._by_option(service, packet), None
        if member is None:
            slot = self._slot(service, packet.flow)
            member = self._at(service, slot, packet.flow, packet)
        if member is None:
            raise Ends("DROP_NO_BACKEND")
        return Way(service, member, slot, self._hash(packet.flow) & MASK32)

    def _by_option(self, service: Service, packet: Packet) -> Member | None:
        """The member that more than the flow's slot decides; None: the slot does."""
        return self._named(service, packet) or (self._of_client(service, packet) if service.affinity_s else None)

    def _named(self, service: Service, packet: Packet) -> Member | None:
        """The member that the connection ID names."""
        found = quic_server_id(packet, service.quic_lengths) if service.server_ids and packet.is_udp else None
        return service.live(service.server_ids.get(found, 0)) if found else None

    def _of_client(self, service: Service, packet: Packet) -> Member | None:
        """All flows of a client are one: from no port of its address, to the first of the VIP."""
        client = Flow(packet.flow.source, 0, service.address, service.ports.start, packet.flow.protocol)
        return self._at(service, self._slot(service, client), client, packet)

    def _at(self, service: Service, slot: Slot, flow: Flow, packet: Packet) -> Member | None:
        return self._tracked(service, slot, flow, packet) if slot.track else service.live(slot.current)

    def _tracked(self, service: Service, slot: Slot, flow: Flow, packet: Packet) -> Member | None:
        entry = self.flows.get(flow)
        if entry and not self._has_ended(entry, service, packet):
            member = service.recorded(entry.number, entry.uid)
            if member:
                self._touch(entry, service, packet)
                return member
        member = self._first_seen(service, slot, packet)
        if member and (entry or slot.previous) and not packet.is_error:
            self._record(service, flow, member, packet)
        return member

    def _record(self, service: Service, flow: Flow, member: Member, packet: Packet) -> None:
        if packet.opens and not self._may("record", self.settings.recorded_syns_per_s):
            self._noted = NOT_RECORDED
            return
        self.flows[flow] = Recorded(self.now_ns, member.uid, service.number_of(member), self._closes(service, packet))

    def _closes(self, service: Service, packet: Packet) -> bool:
        """What is recorded of a client with affinity outlives its connections."""
        return bool(packet.tcp_flags & (FIN | RST)) and not service.affinity_s

    def _has_ended(self, entry: Recorded, service: Service, packet: Packet) -> bool:
        was_silent = bool(service.affinity_s) and self._older_than(entry.seen_ns, service.affinity_s)
        if packet.opens and (entry.closing or was_silent):
            return True
        return self._older_than(entry.seen_ns, service.flow_timeout_s)

    def _touch(self, entry: Recorded, service: Service, packet: Packet) -> None:
        if self.now_ns - entry.seen_ns >= self.settings.refresh_ns:
            entry.seen_ns = self.now_ns
        entry.closing = entry.closing or self._closes(service, packet)

    def _first_seen(self, service: Service, slot: Slot, packet: Packet) -> Member | None:
        is_older = self._is_older_than_change(service, packet)
        return (service.live(slot.previous) if is_older else None) or service.live(slot.current)

    def _is_older_than_change(self, service: Service, packet: Packet) -> bool:
        """Of what is unknown: what opens no connection; UDP, and a client with affinity, soon after the change."""
        if service.affinity_s:
            return not self._older_than(service.changed_ns, service.affinity_s)
        if packet.flow.protocol == IPPROTO_UDP:
            return not self._older_than(service.changed_ns, self.settings.udp_timeout_s)
        return packet.belongs_to_open_connection

    # Fragments

    def _forward_fragment(self, packet: Packet) -> int:
        first = self._first_fragment(packet)
        self._check_source(packet)
        self._check_ttl(packet)
        member = first.service.recorded(first.number, first.uid)
        if member is None:
            raise Ends("DROP_NO_BACKEND")
        return self._send_whole(Way(first.service, member, None, first.hash32), packet)

    def _first_fragment(self, packet: Packet) -> FirstFragment:
        """Every fragment follows the first of its datagram, which finds its way by its ports."""
        assert packet.fragment
        name = packet.flow, packet.fragment.datagram
        if packet.fragment.is_first:
            self.fragments[name] = self._way_of_datagram(packet)
        elif name not in self.fragments:
            raise Ends("PASS_FRAGMENT")
        return self.fragments[name]

    def _way_of_datagram(self, packet: Packet) -> FirstFragment:
        assert packet.fragment
        if len(packet.frame) < packet.fragment.start + 8:
            raise Ends("PASS_FRAGMENT")
        if packet.flow.protocol == IPPROTO_UDP:
            set_ports(packet)
        service = self._service_of_fragment(packet)
        if service is None:
            raise Ends(self._refused(packet.frame, "DROP_FRAGMENT"))
        self._check_is_no_vip(packet)
        way = self._way(service, packet)
        return FirstFragment(service, service.number_of(way.member), way.member.uid, way.hash32)

    def _service_of_fragment(self, packet: Packet) -> Service | None:
        """Of UDP, in modes that leave the packet its addresses."""
        flow = packet.flow
        if flow.protocol != IPPROTO_UDP:
            return None
        service = self._service_at(flow.destination, flow.destination_port, flow.protocol)
        try:
            service = self._service_of_source(service, flow.source) if service else None
        except Ends:
            return None
        return service if service and service.mode != "nat" else None

    # Modes dr, ipip and gue

    def _send_whole(self, way: Way, packet: Packet) -> int:
        if way.service.mode != "dr":
            return self._through_tunnel(way, packet)
        if not way.member.resolved:
            raise Ends("DROP_NO_NEIGHBOUR")
        send_to(packet, way.member.hop)
        return self._count(way.service, way.member, packet, packet.opens)

    def _through_tunnel(self, way: Way, packet: Packet) -> int:
        member, gue = way.member, self._gue(way, packet)
        room = member.mtu - outer_size(member.address, gue)
        if packet.ip_size > room:
            self._answer_too_big(packet, room)
        if not member.resolved:
            raise Ends("DROP_NO_NEIGHBOUR")
        send_to(packet, member.hop)
        egress = self._count(way.service, member, packet, packet.opens)
        tunnel = Tunnel(member.source, member.address, member.source_bits, way.hash32)
        packet.frame[:] = encapsulated(packet, tunnel, gue)
        return egress

    def _gue(self, way: Way, packet: Packet) -> Gue | None:
        service = way.service
        if service.mode != "gue":
            return None
        other = self._second_chance(way, packet)
        return Gue(service.gue_port, service.outer_checksum, other.address if other else None)

    def _second_chance(self, way: Way, packet: Packet) -> Member | None:
        """On a slot in transition, that of the two members which the packet does not go to."""
        is_tcp = packet.protocol == IPPROTO_TCP and packet.fragment is None
        if not (way.service.second_chance and is_tcp and way.slot):
            return None
        if not (way.slot.previous or way.slot.track):
            return None
        goes_to_current = way.service.number_of(way.member) == way.slot.current
        return way.service.live(way.slot.previous if goes_to_current else way.slot.current)

    def _answer_too_big(self, packet: Packet, mtu: int) -> None:
        """To what is no ICMP error itself (RFC 1122, section 3.2.2), and long enough to be quoted."""
        if packet.is_error or not self._may("answer", self.settings.icmp_errors_per_s):
            raise Ends("DROP_TOO_BIG")
        if len(packet.frame) < ETHERNET_HEADER_SIZE + QUOTED[packet.version]:
            raise Ends("DROP_TOO_BIG")
        packet.frame[:] = too_big_answer(packet, mtu)
        raise Ends("ANSWERED_TOO_BIG")

    def _answer_expired(self, packet: Packet) -> None:
        if packet.is_error or not self._may("expired", self.settings.icmp_errors_per_s):
            raise Ends("DROP_TTL_EXPIRED")
        packet.frame[:] = time_exceeded_answer(packet)
        raise Ends("ANSWERED_TTL_EXPIRED")

    # Mode nat, towards the member

    def _to_member(self, service: Service, packet: Packet, ingress_ifindex: int) -> int:
        entry = self.requests.get(packet.flow)
        member = service.recorded(entry.number, entry.uid) if entry and not self._is_over(entry, packet) else None
        back = Hop(ingress_ifindex, bytes(packet.frame[6:12]), bytes(packet.frame[:6]))
        if member and self._named(service, packet) not in (None, member):
            member = None
        if entry and member and self._refresh_request(service, member, entry, packet, back):
            return self._send_request(service, packet, member, entry.port, opens=False)
        member = self._member_for_new(service, packet)
        if not member.resolved:
            raise Ends("DROP_NO_NEIGHBOUR")
        port = self._open(service, member, packet.flow, back)
        return self._send_request(service, packet, member, port, opens=True)

    def _is_over(self, entry: Request, packet: Packet) -> bool:
        reopens = packet.opens and bool(entry.state & {"client-fin", "reset"})
        return reopens or self._older_than(entry.seen_ns, entry.timeout_s)

    def _send_request(self, service: Service, packet: Packet, member: Member, port: int, opens: bool) -> int:
        if not member.resolved:
            raise Ends("DROP_NO_NEIGHBOUR")
        translate(packet, self._reply_flow(member, packet.flow, port).turned())
        send_to(packet, member.hop)
        return self._count(service, member, packet, opens)

    def _reply_flow(self, member: Member, flow: Flow, port: int) -> Flow:
        return Flow(member.address, member.port or flow.destination_port, member.source, port, flow.protocol)

    def _member_for_new(self, service: Service, packet: Packet) -> Member:
        if packet.is_error:
            raise Ends("PASS_ICMP_NO_FLOW")
        if packet.tcp_flags & RST:
            raise Ends("DROP_NAT_NO_FLOW")
        member = self._by_option(service, packet)
        if member is None:
            slot = self._slot(service, packet.flow)
            previous = service.live(slot.previous) if packet.belongs_to_open_connection else None
            member = previous or service.live(slot.current)
        if member is None:
            raise Ends("DROP_NO_BACKEND")
        return member

    def _open(self, service: Service, member: Member, flow: Flow, back: Hop) -> int:
        timeout_s = self._timeout_s(flow, set(), service)
        port = self._free_port(member, flow)
        reply = Reply(self.now_ns, flow, back, self._counter_name(service, member), member.uid, timeout_s)
        self.replies[self._reply_flow(member, flow, port)] = reply
        self.requests[flow] = Request(self.now_ns, member.uid, service.number_of(member), port, timeout_s)
        return port

    def _timeout_s(self, flow: Flow, state: set[State], service: Service) -> int:
        if flow.protocol == IPPROTO_UDP:
            return self.settings.udp_timeout_s
        if is_closed(state):
            return self.settings.nat_closed_timeout_s
        return service.flow_timeout_s if "established" in state else self.settings.nat_opening_timeout_s

    def _free_port(self, member: Member, flow: Flow) -> int:
        candidates = enumerate(self._candidates(flow))
        free = (port for n, port in candidates if self._is_free(member, flow, port, looked_at=n < LOOKED_AT))
        port = next(free, None)
        if port is not None:
            return port
        first, count = self.settings.nat_port_first, self.settings.nat_port_count
        if any(self._is_free(member, flow, port) for port in range(first, first + count)):
            raise Undetermined
        raise Ends("DROP_NAT_NO_PORT")

    def _candidates(self, flow: Flow) -> Iterator[int]:
        seed_hash = flow_hash(flow, self.settings.hash_seed)
        hash64 = mix(seed_hash + port_word(flow.destination_port) & MASK64)
        for attempt in range(HASHED_TRIES):
            offset = hash64 + attempt * (hash64 >> 32 | 1) & MASK32
            yield self.settings.nat_port_first + scaled(offset, self.settings.nat_port_count)

    def _is_free(self, member: Member, flow: Flow, port: int, looked_at: bool = False) -> bool:
        """No service's, and no flow's; where it is looked at, its own or that of one that has timed out will do."""
        if self._service_at(member.source, port, flow.protocol):
            return False
        held = self.replies.get(self._reply_flow(member, flow, port))
        if held is None or not looked_at:
            return held is None
        return held.request == flow or self._older_than(held.seen_ns, held.timeout_s)

    def _is_fresh(self, seen_ns: int) -> bool:
        return self.now_ns - seen_ns < self.settings.refresh_ns

    def _refresh_request(self, service: Service, member: Member, entry: Request, packet: Packet, back: Hop) -> bool:
        """About once a second, and when TCP's state changes, the reply's entry learns it. False: it is another's."""
        state = entry.state | news_of_request(packet)
        if packet.is_error or (state == entry.state and self._is_fresh(entry.seen_ns)):
            return True
        entry.seen_ns, entry.state = self.now_ns, state
        entry.timeout_s = self._timeout_s(packet.flow, state, service)
        if service.affinity_s:
            self._of_client(service, packet)
        key = self._reply_flow(member, packet.flow, entry.port)
        counter = self._counter_name(service, member)
        fresh = Reply(self.now_ns, packet.flow, back, counter, member.uid, entry.timeout_s, set(state))
        reply = self.replies.setdefault(key, fresh)
        if reply.request == packet.flow:
            self._merge(reply, fresh)
        return reply.request == packet.flow

    def _merge(self, reply: Reply, fresh: Reply) -> None:
        reply.seen_ns, reply.hop, reply.counter = fresh.seen_ns, fresh.hop, fresh.counter
        reply.state = reply.state | fresh.state
        reply.timeout_s = self.settings.nat_closed_timeout_s if is_closed(reply.state) else fresh.timeout_s

    # Mode nat, back to the client

    def _to_client(self, packet: Packet) -> int:
        reply = self.replies.get(packet.flow)
        if reply is None:
            raise Ends("PASS_ICMP_NO_FLOW" if packet.is_error else "PASS_NOT_A_SERVICE")
        self._check_ttl(packet)
        self._refresh_reply(reply, packet)
        translate(packet, reply.request.turned())
        send_to(packet, reply.hop)
        count = self.counts.setdefault(reply.counter, Count())
        count.reply_packets += 1
        count.reply_bytes += len(packet.frame)
        return reply.hop.ifindex

    def _refresh_reply(self, reply: Reply, packet: Packet) -> None:
        state = reply.state | news_of_reply(packet)
        if packet.is_error or (state == reply.state and self._is_fresh(reply.seen_ns)):
            return
        reply.seen_ns, reply.state = self.now_ns, state
        request = self.requests.get(reply.request)
        if request is None or (request.port, request.uid) != (packet.flow.destination_port, reply.uid):
            return
        request.seen_ns, request.state = self.now_ns, request.state | state
        if is_closed(request.state):
            reply.timeout_s = request.timeout_s = self.settings.nat_closed_timeout_s


def parse_addresses(frame: bytearray) -> Packet:
    """Of a packet whose headers parse() has found to be there."""
    version = version_of(frame)
    return packet_between(frame, version, 0, ICMP_OF[version])


def is_closed(state: set[State]) -> bool:
    return "reset" in state or {"client-fin", "backend-fin"} <= state


def news_of_request(packet: Packet) -> set[State]:
    if packet.flow.protocol != IPPROTO_TCP:
        return set()
    return closing(packet, "client-fin") | (set() if packet.opens else {"established"})


def news_of_reply(packet: Packet) -> set[State]:
    return closing(packet, "backend-fin")


def closing(packet: Packet, fin: State) -> set[State]:
    news: set[State] = {fin} if packet.tcp_flags & FIN else set()
    return news | ({"reset"} if packet.tcp_flags & RST else set())
