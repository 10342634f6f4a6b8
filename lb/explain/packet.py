"""Frames for `xdp-lb explain`: made of a few words, read as the balancer reads them, and described (pure).

Enters: addresses, ports and flags, or a frame. Leaves: a frame of Ethernet, a Packet with the flow by which the
programs look it up (xdp/bpf/lb/packet.h), or lines such as tcpdump prints, one for each header from the outermost on.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from ipaddress import ip_address
from socket import IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_IPIP, IPPROTO_IPV6, IPPROTO_TCP, IPPROTO_UDP
from typing import NamedTuple

from lb.errors import InvalidInput, part
from lb.model.options import GUE_PORT
from lb.model.vip import Address, join_port, split_port

ETHERNET_SIZE = 14
MIN_FRAME, MAX_FRAME = ETHERNET_SIZE, 3520 - 64  # what BPF_PROG_TEST_RUN takes in one piece, room left for a mark
HOPS = 64
WINDOW = 64240

ETHERTYPES = {4: 0x0800, 6: 0x86DD}
TAGS = (0x8100, 0x88A8)  # IEEE 802.1Q, 802.1ad
IP_SIZE = {4: 20, 6: 40}
FRAGMENT = 44
ICMP_OF = {4: IPPROTO_ICMP, 6: IPPROTO_ICMPV6}
ECHO_REQUEST = {4: 8, 6: 128}
ICMP_ERRORS = {4: {3, 11, 12}, 6: {1, 2, 3, 4}}  # RFC 792, RFC 4443
PROTOCOL_NAMES = {IPPROTO_TCP: "TCP", IPPROTO_UDP: "UDP", IPPROTO_ICMP: "ICMP", IPPROTO_ICMPV6: "ICMPv6"}
INNER = {IPPROTO_IPIP: 4, IPPROTO_IPV6: 6}

FLAGS = {"F": 0x01, "S": 0x02, "R": 0x04, "P": 0x08, "A": 0x10, "U": 0x20, "E": 0x40, "W": 0x80, ".": 0x10}
FIN, SYN, RST, ACK = (FLAGS[letter] for letter in "FSRA")


class Flow(NamedTuple):
    """As its packets carry it; without ports, for ICMP, both are 0."""

    protocol: int
    source: Address
    source_port: int
    destination: Address
    destination_port: int

    def __str__(self) -> str:
        name = PROTOCOL_NAMES.get(self.protocol, f"protocol {self.protocol}")
        return f"{name} {_end(self.source, self.source_port)} > {_end(self.destination, self.destination_port)}"


def _end(address: Address, port: int) -> str:
    return join_port(address, port) if port else str(address)


class Kind(Enum):
    TCP = "tcp"
    UDP = "udp"
    ICMP_ERROR = "icmp error"  # the flow is that of the packet it quotes, turned round
    FIRST_FRAGMENT = "first fragment"
    LATER_FRAGMENT = "later fragment"
    OTHER = "other"  # cannot be balanced


@dataclass(frozen=True, slots=True)
class Packet:
    """What decides where a frame goes."""

    flow: Flow
    kind: Kind
    tcp_flags: int = 0
    payload: bytes = b""  # of UDP
    datagram: int = 0  # the ID that its fragments share

    @property
    def version(self) -> int:
        return self.flow.source.version

    @property
    def opens(self) -> bool:
        """Whether it is the first of a TCP connection."""
        return self.tcp_flags & (SYN | ACK) == SYN


# Words


def parse_flags(text: str) -> int:
    """Letters as tcpdump has them, `SA` or `S.`; none: no flag at all. Raises InvalidInput."""
    unknown = [letter for letter in text.upper() if letter not in FLAGS]
    if unknown:
        raise InvalidInput(f"flags {text}: {unknown[0]}: not one of F S R P A U E W")
    return sum({FLAGS[letter] for letter in text.upper()})


def flag_letters(flags: int) -> str:
    """What `parse_flags` reads."""
    return "".join(letter for letter, bit in FLAGS.items() if flags & bit and letter != ".")


def parse_flow(protocol: str, source: str, destination: str) -> Flow:
    """Of tcp, udp or icmp, and ADDR:PORT or for icmp ADDR. Raises InvalidInput."""
    with part("source"):
        client, client_port = _parse_end(protocol, source)
    with part("destination"):
        vip, vip_port = _parse_end(protocol, destination)
        if client.version != vip.version:
            raise InvalidInput(f"{client} and {vip}: different address families")
    number = {"tcp": IPPROTO_TCP, "udp": IPPROTO_UDP, "icmp": ICMP_OF[client.version]}[protocol]
    return Flow(number, client, client_port, vip, vip_port)


def _parse_end(protocol: str, text: str) -> tuple[Address, int]:
    address, port = split_port(text, text)
    if (port is None) != (protocol == "icmp"):
        raise InvalidInput(f"{text}: {'icmp has no ports' if protocol == 'icmp' else 'a port is missing'}")
    return address, port or 0


def parse_hex(text: str) -> bytes:
    """Bytes in hexadecimal, with spaces, colons or none between them. Raises InvalidInput."""
    digits = "".join(text.replace(":", " ").removeprefix("0x").split())
    try:
        return bytes.fromhex(digits)
    except ValueError:
        raise InvalidInput(f"hex: not pairs of hexadecimal digits: {text[:40]}") from None


def check_size(frame: bytes) -> bytes:
    """The frame, if the kernel takes it for a test run. Raises InvalidInput."""
    if not MIN_FRAME <= len(frame) <= MAX_FRAME:
        raise InvalidInput(
            f"packet of {len(frame)} bytes: out of range {MIN_FRAME} to {MAX_FRAME}, including the Ethernet header"
        )
    return frame


# Making frames


def make_frame(flow: Flow, tcp_flags: int, source_mac: bytes, destination_mac: bytes) -> bytes:
    """One packet of a flow without payload: TCP, UDP, or for ICMP an echo request."""
    version = flow.source.version
    segment = _segment(flow, tcp_flags)
    ethernet = destination_mac + source_mac + struct.pack("!H", ETHERTYPES[version])
    return ethernet + _ip_header(flow, len(segment)) + segment


def _segment(flow: Flow, tcp_flags: int) -> bytes:
    ports = struct.pack("!HH", flow.source_port, flow.destination_port)
    if flow.protocol == IPPROTO_TCP:
        acknowledged = 1 if tcp_flags & ACK else 0
        header, at = ports + struct.pack("!IIBBHHH", 1, acknowledged, 5 << 4, tcp_flags, WINDOW, 0, 0), 16
    elif flow.protocol == IPPROTO_UDP:
        header, at = ports + struct.pack("!HH", 8, 0), 6
    else:
        header, at = struct.pack("!BBHHH", ECHO_REQUEST[flow.source.version], 0, 0, 1, 1), 2
    pseudo = b"" if flow.protocol == IPPROTO_ICMP else _pseudo_header(flow, len(header))
    return header[:at] + struct.pack("!H", checksum(pseudo + header) or 0xFFFF) + header[at + 2 :]


def _pseudo_header(flow: Flow, size: int) -> bytes:
    """RFC 9293, 3.1; RFC 8200, 8.1."""
    return flow.source.packed + flow.destination.packed + struct.pack("!II", size, flow.protocol)


def _ip_header(flow: Flow, size: int) -> bytes:
    addresses = flow.source.packed + flow.destination.packed
    if flow.source.version == 6:
        return struct.pack("!IHBB", 6 << 28, size, flow.protocol, HOPS) + addresses
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + size, 0, 0x4000, HOPS, flow.protocol, 0)
    return header[:10] + struct.pack("!H", checksum(header + addresses)) + addresses


def checksum(data: bytes) -> int:
    """RFC 1071."""
    padded = data + b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


# Reading frames


@dataclass(frozen=True, slots=True)
class Ip:
    """An IP header, and what is behind it as far as the frame goes."""

    version: int
    protocol: int
    source: Address
    destination: Address
    hops: int
    size: int  # of the header
    payload: bytes
    fragment: tuple[int, int, bool] | None = None  # ID, offset in bytes, whether more follow
    is_sound: bool = True  # it has no options, and its length is that of bytes that are there


def untagged(frame: bytes) -> tuple[list[int], int, bytes]:
    """VLAN IDs, the EtherType behind them, and what follows it."""
    tags, at = [], 12
    while len(frame) >= at + 4 and _number(frame, at) in TAGS:
        tags.append(_number(frame, at + 2) & 0xFFF)
        at += 4
    return tags, _number(frame, at), frame[at + 2 :]


def read_ip(data: bytes, version: int) -> Ip | None:
    """None where it is none, or cut off in its header."""
    if len(data) < IP_SIZE[version] or data[0] >> 4 != version:
        return None
    return _read_ip4(data) if version == 4 else _read_ip6(data)


def _read_ip4(data: bytes) -> Ip:
    size, bits = (data[0] & 0xF) * 4, _number(data, 6)
    fragment = (_number(data, 4), (bits & 0x1FFF) * 8, bool(bits & 0x2000)) if bits & 0x3FFF else None
    total = _number(data, 2)
    is_sound = size == IP_SIZE[4] <= total <= len(data)
    payload = data[size : total if is_sound else None]
    return Ip(4, data[9], ip_address(data[12:16]), ip_address(data[16:20]), data[8], size, payload, fragment, is_sound)


def _read_ip6(data: bytes) -> Ip:
    protocol, fragment, size = data[6], None, 40
    is_sound = 40 + _number(data, 4) <= len(data)
    payload = data[40 : 40 + _number(data, 4)]
    if protocol == FRAGMENT and len(payload) >= 8:
        bits = _number(payload, 2)
        if bits & 0xFFF9:  # else it is all of its packet (RFC 6946)
            fragment = (_number(payload, 4, 4), bits & 0xFFF8, bool(bits & 1))
        protocol, payload, size = payload[0], payload[8:], 48
    return Ip(6, protocol, ip_address(data[8:24]), ip_address(data[24:40]), data[7], size, payload, fragment, is_sound)


def read(frame: bytes) -> Packet | None:
    """What the balancer looks at; None for what is neither IPv4 nor IPv6, or cut off."""
    if len(frame) < ETHERNET_SIZE + 4:
        return None
    _, ethertype, data = untagged(frame)
    version = next((v for v, number in ETHERTYPES.items() if number == ethertype), None)
    ip = read_ip(data, version) if version else None
    return _packet(ip) if ip else None


def _packet(ip: Ip) -> Packet:
    if ip.fragment and ip.is_sound:
        return _fragment(ip, *ip.fragment[:2])
    if _is_sound_tcp(ip):
        return Packet(_flow(ip), Kind.TCP, ip.payload[13])
    if _is_sound_udp(ip):
        return Packet(_flow(ip), Kind.UDP, payload=ip.payload[8:])
    if ip.is_sound and ip.protocol == ICMP_OF[ip.version] and (quoted := _quoted(ip)):
        return Packet(quoted, Kind.ICMP_ERROR)
    return Packet(_flow(ip) if ip.protocol in (IPPROTO_TCP, IPPROTO_UDP) else _flow_without_ports(ip), Kind.OTHER)


def _is_sound_tcp(ip: Ip) -> bool:
    whole = ip.is_sound and ip.protocol == IPPROTO_TCP and len(ip.payload) >= 20
    return whole and 20 <= (ip.payload[12] >> 4) * 4 <= len(ip.payload)


def _is_sound_udp(ip: Ip) -> bool:
    whole = ip.is_sound and ip.protocol == IPPROTO_UDP and len(ip.payload) >= 8
    return whole and 8 <= _number(ip.payload, 4) <= len(ip.payload)


def _fragment(ip: Ip, datagram: int, offset: int) -> Packet:
    if offset or ip.protocol != IPPROTO_UDP or len(ip.payload) < 8:
        return Packet(_flow_without_ports(ip), Kind.LATER_FRAGMENT if offset else Kind.OTHER, datagram=datagram)
    return Packet(_flow(ip), Kind.FIRST_FRAGMENT, datagram=datagram)


def _flow_without_ports(ip: Ip) -> Flow:
    return Flow(ip.protocol, ip.source, 0, ip.destination, 0)


def _flow(ip: Ip) -> Flow:
    return Flow(ip.protocol, ip.source, _number(ip.payload, 0), ip.destination, _number(ip.payload, 2))


def _quoted(ip: Ip) -> Flow | None:
    """Of an error that quotes a packet of its receiver's, the flow that the packet belongs to from the other side."""
    if len(ip.payload) < 8 or ip.payload[0] not in ICMP_ERRORS[ip.version]:
        return None
    quoted = read_ip(ip.payload[8:], ip.version)
    if quoted is None or quoted.source != ip.destination or len(quoted.payload) < 8 or quoted.fragment:
        return None
    if quoted.protocol not in (IPPROTO_TCP, IPPROTO_UDP):
        return None
    flow = _flow(quoted)
    return Flow(flow.protocol, flow.destination, flow.destination_port, flow.source, flow.source_port)


