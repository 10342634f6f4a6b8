"""What the balancer costs a packet, in nanoseconds, without network or driver.

In come a mode, a kind of packet and a number of flows; out go the median times of one packet, with and without the
balancer. bench/dataplane.bpf.c makes the packets and calls the balancer within BPF_PROG_TEST_RUN; here its tables are
filled, its runs are timed, and it is made sure that every timed packet was forwarded, and the way it was meant to be.

Flows are visited in an order that neither the caches nor the tables can foresee, all of them once before any is
visited again. The clock is the real one; the refresh of a flow's entry, due once a second, is put off, and measured by
itself as refresh=1. A SYN opens a flow that was never seen; `flows` is then how many of them one timed run opens.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from ipaddress import ip_address
from pathlib import Path
from statistics import median
from typing import Any

import click
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from bench import report
from bench.report import BenchError, Result
from lb.maglev import table
from lb.model import DEFAULT_RING_SIZE
from lb.ring import pack
from xdp.object import BpfObject

OBJECT = Path(__file__).with_name("dataplane.bpf.o")

BACKENDS = 100
SERVICE_PORT = 80
LOOPBACK = 1  # the ifindex that a test run comes in on; to leave by it is XDP_TX
CLIENT_MAC, BALANCER_MAC, BACKEND_MAC = "02:00:00:00:00:01", "02:00:00:00:00:02", "02:00:00:00:00:11"
ETHERNET_HEADER_SIZE = 14
FRAME_SIZES = {4: 54, 6: 74}  # of a TCP packet without payload; UDP is padded to it

AF_INET, AF_INET6 = 2, 10
FAMILIES = {4: AF_INET, 6: AF_INET6}

NEVER_NS = 1 << 62
LONG_S = 3600
SPARE_ENTRIES = 4096  # of an LRU map, whose per-CPU free lists hold some back

IN_ORDER = (1, 1)
SHUFFLED = (1664525, 1013904223)  # multiplier and increment, with a full period for every power of two
UNENDING = 1 << 32  # flows: no table holds so many


@dataclass(frozen=True)
class Addresses:
    """RFC 2544, RFC 5180 and private addresses; `backends` and `clients` are the first of as many as needed."""

    vip: str
    balancer: str
    backends: str
    clients: str


ADDRESSES = {
    4: Addresses("198.19.0.1", "198.19.0.2", "198.18.0.1", "10.0.0.0"),
    6: Addresses("2001:2:0:1::1", "2001:2:0:1::2", "2001:2:0:2::1", "2001:2:0:3::"),
}


@dataclass(frozen=True)
class Scenario:
    """One kind of traffic: `mode` nat or dr, `family` 4 or 6, `packet` ack, syn or udp, `direction` request or reply.

    refresh: each packet finds the entry of its flow due for a refresh.
    """

    mode: str
    family: int
    packet: str
    direction: str = "request"
    refresh: bool = False

    def case(self, flows: int) -> str:
        always = f"mode={self.mode} family={self.family} packet={self.packet} flows={flows} transition=0"
        reply = " direction=reply" if self.direction == "reply" else ""
        return always + reply + (" refresh=1" if self.refresh else "")

    @property
    def addresses(self) -> Addresses:
        return ADDRESSES[self.family]

    @property
    def protocol(self) -> int:
        return socket.IPPROTO_UDP if self.packet == "udp" else socket.IPPROTO_TCP

    def frame(self, flags: str) -> bytes:
        """The first client's packet to the VIP, without payload; `flags` are TCP's."""
        ip = IP if self.family == 4 else IPv6
        packet = Ether(src=CLIENT_MAC, dst=BALANCER_MAC) / ip(src=self.addresses.clients, dst=self.addresses.vip)
        packet /= UDP(dport=SERVICE_PORT) if self.packet == "udp" else TCP(dport=SERVICE_PORT, flags=flags)
        return bytes(packet).ljust(FRAME_SIZES[self.family], b"\0")


SCENARIOS = (
    Scenario("nat", 4, "ack"),
    Scenario("nat", 4, "ack", direction="reply"),
    Scenario("nat", 4, "ack", refresh=True),
    Scenario("nat", 4, "udp"),
    Scenario("nat", 4, "syn"),
    Scenario("nat", 6, "ack"),
    Scenario("dr", 4, "ack"),
    Scenario("dr", 4, "udp"),
    Scenario("dr", 4, "syn"),
    Scenario("dr", 6, "ack"),
)


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

    def __init__(self, obj: BpfObject, scenario: Scenario) -> None:
        self._obj, self._scenario = obj, scenario
        self._traffic = obj.variable("traffic")
        self._frame = b""

    def aim(self, flags: str, flows: int, order: tuple[int, int]) -> None:
        """From now on packets with these TCP flags, each from the next of `flows` clients; a power of two."""
        self._frame = self._scenario.frame(flags)
        ip = self._frame[ETHERNET_HEADER_SIZE:]
        ctypes.memmove(self._traffic.macs, self._frame, ctypes.sizeof(self._traffic.macs))
        ctypes.memmove(self._traffic.packet, ip, len(ip))
        self._traffic.family = FAMILIES[self._scenario.family]
        self._traffic.client = words(self._scenario.addresses.clients)[0 if self._scenario.family == 4 else 3]
        self._traffic.multiplier, self._traffic.increment = order
        self._traffic.flow, self._traffic.sent, self._traffic.mask = 0, 0, flows - 1

    def run(self, program: str, packets: int) -> int:
        """The mean time of a packet in ns."""
        return self._obj.program(program).test_run(self._frame, repeat=packets).duration_ns

    def open(self, flows: int) -> None:
        """The first packet of each flow, in another order than they are measured in: that of memory."""
        self.aim("S", flows, IN_ORDER)
        self.run("request", flows)

    def settle(self, flows: int) -> None:
        """One more packet of each flow, in the order of the measurement; replies will come in this order too."""
        self.aim("A", flows, SHUFFLED)
        self.run("request_kept", flows)

    def overflow(self) -> None:
        """New flows until each further one takes the place of an old one, and goes on with new flows."""
        self.aim("S", UNENDING, SHUFFLED)
        self.run("request", 2 * len(self._obj.map("nat_flows4")))

    def compare(self, repeat: int, rounds: int) -> tuple[float, float]:
        """(total, floor) of a packet in ns: medians over the rounds, which time `repeat` packets each, by turns."""
        program = self._scenario.direction
        timed = [(self.run(program, repeat), self.run(f"{program}_floor", repeat)) for _ in range(rounds)]
        totals, floors = zip(*timed, strict=True)
        return median(totals), median(floors)

    def counts(self) -> Counts:
        counters = self._obj.map("counters").totals()
        return Counts(
            requests=sum(c.packets for c in counters),
            replies=sum(c.reply_packets for c in counters),
            connections=sum(c.connections for c in counters),
        )

    def refused(self) -> dict[str, int]:
        """Packets that were not forwarded, by reason."""
        reasons = self._obj.types.enum("reason")
        packets = self._obj.map("reasons").totals()
        return {name: packets[index] for name, index in reasons.items() if index < len(packets) and packets[index]}

    def expected(self, packets: int) -> Counts:
        """What `packets` timed packets add to the counts if each of them took its scenario's way."""
        if self._scenario.direction == "reply":
            return Counts(0, packets, 0)
        return Counts(packets, 0, packets if self._scenario.packet == "syn" else 0)


