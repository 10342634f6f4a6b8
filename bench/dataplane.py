"""What the balancer costs a packet, in nanoseconds, without network or driver.

In come a mode, a kind of packet and a number of flows; out go the median times of one packet, with and without the
balancer. bench/dataplane.bpf.c makes the packets and calls the balancer within BPF_PROG_TEST_RUN; here its tables are
filled, its runs are timed, and it is made sure that every timed packet was forwarded, and the way it was meant to be.

Flows are visited in an order that neither the caches nor the tables can foresee, all of them once before any is
visited again. The clock is the real one; the refresh of a flow's entry, due once a second, is put off, and measured by
itself as refresh=1. A SYN is always a new flow's; where it is recorded, in mode nat or in a slot in transition, the
tables, of `flows` entries, are then full, and it takes the place of an old one.

With transition=P that percentage of the slots waits for older flows, and all flows of these slots are recorded. Mode
nat, which records every flow in any case, looks at a slot only for a new one, and costs the same.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from statistics import median

import click

from bench import plot, report
from bench.report import BenchError, Result
from bench.traffic import CLIENTS, IN_ORDER, SHUFFLED, Target, aim, words
from lb.maglev import table
from lb.model import DEFAULT_RING_SIZE
from lb.ring import pack
from xdp.object import BpfObject, TestRun

OBJECT = Path(__file__).with_name("dataplane.bpf.o")

BACKENDS = 100
SERVICE_PORT = 80
LOOPBACK = 1  # the ifindex that a test run comes in on; to leave by it is XDP_TX
CLIENT_MAC, BALANCER_MAC, BACKEND_MAC = "02:00:00:00:00:01", "02:00:00:00:00:02", "02:00:00:00:00:11"
FRAME_SIZES = {4: 54, 6: 74}  # of a TCP packet without payload; UDP is padded to it

NEVER_NS = 1 << 62
LONG_S = 3600
EVERY_SYN = 2**32 - 1
SPARE_ENTRIES = 4096  # of an LRU map, whose per-CPU free lists hold some back

UNENDING = 1 << 32  # flows: no table holds so many
FLOWS_OVER_BACKENDS = 1 << 14  # nat has ports for no more than 31,744 towards a single backend
PLOTTED_FLOWS = (1, 1 << 8, 1 << 12, 1 << 14, 1 << 16, 1 << 18)
PLOTTED_BACKENDS = (1, 10, 100, 1000)
MOST_FLOWS = 1 << 20  # twice that is two thirds of the ports that nat has towards so many backends


@dataclass(frozen=True)
class Addresses:
    """RFC 2544 and RFC 5180; `backends` is the first of as many as needed."""

    vip: str
    balancer: str
    backends: str


ADDRESSES = {
    4: Addresses("198.19.0.1", "198.19.0.2", "198.18.0.1"),
    6: Addresses("2001:2:0:1::1", "2001:2:0:1::2", "2001:2:0:2::1"),
}


@dataclass(frozen=True)
class Scenario:
    """One kind of traffic: `mode` nat or dr, `family` 4 or 6, `packet` ack, syn or udp, `direction` request or reply.

    refresh: each packet finds the entry of its flow due for a refresh.
    transition: percent of the slots.
    """

    mode: str
    family: int
    packet: str
    direction: str = "request"
    refresh: bool = False
    transition: int = 0
    backends: int = BACKENDS

    def case(self, flows: int) -> str:
        always = (
            f"mode={self.mode} family={self.family} packet={self.packet} flows={flows} transition={self.transition}"
        )
        backends = f" backends={self.backends}" if self.backends != BACKENDS else ""
        reply = " direction=reply" if self.direction == "reply" else ""
        return always + backends + reply + (" refresh=1" if self.refresh else "")

    @property
    def addresses(self) -> Addresses:
        return ADDRESSES[self.family]

    @property
    def protocol(self) -> int:
        return socket.IPPROTO_UDP if self.packet == "udp" else socket.IPPROTO_TCP

    @property
    def recorded_in(self) -> str | None:
        """The table that a new flow enters."""
        if self.mode == "nat":
            return f"nat_flows{self.family}"
        return f"flows{self.family}" if self.transition else None

    def frame(self, packet: str) -> bytes:
        """The first client's packet to the VIP, without payload."""
        target = Target(self.addresses.vip, SERVICE_PORT, CLIENT_MAC, BALANCER_MAC)
        return target.frame(packet, CLIENTS[self.family], FRAME_SIZES[self.family])


