"""Filters made from tcpdump expressions: how fast they drop, and what their code costs.

In comes nothing but how long to measure; out go, for each way to drop `udp port 53`, the packets a second that are
dropped on veth, generator and all on one CPU; and, for some expressions, the time of the filter alone on a packet that
it accepts and on one that it does not, in BPF_PROG_TEST_RUN, beside the same filter written by hand in C
(bench/filter.bpf.c). All of them take turns, and each figure is the median of its turns.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import click
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from bench import report
from bench.generator import FRAME_SIZES, Generator, Sent, lasting
from bench.line import Line, installed
from bench.live import FLOWS, on_one_cpu
from bench.report import BenchError, Result
from bench.scenarios import ADDRESSES, BALANCER_MAC, CLIENT_MAC
from filters.compiler.expr import compile_expression
from filters.compiler.hook import TC_IN, XDP, Hook
from filters.compiler.translate import translate
from filters.programs.program import Drop, LoadedProgram, Rule, assemble, load
from xdp.link import hold_at_tc, hold_at_xdp
from xdp.object import BpfObject, Program

OBJECT = Path(__file__).with_name("filter.bpf.o")
PORT = 53
XDP_DROP, XDP_PASS = 1, 2

_CLIENT, _SERVER, _OTHER = "10.0.0.1", "198.19.0.1", "172.16.0.1"


def _frame(packet: Packet) -> bytes:
    return bytes(Ether(src=CLIENT_MAC, dst=BALANCER_MAC) / packet).ljust(FRAME_SIZES[4], b"\0")


_DNS = _frame(IP(src=_CLIENT, dst=_SERVER) / UDP(sport=1024, dport=PORT))
_ACK = _frame(IP(src=_CLIENT, dst=_SERVER) / TCP(sport=1024, dport=80, flags="A"))
_SYN = _frame(IP(src=_CLIENT, dst=_SERVER) / TCP(sport=1024, dport=80, flags="S"))
_GET = _frame(IP(src=_CLIENT, dst=_SERVER) / TCP(sport=1024, dport=80, flags="PA") / b"GET / HTTP/1.0\r\n\r\n")
_ELSEWHERE = _frame(IP(src=_OTHER, dst=_OTHER) / TCP(sport=1024, dport=80, flags="A"))
_HTTPS6 = _frame(IPv6(src=ADDRESSES[6].balancer, dst=ADDRESSES[6].vip) / TCP(sport=1024, dport=443, flags="A"))


@dataclass(frozen=True, slots=True)
class Expression:
    """`name`: what it is called in a case; in bench/filter.bpf.c with underscores. Of two frames it accepts one."""

    name: str
    text: str
    accepted: bytes
    other: bytes

    @property
    def by_hand(self) -> str:
        return self.name.replace("-", "_")

    def dropped(self, hook: Hook) -> LoadedProgram:
        """The program that drops what the expression accepts. Raises FilterError, XdpError."""
        rule = Rule(translate(compile_expression(self.text), hook), [Drop()])
        return load("bench_filter", hook, assemble(hook, [rule]))


UDP_53 = Expression("udp-53", "udp port 53", _DNS, _ACK)
EXPRESSIONS = (
    UDP_53,
    Expression("tcp-syn", "tcp[tcpflags] & tcp-syn != 0", _SYN, _ACK),
    Expression("ip6-tcp-443", "ip6 and tcp dst port 443", _HTTPS6, _ACK),
    Expression("source-net", "ip src net 10.0.0.0/8", _ACK, _ELSEWHERE),
    Expression("host", f"host {_SERVER}", _ACK, _ELSEWHERE),
    Expression(
        "http-payload",
        "tcp port 80 and (((ip[2:2] - ((ip[0]&0xf)<<2)) - ((tcp[12]&0xf0)>>2)) != 0)",
        _GET,
        _ACK,
    ),
)


# On veth

Held = AbstractContextManager[object]


class DropRig:
    """A generator, and an interface on which what it sends is dropped in one of WAYS."""

    def __init__(self, way: str, resources: ExitStack) -> None:
        self.case = f"expr={UDP_53.name} by={way}"
        self._line = resources.enter_context(Line("sink", "udp", PORT))
        with self._line.client.entered():
            self._generator = resources.enter_context(Generator("out"))
        self._generator.aim(self._line.target, "udp", FLOWS)
        with self._line.lb.entered():
            WAYS[way](self._line, socket.if_nametoindex("in"), resources)

    def flood(self, packets: int) -> Sent:
        """Raises BenchError if not all of them were dropped."""
        arrived, passed = self._arrived(), self._passed()
        with self._line.client.entered():
            sent = self._generator.send(packets)
        arrived, passed = self._arrived() - arrived, self._passed() - passed
        if arrived < packets or passed:
            raise BenchError(f"filter: {self.case}: {packets} packets sent, {arrived} arrived, {passed} not dropped")
        return sent

    def _arrived(self) -> int:
        with self._line.lb.netlink() as ip:
            return int(ip.link("get", ifname="in")[0].get_attr("IFLA_STATS64")["rx_packets"])

    def _passed(self) -> int:
        """What IPv4 was given to look at."""
        names, values = (line.split() for line in self._line.lb.run(["cat", "/proc/net/snmp"]).stdout.splitlines()[:2])
        return int(dict(zip(names, values, strict=True))["InReceives"])


def _by_expression(_: Line, ifindex: int, resources: ExitStack) -> None:
    program = resources.enter_context(UDP_53.dropped(XDP))
    resources.enter_context(hold_at_xdp(ifindex, program.fd))


def _by_expression_at_tc(_: Line, ifindex: int, resources: ExitStack) -> None:
    program = resources.enter_context(UDP_53.dropped(TC_IN))
    resources.enter_context(hold_at_tc(ifindex, program.fd, egress=False))


def _by_program(name: str) -> Callable[[Line, int, ExitStack], None]:
    def hold(_: Line, ifindex: int, resources: ExitStack) -> None:
        program = resources.enter_context(written_by_hand()).program(name)
        resources.enter_context(hold_at_xdp(ifindex, program.fd))

    return hold


def _by_nftables(line: Line, _: int, __: ExitStack) -> None:
    rules = f"""
        table netdev bench {{
            chain drops {{
                type filter hook ingress device in priority 0
                udp dport {PORT} drop
                udp sport {PORT} drop
            }}
        }}
    """
    line.lb.run([installed("nft", "nftables"), "-f", "-"], input=rules)


def _by_u32(line: Line, _: int, __: ExitStack) -> None:
    line.lb.run(["tc", "qdisc", "add", "dev", "in", "clsact"])
    action = _drop_action(line)
    for port in ("dport", "sport"):
        words = f"match ip protocol 17 0xff match ip {port} {PORT} 0xffff action {action}"
        line.lb.run(f"tc filter add dev in ingress protocol ip u32 {words}".split())


def _drop_action(line: Line) -> str:
    """A redirection to an interface that is down drops as well, where the kernel lacks the action for it (act_gact)."""
    probe = "tc actions add action drop index 1"
    if line.lb.run(probe.split(), check=False).returncode == 0:
        return "drop"
    line.lb.run(["ip", "link", "add", "hole", "type", "veth"])
    return "mirred egress redirect dev hole"


WAYS: dict[str, Callable[[Line, int, ExitStack], None]] = {
    "bare-xdp": _by_program("bare_drop"),
    "xdp": _by_expression,
    "hand-written": _by_program(UDP_53.by_hand),
    "tc-bpf": _by_expression_at_tc,
    "tc-u32": _by_u32,
    "nftables": _by_nftables,
}


def written_by_hand() -> BpfObject:
    """The loaded programs of bench/filter.bpf.c. Raises XdpError."""
    obj = BpfObject.open(OBJECT)
    obj.load()
    return obj


def measure_drops(ways: Sequence[str], seconds: float, rounds: int) -> Iterator[Result]:
    """Packets a second by each way. Raises BenchError, XdpError."""
    with on_one_cpu(), ExitStack() as resources:
        rigs = [DropRig(way, resources) for way in ways]
        amounts = [lasting(seconds, rig.flood(FLOWS)) for rig in rigs]
        turns = [[rig.flood(amount).rate for rig, amount in zip(rigs, amounts, strict=True)] for _ in range(rounds)]
    for rig, rates in zip(rigs, zip(*turns, strict=True), strict=True):
        yield Result("filter", rig.case, median(rates), "packets/s")


# In test runs


def time_of(program: Program, frame: bytes, packets: int) -> float:
    """Of this thread on one packet, in ns: the kernel's own figure is a whole number."""
    start = time.thread_time_ns()
    program.test_run(frame, repeat=packets)
    return (time.thread_time_ns() - start) / packets


