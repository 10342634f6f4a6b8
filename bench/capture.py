"""xdp-dump beside tcpdump: what a captured packet costs, how many are lost, how soon the first one is there.

In comes nothing but how long to measure; out go, of frames of 64 bytes on veth,

    match=all by=WAY               CPU time of a packet that is captured to a file in memory; the floor is the same
                                   traffic without a capture
    match=none expr=E by=WAY       time of a packet that a capture does not want, in BPF_PROG_TEST_RUN, beside a filter
                                   written by hand (bench/filter.bpf.c); the floor is a program that looks at nothing
    rate=N by=WAY [metric=loss]    packets a second that were sent, at most N, and what of them is not in the file
    path=first-packet by=WAY       from the start of the command to the first packet that it writes

Behind the capture all packets are dropped, at tc. CPU time is that of generator, kernel and capture together, which all
run on one CPU for it; each figure is the median of its turns.
"""

from __future__ import annotations

import math
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median

import click

from bench import report
from bench.filter import EXPRESSIONS, Expression, compare, written_by_hand
from bench.generator import FRAME_SIZES, Generator, Sent, transmitted
from bench.line import Line, installed
from bench.live import FLOWS, on_one_cpu
from bench.report import BenchError, Result, percent_lost
from bench.traffic import CLIENTS
from filters.capture.record import Capture
from filters.capture.ring import Rings
from filters.compiler.expr import compile_expression
from filters.compiler.hook import TC_IN, XDP_FRAGS
from filters.compiler.translate import translate
from filters.programs.program import Drop, Rule, assemble, load
from filters.records.pcap import file_header
from netns_tests.bed.topology import Host, wait_until
from xdp.link import hold_at_tc

PORT = 80
MEMORY = Path("/dev/shm")  # a tmpfs, says systemd's file-hierarchy(7)
FILE_HEADER, RECORD = len(file_header(1, 0, nano=False)), 16 + FRAME_SIZES[4]
UNWRITTEN = 1 << 16  # bytes that tcpdump may hold back
BUFFER_KIB = 1 << 14  # for each CPU
FLOOD = 1 << 18  # packets of a turn
XDP_DUMP = Path(sys.executable).with_name("xdp-dump")
PROGRAMS: dict[str, Callable[[], list[str]]] = {
    "xdp-dump": lambda: [str(XDP_DUMP)],
    "tcpdump": lambda: [installed("tcpdump", "tcpdump"), "-Z", "root"],  # it may write where root does
}
WAYS = (*PROGRAMS,)
NOTHING = "nothing"  # the way of the floor
FIRST_PACKET_WITHIN_S = 10
PART_S = 1.0  # the first and the last moments of a call of the generator take some 30 ms in which nothing is sent


@dataclass(frozen=True, slots=True)
class Account:
    """Packets, as both commands count them at their end."""

    captured: int
    received: int
    dropped: int

    def lost(self, sent: int) -> int:
        """Of so many that were sent. What tcpdump has not fetched when it ends is captured nor dropped."""
        return max(0, sent - self.received) + self.dropped


class Dumping:
    """A command that captures at work in a host, from its first line on standard error to the end of the `with`."""

    def __init__(self, way: str, host: Host, *words: str) -> None:
        command = [*PROGRAMS[way](), "-i", "in", "-nn", *words]
        self._way = way
        self._process = host.popen(command, stderr=subprocess.PIPE)
        self._listening()

    def _listening(self) -> None:
        assert self._process.stderr
        said = ""
        for line in self._process.stderr:
            said += line
            if "listening on" in line:
                return
        raise BenchError(f"capture: {self._way}: {said.strip()}")

    def cpu_ns(self) -> int:
        """CPU time so far. /proc/PID/schedstat: time on the CPU in nanoseconds, and more."""
        return int(Path(f"/proc/{self._process.pid}/schedstat").read_text().split()[0])

    def flush(self) -> None:
        """tcpdump holds back what does not fill a page."""
        self._process.send_signal(signal.SIGUSR2)

    def ended(self) -> Account:
        """Ends it; what it says then. Raises BenchError where it ends otherwise."""
        self._process.send_signal(signal.SIGINT)
        _, said = self._process.communicate()
        counts = re.findall(r"^(\d+) packets? (?:captured|received by filter|dropped by kernel)$", said, re.MULTILINE)
        if self._process.returncode or len(counts) != len(fields(Account)):
            raise BenchError(f"capture: {self._way}: status {self._process.returncode}: {said.strip()}")
        return Account(*map(int, counts))


