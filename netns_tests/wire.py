"""Frames by hand, for the model: parsing a frame into its flow, and giving it another flow.

Enters a frame; leaves a Packet, or Ends with the reason why the balancer does not use it. No checksum is computed from
a difference of fields: what a checksum covers is summed before and after, and stays as right or as wrong as it was.
Addresses are in network byte order (4 or 16 bytes), ports plain integers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from socket import IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_TCP, IPPROTO_UDP
from typing import NamedTuple

from netns_tests.packets import ETHERNET_HEADER_SIZE

FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10
FRAGMENT = 44
EXTENSIONS = {0, 43, 60}  # hop-by-hop options, routing, destination options
IP_HEADER_SIZE = {4: 20, 6: 40}
ICMP_HEADER_SIZE = 8
ICMP_OF = {4: IPPROTO_ICMP, 6: IPPROTO_ICMPV6}
ICMP_ERRORS = {4: {3, 11, 12}, 6: {1, 2, 3, 4}}  # RFC 792, RFC 4443


class Flow(NamedTuple):
    """A flow as its packets carry it."""

    source: bytes
    source_port: int
    destination: bytes
    destination_port: int
    protocol: int

    def turned(self) -> Flow:
        return Flow(self.destination, self.destination_port, self.source, self.source_port, self.protocol)


@dataclass(frozen=True)
class Hop:
    """Where a frame goes: interface and MAC addresses."""

    ifindex: int
    destination: bytes
    source: bytes


@dataclass
class Packet:
    """A parsed frame. An ICMP error has the flow that it quotes, turned round."""

    frame: bytearray
    version: int
    l4_size: int
    protocol: int
    flow: Flow
    tcp_flags: int = 0

    @property
    def l4(self) -> int:
        return ETHERNET_HEADER_SIZE + IP_HEADER_SIZE[self.version]

    @property
    def is_error(self) -> bool:
        return self.protocol == ICMP_OF[self.version]

    @property
    def opens(self) -> bool:
        return self.tcp_flags & (SYN | ACK) == SYN

    @property
    def belongs_to_open_connection(self) -> bool:
        return self.flow.protocol == IPPROTO_TCP and not self.opens


class Ends(Exception):
    """The packet's story ends early: the name of the reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def address(text: str) -> bytes:
    return ip_address(text).packed


# Parsing


def number(data: bytes | bytearray, at: int, size: int = 2) -> int:
    return int.from_bytes(data[at : at + size], "big")


def parse(frame: bytes) -> Packet:
    """Raises Ends with a DROP reason for what a service cannot use, a PASS reason for what is no service's."""
    version = version_of(frame)
    l4 = ETHERNET_HEADER_SIZE + IP_HEADER_SIZE[version]
    if len(frame) < l4 or frame[ETHERNET_HEADER_SIZE] >> 4 != version:
        raise Ends("PASS_MALFORMED")
    protocol, l4_size = (parse_ip4 if version == 4 else parse_ip6)(frame)
    addresses = addresses_at(frame, ETHERNET_HEADER_SIZE, version)
    packet = Packet(bytearray(frame), version, l4_size, protocol, Flow(addresses[0], 0, addresses[1], 0, protocol))
    {IPPROTO_TCP: parse_tcp, IPPROTO_UDP: parse_udp, ICMP_OF[version]: parse_icmp}.get(protocol, parse_other)(packet)
    return packet


def version_of(frame: bytes) -> int:
    ethertype = number(frame, 12)
    if ethertype not in (0x0800, 0x86DD):
        raise Ends("PASS_NOT_IP")
    return 4 if ethertype == 0x0800 else 6


def addresses_at(frame: bytes | bytearray, ip: int, version: int) -> tuple[bytes, bytes]:
    at, size = (ip + 12, 4) if version == 4 else (ip + 8, 16)
    return bytes(frame[at : at + size]), bytes(frame[at + size : at + 2 * size])


def parse_ip4(frame: bytes) -> tuple[int, int]:
    """Protocol and size of what is behind the header."""
    ip = frame[ETHERNET_HEADER_SIZE:]
    header_words, fragment, total = ip[0] & 0xF, number(ip, 6), number(ip, 2)
    if header_words < 5:
        raise Ends("PASS_MALFORMED")
    if fragment & 0x1FFF:
        raise Ends("PASS_FRAGMENT")
    if header_words > 5:
        raise Ends("DROP_IP_OPTIONS")
    if fragment & 0x2000:
        raise Ends("DROP_FRAGMENT")
    if not 20 <= total <= len(ip):
        raise Ends("DROP_MALFORMED")
    return ip[9], total - 20