def _number(data: bytes, at: int, size: int = 2) -> int:
    return int.from_bytes(data[at : at + size], "big")


# Describing frames


def mac_text(mac: bytes) -> str:
    return mac.hex(":")


def describe(frame: bytes, gue_port: int = GUE_PORT) -> list[str]:
    """A line for each header, the outermost first. gue_port: the UDP port behind which there is GUE."""
    tags, ethertype, data = untagged(frame)
    ethernet = f"{mac_text(frame[6:12])} > {mac_text(frame[:6])}"
    lines = [ethernet + "".join(f", vlan {tag}" for tag in tags)]
    version = next((v for v, number in ETHERTYPES.items() if number == ethertype), None)
    if version is None:
        return [*lines, f"ethertype {ethertype:#06x}"]
    return [*lines, *_ip_lines(data, version, gue_port)]


def _ip_lines(data: bytes, version: int, gue_port: int) -> Iterator[str]:
    ip = read_ip(data, version)
    if ip is None:
        yield f"IPv{version}, cut off"
        return
    fragment = f", fragment {ip.fragment[0]} at {ip.fragment[1]}" if ip.fragment else ""
    head = f"IPv{version} {ip.source} > {ip.destination}, {'ttl' if version == 4 else 'hop limit'} {ip.hops}{fragment}"
    yield f"{head}{_transport(ip, gue_port)}"
    if ip.protocol in INNER:
        yield from _ip_lines(ip.payload, INNER[ip.protocol], gue_port)
    elif inner := _gue(ip, gue_port):
        yield from _ip_lines(inner[1], inner[0], gue_port)