def words(address: str) -> tuple[int, ...]:
    """The four 32-bit words of an address, as structs hold it; IPv4 is word 0."""
    return struct.unpack("!4I", ip_address(address).packed.ljust(16, b"\0"))


def mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


@contextmanager
def rig(scenario: Scenario, flows: int) -> Iterator[Rig]:
    """A rig whose tables hold `flows` flows twice over."""
    with BpfObject.open(OBJECT) as obj:
        obj.configure(
            "config",
            refresh_ns=0 if scenario.refresh else NEVER_NS,
            nat_opening_timeout_s=LONG_S,
            udp_timeout_s=LONG_S,
        )
        resize(obj, flows)
        obj.load()
        fill_ring(obj)
        fill_members(obj, scenario)
        add_service(obj, scenario)
        yield Rig(obj, scenario)


def resize(obj: BpfObject, flows: int) -> None:
    obj.resize("rings", -(-DEFAULT_RING_SIZE // words_of_a_line(obj)))
    obj.resize("members", 1 + BACKENDS)
    obj.resize("counters", 1 + BACKENDS)
    obj.resize("forwarded", flows)
    for name in ("nat_flows4", "nat_flows6", "nat_replies4", "nat_replies6"):
        obj.resize(name, 2 * flows + SPARE_ENTRIES)


def words_of_a_line(obj: BpfObject) -> int:
    return ctypes.sizeof(obj.types.struct("slot_words")) // ctypes.sizeof(ctypes.c_uint32)


def fill_ring(obj: BpfObject) -> None:
    """Every slot stable; members count from 1."""
    slots = table({f"backend {number}": 1 for number in range(BACKENDS)}, DEFAULT_RING_SIZE)
    ring = (ctypes.c_uint32 * DEFAULT_RING_SIZE).from_buffer(obj.map("rings").bytes())
    ring[:] = [pack(1 + position) for position in slots]


def fill_members(obj: BpfObject, scenario: Scenario) -> None:
    flags = obj.types.enum("member_flag")
    members = obj.map("members").view()
    first = ip_address(scenario.addresses.backends)
    for number in range(1, 1 + BACKENDS):
        member = members[number]
        member.address[:] = words(str(first + number))
        member.source[:] = words(scenario.addresses.balancer)
        member.hop.ifindex = LOOPBACK
        member.hop.destination[:] = mac_bytes(BACKEND_MAC)
        member.hop.source[:] = mac_bytes(BALANCER_MAC)
        member.uid = member.counter = member.number = number
        member.flags = flags["MEMBER_ALIVE"] | flags["MEMBER_RESOLVED"]


def add_service(obj: BpfObject, scenario: Scenario) -> None:
    services = obj.map(f"services{scenario.family}")
    key = services.key_type(port=SERVICE_PORT, protocol=scenario.protocol)
    vip = words(scenario.addresses.vip)
    if scenario.family == 4:
        key.address = vip[0]
    else:
        key.address[:] = vip
    services[key] = services.value_type(
        ring_size=DEFAULT_RING_SIZE,
        member_count=1 + BACKENDS,
        flow_timeout_s=LONG_S,
        mode=obj.types.enum("mode")[f"MODE_{scenario.mode.upper()}"],
    )


def measure(scenario: Scenario, flow_counts: Sequence[int], repeat: int, rounds: int) -> Iterator[Result]:
    """A Result for each number of flows, all of them powers of two. Raises BenchError, XdpError."""
    if scenario.packet == "syn":
        with rig(scenario, repeat) as full:
            full.overflow()
            yield timed(full, scenario, repeat, repeat, rounds)
        return
    with rig(scenario, max(flow_counts)) as settled:
        settled.open(max(flow_counts))
        for flows in flow_counts:
            settled.settle(flows)
            yield timed(settled, scenario, flows, repeat, rounds)


def timed(rig: Rig, scenario: Scenario, flows: int, repeat: int, rounds: int) -> Result:
    case, before = scenario.case(flows), rig.counts()
    total, floor = rig.compare(repeat, rounds)
    counted, expected = rig.counts() - before, rig.expected(repeat * rounds)
    if counted != expected or rig.refused():
        raise BenchError(f"dataplane: {case}: expected {expected}, got {counted}; not forwarded: {rig.refused()}")
    return Result("dataplane", case, total, "ns/packet", floor)


def powers_of_two(_: click.Context, __: click.Parameter, values: tuple[int, ...]) -> tuple[int, ...]:
    for value in values:
        if value & (value - 1):
            raise click.BadParameter(f"{value} is not a power of two.")
    return values


@report.command
@click.option(
    "--flows",
    "flow_counts",
    type=click.IntRange(1, 1 << 24),
    multiple=True,
    default=(1, 1 << 16, 1 << 20),
    show_default=True,
    callback=powers_of_two,
    help="How many flows take turns; may be repeated.",
)
@click.option("--repeat", type=click.IntRange(1), default=1 << 20, show_default=True, help="Packets of a timed run.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Timed runs of each case.")
def command(flow_counts: tuple[int, ...], repeat: int, rounds: int) -> Iterator[Result]:
    """What the balancer costs a packet, by mode, packet and number of flows."""
    for scenario in SCENARIOS:
        yield from measure(scenario, flow_counts, repeat, rounds)