def parse_ip6(frame: bytes) -> tuple[int, int]:
    ip = frame[ETHERNET_HEADER_SIZE:]
    payload = number(ip, 4)
    if 40 + payload > len(ip):
        raise Ends("DROP_MALFORMED")
    return ip[6], payload


def ports_at(frame: bytes | bytearray, at: int) -> tuple[int, int]:
    return number(frame, at), number(frame, at + 2)


def need(packet: Packet, size: int) -> None:
    """A transport header that the frame itself cuts off is left to the host."""
    if len(packet.frame) < packet.l4 + size:
        raise Ends("PASS_MALFORMED")


def set_ports(packet: Packet) -> None:
    source_port, destination_port = ports_at(packet.frame, packet.l4)
    packet.flow = packet.flow._replace(source_port=source_port, destination_port=destination_port)


def parse_tcp(packet: Packet) -> None:
    need(packet, 20)
    header_size = (packet.frame[packet.l4 + 12] >> 4) * 4
    if not 20 <= header_size <= packet.l4_size:
        raise Ends("DROP_MALFORMED")
    packet.tcp_flags = packet.frame[packet.l4 + 13]
    set_ports(packet)


def parse_udp(packet: Packet) -> None:
    need(packet, 8)
    if not 8 <= number(packet.frame, packet.l4 + 4) <= packet.l4_size:
        raise Ends("DROP_MALFORMED")
    set_ports(packet)


def parse_icmp(packet: Packet) -> None:
    need(packet, ICMP_HEADER_SIZE)
    if packet.frame[packet.l4] not in ICMP_ERRORS[packet.version]:
        raise Ends("PASS_ICMP")
    shortest = ICMP_HEADER_SIZE + IP_HEADER_SIZE[packet.version] + 8
    need(packet, shortest)
    if packet.l4_size < shortest:
        raise Ends("PASS_MALFORMED")
    quoted = quoted_flow(packet)
    if quoted.source != packet.flow.destination or quoted.protocol not in (IPPROTO_TCP, IPPROTO_UDP):
        raise Ends("PASS_ICMP")
    packet.flow = quoted.turned()


def quoted_flow(packet: Packet) -> Flow:
    ip, frame = packet.l4 + ICMP_HEADER_SIZE, packet.frame
    if packet.version == 4 and (frame[ip] != 0x45 or number(frame, ip + 6) & 0x1FFF):
        raise Ends("PASS_ICMP")
    if frame[ip] >> 4 != packet.version:
        raise Ends("PASS_ICMP")
    source, destination = addresses_at(frame, ip, packet.version)
    source_port, destination_port = ports_at(frame, ip + IP_HEADER_SIZE[packet.version])
    return Flow(source, source_port, destination, destination_port, frame[ip + (9 if packet.version == 4 else 6)])


def parse_other(packet: Packet) -> None:
    if packet.version == 6 and packet.protocol in EXTENSIONS:
        raise Ends("PASS_IPV6_EXTENSION")
    if packet.version == 4 or packet.protocol != FRAGMENT:
        raise Ends("PASS_NOT_TCP_OR_UDP")
    need(packet, 8)
    raise Ends("PASS_FRAGMENT" if number(packet.frame, packet.l4 + 2) & 0xFFF8 else "DROP_FRAGMENT")


def refused_flow(frame: bytes) -> Flow | None:
    """The flow of a packet that cannot be balanced, for finding out whose it is; None where no ports are to be read."""
    version, ip = version_of(frame), ETHERNET_HEADER_SIZE
    ports, protocol = ip + IP_HEADER_SIZE[version], frame[ip + (9 if version == 4 else 6)]
    if len(frame) < ports + 8:
        return None
    if version == 4:
        ports = ip + (frame[ip] & 0xF) * 4
    elif protocol == FRAGMENT:
        protocol, ports = frame[ports], ports + 8
    if len(frame) < ports + 4:
        return None
    source, destination = addresses_at(frame, ip, version)
    source_port, destination_port = ports_at(frame, ports)
    return Flow(source, source_port, destination, destination_port, protocol)


# Rewriting


def internet_sum(data: bytes | bytearray) -> int:
    """The one's complement sum of RFC 1071, zero for a multiple of 0xffff."""
    padded = bytes(data) + bytes(len(data) % 2)
    return int.from_bytes(padded, "big") % 0xFFFF