def compare(programs: Sequence[Program], frame: bytes, repeat: int, rounds: int) -> list[float]:
    """Of each the median time of a packet in ns, by turns."""
    turns = [[time_of(program, frame, repeat) for program in programs] for _ in range(rounds)]
    return [median(times) for times in zip(*turns, strict=True)]


def measure_code(repeat: int, rounds: int) -> Iterator[Result]:
    """Each expression translated and by hand; the floor is a program that looks at nothing. Raises BenchError."""
    with written_by_hand() as by_hand:
        floor = by_hand.program("bare_pass")
        for expression in EXPRESSIONS:
            with expression.dropped(XDP) as translated:
                filters = (translated, by_hand.program(expression.by_hand))
                for packet, frame in (("accepted", expression.accepted), ("other", expression.other)):
                    check_verdicts(expression, packet, filters, frame)
                    *times, least = compare((*filters, floor), frame, repeat, rounds)
                    for way, value in zip(("xdp", "hand-written"), times, strict=True):
                        yield Result(
                            "filter", f"expr={expression.name} packet={packet} by={way}", value, "ns/packet", least
                        )


def check_verdicts(expression: Expression, packet: str, programs: Sequence[Program], frame: bytes) -> None:
    wanted = XDP_DROP if packet == "accepted" else XDP_PASS
    for program in programs:
        verdict = program.test_run(frame).verdict
        if verdict != wanted:
            raise BenchError(f"filter: {expression.text}: {program.name}: verdict {verdict} instead of {wanted}")


@report.command
@click.option("--seconds", type=click.FloatRange(0, 60, min_open=True), default=0.3, show_default=True, help="A turn.")
@click.option("--rounds", type=click.IntRange(1, 100), default=11, show_default=True, help="Turns of each way.")
@click.option("--repeat", type=click.IntRange(1), default=500_000, show_default=True, help="Packets of a test run.")
def command(seconds: float, rounds: int, repeat: int) -> Iterator[Result]:
    """Drop by expression beside XDP, nftables and tc; the filters' code beside C."""
    yield from measure_drops([*WAYS], seconds, rounds)
    yield from measure_code(repeat, rounds)