def _transport(ip: Ip, gue_port: int) -> str:
    name = PROTOCOL_NAMES.get(ip.protocol, f"protocol {ip.protocol}")
    if ip.fragment and ip.fragment[1]:
        return f", {name}"
    if ip.protocol == IPPROTO_TCP and len(ip.payload) >= 20:
        return f", TCP {_number(ip.payload, 0)} > {_number(ip.payload, 2)} [{flags_text(ip.payload[13])}]"
    if ip.protocol == IPPROTO_UDP and len(ip.payload) >= 8:
        kind = "GUE" if _gue(ip, gue_port) else f"{_number(ip.payload, 4) - 8} bytes"
        return f", UDP {_number(ip.payload, 0)} > {_number(ip.payload, 2)}, {kind}{_other_member(ip, gue_port)}"
    if ip.protocol == ICMP_OF[ip.version] and len(ip.payload) >= 2:
        return f", {name} type {ip.payload[0]} code {ip.payload[1]}"
    return "" if ip.protocol in INNER else f", {name}"


def flags_text(flags: int) -> str:
    """As tcpdump has them: S, S., P., none."""
    return "".join(letter for letter, bit in FLAGS.items() if flags & bit and letter != "A") or "none"


def _gue(ip: Ip, gue_port: int) -> tuple[int, bytes] | None:
    """The version and the bytes of the packet inside (draft-ietf-intarea-gue, variant 0)."""
    is_gue = ip.protocol == IPPROTO_UDP and len(ip.payload) >= 12 and _number(ip.payload, 2) == gue_port
    if not is_gue or ip.payload[9] not in INNER or ip.payload[8] & 0xE0:
        return None
    return INNER[ip.payload[9]], ip.payload[12 + 4 * (ip.payload[8] & 0x1F) :]


def _other_member(ip: Ip, gue_port: int) -> str:
    """The second chance, struct second_chance in xdp/bpf/common/tunnel.h."""
    if not _gue(ip, gue_port) or ip.payload[12:14] != b"X2" or not ip.payload[8] & 0x1F:
        return ""
    size = 4 if ip.payload[14] == 4 else 16
    return f", second chance {ip_address(ip.payload[16 : 16 + size])}"
