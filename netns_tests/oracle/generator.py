"""What is drawn at random for the program and its model: services, events and frames, and the world that they meet.

Enters a seed; leaves a Run: services to be and steps, plain numbers which mean something only in the World in which
they are taken, and the same from the same seed. A World has the program and its model with the same services, sends
each frame through both, and fails with what is needed to repeat it.
"""

from __future__ import annotations

import struct
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Literal

from scapy.layers.l2 import Ether

from netns_tests.oracle import packets
from netns_tests.oracle.model import (
    SECOND_NS,
    Member,
    Mode,
    Model,
    Outcome,
    Prefix,
    Service,
    Settings,
    Slot,
)
from netns_tests.oracle.program import LoadedProgram
from netns_tests.oracle.program import version as version_of_address
from netns_tests.oracle.wire import (
    ACK,
    ECHO_REQUEST,
    ETHERTYPES,
    FIN,
    ICMP_OF,
    IP_HEADER_SIZE,
    RST,
    SYN,
    Flow,
    Hop,
    address,
    checksum,
)

STEPS = 50
# So few ports that flows meet on them, time out and take each other's over.
SETTINGS = Settings(nat_port_first=1098, nat_port_count=4, recorded_syns_per_s=2, icmp_errors_per_s=2)
# About the refresh period, and just beyond each timeout.
CLOCK_STEPS_MS = (500, 1000, 1001, 31_000, 61_000, 101_000, 121_000, 121_000)
START_NS = 1_000_000 * SECOND_NS
TCP, UDP, OTHER_PROTOCOL = 6, 17, 132
PSH = 0x08
ERROR_TYPES = {4: (3, 11, 12), 6: (1, 2, 3, 4)}

CLIENTS = {4: ("192.0.2.1", "192.0.2.77", "192.0.2.255"), 6: ("2001:db8:1::1", "2001:db8:1::77", "2001:db8:1:ffff::")}
# VIPs, which no client has, martians, and addresses beside them that a client may have.
STRANGERS = {
    4: (
        "203.0.113.1",
        "203.0.113.2",
        "0.0.0.0",
        "127.0.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "126.0.0.1",
        "223.255.0.1",
    ),
    6: ("2001:db8:2::1", "2001:db8:2::2", "::", "::1", "fe80::1", "ff02::1", "::ffff:c000:201", "fec0::1", "fc00::1"),
}
CLIENT_PORTS = (1, 40000, 65535)
SOURCES = {4: packets.LB4, 6: packets.LB6}
# One of the services may be on the address that nat sends from, with a port that nat would otherwise use.
VIPS = {4: (packets.VIP4, "203.0.113.2", packets.LB4), 6: (packets.VIP6, "2001:db8:2::2", packets.LB6)}
# First and last port (0: there is one), which lie in one another but never cross; port 0 is all of them.
SERVICE_PORTS = ((80, 0), (80, 0), (53, 0), (1100, 0), (0, 0), (1000, 1999), (1100, 1101))
PREFIX_BITS = {4: (None, None, None, 24, 16), 6: (None, None, None, 64, 32)}
# All clients but the last, and the second alone.
MAX_CLIENTS, ONE_CLIENT = (
    {4: ("192.0.2.0", 25), 6: ("2001:db8:1::", 64)},
    {4: ("192.0.2.77", 32), 6: ("2001:db8:1::77", 128)},
)
# Those of tunnels whose low bits vary.
TUNNEL_SOURCES = {4: "198.18.0.0", 6: "2001:db8:9::"}
SERVER_IDS = {(0, bytes(range(15))): 1, (1, b"\1\2"): 1, (1, b"\3\4"): 2, (6, b"\7"): 3}
BACKENDS = {4: packets.BACKEND4, 6: packets.BACKEND6}
ROUTERS = {4: packets.ROUTER4, 6: packets.ROUTER6}
TAGS = {
    "none": b"",
    "one": bytes.fromhex("81000007"),
    "two": bytes.fromhex("88a8000781000008"),
    "three": bytes.fromhex("88a800078100000881000009"),
}
GROUP_MAC = bytes.fromhex("01005e000001")
CLIENT_MAC, LB_MAC, *BACKEND_MACS = (
    bytes.fromhex(mac.replace(":", "")) for mac in (packets.CLIENT_MAC, packets.LB_MAC, *packets.BACKEND_MACS)
)


