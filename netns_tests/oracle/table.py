"""What the tables of cases share: the balancer's program with its interfaces, and frames as each side sends them.

A module of tests takes the fixtures by name: `balancer = table.balancer`. The services are put straight into the
program's maps and its clock is set by hand.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from netns_tests.oracle import packets
from netns_tests.oracle.model import SECOND_NS, Member, Outcome, Service, Settings, Slot
from netns_tests.oracle.packets import Verdict
from netns_tests.oracle.program import LoadedProgram
from netns_tests.oracle.wire import Hop, address

SETTINGS = Settings(nat_port_first=2000, nat_port_count=1000)
START_NS = 1_000_000 * SECOND_NS
MEMBER_PORT = 8080
OTHER_CLIENT_MAC = "02:00:00:00:00:09"
GATEWAY_MAC = "02:00:00:00:00:fe"


@dataclass(frozen=True)
class Family:
    """The addresses of a family, and its header."""

    version: int
    client: str
    vip: str
    balancer: str
    backends: tuple[str, ...]
    router: str

    def header(self, src: str, dst: str, hops: int = 64) -> Packet:
        return IP(src=src, dst=dst, ttl=hops) if self.version == 4 else IPv6(src=src, dst=dst, hlim=hops)

    def request(self, segment: Packet, hops: int = 64, src_mac: str = packets.CLIENT_MAC) -> bytes:
        """As the client sends it."""
        return packets.frame(self.header(self.client, self.vip, hops), segment, src_mac=src_mac)

    def to_member(self, segment: Packet, member: int = 1) -> bytes:
        """As nat sends it on, the segment having the new ports."""
        header = self.header(self.balancer, self.backends[member - 1], 63)
        return packets.frame(header, segment, src_mac=packets.LB_MAC, dst_mac=packets.BACKEND_MACS[member - 1])

    def from_member(self, segment: Packet, member: int = 1, hops: int = 64) -> bytes:
        header = self.header(self.backends[member - 1], self.balancer, hops)
        return packets.frame(header, segment, src_mac=packets.BACKEND_MACS[member - 1])

    def to_client(self, segment: Packet, dst_mac: str = packets.CLIENT_MAC) -> bytes:
        header = self.header(self.vip, self.client, 63)
        return packets.frame(header, segment, src_mac=packets.LB_MAC, dst_mac=dst_mac)

    def error(self, quoted: bytes, src: str, quoted_size: int, hops: int = 64) -> bytes:
        """An ICMP error that quotes so many bytes behind the quoted packet's IP header; to its sender."""
        if self.version == 4:
            error = packets.icmp_error4(quoted, src=src, size=20 + quoted_size)
        else:
            error = packets.icmp_error6(quoted, src=src, size=40 + quoted_size)
        return with_hops(error, hops)


V4 = Family(4, packets.CLIENT4, packets.VIP4, packets.LB4, packets.BACKEND4, packets.ROUTER4)
V6 = Family(6, packets.CLIENT6, packets.VIP6, packets.LB6, packets.BACKEND6, packets.ROUTER6)

both_families = pytest.mark.parametrize("family", [V4, V6], ids=["ipv4", "ipv6"])
both_protocols = pytest.mark.parametrize("protocol", ["tcp", "udp"])


def with_hops(frame: bytes, hops: int) -> bytes:
    """The frame with another TTL or hop limit; scapy computes the checksum anew."""
    packet = Ether(frame)
    if IP in packet:
        packet[IP].ttl = hops
        del packet[IP].chksum
    else:
        packet[IPv6].hlim = hops
    return bytes(packet)


def segment(
    protocol: str, sport: int, dport: int, flags: str = "S", payload: bytes = b"hello", **fields: Any
) -> Packet:
    if protocol == "udp":
        return UDP(sport=sport, dport=dport, **fields) / Raw(payload)
    return TCP(sport=sport, dport=dport, flags=flags, **fields) / Raw(payload)


def from_client(protocol: str = "tcp", sport: int = packets.CLIENT_PORT, **fields: Any) -> Packet:
    return segment(protocol, sport, packets.SERVICE_PORT, **fields)


def client_port_of(frame: bytes) -> int:
    """The source port of a frame that leaves, which is nat's."""
    packet = Ether(frame)
    return int(packet[TCP].sport if TCP in packet else packet[UDP].sport)


class Balancer:
    """The program with its interfaces: clients come in on `front`, members are behind `back`."""

    def __init__(self, program: LoadedProgram, front: int, back: int) -> None:
        self.program, self.front, self.back = program, front, back
        self.now_ns = START_NS
        self.services: list[Service] = []
        program.forget()
        program.set_clock(START_NS)
        program.wait_for_flows_until(0)
        program.install([])

    def serve(self, *services: Service, echo: Collection[bytes] = ()) -> None:
        """Their numbers follow from their order. echo: the addresses whose echo requests are answered."""
        self.services = list(services)
        self.program.install(self.services, echo)

    def service(self, family: Family = V4, protocol: str = "tcp", size: int = 1, **fields: Any) -> Service:
        """A service of the VIP on port 80, in mode nat, its ring all the first member's, unless told otherwise."""
        standard: dict[str, Any] = {
            "address": address(family.vip),
            "port": packets.SERVICE_PORT,
            "protocol": 6 if protocol == "tcp" else 17,
            "mode": "nat",
            "members": {number: self.member(family, number) for number in range(1, size + 1)},
            "slots": [Slot(current=1)],
        }
        return Service(**(standard | fields))

    def member(self, family: Family, number: int, **fields: Any) -> Member:
        hop = Hop(self.back, mac(packets.BACKEND_MACS[number - 1]), mac(packets.LB_MAC))
        backend, balancer = address(family.backends[number - 1]), address(family.balancer)
        return replace(Member(number, backend, balancer, hop, port=MEMBER_PORT), **fields)

    def change(self, **fields: Any) -> None:
        """Change the (only) service while its flows stay."""
        self.serve(replace(self.services[0], **fields))

    def after(self, seconds: float) -> None:
        self.now_ns += int(seconds * SECOND_NS)
        self.program.set_clock(self.now_ns)

    def send(self, frame: bytes) -> Outcome:
        return self.program.run(frame, self.front)

    def answer(self, frame: bytes) -> Outcome:
        """Run a frame that comes from a member."""
        return self.program.run(frame, self.back)

    def opened(self, frame: bytes) -> int:
        """The port that nat gives to the flow of a frame."""
        outcome = self.send(frame)
        assert outcome.reason == "FORWARDED"
        return client_port_of(outcome.frame)


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def with_macs(frame: bytes, src: str, dst: str) -> bytes:
    return mac(dst) + mac(src) + frame[12:]


@contextlib.contextmanager
def on_one_cpu() -> Iterator[None]:
    """What is limited by the second is so on each CPU."""
    home = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(home)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, home)


def redirected(frame: bytes) -> Outcome:
    return Outcome(Verdict.REDIRECT, "FORWARDED", frame)


def dropped(reason: str, frame: bytes) -> Outcome:
    return Outcome(Verdict.DROP, reason, frame)


def passed(reason: str, frame: bytes) -> Outcome:
    return Outcome(Verdict.PASS, reason, frame)


def member_reached(outcome: Outcome) -> int:
    """Which member a frame leaves for, by its MAC address; 0 if it does not leave."""
    if outcome.reason != "FORWARDED":
        return 0
    return packets.BACKEND_MACS.index(Ether(outcome.frame).dst) + 1
