"""What the balancer costs a packet, in nanoseconds, without network or driver.

In come a mode, a kind of packet and a number of flows; out go the median times of one packet, with and without the
balancer. bench/dataplane.bpf.c makes the packets and calls the balancer within BPF_PROG_TEST_RUN; here its tables are
filled, its runs are timed, and it is made sure that every timed packet was forwarded, and the way it was meant to be.

Flows are visited in an order that neither the caches nor the tables can foresee, all of them once before any is
visited again. The clock is the real one; the refresh of a flow's entry, due once a second, is put off, and measured by
itself as refresh=1. A SYN is always a new flow's; in mode nat the tables, of `flows` entries, are then full, and it
takes the place of an old one.
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

import click
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from bench import report
from bench.report import BenchError, Result
from lb.maglev import table
from lb.model import DEFAULT_RING_SIZE
from lb.ring import pack
from xdp.object import BpfObject, TestRun

OBJECT = Path(__file__).with_name("dataplane.bpf.o")

BACKENDS = 100
SERVICE_PORT = 80
LOOPBACK = 1  # the ifindex that a test run comes in on; to leave by it is XDP_TX
CLIENT_MAC, BALANCER_MAC, BACKEND_MAC = "02:00:00:00:00:01", "02:00:00:00:00:02", "02:00:00:00:00:11"
ETHERNET_HEADER_SIZE = 14
FRAME_SIZES = {4: 54, 6: 74}  # of a TCP packet without payload; UDP is padded to it

FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
LAST_WORD = {4: 0, 6: 3}  # of an address, as structs hold it

NEVER_NS = 1 << 62
LONG_S = 3600
SPARE_ENTRIES = 4096  # of an LRU map, whose per-CPU free lists hold some back

IN_ORDER = (1, 1)
SHUFFLED = (1664525, 1013904223)  # multiplier and increment, with a full period for every power of two
UNENDING = 1 << 32  # flows: no table holds so many
MOST_FLOWS = 1 << 20  # twice that is two thirds of the ports that nat has towards so many backends


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


# The first are measured with each number of flows, the others with the largest.
MAIN_SCENARIOS = (
    Scenario("nat", 4, "ack"),
    Scenario("dr", 4, "ack"),
)
OTHER_SCENARIOS = (
    Scenario("nat", 6, "ack"),
    Scenario("nat", 4, "udp"),
    Scenario("nat", 4, "syn"),
    Scenario("nat", 4, "ack", direction="reply"),
    Scenario("nat", 4, "ack", refresh=True),
    Scenario("dr", 6, "ack"),
    Scenario("dr", 4, "udp"),
    Scenario("dr", 4, "syn"),
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
        self.obj, self.scenario = obj, scenario
        self._traffic = obj.variable("traffic")
        self._frame = b""

    def aim(self, flags: str, flows: int, order: tuple[int, int]) -> None:
        """From now on packets with these TCP flags, each from the next of `flows` clients, a power of two."""
        self._frame = self.scenario.frame(flags)
        ip = self._frame[ETHERNET_HEADER_SIZE:]
        ctypes.memmove(self._traffic.macs, self._frame, ctypes.sizeof(self._traffic.macs))
        ctypes.memmove(self._traffic.packet, ip, len(ip))
        self._traffic.family = FAMILIES[self.scenario.family]
        self._traffic.client = words(self.scenario.addresses.clients)[LAST_WORD[self.scenario.family]]
        self._traffic.multiplier, self._traffic.increment = order
        self._traffic.flow, self._traffic.sent, self._traffic.mask = 0, 0, flows - 1

    def run(self, program: str, packets: int) -> TestRun:
        """The last of the packets as it left, and the mean time of one."""
        return self.obj.program(program).test_run(self._frame, repeat=packets)

    def open(self, flows: int) -> None:
        """The first packet of each flow, in another order than they are measured in: that of memory."""
        self.aim("S", flows, IN_ORDER)
        self.run("request", flows)

    def settle(self, flows: int) -> None:
        """One more packet of each flow, in the order of the measurement; replies will come in this order too."""
        self.aim("A", flows, SHUFFLED)
        self.run("request_kept", flows)

    def overflow(self) -> None:
        """New flows until every further one takes the place of an old one. More new flows are to come."""
        self.aim("S", UNENDING, SHUFFLED)
        if self.scenario.mode == "nat":
            self.run("request", len(self.obj.map(f"nat_flows{self.scenario.family}")))

    def compare(self, repeat: int, rounds: int) -> tuple[float, float]:
        """(total, floor) of a packet in ns: medians over the rounds, which time `repeat` packets each, by turns."""
        program = self.scenario.direction
        floor = f"{program}_floor"
        runs = [(self.run(program, repeat), self.run(floor, repeat)) for _ in range(rounds)]
        return median(run.duration_ns for run, _ in runs), median(run.duration_ns for _, run in runs)

    def counts(self) -> Counts:
        counters = self.obj.map("counters").totals()
        return Counts(
            requests=sum(c.packets for c in counters),
            replies=sum(c.reply_packets for c in counters),
            connections=sum(c.connections for c in counters),
        )

    def refused(self) -> dict[str, int]:
        """Packets that were not forwarded, by reason."""
        reasons = self.obj.types.enum("reason")
        packets = self.obj.map("reasons").totals()
        return {name: packets[index] for name, index in reasons.items() if index < len(packets) and packets[index]}

    def expected(self, packets: int) -> Counts:
        """What `packets` timed packets add to the counts if each of them took its scenario's way."""
        if self.scenario.direction == "reply":
            return Counts(0, packets, 0)
        return Counts(packets, 0, packets if self.scenario.packet == "syn" else 0)


