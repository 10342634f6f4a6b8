"""What the end of a tunnel costs a packet: the decapsulating program, as a part of bench dataplane.

In come a tunnel, the families of its inner and outer packets, and a number of flows; out go the times of one packet,
with and without the program. bench/decap.bpf.c puts each packet into the tunnel; here its tables are filled, and it is
made sure that every packet was taken out.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from bench.report import Result
from bench.scenarios import ADDRESSES, BACKEND_MAC, BALANCER_MAC, CLIENT_MAC, FRAME_SIZES, SERVICE_PORT
from bench.timing import timed
from bench.traffic import CLIENTS, ETHERNET_HEADER_SIZE, SHUFFLED, Target, aim
from lb.decap.kernel import load
from lb.decap.values import DecapConfig
from xdp.object import BpfObject, TestRun

OBJECT = Path(__file__).with_name("decap.bpf.o")

PROTOCOLS = {4: socket.IPPROTO_IPIP, 6: socket.IPPROTO_IPV6}  # of inner packets
GUE_PORT, SOURCE_PORT = 6080, 0xC000
PROGRAM = "encapsulated"


@dataclass(frozen=True)
class DecapScenario:
    """Packets in a `tunnel`, ipip or gue. `family` is the inner one, `outer` the other, None if it is the same.

    destinations: so many inner addresses are configured, the last of which is the packets'.
    checks_source: the outer source is looked for among those allowed.
    """

    tunnel: str
    family: int
    outer: int | None = None
    destinations: int = 1
    checks_source: bool = False

    def case(self, flows: int) -> str:
        always = f"mode=decap tunnel={self.tunnel} family={self.family} packet=ack flows={flows} transition=0"
        outer = f" outer={self.outer}" if self.outer else ""
        destinations = f" destinations={self.destinations}" if self.destinations > 1 else ""
        return always + outer + destinations + (" from=1" if self.checks_source else "")

    @property
    def outer_family(self) -> int:
        return self.outer or self.family

    @property
    def kind(self) -> str:
        """As enum tunnel_kind has it."""
        return f"{self.tunnel.upper()}_{self.family}_IN_{self.outer_family}"

    def config(self) -> DecapConfig:
        """Destinations of the inner family, single addresses; and, of the outer one, who may send."""
        vip = ip_address(ADDRESSES[self.family].vip)
        destinations = tuple(ip_network(vip - number) for number in range(self.destinations))
        tunnels = ip_network(ADDRESSES[self.outer_family].tunnels)
        return DecapConfig(destinations, (tunnels,) if self.checks_source else (), GUE_PORT)

    def inner_frame(self) -> bytes:
        """The first client's packet, in an Ethernet frame without a tunnel."""
        target = Target(ADDRESSES[self.family].vip, SERVICE_PORT, CLIENT_MAC, BACKEND_MAC)
        return target.frame("ack", CLIENTS[self.family], FRAME_SIZES[self.family])

    def outer_frame(self) -> bytes:
        """The same packet in its tunnel."""
        frame = Ether(src=BALANCER_MAC, dst=BACKEND_MAC) / self._outer_ip()
        inner = Raw(self.inner_frame()[ETHERNET_HEADER_SIZE:])
        if self.tunnel == "ipip":
            return bytes(frame / inner)
        gue = Raw(bytes([0, PROTOCOLS[self.family], 0, 0]))
        return bytes(frame / UDP(sport=SOURCE_PORT, dport=GUE_PORT, chksum=0) / gue / inner)

    def _outer_ip(self) -> Packet:
        addresses = ADDRESSES[self.outer_family]
        protocol = socket.IPPROTO_UDP if self.tunnel == "gue" else PROTOCOLS[self.family]
        if self.outer_family == 4:
            return IP(src=addresses.tunnels, dst=addresses.backends, proto=protocol)
        return IPv6(src=addresses.tunnels, dst=addresses.backends, nh=protocol)


MAIN_SCENARIOS = (DecapScenario("ipip", 4),)
OTHER_SCENARIOS = (
    DecapScenario("ipip", 4, destinations=100),
    DecapScenario("ipip", 4, checks_source=True),
    DecapScenario("ipip", 6),
    DecapScenario("ipip", 4, outer=6),
    DecapScenario("ipip", 6, outer=4),
    DecapScenario("gue", 4),
    DecapScenario("gue", 6),
)


class DecapRig:
    """A loaded decapsulating program, and the packets of one scenario."""

    program = PROGRAM

    def __init__(self, obj: BpfObject, scenario: DecapScenario) -> None:
        self.obj, self.scenario = obj, scenario
        self._traffic = obj.variable("traffic")
        self._frame = scenario.inner_frame()

    def aim(self, flows: int) -> None:
        """From now on packets from the next of `flows` clients, a power of two."""
        aim(self._traffic, self._frame, flows, SHUFFLED)

    def run(self, program: str, packets: int) -> TestRun:
        """The last of the packets as it left, and the mean time of one."""
        return self.obj.program(program).test_run(self._frame, repeat=packets)

    def counts(self) -> int:
        kinds = self.obj.types.enum("tunnel_kind")
        return int(self.obj.map("tunnels").total(kinds[self.scenario.kind]).packets)

    def expected(self, packets: int) -> int:
        return packets

    def refused(self) -> Mapping[str, int]:
        packets = self.obj.map("reasons").totals()
        reasons = self.obj.types.enum("decap_reason")
        return {name: packets[index] for name, index in reasons.items() if index < len(packets) and packets[index]}


@contextmanager
def loaded(scenario: DecapScenario) -> Iterator[DecapRig]:
    with BpfObject.open(OBJECT) as obj:
        encapsulation: dict[str, Any] = encapsulation_of(scenario)
        obj.configure("encapsulation", **encapsulation)
        load(obj, scenario.config(), own={}, mark=bytes(6))
        yield DecapRig(obj, scenario)


def encapsulation_of(scenario: DecapScenario) -> dict[str, object]:
    """The fields of struct encapsulation: what stands before the inner packet, in words as they lie in memory."""
    frame, inner = scenario.outer_frame(), scenario.inner_frame()[ETHERNET_HEADER_SIZE:]
    outer = frame[ETHERNET_HEADER_SIZE : -len(inner)]
    return {
        "words": len(outer) // 4,
        "ethernet": struct.unpack("=7H", frame[:ETHERNET_HEADER_SIZE]),
        "outer": struct.unpack(f"={len(outer) // 4}I", outer),
    }


def measure_all(flow_counts: Sequence[int], repeat: int, rounds: int) -> Iterator[Result]:
    """The first scenarios with each number of flows, the others with the largest. Raises BenchError, XdpError."""
    for scenario in MAIN_SCENARIOS:
        yield from measure(scenario, flow_counts, repeat, rounds)
    for scenario in OTHER_SCENARIOS:
        yield from measure(scenario, [max(flow_counts)], repeat, rounds)


def measure(scenario: DecapScenario, flow_counts: Sequence[int], repeat: int, rounds: int) -> Iterator[Result]:
    with loaded(scenario) as rig:
        for flows in flow_counts:
            rig.aim(flows)
            yield timed(rig, scenario.case(flows), repeat, rounds)