class CaptureRig:
    """A generator, and a host that drops what it sends, after a capture by one of WAYS has seen it, or by NOTHING."""

    def __init__(self, way: str, directory: Path, resources: ExitStack) -> None:
        self.way = way
        self._line = resources.enter_context(Line("sink", "udp", PORT))
        resources.enter_context(dropping(self._line.lb))
        with self._line.client.entered():
            self._generator = resources.enter_context(Generator("out"))
        self._generator.aim(self._line.target, "udp", FLOWS)
        self._file = directory / f"{way}.pcap"
        self._sent = 0

    def start(self, *words: str) -> None:
        self._sent = 0
        self._dumping = Dumping(self.way, self._line.lb, "-w", str(self._file), *words)

    def cost_ns(self, packets: int) -> float:
        """CPU time of a packet, until all are in the file."""
        before = self._cpu_ns()
        self._sent += self._send(packets)
        if self.way != NOTHING:
            wait_until(self._is_written, f"{self._sent} packets in the file of {self.way}")
        return (self._cpu_ns() - before) / packets

    def _cpu_ns(self) -> int:
        return time.thread_time_ns() + (self._dumping.cpu_ns() if self.way != NOTHING else 0)

    def _is_written(self) -> bool:
        return self._size_missing() <= UNWRITTEN

    def _is_written_whole(self) -> bool:
        self._dumping.flush()
        return self._size_missing() <= 0

    def _size_missing(self) -> int:
        return FILE_HEADER + self._sent * RECORD - self._file.stat().st_size

    def _send(self, packets: int) -> int:
        with self._line.client.entered():
            return self._generator.send(packets).packets

    def _send_at(self, rate: float, seconds: float) -> Sent:
        """In parts of a second, each as fast as it goes. Counted is what the interface took.

        Only from one CPU does it take all: what is received on another than it is sent from must pass a queue of 256
        packets between the two, in front of every capture.
        """
        start, sent, before = time.monotonic(), 0, self._transmitted()
        while sent < rate * seconds:
            time.sleep(max(0.0, sent / rate - (time.monotonic() - start)))
            sent += self._send(math.ceil(rate * min(seconds, PART_S)))
        time.sleep(max(0.0, sent / rate - (time.monotonic() - start)))
        return Sent(self._transmitted() - before, time.monotonic() - start)

    def _transmitted(self) -> int:
        with self._line.client.entered():
            return transmitted("out")

    def check(self) -> None:
        """Raises BenchError if a packet is missing."""
        wait_until(self._is_written_whole, f"all {self._sent} packets in the file of {self.way}")
        if lost := self._dumping.ended().lost(self._sent):
            raise BenchError(f"capture: {self.way}: {self._sent} packets sent, {lost} lost")

    def losing(self, seconds: float, rate: float) -> tuple[Sent, int]:
        """What came in at that rate, and how many of it were lost. Leaves no file."""
        self.start()
        with on_one_cpu():
            sent = self._send_at(rate, seconds)
        lost = self._dumping.ended().lost(sent.packets)
        self._file.unlink()
        return sent, lost

    def first_packet_s(self) -> float:
        """From the command to its first record, while packets come in all the time."""
        start = time.monotonic()
        words = ["-i", "in", "-nn", "-U", "--immediate-mode", "-w", "-"]
        reader, writer = os.pipe()
        try:
            with self._line.lb.popen(
                [*PROGRAMS[self.way](), *words], stdout=writer, stderr=subprocess.DEVNULL
            ) as command:
                try:
                    self._send_until(reader, FILE_HEADER + RECORD, start + FIRST_PACKET_WITHIN_S)
                    return time.monotonic() - start
                finally:
                    command.kill()  # before the next one comes: an interface has room for one
        finally:
            os.close(writer)
            os.close(reader)

    def _send_until(self, output: int, size: int, deadline: float) -> None:
        """A packet each millisecond, until that many bytes have been written."""
        frame = self._line.target.frame("udp", CLIENTS[4], FRAME_SIZES[4])
        with self._line.client.entered():
            sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        with sender:
            sender.bind(("out", 0))
            while size > 0:
                if time.monotonic() > deadline:
                    raise BenchError(f"capture: {self.way}: no packet within {FIRST_PACKET_WITHIN_S} s")
                sender.send(frame)
                if select.select([output], [], [], 0.001)[0]:
                    size -= len(os.read(output, size))


@contextmanager
def dropping(host: Host) -> Iterator[None]:
    """All packets that come in, behind whatever captures them."""
    with load("bench_drop", TC_IN, assemble(TC_IN, [], Drop())) as program:
        with host.entered():
            held = hold_at_tc(socket.if_nametoindex("in"), program.fd, egress=False)
        with held:
            yield