# The first are measured with each number of flows, the others with the largest.
MAIN_SCENARIOS = (
    Scenario("nat", 4, "ack"),
    Scenario("dr", 4, "ack"),
)
OTHER_SCENARIOS = (
    Scenario("dr", 4, "ack", transition=1),
    Scenario("dr", 4, "ack", transition=5),
    Scenario("dr", 4, "ack", transition=100),
    Scenario("nat", 6, "ack"),
    Scenario("nat", 4, "udp"),
    Scenario("nat", 4, "syn"),
    Scenario("nat", 4, "ack", direction="reply"),
    Scenario("nat", 4, "ack", refresh=True),
    Scenario("dr", 6, "ack"),
    Scenario("dr", 4, "udp"),
    Scenario("dr", 4, "syn"),
    Scenario("dr", 6, "ack", transition=100),
    Scenario("dr", 4, "udp", transition=100),
    Scenario("dr", 4, "syn", transition=100),
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

    def aim(self, packet: str, flows: int, order: tuple[int, int]) -> None:
        """From now on packets of this kind, each from the next of `flows` clients, a power of two."""
        self._frame = self.scenario.frame(packet)
        aim(self._traffic, self._frame, flows, order)

    def run(self, program: str, packets: int) -> TestRun:
        """The last of the packets as it left, and the mean time of one."""
        return self.obj.program(program).test_run(self._frame, repeat=packets)

    def open(self, flows: int) -> None:
        """The first packet of each flow, in another order than they are measured in: that of memory."""
        self.aim(self._kind("syn"), flows, IN_ORDER)
        self.run("request", flows)

    def settle(self, flows: int) -> None:
        """One more packet of each flow, in the order of the measurement; replies will come in this order too."""
        self.aim(self._kind("ack"), flows, SHUFFLED)
        self.run("request_kept", flows)

    def change(self) -> None:
        """Put the slots in transition that the scenario wants there."""
        fill_ring(self.obj, self.scenario)

    def overflow(self) -> None:
        """New flows until every further one takes the place of an old one. More new flows are to come."""
        self.aim("syn", UNENDING, SHUFFLED)
        if table := self.scenario.recorded_in:
            self.run("request", len(self.obj.map(table)))

    def _kind(self, packet: str) -> str:
        return "udp" if self.scenario.packet == "udp" else packet

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
        obj.load()
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
    flags = obj.types.enum("member_flag")
    members = obj.map("members").view()
    first = ip_address(scenario.addresses.backends)
    for number in range(1, 1 + scenario.backends):
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
        member_count=1 + scenario.backends,
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
        rig.change()
        for flows in flow_counts:
            rig.settle(flows)
            yield timed(rig, flows, repeat, rounds)


def measure_new(scenario: Scenario, flow_counts: Sequence[int], repeat: int, rounds: int) -> Iterator[Result]:
    for flows in flow_counts:
        with loaded(scenario, flows) as rig:
            rig.change()
            rig.overflow()
            yield timed(rig, flows, repeat, rounds)


def timed(rig: Rig, flows: int, repeat: int, rounds: int) -> Result:
    case, before = rig.scenario.case(flows), rig.counts()
    total, floor = rig.compare(repeat, rounds)
    counted, expected = rig.counts() - before, rig.expected(repeat * rounds)
    if counted != expected or rig.refused():
        raise BenchError(f"dataplane: {case}: counted {counted} instead of {expected}; refused {rig.refused()}")
    return Result("dataplane", case, total, "ns/packet", floor)


def powers_of_two(context: click.Context, parameter: click.Parameter, values: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(report.power_of_two(context, parameter, value) for value in values)


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
@click.option(
    "--plot",
    "picture",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE.svg",
    help="Draw the cost against flows and against backends, of which it measures more then.",
)
def command(flow_counts: tuple[int, ...], repeat: int, rounds: int, picture: Path | None) -> Iterator[Result]:
    """What the balancer costs a packet, by mode, packet and number of flows."""
    if not picture:
        yield from measure_all(flow_counts, repeat, rounds)
        return
    plot.require()
    most = max(flow_counts)
    flow_counts = tuple(sorted({*flow_counts, *(flows for flows in PLOTTED_FLOWS if flows < most)}))
    across = min(most, FLOWS_OVER_BACKENDS)
    over_flows: list[Result] = []
    over_backends: list[Result] = []
    for result in measure_all(flow_counts, repeat, rounds):
        over_flows.append(result)
        yield result
    for result in measure_backends(across, repeat, rounds):
        over_backends.append(result)
        yield result
    plot.draw(over_flows, over_backends, picture)


def measure_all(flow_counts: Sequence[int], repeat: int, rounds: int) -> Iterator[Result]:
    for scenario in MAIN_SCENARIOS:
        yield from measure(scenario, flow_counts, repeat, rounds)
    for scenario in OTHER_SCENARIOS:
        yield from measure(scenario, [max(flow_counts)], repeat, rounds)


def measure_backends(flows: int, repeat: int, rounds: int) -> Iterator[Result]:
    for scenario in MAIN_SCENARIOS:
        for backends in PLOTTED_BACKENDS:
            for result in measure(replace(scenario, backends=backends), [flows], repeat, rounds):
                yield replace(result, case=f"{scenario.case(flows)} backends={backends}")
