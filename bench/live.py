"""Real frames over veth, from a generator through a balancer to a sink: ours, kernel routing, nftables and HAProxy.

In comes nothing but how long to measure; out go, for each way through the balancer, the packets a second that arrived
at the sink, the packets that were lost, and the connections a second of real TCP. All of it runs on one CPU, so what is
compared is the whole work that a packet or a connection takes; path=sink is that of generator and sink alone, and
path=forward that of a kernel that only routes. The ways take turns, round by round, and each figure is the median.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median

import click

from bench import report
from bench.connections import Client
from bench.generator import FIRST_CALL, Generator, Sent, lasting
from bench.line import Line
from bench.report import BenchError, Result, percent_lost
from bench.sink import Sink
from netns_tests.bed.topology import wait_until

PACKET_PORT, CONNECTION_PORT = 80, 8080
PACKET_WAYS = ("sink", "xdp-dr", "xdp-nat", "forward", "nftables")
CONNECTION_WAYS = ("forward", "xdp-dr", "xdp-nat", "nftables", "haproxy")
PACKETS = ("ack", "udp")
AT_ONCE = 64  # connections in the making
FLOWS = 1 << 16

# mode nat knows a connection from its SYN, nftables takes one up in the middle, and after a SYN waits for the answer.
OPENING = {"xdp-nat": "syn"}


@dataclass(frozen=True)
class Flood:
    """What was sent, and what of it arrived."""

    sent: Sent
    arrived: int

    @property
    def rate(self) -> float:
        return self.arrived / self.sent.seconds

    @property
    def percent_lost(self) -> float:
        return percent_lost(self.sent.packets, self.arrived)


class PacketRig:
    """A line with a sink at its end: on the balancer's own interface for path=sink, else on the server's."""

    def __init__(self, way: str, packet: str, resources: ExitStack) -> None:
        self.case = f"path={way}" + (f" packet={packet}" if packet != PACKETS[0] else "")
        line = resources.enter_context(Line(way, "udp" if packet == "udp" else "tcp", PACKET_PORT))
        host = line.lb if way == "sink" else line.server
        self._sink = resources.enter_context(Sink(host, "in", PACKET_PORT))
        with line.client.entered():
            self._generator = resources.enter_context(Generator("out"))
        self._line, self._packet = line, packet
        self._opening = OPENING.get(way, packet) if packet == "ack" else packet

    def open(self, flows: int) -> Sent:
        """Two packets of each flow, slowly at first. Returns how the later ones went, for others to go likewise."""
        self._generator.aim(self._line.target, self._opening, flows)
        self._send(min(FIRST_CALL, flows))
        self._send(flows)
        self._generator.aim(self._line.target, self._packet, flows)
        return self._send(flows).sent

    def flood(self, packets: int) -> Flood:
        return self._send(packets)

    def _send(self, packets: int) -> Flood:
        before = self._sink.packets()
        with self._line.client.entered():
            sent = self._generator.send(packets)
        return Flood(sent, self._settled() - before)

    def _settled(self) -> int:
        """What the sink has counted once nothing more comes."""
        counts = [-1, self._sink.packets()]

        def is_settled() -> bool:
            counts.append(self._sink.packets())
            return counts[-1] == counts[-2] == counts[-3]

        wait_until(is_settled, "the sink's count to stand still")
        return counts[-1]


class ConnectionRig:
    """A line with a server at its end."""

    def __init__(self, way: str, resources: ExitStack) -> None:
        self.case = f"path={way} metric=cps"
        self._line = resources.enter_context(Line(way, "tcp", CONNECTION_PORT))
        self._line.serve()

    def connections(self, seconds: float) -> float:
        """Connections a second. Raises BenchError if one failed."""
        client = Client((self._line.target.address, CONNECTION_PORT), AT_ONCE)
        with self._line.client.entered():
            client.run(seconds)
        if client.failed or not client.done:
            raise BenchError(f"live: {self.case}: {client.failed} connections failed beside {client.done}")
        return client.done / seconds


@contextmanager
def on_one_cpu() -> Iterator[None]:
    """This thread, and whatever it starts."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def measure_packets(ways: Sequence[str], packet: str, flows: int, seconds: float, rounds: int) -> Iterator[Result]:
    """Packets a second and the loss of each way. Raises BenchError, XdpError."""
    with on_one_cpu(), ExitStack() as resources:
        rigs = [PacketRig(way, packet, resources) for way in ways]
        amounts = [lasting(seconds, rig.open(flows)) for rig in rigs]
        turns = [[rig.flood(amount) for rig, amount in zip(rigs, amounts, strict=True)] for _ in range(rounds)]
    for rig, floods in zip(rigs, zip(*turns, strict=True), strict=True):
        yield Result("live", rig.case, median(flood.rate for flood in floods), "packets/s")
        yield Result("live", f"{rig.case} metric=loss", median(flood.percent_lost for flood in floods), "%")


def measure_connections(ways: Sequence[str], seconds: float, rounds: int) -> Iterator[Result]:
    """Connections a second of each way. Raises BenchError."""
    with on_one_cpu(), ExitStack() as resources:
        rigs = [ConnectionRig(way, resources) for way in ways]
        turns = [[rig.connections(seconds) for rig in rigs] for _ in range(rounds)]
    for rig, rates in zip(rigs, zip(*turns, strict=True), strict=True):
        yield Result("live", rig.case, median(rates), "connections/s")


@report.command
@click.option("--path", "paths", multiple=True, type=click.Choice([*PACKET_WAYS, "haproxy"]), help="Only these.")
@click.option("--seconds", type=click.FloatRange(0, 60, min_open=True), default=1.0, show_default=True, help="A turn.")
@click.option("--rounds", type=click.IntRange(1, 100), default=3, show_default=True, help="Turns of each path.")
@click.option("--flows", type=click.IntRange(1, FLOWS), default=FLOWS, show_default=True, callback=report.power_of_two)
def command(paths: tuple[str, ...], seconds: float, rounds: int, flows: int) -> Iterator[Result]:
    """Packets and connections a second over veth, ours beside routing, nftables and HAProxy."""
    wanted: Callable[[str], bool] = (lambda way: way in paths) if paths else (lambda way: True)
    for packet in PACKETS:
        yield from measure_packets([*filter(wanted, PACKET_WAYS)], packet, flows, seconds, rounds)
    yield from measure_connections([*filter(wanted, CONNECTION_WAYS)], seconds, rounds)
