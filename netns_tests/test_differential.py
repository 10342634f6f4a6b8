"""The program against its model: hypothesis draws services, events and frames, and both must do the same with each.

Verdict, reason and bytes are compared after every frame, the members' counters at the end. `make test` draws the same
20,000 frames every time; with FUZZ_PACKETS set the frames are new ones, as many as it says.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP, IPOption_Router_Alert
from scapy.layers.inet6 import ICMPv6PacketTooBig, ICMPv6TimeExceeded, IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet, Raw

from netns_tests import packets
from netns_tests.model import SECOND_NS, Member, Model, Outcome, Service, Settings, Slot
from netns_tests.program import LoadedProgram, loaded_program
from netns_tests.topology import Bed
from netns_tests.wire import Flow, Hop, address

FRAMES = int(os.environ.get("FUZZ_PACKETS", 20_000))
STEPS = 50
SETTINGS = Settings(nat_port_first=1024, nat_port_count=256)
START_NS = 1_000_000 * SECOND_NS
TCP_PROTOCOL, UDP_PROTOCOL = 6, 17

CLIENTS = {4: ("192.0.2.1", "192.0.2.77", "192.0.2.255"), 6: ("2001:db8:1::1", "2001:db8:1::77", "2001:db8:1:ffff::")}
CLIENT_PORTS = (1, 40000, 65535)
SOURCES = {4: packets.LB4, 6: packets.LB6}
# One of the services may be on the address that nat sends from, with a port that nat would otherwise use.
VIPS = {4: (packets.VIP4, "203.0.113.2", packets.LB4), 6: (packets.VIP6, "2001:db8:2::2", packets.LB6)}
SERVICE_PORTS = (80, 53, 1100, 0)
BACKENDS = {4: packets.BACKEND4, 6: packets.BACKEND6}
ROUTERS = {4: packets.ROUTER4, 6: packets.ROUTER6}


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
    tcp_flags: str
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


def mostly(usual: str, *others: str) -> st.SearchStrategy[str]:
    return st.sampled_from([usual] * 2 * len(others) + list(others))


INDEX = st.integers(0, 15)
SLOTS = st.builds(Slot, current=st.integers(0, 3), previous=st.integers(0, 3), track=st.booleans())
BACKEND_STRATEGY = st.builds(
    Backend,
    address=INDEX,
    port=st.sampled_from([0, 8080]),
    alive=st.sampled_from([True, True, True, False]),
    resolved=st.sampled_from([True] * 7 + [False]),
    interface=INDEX,
)
OFFERS = st.builds(
    Offer,
    family=st.sampled_from([4, 6]),
    vip=INDEX,
    port=st.sampled_from(SERVICE_PORTS),
    protocol=st.sampled_from([TCP_PROTOCOL, UDP_PROTOCOL]),
    mode=st.sampled_from(["nat", "nat", "dr"]),
    backends=st.tuples(BACKEND_STRATEGY, BACKEND_STRATEGY, BACKEND_STRATEGY),
    slots=st.lists(SLOTS, min_size=1, max_size=7).map(tuple),
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
    client=st.integers(0, 2),
    client_port=st.integers(0, 2),
    destination_port=st.sampled_from([80, 80, 53, 443, 1100]),
    tcp_flags=st.sampled_from(["S", "S", "A", "A", "PA", "FA", "R", "RA", "SA", "SF", ""]),
    payload=st.sampled_from([0, 0, 1, 5, 64, 1000]),
    ttl=st.sampled_from([64] * 8 + [255, 2, 1, 0]),
    checksum=mostly("right", "none", "wrong"),
    shape=st.sampled_from(
        ["plain"] * 10 + ["error"] * 4 + ["first fragment", "later fragment", "options", "vlan", "other protocol"]
    ),
    quoted=st.sampled_from([0, 7, 8, 8, 12, 17, 18, 19, 20, 21, 1000]),
)
DAMAGES = st.builds(Damage, what=mostly("none", "cut", "flip", "pad", "length"), at=INDEX, amount=st.integers(0, 255))
STEP_LISTS = st.lists(
    st.builds(Step, event=st.none() | st.none() | EVENTS, sent=SENT, damage=DAMAGES, interface=st.integers(0, 1)),
    min_size=STEPS,
    max_size=STEPS,
)


# What is sent


def frame_of(sent: Sent, flow: Flow) -> bytes:
    family = 4 if len(flow.source) == 4 else 6
    segment = segment_of(sent, flow)
    if sent.shape == "error":
        return error_about(sent, packets.frame(header_of(flow.turned()), segment_of(sent, flow.turned())), family)
    if sent.shape == "vlan":
        return packets.frame(Dot1Q(vlan=7), header_of(flow, **{hop_field(family): sent.ttl}), segment)
    header, extension = shaped_header(sent, flow, family)
    return packets.frame(header, *extension, segment)


def header_of(flow: Flow, **fields: Any) -> Packet:
    ip = IP if len(flow.source) == 4 else IPv6
    return ip(src=str(ip_address(flow.source)), dst=str(ip_address(flow.destination)), **fields)


def hop_field(family: int) -> str:
    return "ttl" if family == 4 else "hlim"


def shaped_header(sent: Sent, flow: Flow, family: int) -> tuple[Packet, list[Packet]]:
    ttl = {hop_field(family): sent.ttl}
    if family == 4:
        fields: dict[str, Any] = {
            "first fragment": {"flags": "MF"},
            "later fragment": {"frag": 3},
            "options": {"options": [IPOption_Router_Alert()]},
            "other protocol": {"proto": 132},
        }.get(sent.shape, {})
        return header_of(flow, **ttl, **fields), []
    extensions: dict[str, list[Packet]] = {
        "first fragment": [IPv6ExtHdrFragment(m=1, nh=flow.protocol)],
        "later fragment": [IPv6ExtHdrFragment(offset=3, nh=flow.protocol)],
        "options": [IPv6ExtHdrDestOpt(nh=flow.protocol)],
    }
    next_header = {"nh": 132} if sent.shape == "other protocol" else {}
    return header_of(flow, **ttl, **next_header), extensions.get(sent.shape, [])


def segment_of(sent: Sent, flow: Flow) -> Packet:
    fields: dict[str, Any] = {"sport": flow.source_port, "dport": flow.destination_port}
    if sent.checksum != "right":
        fields["chksum"] = 0 if sent.checksum == "none" else 0xFFFF
    payload = Raw(bytes(n & 0xFF for n in range(sent.payload)))
    if flow.protocol == UDP_PROTOCOL:
        return UDP(**fields) / payload
    return TCP(**fields, flags=sent.tcp_flags, seq=0x01020304) / payload


def error_about(sent: Sent, quoted: bytes, family: int) -> bytes:
    """From a router on the way, or (as hosts do) from the one who got the packet."""
    to = Ether(quoted).payload
    source = to.dst if sent.client else ROUTERS[family]
    if family == 4:
        kind = (3, 11, 12, 3)[sent.payload % 4]
        return packets.icmp_error4(quoted, src=source, size=20 + sent.quoted, type=kind, code=1)
    error = ICMPv6PacketTooBig() if sent.payload else ICMPv6TimeExceeded()
    return packets.icmp_error6(quoted, src=source, size=40 + sent.quoted, error=error)


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
            "clock": lambda: self._advance((0, 500, 1000, 1001, 31_000, 61_000, 101_000, 121_000)[event.amount % 8]),
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
        mac = bytes.fromhex(packets.BACKEND_MACS[backend.address % 3].replace(":", ""))
        return Member(
            uid=new_id,
            address=address(BACKENDS[family][backend.address % 3]),
            source=address(SOURCES[family]),
            hop=Hop(self.interfaces[backend.interface % 2], mac, b"\x02lb\0\0\0"),
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
    derandomize="FUZZ_PACKETS" not in os.environ,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
@given(
    offers=st.lists(OFFERS, min_size=1, max_size=5, unique_by=lambda o: (o.family, o.vip % 3, o.port, o.protocol)),
    steps=STEP_LISTS,
)
def test_program_and_model_do_the_same_with_every_frame(
    program: LoadedProgram, interfaces: tuple[int, int], offers: list[Offer], steps: list[Step]
) -> None:
    world = World(program, interfaces, offers)
    for step in steps:
        world.take(step)
    world.check_counters()