@contextmanager
def memory(needed: int) -> Iterator[Path]:
    """A directory in memory with room for so many bytes. Raises BenchError."""
    if not MEMORY.is_dir() or shutil.disk_usage(MEMORY).free < needed:
        raise BenchError(f"capture: {MEMORY}: needs {needed >> 20} MiB there, to capture to")
    with tempfile.TemporaryDirectory(dir=MEMORY, prefix="bench-capture-") as directory:
        yield Path(directory)


def measure_costs(ways: Sequence[str], packets: int, rounds: int) -> Iterator[Result]:
    """What capturing all costs. Raises BenchError, XdpError."""
    with on_one_cpu(), memory(len(ways) * (rounds + 1) * packets * RECORD) as directory, ExitStack() as resources:
        floor, *rigs = (CaptureRig(way, directory, resources) for way in (NOTHING, *ways))
        for rig in rigs:
            rig.start("-B", str(BUFFER_KIB))
        turns = [[rig.cost_ns(packets) for rig in (floor, *rigs)] for _ in range(1 + rounds)][1:]
        for rig in rigs:
            rig.check()
    least, *costs = (median(times) for times in zip(*turns, strict=True))
    for rig, cost in zip(rigs, costs, strict=True):
        yield Result("capture", f"match=all by={rig.way}", cost, "ns/packet", least)


def measure_losses(ways: Sequence[str], rate: int, seconds: float, rounds: int) -> Iterator[Result]:
    """Of all turns together: a single lost packet shall be seen. Raises BenchError, XdpError."""
    with memory(int(2 * (seconds + PART_S) * rate * RECORD)) as directory, ExitStack() as resources:
        rigs = [CaptureRig(way, directory, resources) for way in ways]
        turns = [[rig.losing(seconds, rate) for rig in rigs] for _ in range(rounds)]
    for rig, results in zip(rigs, zip(*turns, strict=True), strict=True):
        case = f"rate={rate} by={rig.way}"
        sent, lost = sum(sent.packets for sent, _ in results), sum(lost for _, lost in results)
        yield Result("capture", case, median(sent.rate for sent, _ in results), "packets/s")
        yield Result("capture", f"{case} metric=loss", percent_lost(sent, sent - lost), "%")


def measure_first_packets(ways: Sequence[str], rounds: int) -> Iterator[Result]:
    """Raises BenchError, XdpError."""
    with memory(0) as directory, ExitStack() as resources:
        rigs = [CaptureRig(way, directory, resources) for way in ways]
        turns = [[rig.first_packet_s() for rig in rigs] for _ in range(rounds)]
    for rig, times in zip(rigs, zip(*turns, strict=True), strict=True):
        yield Result("capture", f"path=first-packet by={rig.way}", median(times), "s")


def measure_misses(repeat: int, rounds: int) -> Iterator[Result]:
    """Packets that a capture does not want. Raises BenchError, XdpError."""
    with Rings(1 << 20) as rings, written_by_hand() as by_hand:
        floor = by_hand.program("bare_pass")
        for expression in EXPRESSIONS:
            rule = Rule(translate(compile_expression(expression.text), XDP_FRAGS), [Capture(rings)])
            with load("bench_capture", XDP_FRAGS, assemble(XDP_FRAGS, [rule])) as capturing:
                programs = (capturing, by_hand.program(expression.by_hand), floor)
                *times, least = compare(programs, expression.other, repeat, rounds)
            check_counts(expression, rings)
            for way, value in zip(("xdp-dump", "hand-written"), times, strict=True):
                yield Result("capture", f"match=none expr={expression.name} by={way}", value, "ns/packet", least)


def check_counts(expression: Expression, rings: Rings) -> None:
    if rings.counts().matched:
        raise BenchError(f"capture: {expression.text}: {rings.counts().matched} packets captured instead of none")


@report.command
@click.option("--rounds", type=click.IntRange(1, 100), default=31, show_default=True, help="Turns of each way.")
@click.option("--packets", type=click.IntRange(1), default=FLOOD, show_default=True, help="Captured in a turn.")
@click.option("--repeat", type=click.IntRange(1), default=500_000, show_default=True, help="Packets of a test run.")
@click.option("--rate", type=click.IntRange(1), default=2_000_000, show_default=True, help="Packets a second.")
@click.option("--seconds", type=click.FloatRange(0, 60, min_open=True), default=2, show_default=True, help="At --rate.")
def command(rounds: int, packets: int, repeat: int, rate: int, seconds: float) -> Iterator[Result]:
    """Capture by xdp-dump beside tcpdump: cost, loss, and the time to the first packet."""
    yield from measure_costs(WAYS, packets, rounds)
    yield from measure_misses(repeat, rounds)
    yield from measure_losses(WAYS, rate, seconds, max(1, rounds // 3))
    yield from measure_first_packets(WAYS, max(1, rounds // 2))
