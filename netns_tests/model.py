"""What the balancer's program is meant to do with a frame, written slowly: the oracle it is compared with.

Services and members go in, then frames with the interface they came in on; out comes an Outcome. Flows and translations
are dicts. Addresses are in network byte order (4 or 16 bytes), ports plain integers, times nanoseconds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from socket import IPPROTO_TCP, IPPROTO_UDP
from typing import Literal

from netns_tests.packets import Verdict
from netns_tests.wire import FIN, RST, Ends, Flow, Hop, Packet, parse, refused_flow, send_to, translate, ttl

SECOND_NS = 1_000_000_000
HASHED_TRIES = 16
LOOKED_AT = 4
MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1

State = Literal["established", "client-fin", "backend-fin", "reset"]


@dataclass(frozen=True)
class Outcome:
    """`reason` is the name in `enum reason`."""

    verdict: Verdict
    reason: str
    frame: bytes


@dataclass(frozen=True)
class Settings:
    """`struct config`, by its names."""

    hash_seed: int = 0x0123456789ABCDEF
    refresh_ns: int = SECOND_NS
    nat_opening_timeout_s: int = 60
    nat_closed_timeout_s: int = 30
    udp_timeout_s: int = 120
    recorded_syns_per_s: int = 1 << 31
    nat_port_first: int = 1024
    nat_port_count: int = 256


@dataclass
class Member:
    """A backend in a service. Port 0: the one the client asked for."""

    uid: int
    address: bytes
    source: bytes
    hop: Hop
    counter: int
    port: int = 0
    alive: bool = True
    resolved: bool = True


@dataclass
class Slot:
    """Members by number; 0 stands for none."""

    current: int
    previous: int = 0
    track: bool = False


@dataclass
class Service:
    """Port 0: every port of the address that has no service of its own."""

    address: bytes
    port: int
    protocol: int
    mode: Literal["nat", "dr"]
    members: dict[int, Member]
    slots: list[Slot]
    flow_timeout_s: int = 3600
    changed_ns: int = 0

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
    counter: int
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


# The balancer


class Model:
    """The balancer's state, and what it does with frames. Services and `now_ns` may be changed between frames."""

    def __init__(self, settings: Settings, services: list[Service]) -> None:
        self.settings, self.services = settings, services
        self.now_ns = 0
        self.flows: dict[Flow, Recorded] = {}
        self.requests: dict[Flow, Request] = {}
        self.replies: dict[Flow, Reply] = {}
        self.counts: dict[int, Count] = {}

    def receive(self, frame: bytes, ingress_ifindex: int) -> Outcome:
        """What becomes of a frame of at least 14 bytes."""
        try:
            packet, egress = self._balance(frame, ingress_ifindex)
        except Ends as end:
            return Outcome(Verdict.DROP if end.reason.startswith("DROP") else Verdict.PASS, end.reason, frame)
        verdict = Verdict.TX if egress == ingress_ifindex else Verdict.REDIRECT
        return Outcome(verdict, "FORWARDED", bytes(packet.frame))

    def _balance(self, frame: bytes, ingress_ifindex: int) -> tuple[Packet, int]:
        packet = self._parse(frame)
        service = self._service_at(packet.flow.destination, packet.flow.destination_port, packet.flow.protocol)
        if service is None:
            return packet, self._to_client(packet)
        self._check_ttl(packet)
        if service.mode == "dr":
            return packet, self._direct(service, packet)
        return packet, self._to_member(service, packet, ingress_ifindex)

    def _parse(self, frame: bytes) -> Packet:
        try:
            return parse(frame)
        except Ends as end:
            raise Ends(self._refused(frame, end.reason)) from None

    def _refused(self, frame: bytes, reason: str) -> str:
        """What cannot be balanced is dropped only where a service or a translated flow would have had it."""
        if reason.startswith("PASS"):
            return reason
        flow = refused_flow(frame)
        if flow is None:
            return "PASS_MALFORMED"
        service = self._service_at(flow.destination, flow.destination_port, flow.protocol)
        return reason if service or flow in self.replies else "PASS_NOT_A_SERVICE"

    def _service_at(self, destination: bytes, port: int, protocol: int) -> Service | None:
        here = {s.port: s for s in self.services if (s.address, s.protocol) == (destination, protocol)}
        return here.get(port) or here.get(0)

    def _check_ttl(self, packet: Packet) -> None:
        if ttl(packet) <= 1:
            raise Ends("DROP_TTL_EXPIRED")

    def _older_than(self, seen_ns: int, timeout_s: int) -> bool:
        return self.now_ns > seen_ns + timeout_s * SECOND_NS

    def _slot(self, service: Service, flow: Flow) -> Slot:
        high = flow_hash(flow, self.settings.hash_seed) >> 32
        return service.slots[scaled(high, len(service.slots))]

    def _forward(self, packet: Packet, member: Member, opens: bool) -> int:
        send_to(packet, member.hop)
        count = self.counts.setdefault(member.counter, Count())
        count.packets += 1
        count.bytes += len(packet.frame)
        count.connections += opens
        return member.hop.ifindex

    # Mode dr

    def _direct(self, service: Service, packet: Packet) -> int:
        slot = self._slot(service, packet.flow)
        member = self._tracked(service, slot, packet) if slot.track else service.live(slot.current)
        if member is None:
            raise Ends("DROP_NO_BACKEND")
        if not member.resolved:
            raise Ends("DROP_NO_NEIGHBOUR")
        return self._forward(packet, member, packet.opens)

    def _tracked(self, service: Service, slot: Slot, packet: Packet) -> Member | None:
        entry = self.flows.get(packet.flow)
        if entry and not self._has_ended(entry, service, packet):
            member = service.recorded(entry.number, entry.uid)
            if member:
                self._touch(entry, packet)
                return member
        member = self._first_seen(service, slot, packet)
        if member and (entry or slot.previous) and not packet.is_error:
            closing = bool(packet.tcp_flags & (FIN | RST))
            self.flows[packet.flow] = Recorded(self.now_ns, member.uid, service.number_of(member), closing)
        return member

    def _has_ended(self, entry: Recorded, service: Service, packet: Packet) -> bool:
        return (entry.closing and packet.opens) or self._older_than(entry.seen_ns, service.flow_timeout_s)

    def _touch(self, entry: Recorded, packet: Packet) -> None:
        if self.now_ns - entry.seen_ns >= self.settings.refresh_ns:
            entry.seen_ns = self.now_ns
        entry.closing = entry.closing or bool(packet.tcp_flags & (FIN | RST))

    def _first_seen(self, service: Service, slot: Slot, packet: Packet) -> Member | None:
        """Unknown and not opening a connection, or UDP soon after the change: older than the change."""
        is_udp = packet.flow.protocol == IPPROTO_UDP
        is_soon = not self._older_than(service.changed_ns, self.settings.udp_timeout_s)
        is_older = is_soon if is_udp else packet.belongs_to_open_connection
        return (service.live(slot.previous) if is_older else None) or service.live(slot.current)

    # Mode nat, towards the member

    def _to_member(self, service: Service, packet: Packet, ingress_ifindex: int) -> int:
        entry = self.requests.get(packet.flow)
        member = service.recorded(entry.number, entry.uid) if entry and not self._is_over(entry, packet) else None
        back = Hop(ingress_ifindex, bytes(packet.frame[6:12]), bytes(packet.frame[:6]))
        if entry and member and self._refresh_request(service, member, entry, packet, back):
            return self._send_request(packet, member, entry.port, opens=False)
        member = self._member_for_new(service, packet)
        if not member.resolved:
            raise Ends("DROP_NO_NEIGHBOUR")
        port = self._open(service, member, packet.flow, back)
        return self._send_request(packet, member, port, opens=True)

    def _is_over(self, entry: Request, packet: Packet) -> bool:
        reopens = packet.opens and bool(entry.state & {"client-fin", "reset"})
        return reopens or self._older_than(entry.seen_ns, entry.timeout_s)

    def _send_request(self, packet: Packet, member: Member, port: int, opens: bool) -> int:
        if not member.resolved:
            raise Ends("DROP_NO_NEIGHBOUR")
        translate(packet, self._reply_flow(member, packet.flow, port).turned())
        return self._forward(packet, member, opens)

    def _reply_flow(self, member: Member, flow: Flow, port: int) -> Flow:
        return Flow(member.address, member.port or flow.destination_port, member.source, port, flow.protocol)

    def _member_for_new(self, service: Service, packet: Packet) -> Member:
        if packet.is_error:
            raise Ends("PASS_ICMP_NO_FLOW")
        if packet.tcp_flags & RST:
            raise Ends("DROP_NAT_NO_FLOW")
        slot = self._slot(service, packet.flow)
        previous = service.live(slot.previous) if packet.belongs_to_open_connection else None
        member = previous or service.live(slot.current)
        if member is None:
            raise Ends("DROP_NO_BACKEND")
        return member

    def _open(self, service: Service, member: Member, flow: Flow, back: Hop) -> int:
        timeout_s = self._timeout_s(flow, set(), service)
        port = self._free_port(member, flow)
        reply = Reply(self.now_ns, flow, back, member.counter, member.uid, timeout_s)
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
        key = self._reply_flow(member, packet.flow, entry.port)
        fresh = Reply(self.now_ns, packet.flow, back, member.counter, member.uid, entry.timeout_s, set(state))
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
