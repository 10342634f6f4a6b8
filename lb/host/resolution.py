"""Frames by which two hosts of a link find each other's MAC address: ARP (RFC 826), neighbour discovery (RFC 4861).

Enters: who asks and answers, and whom. Leaves: Ethernet frames, to test filter rules with.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv6Address

from lb.model.vip import Address

_ARP, _IP6 = 0x0806, 0x86DD
_REQUEST, _REPLY = 1, 2
_ICMP6, _SOLICITATION, _ADVERTISEMENT = 58, 135, 136
_SOLICITED_OVERRIDE = 0x60000000
_SOURCE_MAC, _TARGET_MAC = 1, 2  # options
_HOP_LIMIT = 255  # of any other nothing is accepted
_BROADCAST = b"\xff" * 6


@dataclass(frozen=True, slots=True)
class End:
    address: Address
    mac: bytes


def resolution_name(address: Address) -> str:
    return "ARP" if address.version == 4 else "neighbour discovery"


def resolution_frames(sender: End, receiver: End) -> Iterator[bytes]:
    """The question for the receiver's address, to all and to one known already, and the answer for the sender's own."""
    if sender.address.version == 4:
        yield _arp(_BROADCAST, _REQUEST, sender, receiver)
        yield _arp(receiver.mac, _REQUEST, sender, receiver)
        yield _arp(receiver.mac, _REPLY, sender, receiver)
        return
    group = receiver.address.packed[-3:]
    yield _solicitation(
        End(IPv6Address(b"\xff\x02" + bytes(9) + b"\x01\xff" + group), b"\x33\x33\xff" + group), sender, receiver
    )
    yield _solicitation(receiver, sender, receiver)
    yield _advertisement(sender, receiver)


def _arp(destination: bytes, operation: int, sender: End, target: End) -> bytes:
    asked = bytes(6) if operation == _REQUEST else target.mac
    ends = sender.mac + sender.address.packed + asked + target.address.packed
    return destination + sender.mac + struct.pack(">HHHBBH", _ARP, 1, 0x0800, 6, 4, operation) + ends


def _solicitation(destination: End, sender: End, target: End) -> bytes:
    body = bytes(4) + target.address.packed + bytes((_SOURCE_MAC, 1)) + sender.mac
    return _icmp6(destination, sender, _SOLICITATION, body)


def _advertisement(sender: End, receiver: End) -> bytes:
    body = struct.pack(">I", _SOLICITED_OVERRIDE) + sender.address.packed + bytes((_TARGET_MAC, 1)) + sender.mac
    return _icmp6(receiver, sender, _ADVERTISEMENT, body)


def _icmp6(destination: End, sender: End, kind: int, body: bytes) -> bytes:
    ends = sender.address.packed + destination.address.packed
    length = 4 + len(body)
    checksum = _checksum(ends + struct.pack(">IIBBH", length, _ICMP6, kind, 0, 0) + body)
    header = struct.pack(">HIHBB", _IP6, 6 << 28, length, _ICMP6, _HOP_LIMIT)
    return destination.mac + sender.mac + header + ends + struct.pack(">BBH", kind, 0, checksum) + body


def _checksum(data: bytes) -> int:
    """RFC 1071, of an even number of bytes."""
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
