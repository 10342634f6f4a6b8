"""Packets for tables of cases: the addresses they use, and builders of whole Ethernet frames.

What enters is what a case is about (a port, a flag, a header field by scapy's name); what leaves is
the frame as bytes, with every length and checksum right unless the case sets it. Documentation
addresses (RFC 5737, RFC 3849) that no test bed uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach, IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

CLIENT_MAC = "02:00:00:00:00:01"
LB_MAC = "02:00:00:00:00:02"
BACKEND_MACS = ("02:00:00:00:00:11", "02:00:00:00:00:12", "02:00:00:00:00:13")

CLIENT4 = "192.0.2.1"
LB4 = "192.0.2.2"
ROUTER4 = "192.0.2.254"
VIP4 = "203.0.113.1"
BACKEND4 = ("198.51.100.11", "198.51.100.12", "198.51.100.13")

CLIENT6 = "2001:db8:1::1"
LB6 = "2001:db8:1::2"
ROUTER6 = "2001:db8:1::fe"
VIP6 = "2001:db8:2::1"
BACKEND6 = ("2001:db8:3::11", "2001:db8:3::12", "2001:db8:3::13")

CLIENT_PORT = 40000
SERVICE_PORT = 80
ETHERNET_HEADER_SIZE = 14


class Verdict(IntEnum):
    """What an XDP program returns (`enum xdp_action`, linux/bpf.h)."""

    ABORTED = 0
    DROP = 1
    PASS = 2
    TX = 3
    REDIRECT = 4


@dataclass(frozen=True)
class Case:
    """One row: a frame in, and what is to become of it.

    `expect_reason` is the name under which the verdict is counted; `expect_bytes` the whole frame
    that leaves, None when it leaves as it came.
    """

    name: str
    packet: bytes
    expect_verdict: Verdict
    expect_reason: str
    expect_bytes: bytes | None = None

    @property
    def leaves(self) -> bytes:
        return self.packet if self.expect_bytes is None else self.expect_bytes


def frame(*layers: Packet, src_mac: str = CLIENT_MAC, dst_mac: str = LB_MAC) -> bytes:
    """The layers in an Ethernet frame, unpadded, as bytes."""
    packet: Packet = Ether(src=src_mac, dst=dst_mac)
    for layer in layers:
        packet = packet / layer
    return bytes(packet)


def ip4(src: str = CLIENT4, dst: str = VIP4, **fields: Any) -> Packet:
    return IP(src=src, dst=dst, **fields)


def ip6(src: str = CLIENT6, dst: str = VIP6, **fields: Any) -> Packet:
    return IPv6(src=src, dst=dst, **fields)


def tcp(sport: int = CLIENT_PORT, dport: int = SERVICE_PORT, flags: str = "S", **fields: Any) -> Packet:
    return TCP(sport=sport, dport=dport, flags=flags, **fields)


def udp(sport: int = CLIENT_PORT, dport: int = SERVICE_PORT, **fields: Any) -> Packet:
    return UDP(sport=sport, dport=dport, **fields)


def tcp4(*, src: str = CLIENT4, dst: str = VIP4, payload: bytes = b"", **fields: Any) -> bytes:
    """`fields` are those of `tcp`; a case about the IP header composes `frame(ip4(...), tcp())`."""
    return frame(ip4(src, dst), tcp(**fields), Raw(payload))


def tcp6(*, src: str = CLIENT6, dst: str = VIP6, payload: bytes = b"", **fields: Any) -> bytes:
    return frame(ip6(src, dst), tcp(**fields), Raw(payload))


def udp4(*, src: str = CLIENT4, dst: str = VIP4, payload: bytes = b"", **fields: Any) -> bytes:
    return frame(ip4(src, dst), udp(**fields), Raw(payload))


def udp6(*, src: str = CLIENT6, dst: str = VIP6, payload: bytes = b"", **fields: Any) -> bytes:
    return frame(ip6(src, dst), udp(**fields), Raw(payload))


def icmp_error4(quoted: bytes, *, src: str = ROUTER4, dst: str | None = None, size: int = 28, **fields: Any) -> bytes:
    """An ICMP error about the frame `quoted`, to `dst` (that frame's sender if None).

    It quotes `size` bytes of the packet: 28 are the IPv4 header and 8 bytes of TCP, all that
    RFC 792 asks for. `fields` are scapy's; port unreachable unless they say otherwise.
    """
    packet = IP(quoted[ETHERNET_HEADER_SIZE:])
    error = ICMP(**({"type": 3, "code": 3} | fields))
    return frame(ip4(src, dst or packet.src), error, Raw(bytes(packet)[:size]))


def icmp_error6(
    quoted: bytes,
    *,
    src: str = ROUTER6,
    dst: str | None = None,
    size: int = 1232,
    error: Packet | None = None,
) -> bytes:
    """As `icmp_error4`; RFC 4443 quotes as much as fits 1280 bytes. Port unreachable by default."""
    packet = IPv6(quoted[ETHERNET_HEADER_SIZE:])
    header = error or ICMPv6DestUnreach(code=4)
    return frame(ip6(src, dst or packet.src), header, Raw(bytes(packet)[:size]))