def words(address: str) -> tuple[int, ...]:
    """The four 32-bit words of an address, as structs hold it; IPv4 is word 0."""
    return struct.unpack("!4I", ip_address(address).packed.ljust(16, b"\0"))


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
        )
        resize(obj, scenario, entries)
        obj.load()
        fill_ring(obj)
        fill_members(obj, scenario)
        add_service(obj, scenario)
        yield Rig(obj, scenario)


def resize(obj: BpfObject, scenario: Scenario, entries: int) -> None:
    obj.resize("rings", -(-DEFAULT_RING_SIZE // words_of_a_line(obj)))
    obj.resize("members", 1 + BACKENDS)
    obj.resize("counters", 1 + BACKENDS)
    obj.resize("forwarded", entries)
    if scenario.mode == "nat":
        obj.resize(f"nat_flows{scenario.family}", entries + SPARE_ENTRIES)
        obj.resize(f"nat_replies{scenario.family}", entries + SPARE_ENTRIES)


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
        member.address[:] = words(str(first + number - 1))
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
    measure_any = measure_new if scenario.packet == "syn" else measure_known
    yield from measure_any(scenario, flow_counts, repeat, rounds)


def measure_known(scenario: Scenario, flow_counts: Sequence[int], repeat: int, rounds: int) -> Iterator[Result]:
    most = max(flow_counts)
    with loaded(scenario, 2 * most) as rig:
        rig.open(most)
        for flows in flow_counts:
            rig.settle(flows)
            yield timed(rig, flows, repeat, rounds)


def measure_new(scenario: Scenario, flow_counts: Sequence[int], repeat: int, rounds: int) -> Iterator[Result]:
    for flows in flow_counts:
        with loaded(scenario, flows) as rig:
            rig.overflow()
            yield timed(rig, flows, repeat, rounds)


def timed(rig: Rig, flows: int, repeat: int, rounds: int) -> Result:
    case, before = rig.scenario.case(flows), rig.counts()
    total, floor = rig.compare(repeat, rounds)
    counted, expected = rig.counts() - before, rig.expected(repeat * rounds)
    if counted != expected or rig.refused():
        raise BenchError(f"dataplane: {case}: counted {counted} instead of {expected}; refused {rig.refused()}")
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
    type=click.IntRange(1, MOST_FLOWS),
    multiple=True,
    default=(1, 1 << 16, MOST_FLOWS),
    show_default=True,
    callback=powers_of_two,
    help="How many flows take turns; may be repeated.",
)
@click.option("--repeat", type=click.IntRange(1), default=1 << 20, show_default=True, help="Packets of a timed run.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Timed runs of each case.")
def command(flow_counts: tuple[int, ...], repeat: int, rounds: int) -> Iterator[Result]:
    """What the balancer costs a packet, by mode, packet and number of flows."""
    for scenario in MAIN_SCENARIOS:
        yield from measure(scenario, flow_counts, repeat, rounds)
    for scenario in OTHER_SCENARIOS:
        yield from measure(scenario, [max(flow_counts)], repeat, rounds)