@contextlib.contextmanager
def checksum_follows(frame: bytearray, at: int, covered: Callable[[], bytes], optional: bool = False) -> Iterator[None]:
    """Set the checksum at `at`, itself among what is covered, so that the sum is the same after the block as before.

    `optional` is UDP's: zero says that there is none (RFC 768), and a sum of zero is sent as 0xffff.
    """
    before, check = internet_sum(covered()), number(frame, at)
    yield
    if optional and not check:
        return
    rest = internet_sum(covered()) - number(frame, at)
    updated = (before - rest) % 0xFFFF
    frame[at : at + 2] = (updated or 0xFFFF * optional).to_bytes(2, "big")


def set_addresses(frame: bytearray, ip: int, source: bytes, destination: bytes) -> None:
    at, size = (ip + 12, 4) if len(source) == 4 else (ip + 8, 16)
    frame[at : at + 2 * size] = source + destination


def set_ports_at(frame: bytearray, at: int, flow: Flow) -> None:
    frame[at : at + 4] = flow.source_port.to_bytes(2, "big") + flow.destination_port.to_bytes(2, "big")


def ip_checksum_follows(frame: bytearray, ip: int, version: int) -> contextlib.AbstractContextManager[None]:
    if version == 6:
        return contextlib.nullcontext()
    return checksum_follows(frame, ip + 10, lambda: bytes(frame[ip : ip + 20]))


def l4_checksum_follows(packet: Packet) -> contextlib.AbstractContextManager[None]:
    """TCP, UDP and ICMPv6 cover the addresses of the pseudo header, ICMP does not."""

    def covered() -> bytes:
        addresses = b"".join(addresses_at(packet.frame, ETHERNET_HEADER_SIZE, packet.version))
        segment = bytes(packet.frame[packet.l4 : packet.l4 + packet.l4_size])
        return segment if packet.protocol == IPPROTO_ICMP else addresses + segment

    at = {IPPROTO_TCP: 16, IPPROTO_UDP: 6}.get(packet.protocol, 2)
    return checksum_follows(packet.frame, packet.l4 + at, covered, optional=packet.protocol == IPPROTO_UDP)


def quoted_l4_checksum_follows(packet: Packet) -> contextlib.AbstractContextManager[None]:
    """A quote may be cut off: only what changes is summed, and TCP's checksum may not be there at all."""
    ip = packet.l4 + ICMP_HEADER_SIZE
    l4 = ip + IP_HEADER_SIZE[packet.version]
    is_udp = packet.flow.protocol == IPPROTO_UDP
    check = l4 + (6 if is_udp else 16)
    if packet.l4 + packet.l4_size < check + 2:
        return contextlib.nullcontext()

    def changing() -> bytes:
        addresses = b"".join(addresses_at(packet.frame, ip, packet.version))
        return addresses + bytes(packet.frame[l4 : l4 + 4] + packet.frame[check : check + 2])

    return checksum_follows(packet.frame, check, changing, optional=is_udp)


def translate(packet: Packet, new: Flow) -> None:
    """The packet gets a new flow; in an ICMP error the quoted packet gets it turned round (RFC 5508, section 4.2)."""
    with ip_checksum_follows(packet.frame, ETHERNET_HEADER_SIZE, packet.version), l4_checksum_follows(packet):
        set_addresses(packet.frame, ETHERNET_HEADER_SIZE, new.source, new.destination)
        if packet.is_error:
            translate_quote(packet, new.turned())
        else:
            set_ports_at(packet.frame, packet.l4, new)


def translate_quote(packet: Packet, new: Flow) -> None:
    ip = packet.l4 + ICMP_HEADER_SIZE
    with ip_checksum_follows(packet.frame, ip, packet.version), quoted_l4_checksum_follows(packet):
        set_addresses(packet.frame, ip, new.source, new.destination)
        set_ports_at(packet.frame, ip + IP_HEADER_SIZE[packet.version], new)


def send_to(packet: Packet, hop: Hop) -> None:
    """One hop less to live, and the next link's addresses."""
    with ip_checksum_follows(packet.frame, ETHERNET_HEADER_SIZE, packet.version):
        packet.frame[ttl_at(packet)] -= 1
    packet.frame[:12] = hop.destination + hop.source


def ttl_at(packet: Packet) -> int:
    return ETHERNET_HEADER_SIZE + (8 if packet.version == 4 else 7)


def ttl(packet: Packet) -> int:
    return packet.frame[ttl_at(packet)]
