"""Tunnel packets by hand, and the decapsulating program on frames through BPF_PROG_TEST_RUN.

Enters: inner packets of scapy's, destinations, sources. Leaves: frames as a balancer sends them to a
backend, and what the program makes of a frame. It is loaded as `xdp-lb decap attach` loads it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any

from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw

from lb.decap.kernel import PROGRAM, load
from lb.decap.values import DecapConfig
from lb.model.options import parse_network
from netns_tests.oracle.packets import (
    BACKEND4,
    BACKEND6,
    CLIENT4,
    CLIENT6,
    CLIENT_MAC,
    LB4,
    LB6,
    LB_MAC,
    VIP4,
    VIP6,
    Verdict,
    frame,
    ip4,
    ip6,
    tcp,
)
from xdp.object import DECAP_OBJECT, BpfObject

OTHER_VIP4, OTHER_VIP6 = "203.0.113.2", "2001:db8:2::2"
MARK = "0a:bb:cc:dd:ee:ff"
GUE_PORT = 6080
NOT_ECT, ECT_1, ECT_0, CE = range(4)
FAMILIES = (4, 6)


class Loaded:
    """The program, and what its last run counted."""

    def __init__(self, bpf: BpfObject) -> None:
        self.bpf = bpf
        self._program = bpf.program(PROGRAM)
        self._counted = self._counters()

    def run(self, packet: bytes) -> tuple[Verdict, list[str], bytes]:
        done = self._program.test_run(packet)
        before, self._counted = self._counted, self._counters()
        return Verdict(done.verdict), [name for name in before if before[name] != self._counted[name]], done.data

    def decapsulated_bytes(self, kind: str) -> int:
        return int(self.bpf.map("tunnels").total(self.bpf.types.enum("tunnel_kind")[kind]).bytes)

    def _counters(self) -> dict[str, int]:
        types = self.bpf.types
        tunnels, reasons = self.bpf.map("tunnels").totals(), self.bpf.map("reasons").totals()
        kinds = {name: tunnels[n].packets for name, n in types.enum("tunnel_kind").items() if n < len(tunnels)}
        return kinds | {name: reasons[n] for name, n in types.enum("decap_reason").items() if n < len(reasons)}


@contextmanager
def loaded(
    *destinations: str, sources: tuple[str, ...] = (), gue_port: int = GUE_PORT, own: bool = True
) -> Iterator[Loaded]:
    """`own`: the program knows this host's addresses, the first backend's."""
    config = DecapConfig(
        tuple(parse_network(text, "vip") for text in destinations),
        tuple(parse_network(text, "source") for text in sources),
        gue_port,
    )
    with BpfObject.open(DECAP_OBJECT) as bpf:
        addresses = {4: ip_address(BACKEND4[0]), 6: ip_address(BACKEND6[0])} if own else {}
        load(bpf, config, addresses, bytes.fromhex(MARK.replace(":", "")))
        yield Loaded(bpf)


def outer_header(version: int, **fields: Any) -> Packet:
    return ip4(LB4, BACKEND4[0], **fields) if version == 4 else ip6(LB6, BACKEND6[0], **fields)


def inner_packet(version: int, src: str | None = None, dst: str | None = None, ecn: int = NOT_ECT) -> Packet:
    """A client's segment to the VIP; DSCP 10."""
    if version == 4:
        return ip4(src or CLIENT4, dst or VIP4, tos=0x28 | ecn) / tcp(flags="A") / Raw(b"inner")
    return ip6(src or CLIENT6, dst or VIP6, tc=0x28 | ecn, fl=0xABCDE) / tcp(flags="A") / Raw(b"inner")


def protocol_of(inner: Packet) -> int:
    return 4 if bytes(inner)[0] >> 4 == 4 else 41


def gue(
    inner: Packet, *, first: int | None = None, flags: int = 0, private: bytes = b"", port: int = GUE_PORT
) -> Packet:
    words = len(private) // 4 if first is None else first
    header = bytes([words, protocol_of(inner)]) + flags.to_bytes(2, "big")
    return UDP(sport=50000, dport=port, chksum=0) / Raw(header + private + bytes(inner))


def ipip(outer: Packet, inner: Packet) -> Packet:
    """The inner packet's bytes as a payload: scapy would fill in the lengths of a broken one."""
    outer = outer.copy()
    if isinstance(outer, IP):
        outer.proto = protocol_of(inner)
    else:
        outer.nh = protocol_of(inner)
    return outer / Raw(bytes(inner))


def in_ipip(inner: Packet, version: int = 4, **fields: Any) -> bytes:
    return frame(ipip(outer_header(version, **fields), inner))


def in_gue(inner: Packet, version: int = 4, **options: Any) -> bytes:
    return frame(outer_header(version), gue(inner, **options))


def tagged(tags: int, packet: Packet) -> bytes:
    stack = Dot1AD(vlan=7, prio=3) / Dot1Q(vlan=9) if tags == 2 else Dot1Q(vlan=9, prio=5)
    return bytes(Ether(src=CLIENT_MAC, dst=LB_MAC) / stack / packet)


def second_chance(other: str, *, magic: int = 0x5832, family: int | None = None, zero: int = 0) -> bytes:
    """GUE private data that name the other member."""
    address = ip_address(other)
    return struct.pack("!HBB16s", magic, family or address.version, zero, address.packed)
