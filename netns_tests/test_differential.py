"""The program against its model: hypothesis draws services, events and frames, and both must do the same with each.

Verdict, reason and bytes are compared after every frame, the members' counters at the end. `make test` draws the same
20,000 frames every time; with FUZZ_PACKETS set the frames are new ones, as many as it says.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from scapy.layers.l2 import Ether

from netns_tests import packets
from netns_tests.model import SECOND_NS, Member, Model, Outcome, Service, Settings, Slot, Undetermined
from netns_tests.program import LoadedProgram, loaded_program
from netns_tests.program import version as version_of_address
from netns_tests.topology import Bed
from netns_tests.wire import ACK, FIN, ICMP_OF, IP_HEADER_SIZE, RST, SYN, Flow, Hop, address, internet_sum

FUZZ = "FUZZ_PACKETS" in os.environ
FRAMES = int(os.environ.get("FUZZ_PACKETS", 20_000))
STEPS = 50
# So few ports that flows meet on them, time out and take each other's over.
SETTINGS = Settings(nat_port_first=1098, nat_port_count=4)
# About the refresh period, and just beyond each timeout.
CLOCK_STEPS_MS = (500, 1000, 1001, 31_000, 61_000, 101_000, 121_000, 121_000)
START_NS = 1_000_000 * SECOND_NS
TCP, UDP, OTHER_PROTOCOL = 6, 17, 132
PSH = 0x08
ETHERTYPES = {4: b"\x08\x00", 6: b"\x86\xdd"}
ERROR_TYPES = {4: (3, 11, 12), 6: (1, 2, 3, 4)}

CLIENTS = {4: ("192.0.2.1", "192.0.2.77", "192.0.2.255"), 6: ("2001:db8:1::1", "2001:db8:1::77", "2001:db8:1:ffff::")}
CLIENT_PORTS = (1, 40000, 65535)
SOURCES = {4: packets.LB4, 6: packets.LB6}
# One of the services may be on the address that nat sends from, with a port that nat would otherwise use.
VIPS = {4: (packets.VIP4, "203.0.113.2", packets.LB4), 6: (packets.VIP6, "2001:db8:2::2", packets.LB6)}
SERVICE_PORTS = (80, 53, 1100, 0)
BACKENDS = {4: packets.BACKEND4, 6: packets.BACKEND6}
ROUTERS = {4: packets.ROUTER4, 6: packets.ROUTER6}
CLIENT_MAC, LB_MAC, *BACKEND_MACS = (
    bytes.fromhex(mac.replace(":", "")) for mac in (packets.CLIENT_MAC, packets.LB_MAC, *packets.BACKEND_MACS)
)


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
    shape: Literal["plain", "error", "first fragment", "later fragment", "options", "vlan", "other protocol"]
    quoted: int


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
    address: int
    port: int
    alive: bool
    resolved: bool
    interface: int


@dataclass(frozen=True)
class Offer:
    """A service to be: its members have the numbers 1, 2, 3."""

    family: Literal[4, 6]
    vip: int
    port: int
    protocol: int
    mode: Literal["nat", "dr"]
    backends: tuple[Backend, ...]
    slots: tuple[Slot, ...]
    flow_timeout_s: int


def mostly(usual: Any, *others: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from([usual] * 12 * len(others) + list(others))


INDEX = st.integers(0, 15)
SLOTS = st.builds(
    Slot,
    current=st.sampled_from([1, 2, 3, 1, 2, 3, 0]),
    previous=st.integers(0, 3),
    track=st.sampled_from([True, True, False]),
)
BACKEND_STRATEGY = st.builds(
    Backend,
    address=INDEX,
    port=st.sampled_from([0, 8080]),
    alive=mostly(True, False),
    resolved=mostly(True, False),
    interface=INDEX,
)
OFFERS = st.builds(
    Offer,
    family=st.sampled_from([4, 6]),
    vip=INDEX,
    port=st.sampled_from(SERVICE_PORTS),
    protocol=st.sampled_from([TCP, UDP]),
    mode=st.sampled_from(["nat", "dr"]),
    backends=st.tuples(BACKEND_STRATEGY, BACKEND_STRATEGY, BACKEND_STRATEGY),
    slots=st.lists(SLOTS, min_size=1, max_size=4).map(tuple),
    flow_timeout_s=st.sampled_from([100, 3600]),
)
EVENTS = st.builds(
    Event,
    what=st.sampled_from(
        ["clock", "clock", "clock", "kill", "revive", "replace", "resolve", "unresolve", "slot", "change", "evict"]
    ),
    service=INDEX,
    number=INDEX,
    amount=st.integers(0, 255),
)
SENT = st.builds(
    Sent,
    reply=st.booleans(),
    service=INDEX,
    client=st.sampled_from([0, 0, 0, 1, 1, 2]),
    client_port=st.sampled_from([0, 0, 0, 1, 1, 2]),
    destination_port=st.sampled_from([80, 80, 53, 443, 1100]),
    tcp_flags=st.sampled_from([SYN, SYN, ACK, ACK, PSH | ACK, FIN | ACK, RST, RST | ACK, SYN | ACK, SYN | FIN, 0]),
    payload=st.sampled_from([0, 0, 1, 5, 64, 1000]),
    ttl=mostly(64, 255, 2, 1, 0),
    checksum=mostly("right", "none", "wrong"),
    shape=st.sampled_from(
        ["plain"] * 16 + ["error"] * 6 + ["first fragment", "later fragment", "options", "vlan", "other protocol"]
    ),
    quoted=st.sampled_from([0, 7, 8, 8, 12, 17, 18, 19, 20, 21, 1000]),
)
DAMAGES = st.builds(Damage, what=mostly("none", "cut", "flip", "pad", "length"), at=INDEX, amount=st.integers(0, 255))
STEP_LISTS = st.lists(
    st.builds(Step, event=st.none() | st.none() | EVENTS, sent=SENT, damage=DAMAGES, interface=st.integers(0, 1)),
    min_size=STEPS,
    max_size=STEPS,
)


# What is sent: by hand, since scapy would take most of the time


def frame_of(sent: Sent, flow: Flow) -> bytes:
    version = version_of_address(flow.source)
    ethertype = ETHERTYPES[version]
    ip = error_about(sent, flow) if sent.shape == "error" else packet_of(sent, flow)
    tag = b"\x81\x00\x00\x07" if sent.shape == "vlan" else b""
    return LB_MAC + CLIENT_MAC + tag + ethertype + ip


def packet_of(sent: Sent, flow: Flow) -> bytes:
    segment = segment_of(sent, flow)
    build = ip4_packet if version_of_address(flow.source) == 4 else ip6_packet
    return build(flow, OTHER_PROTOCOL if sent.shape == "other protocol" else flow.protocol, segment, sent)


def ip4_packet(flow: Flow, protocol: int, payload: bytes, sent: Sent) -> bytes:
    options = bytes([148, 4, 0, 0]) if sent.shape == "options" else b""  # router alert, RFC 2113
    fragment = {"first fragment": 0x2000, "later fragment": 3}.get(sent.shape, 0x4000)
    size = 20 + len(options) + len(payload)
    start = struct.pack("!BBHHHBB", 0x45 + len(options) // 4, 0, size, 0x1234, fragment, sent.ttl, protocol)
    rest = flow.source + flow.destination + options
    return start + checksum(start + rest) + rest + payload


def ip6_packet(flow: Flow, protocol: int, payload: bytes, sent: Sent) -> bytes:
    extensions = {
        "first fragment": (44, bytes([protocol, 0, 0, 1, 0, 0, 0, 9])),
        "later fragment": (44, bytes([protocol, 0, 0, 24, 0, 0, 0, 9])),
        "options": (60, bytes([protocol, 0, 1, 4, 0, 0, 0, 0])),
    }
    following, extension = extensions.get(sent.shape, (protocol, b""))
    start = struct.pack("!IHBB", 6 << 28, len(extension + payload), following, sent.ttl)
    return start + flow.source + flow.destination + extension + payload


def segment_of(sent: Sent, flow: Flow) -> bytes:
    payload, ports = bytes(n & 0xFF for n in range(sent.payload)), struct.pack("!HH", *flow[1:4:2])
    if flow.protocol == UDP:
        before, after = ports + struct.pack("!H", 8 + len(payload)), payload
    else:
        before = ports + struct.pack("!IIBBH", 0x01020304, 0x05060708, 0x50, sent.tcp_flags, 0x2000)
        after = bytes(2) + payload
    return before + checksum_of(sent, flow, before + after) + after


def checksum_of(sent: Sent, flow: Flow, segment: bytes) -> bytes:
    if sent.checksum == "right":
        return checksum(pseudo_header(flow, flow.protocol, len(segment) + 2) + segment, or_ones=flow.protocol == UDP)
    return b"\0\0" if sent.checksum == "none" else b"\xff\xff"


def pseudo_header(flow: Flow, protocol: int, size: int) -> bytes:
    return flow.source + flow.destination + struct.pack("!II", size, protocol)


def checksum(covered: bytes, or_ones: bool = False) -> bytes:
    value = -internet_sum(covered) % 0xFFFF
    return (value or 0xFFFF * or_ones).to_bytes(2, "big")


def error_about(sent: Sent, flow: Flow) -> bytes:
    """About a packet of the other direction, from a router on the way or (as hosts do) from the one who got it."""
    version = version_of_address(flow.source)
    quote = packet_of(replace(sent, shape="plain"), flow.turned())[: IP_HEADER_SIZE[version] + sent.quoted]
    outer = flow if sent.client else flow._replace(source=address(ROUTERS[version]))
    kind = (ERROR_TYPES[version])[sent.payload % len(ERROR_TYPES[version])]
    before, after, protocol = bytes([kind, 1]), bytes(4) + quote, ICMP_OF[version]
    pseudo = pseudo_header(outer, protocol, 4 + len(after)) if version == 6 else b""
    message = before + checksum(pseudo + before + after) + after
    return (ip4_packet if version == 4 else ip6_packet)(outer, protocol, message, sent)


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

    def __init__(self, program: LoadedProgram, interfaces: tuple[int, int], offers: list[Offer]) -> None:
        self.program, self.interfaces = program, interfaces
        self._last_id = 0
        self.services = [self._service(offer) for offer in offers]
        self.model = Model(SETTINGS, self.services)
        self.model.now_ns = START_NS
        program.forget()
        program.set_clock(START_NS)
        program.install(self.services)

    def take(self, step: Step) -> None:
        if step.event:
            self.change(step.event)
        frame = damaged(frame_of(step.sent, self.flow(step.sent)), step.damage)
        ingress = self.interfaces[step.interface]
        expected, got = self.model.receive(frame, ingress), self.program.run(frame, ingress)
        assert got == expected, difference(frame, ingress, expected, got)

    def check_counters(self) -> None:
        for index, count in self.model.counts.items():
            assert self.program.count(index) == count, f"counter {index}"

    def flow(self, sent: Sent) -> Flow:
        """A reply is a frame of a flow that is translated now, if there is one."""
        if sent.reply and self.model.replies:
            return list(self.model.replies)[(sent.service * 16 + sent.client) % len(self.model.replies)]
        service = self.services[sent.service % len(self.services)]
        client = CLIENTS[4 if len(service.address) == 4 else 6][sent.client]
        port = sent.destination_port if sent.service > 12 else service.port or sent.destination_port
        return Flow(address(client), CLIENT_PORTS[sent.client_port], service.address, port, service.protocol)

    def change(self, event: Event) -> None:
        service = self.services[event.service % len(self.services)]
        self._changes(service, event)[event.what]()
        self.program.set_clock(self.model.now_ns)
        self.program.install(self.services)

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
        vip = VIPS[offer.family][offer.vip % 3]
        members = {n: self._member(offer.family, backend) for n, backend in enumerate(offer.backends, 1)}
        slots = [replace(slot) for slot in offer.slots]
        return Service(
            address(vip), offer.port, offer.protocol, offer.mode, members, slots, offer.flow_timeout_s, START_NS
        )

    def _member(self, family: int, backend: Backend) -> Member:
        new_id = self._new_id()
        return Member(
            uid=new_id,
            address=address(BACKENDS[family][backend.address % 3]),
            source=address(SOURCES[family]),
            hop=Hop(self.interfaces[backend.interface % 2], BACKEND_MACS[backend.address % 3], LB_MAC),
            counter=new_id,
            port=backend.port,
            alive=backend.alive,
            resolved=backend.resolved,
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


@pytest.fixture(scope="module")
def interfaces() -> Iterator[tuple[int, int]]:
    """Two of a host that does not route, so that no one resolves a member but the test."""
    with Bed(backends=0) as bed, bed.lb.netlink() as ip:
        first, second = (ip.link_lookup(ifname=i.name)[0] for i in bed.lb.interfaces)
        with bed.lb.entered():
            yield first, second


@pytest.fixture(scope="module")
def program(interfaces: tuple[int, int]) -> Iterator[LoadedProgram]:
    with loaded_program(SETTINGS) as program:
        yield program


@settings(
    max_examples=math.ceil(FRAMES / STEPS),
    derandomize=not FUZZ,
    # Making a failure smaller takes minutes.
    phases=[Phase.generate, Phase.shrink] if FUZZ else [Phase.generate],
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
@given(
    offers=st.lists(OFFERS, min_size=1, max_size=4, unique_by=lambda o: (o.family, o.vip % 3, o.port, o.protocol)),
    steps=STEP_LISTS,
)
def test_program_and_model_do_the_same_with_every_frame(
    program: LoadedProgram, interfaces: tuple[int, int], offers: list[Offer], steps: list[Step]
) -> None:
    world = World(program, interfaces, offers)
    with contextlib.suppress(Undetermined):
        for step in steps:
            world.take(step)
    world.check_counters()