def quic_packets() -> Iterator[bytes]:
    """With short and long headers, of every server and of none, whole and cut off."""
    for config, server_id in (*SERVER_IDS, (1, b"\5\6"), (2, b"\1\2"), (7, b"\1\2")):
        connection_id = bytes([config << 5 | 3]) + server_id + b"nonce"
        yield b"\x40" + connection_id + b"payload"
        yield b"\xc0\0\0\0\1" + bytes([len(connection_id)]) + connection_id + b"\0payload"
        yield b"\xc0\0\0\0\1" + bytes([len(server_id)]) + connection_id
        yield b"\x40" + connection_id[: len(server_id)]


def tcp_options() -> Iterator[bytes]:
    """MSS at even and odd offsets, behind others, cut off, behind what cannot be read; each as long as it has to be."""
    mss = b"\2\4\5\xb4"
    for before in (
        b"",
        b"\1",
        b"\1\1\1",
        b"\4\2",
        b"\3\3\7",
        b"\2\4\0\x50",
        b"\x0a\x22" + bytes(32),
        b"\7\0",
        b"\7\1",
        b"\2\3\5",
    ):
        yield (before + mss)[:40].ljust(-(-len(before + mss) // 4) * 4, b"\0")[:40]
    yield b"\0" * 4 + mss
    yield b"\1" * 40
    yield b"\1\2\4\5"


QUIC_PACKETS, TCP_OPTIONS = tuple(quic_packets()), tuple(tcp_options())


# What is drawn: plain numbers, which mean something only in the world they meet


@dataclass(frozen=True)
class Event:
    """Something that changes between two frames: what it does is in World.change()."""

    what: Literal["clock", "kill", "revive", "replace", "resolve", "unresolve", "slot", "change", "evict"]
    service: int
    number: int
    amount: int


@dataclass(frozen=True)
class Sent:
    """A frame of a flow: a client's towards a service, or (`reply`) a member's of a flow that is translated."""

    reply: bool
    service: int
    client: int
    client_port: int
    destination_port: int
    tcp_flags: int
    payload: int
    ttl: int
    checksum: Literal["right", "none", "wrong"]
    shape: Literal[
        "plain", "error", "first fragment", "later fragment", "atomic fragment", "options", "other protocol", "echo"
    ]
    quoted: int
    vip: int
    traffic_class: int
    quic: int
    tcp_options: int
    datagram: int
    tags: Literal["none", "one", "two", "three"]
    stranger: int
    to_group: bool


@dataclass(frozen=True)
class Damage:
    """What happens to the bytes of a frame on its way."""

    what: Literal["none", "cut", "flip", "pad", "length"]
    at: int
    amount: int


@dataclass(frozen=True)
class Step:
    event: Event | None
    sent: Sent
    damage: Damage
    interface: int


@dataclass(frozen=True)
class Backend:
    """crosses: of the other family, where the mode allows it."""

    address: int
    port: int
    alive: bool
    resolved: bool
    interface: int
    crosses: bool
    mtu: int
    source_bits: int


@dataclass(frozen=True)
class Offer:
    """A service to be: its members have the numbers 1, 2, 3. sources: with a set of members that one client has."""

    family: Literal[4, 6]
    vip: int
    ports: tuple[int, int]
    prefix: int
    protocol: int
    mode: Mode
    backends: tuple[Backend, ...]
    slots: tuple[Slot, ...]
    sources: Literal["all", "only most", "one in a set", "only most, one in a set"]
    options: dict[str, Any]

    @property
    def network(self) -> Prefix:
        vip, bits = address(VIPS[self.family][self.vip % 3]), PREFIX_BITS[self.family][self.prefix % 5]
        rest = 0 if bits is None else 8 * len(vip) - bits
        return (int.from_bytes(vip, "big") >> rest << rest).to_bytes(len(vip), "big"), 8 * len(vip) - rest

    @property
    def place(self) -> object:
        """No two services have the same."""
        return self.network, self.ports, self.protocol


Draw = Callable[[Random], Any]


def one_of(*values: Any) -> Draw:
    return lambda random: random.choice(values)


def mostly(usual: Any, *others: Any) -> Draw:
    return one_of(*[usual] * 12 * len(others), *others)


def several(draw: Draw, least: int, most: int) -> Draw:
    return lambda random: tuple(draw(random) for _ in range(random.randint(least, most)))


def built(kind: Callable[..., Any], **draws: Draw) -> Draw:
    return lambda random: kind(**{name: draw(random) for name, draw in draws.items()})


YES_OR_NO, INDEX, BYTE = one_of(True, False), one_of(*range(16)), one_of(*range(256))
SLOT = built(Slot, current=one_of(1, 2, 3, 1, 2, 3, 0), previous=one_of(0, 1, 2, 3), track=one_of(True, True, False))
BACKEND = built(
    Backend,
    address=INDEX,
    port=one_of(0, 8080),
    alive=mostly(True, False),
    resolved=mostly(True, False),
    interface=INDEX,
    crosses=YES_OR_NO,
    mtu=one_of(1500, 1500, 1500, 1060, 1100, 100),
    source_bits=one_of(0, 0, 8, 16, 32),
)
OPTIONS = built(
    dict,
    flow_timeout_s=one_of(100, 3600),
    syn_limit=one_of(0, 0, 0, 0, 3),
    syn_limit_of_source=one_of(0, 0, 0, 0, 2),
    mss=one_of(0, 0, 536, 1200),
    affinity_s=one_of(0, 0, 0, 50, 200),
    server_ids=one_of({}, SERVER_IDS),
    outer_checksum=YES_OR_NO,
    second_chance=YES_OR_NO,
    gue_port=one_of(6080, 4444),
)
OFFER = built(
    Offer,
    family=one_of(4, 6),
    vip=INDEX,
    ports=one_of(*SERVICE_PORTS),
    prefix=INDEX,
    protocol=one_of(TCP, UDP),
    mode=one_of("nat", "nat", "dr", "ipip", "gue", "gue"),
    backends=several(BACKEND, 3, 3),
    slots=several(SLOT, 1, 4),
    sources=one_of(*["all"] * 4, "only most", "one in a set", "only most, one in a set"),
    options=OPTIONS,
)
EVENT = built(
    Event,
    what=one_of(*["clock"] * 3, "kill", "revive", "replace", "resolve", "unresolve", "slot", "change", "evict"),
    service=INDEX,
    number=INDEX,
    amount=BYTE,
)
SENT = built(
    Sent,
    reply=one_of(True, False, False),
    service=INDEX,
    client=one_of(0, 0, 0, 1, 1, 2),
    client_port=one_of(0, 0, 0, 1, 1, 2),
    destination_port=one_of(80, 80, 53, 443, 1100),
    tcp_flags=one_of(SYN, SYN, SYN, ACK, ACK, PSH | ACK, FIN | ACK, RST, RST | ACK, SYN | ACK, SYN | FIN, 0),
    payload=one_of(0, 0, 1, 5, 64, 1000, 1400),
    ttl=mostly(64, 255, 2, 1, 0),
    checksum=mostly("right", "none", "wrong"),
    shape=one_of(
        *["plain"] * 16,
        *["error"] * 4,
        *["first fragment", "later fragment"] * 3,
        *["options", "other protocol", "echo", "atomic fragment"],
    ),
    quoted=one_of(0, 7, 8, 8, 12, 17, 18, 19, 20, 21, 1000),
    vip=INDEX,
    traffic_class=one_of(0, 0, 0xB8, 0x03, 0xFF),
    quic=one_of(*range(2 * len(QUIC_PACKETS))),
    tcp_options=one_of(*range(2 * len(TCP_OPTIONS))),
    datagram=one_of(0, 1),
    tags=one_of(*["none"] * 20, *["one"] * 3, "two", "two", "three"),
    stranger=mostly(0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
    to_group=mostly(False, True),
)
DAMAGE = built(Damage, what=mostly("none", "cut", "flip", "pad", "length"), at=INDEX, amount=BYTE)
STEP = built(
    Step,
    event=lambda random: random.choice([None, None, EVENT(random)]),
    sent=SENT,
    damage=DAMAGE,
    interface=one_of(0, 1),
)


@dataclass(frozen=True)
class Run:
    """A world and what happens in it. No two services are in one place."""

    offers: tuple[Offer, ...]
    echo: bool
    steps: tuple[Step, ...]

    @classmethod
    def drawn(cls, seed: int) -> Run:
        random = Random(seed)
        offers = {offer.place: offer for offer in several(OFFER, 1, 4)(random)}
        return cls(tuple(offers.values()), random.choice([True, False]), several(STEP, STEPS, STEPS)(random))


# What is sent: by hand, since scapy would take most of the time


def frame_of(sent: Sent, flow: Flow) -> bytes:
    version = version_of_address(flow.source)
    builders = {"error": error_about, "echo": echo_request}
    ip = builders.get(sent.shape, packet_of)(sent, flow)
    to = GROUP_MAC if sent.to_group else LB_MAC
    return to + CLIENT_MAC + TAGS[sent.tags] + ETHERTYPES[version] + ip


def packet_of(sent: Sent, flow: Flow) -> bytes:
    segment = bytes(sent.payload) if sent.shape == "later fragment" else segment_of(sent, flow)
    return ip_packet(flow, OTHER_PROTOCOL if sent.shape == "other protocol" else flow.protocol, segment, sent)


def ip_packet(flow: Flow, protocol: int, payload: bytes, sent: Sent) -> bytes:
    return (ip4_packet if version_of_address(flow.source) == 4 else ip6_packet)(flow, protocol, payload, sent)


def ip4_packet(flow: Flow, protocol: int, payload: bytes, sent: Sent) -> bytes:
    options = bytes([148, 4, 0, 0]) if sent.shape == "options" else b""  # router alert, RFC 2113
    fragment = {"first fragment": 0x2000, "later fragment": 3}.get(sent.shape, 0x4000)
    size, traffic_class = 20 + len(options) + len(payload), sent.traffic_class
    first = struct.pack("!BBH", 0x45 + len(options) // 4, traffic_class, size)
    start = first + struct.pack("!HHBB", 0x1234 + sent.datagram, fragment, sent.ttl, protocol)
    rest = flow.source + flow.destination + options
    return start + checksum(start + rest) + rest + payload


def ip6_packet(flow: Flow, protocol: int, payload: bytes, sent: Sent) -> bytes:
    extensions = {
        "first fragment": (44, bytes([protocol, 0, 0, 1, 0, 0, 0, sent.datagram])),
        "later fragment": (44, bytes([protocol, 0, 0, 24, 0, 0, 0, sent.datagram])),
        "atomic fragment": (44, bytes([protocol, 0, 0, 0, 0, 0, 0, sent.datagram])),
        "options": (60, bytes([protocol, 0, 1, 4, 0, 0, 0, 0])),
    }
    following, extension = extensions.get(sent.shape, (protocol, b""))
    first = 6 << 28 | sent.traffic_class << 20 | 0x54321
    start = struct.pack("!IHBB", first, len(extension + payload), following, sent.ttl)
    return start + flow.source + flow.destination + extension + payload


def segment_of(sent: Sent, flow: Flow) -> bytes:
    payload, ports = payload_of(sent, flow), struct.pack("!HH", *flow[1:4:2])
    if flow.protocol == UDP:
        before, after = ports + struct.pack("!H", 8 + len(payload)), payload
    else:
        options = TCP_OPTIONS[sent.tcp_options] if sent.tcp_options < len(TCP_OPTIONS) else b""
        offset = 0x50 + len(options) * 4
        before = ports + struct.pack("!IIBBH", 0x01020304 + sent.datagram, 0x05060708, offset, sent.tcp_flags, 0x2000)
        after = bytes(2) + options + payload
    return before + checksum_of(sent, flow, before + after) + after


def payload_of(sent: Sent, flow: Flow) -> bytes:
    if flow.protocol == UDP and sent.quic < len(QUIC_PACKETS):
        return QUIC_PACKETS[sent.quic]
    return bytes(n & 0xFF for n in range(sent.payload))


def checksum_of(sent: Sent, flow: Flow, segment: bytes) -> bytes:
    if sent.checksum == "right":
        return checksum(pseudo_header(flow, flow.protocol, len(segment) + 2) + segment, or_ones=flow.protocol == UDP)
    return b"\0\0" if sent.checksum == "none" else b"\xff\xff"


def pseudo_header(flow: Flow, protocol: int, size: int) -> bytes:
    return flow.source + flow.destination + struct.pack("!II", size, protocol)


def error_about(sent: Sent, flow: Flow) -> bytes:
    """About a packet of the other direction, from a router on the way or (as hosts do) from the one who got it."""
    version = version_of_address(flow.source)
    quote = packet_of(replace(sent, shape="plain"), flow.turned())[: IP_HEADER_SIZE[version] + sent.quoted]
    outer = flow if sent.client else flow._replace(source=address(ROUTERS[version]))
    kind = (ERROR_TYPES[version])[sent.payload % len(ERROR_TYPES[version])]
    before, after, protocol = bytes([kind, 1]), bytes(4) + quote, ICMP_OF[version]
    pseudo = pseudo_header(outer, protocol, 4 + len(after)) if version == 6 else b""
    message = before + checksum(pseudo + before + after) + after
    return ip_packet(outer, protocol, message, sent)


def echo_request(sent: Sent, flow: Flow) -> bytes:
    version = version_of_address(flow.source)
    kind, after, protocol = bytes([ECHO_REQUEST[version], 0]), bytes(4 + sent.payload), ICMP_OF[version]
    after = bytes([sent.datagram]) + after[1:]
    pseudo = pseudo_header(flow, protocol, 4 + len(after)) if version == 6 else b""
    return ip_packet(flow, protocol, kind + checksum(pseudo + kind + after) + after, sent)


def damaged(frame: bytes, damage: Damage) -> bytes:
    """Never shorter than an Ethernet header, which the kernel wants in a test run."""
    at = min(packets.ETHERNET_HEADER_SIZE + damage.amount % 80, len(frame) - 1)
    if damage.what == "cut":
        return frame[:at]
    if damage.what == "flip":
        return frame[:at] + bytes([frame[at] ^ 1 << damage.at % 8]) + frame[at + 1 :]
    if damage.what == "pad":
        return frame + bytes(range(damage.at + 1))
    if damage.what == "length":
        return with_length(frame, damage.amount)
    return frame


def with_length(frame: bytes, length: int) -> bytes:
    """Another length in the IP header, which may be more or less than the frame holds."""
    at = 16 if frame[14] >> 4 == 4 else 18
    return frame[:at] + length.to_bytes(2, "big") + frame[at + 2 :]


# Where it is sent


class World:
    """Program and model with the same services, their clocks together."""

    def __init__(
        self, program: LoadedProgram, interfaces: tuple[int, int], offers: Sequence[Offer], echo: bool
    ) -> None:
        self.program, self.interfaces, self.seen = program, interfaces, Counter[str]()
        self._last_id = 0
        self.services = [self._service(offer) for offer in offers]
        for number, offer in enumerate(offers):
            self._set_sources(self.services[number], number, offer)
        self.echo = [address(VIPS[4][0]), address(VIPS[6][0])] * echo
        self.model = Model(SETTINGS, self.services, self.echo)
        self.model.now_ns = START_NS
        program.forget()
        program.set_clock(START_NS)
        program.install(self.services, self.echo)

    def take(self, step: Step) -> None:
        if step.event:
            self.change(step.event)
        frame = damaged(frame_of(step.sent, self.flow(step.sent)), step.damage)
        ingress = self.interfaces[step.interface]
        expected, got = self.model.receive(frame, ingress), self.program.run(frame, ingress)
        assert got == expected, difference(frame, ingress, expected, got)
        self.seen.update({got.reason, got.noted})

    def check_counters(self) -> None:
        for (service, member), count in self.model.counts.items():
            assert self.program.count(member, service) == count, f"member {member} of service {service}"

    def flow(self, sent: Sent) -> Flow:
        """A reply is a frame of a flow that is translated now, if there is one."""
        if sent.reply and self.model.replies:
            return list(self.model.replies)[(sent.service * 16 + sent.client) % len(self.model.replies)]
        service = self.services[sent.service % len(self.services)]
        family = 4 if len(service.address) == 4 else 6
        strangers = ("", *STRANGERS[family])
        client = strangers[sent.stranger % len(strangers)] or CLIENTS[family][sent.client]
        is_apt = sent.service > 12 or sent.destination_port in service.ports
        port = sent.destination_port if is_apt else service.port
        return Flow(address(client), CLIENT_PORTS[sent.client_port], self._vip(service, sent), port, service.protocol)

    def _vip(self, service: Service, sent: Sent) -> bytes:
        vips = map(address, (*VIPS[4], *VIPS[6]))
        covered = [vip for vip in vips if service.has(vip)]
        return covered[sent.vip % len(covered)]

    def change(self, event: Event) -> None:
        service = self.services[event.service % len(self.services)]
        self._changes(service, event)[event.what]()
        self.program.set_clock(self.model.now_ns)
        self.program.install(self.services, self.echo)

    def _changes(self, service: Service, event: Event) -> dict[str, Callable[[], None]]:
        number = event.number % 3 + 1
        return {
            "clock": lambda: self._advance(CLOCK_STEPS_MS[event.amount % len(CLOCK_STEPS_MS)]),
            "kill": lambda: self._set(service, number, alive=False),
            "revive": lambda: self._set(service, number, alive=True),
            "resolve": lambda: self._set(service, number, resolved=True),
            "unresolve": lambda: self._set(service, number, resolved=False),
            "replace": lambda: self._set(service, number, uid=self._new_id()),
            "slot": lambda: self._set_slot(service, event),
            "change": lambda: self._set_changed(service),
            "evict": self._evict,
        }

    def _advance(self, milliseconds: int) -> None:
        self.model.now_ns += milliseconds * 1_000_000

    def _set(self, service: Service, number: int, **fields: Any) -> None:
        service.members[number] = replace(service.members[number], **fields)

    def _set_slot(self, service: Service, event: Event) -> None:
        track, previous, current = event.amount >> 4 & 1, event.amount >> 2 & 3, event.amount & 3
        service.slots[event.number % len(service.slots)] = Slot(current, previous, bool(track))

    def _set_changed(self, service: Service) -> None:
        service.changed_ns = self.model.now_ns

    def _evict(self) -> None:
        self.program.forget_replies()
        self.model.replies.clear()

    def _new_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _service(self, offer: Offer) -> Service:
        (vip, prefix_bits), (port, last_port) = offer.network, offer.ports
        return Service(
            vip,
            port,
            offer.protocol,
            offer.mode,
            members={n: self._member(offer, backend) for n, backend in enumerate(offer.backends, 1)},
            slots=[replace(slot) for slot in offer.slots],
            changed_ns=START_NS,
            last_port=last_port,
            prefix_bits=prefix_bits,
            **offer.options,
        )

    def _set_sources(self, service: Service, number: int, offer: Offer) -> None:
        most, one = ((address(text), bits) for text, bits in (MAX_CLIENTS[offer.family], ONE_CLIENT[offer.family]))
        sources = {most: number} if "only" in offer.sources else {}
        if "set" in offer.sources:
            sources[one] = len(self.services)
            members = {n: replace(member, uid=self._new_id()) for n, member in service.members.items()}
            slots = [Slot(slot.previous, slot.current, slot.track) for slot in service.slots]
            self.services.append(replace(service, members=members, slots=slots, is_set=True))
        service.sources, service.only_sources = sources, "only" in offer.sources

    def _member(self, offer: Offer, backend: Backend) -> Member:
        in_tunnel = offer.mode in ("ipip", "gue")
        family = 10 - offer.family if backend.crosses and in_tunnel else offer.family
        source_bits = backend.source_bits * in_tunnel
        return Member(
            uid=self._new_id(),
            address=address(BACKENDS[family][backend.address % 3]),
            source=address((TUNNEL_SOURCES if source_bits else SOURCES)[family]),
            hop=Hop(self.interfaces[backend.interface % 2], BACKEND_MACS[backend.address % 3], LB_MAC),
            port=backend.port,
            alive=backend.alive,
            resolved=backend.resolved,
            mtu=backend.mtu,
            source_bits=source_bits,
        )


def difference(frame: bytes, ingress: int, expected: Outcome, got: Outcome) -> str:
    """What is needed to see, and to repeat, what went wrong with a frame."""
    return "\n".join(
        [
            f"on interface {ingress}: {summary(frame)}",
            f"  {frame.hex()}",
            *(told(name, outcome) for name, outcome in [("model", expected), ("program", got)]),
        ]
    )


def told(who: str, outcome: Outcome) -> str:
    return f"{who}: {outcome.verdict.name} {outcome.reason} {summary(outcome.frame)}\n  {outcome.frame.hex()}"


def summary(frame: bytes) -> str:
    with warnings.catch_warnings(action="ignore"):
        return str(Ether(frame).summary())
