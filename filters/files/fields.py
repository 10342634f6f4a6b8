"""What a packet says of itself, for programs to read: the fields of its link, network and transport headers.

Enters: the bytes of an Ethernet frame, perhaps cut. Leaves: a dictionary with an entry for each header that is whole.
Written for --json, since scapy takes 0.2 s to import, and for each packet a hundred times as long.
"""

from __future__ import annotations

import socket
import struct
from typing import Any

_ETHERNET, _TAG, _ARP = struct.Struct("!6s6sH"), struct.Struct("!HH"), struct.Struct("!HHBBH6s4s6s4s")
_IP4, _IP6, _PORTS = struct.Struct("!BBHHHBBH4s4s"), struct.Struct("!IHBB16s16s"), struct.Struct("!HH")
_ETHERNET_SIZE, _TAG_SIZE = 14, 4

_IP4_TYPE, _ARP_TYPE, _IP6_TYPE, _TAG_TYPES = 0x0800, 0x0806, 0x86DD, (0x8100, 0x88A8, 0x9100)
_ICMP, _TCP, _UDP, _ICMP6, _SCTP = 1, 6, 17, 58, 132
_HOP_BY_HOP, _ROUTING, _FRAGMENT, _AUTHENTICATION, _DESTINATION = 0, 43, 44, 51, 60
_PROTOCOLS = {_ICMP: "icmp", _TCP: "tcp", _UDP: "udp", _ICMP6: "icmp6", _SCTP: "sctp"}
_FLAGS = ("fin", "syn", "rst", "psh", "ack", "urg", "ece", "cwr")

Fields = dict[str, Any]


def fields(frame: bytes | memoryview) -> Fields:
    if len(frame) < _ETHERNET_SIZE:
        return {}
    destination, source, kind = _ETHERNET.unpack_from(frame)
    tags, kind, at = _tags(frame, kind)
    found: Fields = {"ether": {"source": _mac(source), "destination": _mac(destination), "type": f"0x{kind:04x}"}}
    if tags:
        found["vlan"] = tags
    return found | _network(frame[at:], kind)


def _mac(address: bytes) -> str:
    return address.hex(":")


def _tags(frame: bytes | memoryview, kind: int) -> tuple[list[Fields], int, int]:
    """The tags, the type of what is behind them, and where that begins."""
    tags, at = [], _ETHERNET_SIZE
    while kind in _TAG_TYPES and len(frame) >= at + _TAG_SIZE:
        control, kind = _TAG.unpack_from(frame, at)
        tags.append({"id": control & 0xFFF, "priority": control >> 13})
        at += _TAG_SIZE
    return tags, kind, at


def _network(packet: bytes | memoryview, kind: int) -> Fields:
    if kind == _IP4_TYPE and len(packet) >= _IP4.size:
        return _ip4(packet)
    if kind == _IP6_TYPE and len(packet) >= _IP6.size:
        return _ip6(packet)
    if kind == _ARP_TYPE and len(packet) >= _ARP.size:
        return _arp(packet)
    return {}


def _arp(packet: bytes | memoryview) -> Fields:
    *_, operation, sender, sender_address, target, target_address = _ARP.unpack_from(packet)
    return {
        "arp": {
            "operation": {1: "request", 2: "reply"}.get(operation, str(operation)),
            "sender": _mac(sender),
            "sender_ip": socket.inet_ntoa(sender_address),
            "target": _mac(target),
            "target_ip": socket.inet_ntoa(target_address),
        }
    }


def _ip4(packet: bytes | memoryview) -> Fields:
    first, _, _, _, fragment, ttl, protocol, _, source, destination = _IP4.unpack_from(packet)
    offset = (fragment & 0x1FFF) * 8
    found = _ip(4, socket.inet_ntoa(source), socket.inet_ntoa(destination), protocol, ttl)
    if fragment & 0x3FFF:
        found["ip"]["fragment_offset"] = offset
    return found if offset else found | _transport(packet[(first & 0xF) * 4 :], protocol)


def _ip6(packet: bytes | memoryview) -> Fields:
    _, _, protocol, hop_limit, source, destination = _IP6.unpack_from(packet)
    protocol, at, offset = _behind_extensions(packet, protocol)
    source, destination = (socket.inet_ntop(socket.AF_INET6, address) for address in (source, destination))
    found = _ip(6, source, destination, protocol, hop_limit)
    if offset is not None:
        found["ip"]["fragment_offset"] = offset
    return found if offset else found | _transport(packet[at:], protocol)


def _behind_extensions(packet: bytes | memoryview, protocol: int) -> tuple[int, int, int | None]:
    """The protocol behind the extension headers (RFC 8200), where it begins, and the offset of a fragment."""
    at, offset = _IP6.size, None
    while protocol in (_HOP_BY_HOP, _ROUTING, _FRAGMENT, _AUTHENTICATION, _DESTINATION) and len(packet) >= at + 8:
        size = {_FRAGMENT: 8, _AUTHENTICATION: packet[at + 1] * 4 + 8}.get(protocol, packet[at + 1] * 8 + 8)
        if protocol == _FRAGMENT:
            offset = int.from_bytes(packet[at + 2 : at + 4], "big") & 0xFFF8
        protocol, at = packet[at], at + size
        if offset:
            break
    return protocol, at, offset


def _ip(version: int, source: str, destination: str, protocol: int, ttl: int) -> Fields:
    words = _PROTOCOLS.get(protocol, str(protocol))
    return {"ip": {"version": version, "source": source, "destination": destination, "protocol": words, "ttl": ttl}}


def _transport(segment: bytes | memoryview, protocol: int) -> Fields:
    if protocol in (_ICMP, _ICMP6) and len(segment) >= 2:
        return {_PROTOCOLS[protocol]: {"type": segment[0], "code": segment[1]}}
    if protocol not in (_TCP, _UDP, _SCTP) or len(segment) < _PORTS.size:
        return {}
    source, destination = _PORTS.unpack_from(segment)
    found: Fields = {"source_port": source, "destination_port": destination}
    if protocol == _TCP and len(segment) > 13:
        found["flags"] = [name for bit, name in enumerate(_FLAGS) if segment[13] >> bit & 1]
    return {_PROTOCOLS[protocol]: found}
