"""A loaded balancer with one service, and the packets of one Scenario to run it on, for bench dataplane.

In comes a Scenario; out go verdicts, times and counts of packets that bench/dataplane.bpf.c makes within
BPF_PROG_TEST_RUN, on tables that are filled here.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from bench.scenarios import (
    ADDRESSES,
    BACKEND_MAC,
    BALANCER_MAC,
    OUTER_SOURCE_BITS,
    SERVICE_PORT,
    Scenario,
)
from bench.traffic import IN_ORDER, SHUFFLED, aim, words
from lb.hashing.maglev import table
from lb.hashing.ring import pack
from lb.model.state import DEFAULT_RING_SIZE
from xdp.object import BpfObject, TestRun

OBJECT = Path(__file__).with_name("dataplane.bpf.o")

SERVICE = 0  # its number
LOOPBACK = 1  # the ifindex that a test run comes in on; to leave by it is XDP_TX
MTU = 1500
GUE_PORT = 6080  # IANA

NEVER_NS = 1 << 62
LONG_S = 3600
EVERY_SYN = 2**32 - 1
SPARE_ENTRIES = 4096  # of an LRU map, whose per-CPU free lists hold some back

UNENDING = 1 << 32  # flows: no table holds so many


@dataclass(frozen=True)
class Counts:
    """What the backends' counters add up to."""

    requests: int
    replies: int
    connections: int

    def __sub__(self, other: Counts) -> Counts:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Counts(*(mine - theirs for mine, theirs in pairs))


class Rig:
    """A loaded balancer with one service, and the packets of one scenario."""

    program = "balanced"

    def __init__(self, obj: BpfObject, scenario: Scenario) -> None:
        self.obj, self.scenario = obj, scenario
        self._traffic, self._around = obj.variable("traffic"), obj.variable("around")
        self._frame = b""

    def aim(self, packet: str, flows: int, order: tuple[int, int]) -> None:
        """From now on requests of this kind, each from the next of `flows` clients, a power of two."""
        self._frame = self.scenario.frame(packet)
        self._around.bytes, self._around.overhead = len(self._frame), self.scenario.overhead
        self._around.replies = 0
        aim(self._traffic, self._frame, flows, order)

    def turn(self) -> None:
        """From now on the replies to the requests that settle() has kept."""
        self._around.replies = 1

    def run(self, program: str, packets: int) -> TestRun:
        """The last of the packets as it left, and the mean time of one."""
        return self.obj.program(program).test_run(self._frame, repeat=packets)

    def made(self) -> bytes:
        """The next packet, as the balancer gets it."""
        return self._once("balanced_floor")

    def forwarded(self) -> bytes:
        """The next packet, as the balancer leaves it: in its tunnel."""
        return self._once("balanced")

    def _once(self, program: str) -> bytes:
        self._around.overhead = 0
        data = self.run(program, 1).data
        self._around.overhead = self.scenario.overhead
        return data

    def open(self, flows: int) -> None:
        """The first packet of each flow, in another order than they are measured in: that of memory."""
        self.aim(self._kind("syn"), flows, IN_ORDER)
        self.run(self.program, flows)

    def settle(self, flows: int) -> None:
        """One more packet of each flow, in the order of the measurement; replies will come in this order too."""
        self.aim(self._kind("ack"), flows, SHUFFLED)
        self._around.keeps = 1
        self.run(self.program, flows)
        self._around.keeps = 0
        if self.scenario.direction == "reply":
            self.turn()

    def change(self) -> None:
        """Put the slots in transition that the scenario wants there."""
        fill_ring(self.obj, self.scenario)

    def overflow(self) -> None:
        """New flows until every further one takes the place of an old one. More new flows are to come."""
        self.aim("syn", UNENDING, SHUFFLED)
        if table := self.scenario.recorded_in:
            self.run(self.program, len(self.obj.map(table)))

    def _kind(self, packet: str) -> str:
        return "udp" if self.scenario.packet == "udp" else packet

    def counts(self) -> Counts:
        counters = self.obj.map("counters").totals()
        return Counts(
            requests=sum(c.packets for c in counters),
            replies=sum(c.reply_packets for c in counters),
            connections=sum(c.connections for c in counters),
        )

    def refused(self) -> Mapping[str, int]:
        """Packets that were not forwarded, by reason, or not as the scenario wants it."""
        reasons = self.obj.types.enum("reason")
        packets = self.obj.map("reasons").totals()
        found = {name: packets[index] for name, index in reasons.items() if index < len(packets) and packets[index]}
        return found | ({"not in a tunnel": self._around.bare} if self._around.bare else {})

    def expected(self, packets: int) -> Counts:
        """What `packets` timed packets add to the counts if each of them took its scenario's way."""
        if self.scenario.direction == "reply":
            return Counts(0, packets, 0)
        return Counts(packets, 0, packets if self.scenario.packet == "syn" else 0)


def mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


@contextmanager
def loaded(scenario: Scenario, entries: int) -> Iterator[Rig]:
    """A rig whose tables hold `entries` flows."""
    with BpfObject.open(OBJECT) as obj:
        obj.configure(
            "config",
            refresh_ns=0 if scenario.refresh else NEVER_NS,
            nat_opening_timeout_s=LONG_S,
            udp_timeout_s=LONG_S,
            recorded_syns_per_s=EVERY_SYN,
        )
        resize(obj, scenario, entries)
        obj.load(Rig.program, f"{Rig.program}_floor")
        fill_ring(obj, replace(scenario, transition=0))
        fill_members(obj, scenario)
        add_service(obj, scenario)
        yield Rig(obj, scenario)


def resize(obj: BpfObject, scenario: Scenario, entries: int) -> None:
    obj.resize("rings", -(-DEFAULT_RING_SIZE // words_of_a_line(obj)))
    obj.resize("members", 1 + scenario.backends)
    obj.resize("counters", 1 + scenario.backends)
    obj.resize("forwarded", entries)
    if table := scenario.recorded_in:
        obj.resize(table, entries + SPARE_ENTRIES)
    if scenario.mode == "nat":
        obj.resize(f"nat_replies{scenario.family}", entries + SPARE_ENTRIES)


def words_of_a_line(obj: BpfObject) -> int:
    return len(obj.types.struct("slot_words")().words)


def fill_ring(obj: BpfObject, scenario: Scenario) -> None:
    """Members count from 1; a slot in transition has just gone from its member to the next one."""
    members = range(1, 1 + scenario.backends)
    slots = table({f"backend {number}": 1 for number in members}, DEFAULT_RING_SIZE, members)
    ring = memoryview(obj.map("rings").bytes()).cast("B").cast("I")
    for slot, member in enumerate(slots):
        if slot % 100 < scenario.transition:
            ring[slot] = pack(1 + member % scenario.backends, previous=member, track=True)
        else:
            ring[slot] = pack(member)


def fill_members(obj: BpfObject, scenario: Scenario) -> None:
    members = obj.map("members").view()
    addresses = ADDRESSES[scenario.backend_family]
    first = ip_address(addresses.backends)
    for number in range(1, 1 + scenario.backends):
        member = members[number]
        member.address[:] = words(str(first + number - 1))
        member.source[:] = words(addresses.tunnels if scenario.is_tunnel else addresses.balancer)
        member.source_bits = OUTER_SOURCE_BITS if scenario.is_tunnel else 0
        member.hop.ifindex = LOOPBACK
        member.hop.destination[:] = mac_bytes(BACKEND_MAC)
        member.hop.source[:] = mac_bytes(BALANCER_MAC)
        member.uid = member.index = number
        member.mtu = MTU
        member.flags = member_flags(obj, scenario)


def member_flags(obj: BpfObject, scenario: Scenario) -> int:
    flags = obj.types.enum("member_flag")
    family = flags["MEMBER_IP6"] if scenario.backend_family == 6 else 0
    return flags["MEMBER_ALIVE"] | flags["MEMBER_RESOLVED"] | family


def add_service(obj: BpfObject, scenario: Scenario) -> None:
    services = obj.map("services")
    services.view()[SERVICE] = services.value_type(
        ring_size=DEFAULT_RING_SIZE,
        member_count=1 + scenario.backends,
        flow_timeout_s=LONG_S,
        mode=obj.types.enum("mode")[f"MODE_{scenario.mode.upper()}"],
        options=service_options(obj, scenario),
        gue_port=GUE_PORT,
        in_use=1,
        number=SERVICE,
        family=socket.AF_INET if scenario.family == 4 else socket.AF_INET6,
        protocol=scenario.protocol,
    )
    obj.map(f"services{scenario.family}")[service_key(obj, scenario)] = SERVICE


def service_options(obj: BpfObject, scenario: Scenario) -> int:
    options = obj.types.enum("service_option")
    checksum = options["OPTION_OUTER_CHECKSUM"] if scenario.outer_checksum else 0
    return checksum | (options["OPTION_SECOND_CHANCE"] if scenario.second_chance else 0)


def service_key(obj: BpfObject, scenario: Scenario) -> Any:
    key = obj.map(f"services{scenario.family}").key_type(port=SERVICE_PORT, protocol=scenario.protocol)
    vip = words(scenario.addresses.vip)
    if scenario.family == 4:
        key.address = vip[0]
    else:
        key.address[:] = vip
    return key
