"""Frames by hand, for the model: parsing a frame into its flow, and giving it another flow.

Enters a frame without VLAN tags; leaves a Packet, or Ends with the reason why the balancer does not use it. No
checksum is computed from a difference of fields: what a checksum covers is summed before and after, and stays as right
or as wrong as it was. Addresses are in network byte order (4 or 16 bytes), ports plain integers.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from socket import IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_IPIP, IPPROTO_IPV6, IPPROTO_TCP, IPPROTO_UDP
from typing import NamedTuple

from netns_tests.oracle.packets import ETHERNET_HEADER_SIZE

FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10
FRAGMENT = 44
EXTENSIONS = {0, 43, 60}  # hop-by-hop options, routing, destination options
IP_HEADER_SIZE = {4: 20, 6: 40}
ICMP_HEADER_SIZE = 8
ICMP_OF = {4: IPPROTO_ICMP, 6: IPPROTO_ICMPV6}
ICMP_ERRORS = {4: {3, 11, 12}, 6: {1, 2, 3, 4}}  # RFC 792, RFC 4443
ECHO_REQUEST, ECHO_REPLY = {4: 8, 6: 128}, {4: 0, 6: 129}
ETHERTYPES = {4: b"\x08\x00", 6: b"\x86\xdd"}
ANSWER_TTL = 64


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


@dataclass(frozen=True)
class Fragment:
    """The datagram's ID, and where in the frame this piece of it starts."""

    datagram: bytes
    is_first: bool
    start: int


@dataclass
class Packet:
    """A parsed frame, which is changed in place. An ICMP error has the flow that it quotes, turned round; a fragment's
    flow has no ports."""

    frame: bytearray
    version: int
    l4_size: int
    protocol: int
    flow: Flow
    tcp_flags: int = 0
    fragment: Fragment | None = None

    @property
    def l4(self) -> int:
        return ETHERNET_HEADER_SIZE + IP_HEADER_SIZE[self.version]

    @property
    def is_error(self) -> bool:
        return self.protocol == ICMP_OF[self.version] and self.fragment is None

    @property
    def ip_size(self) -> int:
        return IP_HEADER_SIZE[self.version] + self.l4_size

    @property
    def is_udp(self) -> bool:
        return self.protocol == IPPROTO_UDP and self.fragment is None

    @property
    def traffic_class(self) -> int:
        """DSCP and ECN."""
        ip = ETHERNET_HEADER_SIZE
        return self.frame[ip + 1] if self.version == 4 else number(self.frame, ip) >> 4 & 0xFF

    @property
    def opens(self) -> bool:
        return self.tcp_flags & (SYN | ACK) == SYN

    @property
    def belongs_to_open_connection(self) -> bool:
        return self.flow.protocol == IPPROTO_TCP and not self.opens


NO_CLIENTS = [
    *map(ip_network, ("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/4", "240.0.0.0/4")),
    *map(ip_network, ("::/64", "fe80::/10", "ff00::/8")),
]


def is_martian(packed: bytes) -> bool:
    """An address that no single host sends from."""
    host = ip_address(packed)
    return any(host in network for network in NO_CLIENTS)


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


def parse(frame: bytearray) -> Packet:
    """Raises Ends with a DROP reason for what a service cannot use, a PASS reason for what is no service's."""
    version = version_of(frame)
    l4 = ETHERNET_HEADER_SIZE + IP_HEADER_SIZE[version]
    if len(frame) < l4 or frame[ETHERNET_HEADER_SIZE] >> 4 != version:
        raise Ends("PASS_MALFORMED")
    packet = (parse_ip4 if version == 4 else parse_ip6)(frame)
    if packet.fragment is None:
        kinds = {IPPROTO_TCP: parse_tcp, IPPROTO_UDP: parse_udp, ICMP_OF[version]: parse_icmp}
        kinds.get(packet.protocol, parse_other)(packet)
    return packet


def version_of(frame: bytes | bytearray) -> int:
    ethertype = number(frame, 12)
    if ethertype not in (0x0800, 0x86DD):
        raise Ends("PASS_NOT_IP")
    return 4 if ethertype == 0x0800 else 6


def addresses_at(frame: bytes | bytearray, ip: int, version: int) -> tuple[bytes, bytes]:
    at, size = (ip + 12, 4) if version == 4 else (ip + 8, 16)
    return bytes(frame[at : at + size]), bytes(frame[at + size : at + 2 * size])


def packet_between(frame: bytearray, version: int, l4_size: int, protocol: int) -> Packet:
    source, destination = addresses_at(frame, ETHERNET_HEADER_SIZE, version)
    return Packet(frame, version, l4_size, protocol, Flow(source, 0, destination, 0, protocol))


def parse_ip4(frame: bytearray) -> Packet:
    ip = frame[ETHERNET_HEADER_SIZE:]
    header_words, fragment, total = ip[0] & 0xF, number(ip, 6), number(ip, 2)
    if header_words < 5:
        raise Ends("PASS_MALFORMED")
    if header_words > 5:
        raise Ends("PASS_FRAGMENT" if fragment & 0x1FFF else "DROP_IP_OPTIONS")
    if not 20 <= total <= len(ip):
        raise Ends("DROP_MALFORMED")
    packet = packet_between(frame, 4, total - 20, ip[9])
    if fragment & 0x3FFF:
        packet.fragment = Fragment(bytes(ip[4:6]), not fragment & 0x1FFF, packet.l4)
    return packet


def parse_ip6(frame: bytearray) -> Packet:
    ip = frame[ETHERNET_HEADER_SIZE:]
    payload = number(ip, 4)
    if 40 + payload > len(ip):
        raise Ends("DROP_MALFORMED")
    packet = packet_between(frame, 6, payload, ip[6])
    if packet.protocol == FRAGMENT:
        need(packet, 8)
        header = frame[packet.l4 : packet.l4 + 8]
        packet.fragment = Fragment(bytes(header[4:]), not number(header, 2) & 0xFFF8, packet.l4 + 8)
        packet.flow = packet.flow._replace(protocol=header[0])
    return packet


def is_atomic_fragment(frame: bytes | bytearray) -> bool:
    """A whole IPv6 packet behind a fragment header (RFC 6946)."""
    ip = frame[ETHERNET_HEADER_SIZE:]
    if number(frame, 12) != 0x86DD or len(ip) < 48 or ip[0] >> 4 != 6 or ip[6] != FRAGMENT:
        return False
    return 8 <= number(ip, 4) <= len(ip) - 40 and not number(ip, 42) & 0xFFF9


def without_fragment_header(frame: bytes | bytearray) -> bytes:
    ip, payload = frame[ETHERNET_HEADER_SIZE:], number(frame, ETHERNET_HEADER_SIZE + 4) - 8
    return bytes(frame[:ETHERNET_HEADER_SIZE] + ip[:4] + payload.to_bytes(2, "big") + ip[40:41] + ip[7:40] + ip[48:])


def tags_and_frame(tagged: bytes) -> tuple[bytes, bytearray]:
    """Up to two VLAN tags, and the frame without them. A frame with three, or with next to nothing behind them, keeps
    them."""
    if len(tagged) < 32 or not is_tag(tagged[12:14]):
        return b"", bytearray(tagged)
    end = 20 if is_tag(tagged[16:18]) else 16
    if end == 20 and is_tag(tagged[20:22]):
        return b"", bytearray(tagged)
    return tagged[12:end], bytearray(tagged[:12] + tagged[end:])


def is_tag(ethertype: bytes) -> bool:
    return ethertype in (b"\x81\x00", b"\x88\xa8")  # IEEE 802.1Q, 802.1ad


def ports_at(frame: bytes | bytearray, at: int) -> tuple[int, int]:
    return number(frame, at), number(frame, at + 2)


def need(packet: Packet, size: int) -> None:
    """A transport header that the frame itself cuts off is passed to the host."""
    if len(packet.frame) < packet.l4 + size:
        raise Ends("PASS_MALFORMED")


def set_ports(packet: Packet) -> None:
    at = packet.fragment.start if packet.fragment else packet.l4
    source_port, destination_port = ports_at(packet.frame, at)
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
    raise Ends("PASS_NOT_TCP_OR_UDP")


def refused_flow(frame: bytes | bytearray) -> Flow | None:
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


def checksum(covered: bytes, or_ones: bool = False) -> bytes:
    """or_ones: UDP's, where a sum of zero is sent as 0xffff."""
    value = -internet_sum(covered) % 0xFFFF
    return (value or 0xFFFF * or_ones).to_bytes(2, "big")


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
    at = {IPPROTO_TCP: 16, IPPROTO_UDP: 6}.get(packet.protocol, 2)
    optional = packet.protocol == IPPROTO_UDP
    return checksum_follows(packet.frame, packet.l4 + at, lambda: l4_covered(packet), optional)


def l4_covered(packet: Packet) -> bytes:
    addresses = b"".join(addresses_at(packet.frame, ETHERNET_HEADER_SIZE, packet.version))
    segment = bytes(packet.frame[packet.l4 : packet.l4 + packet.l4_size])
    if packet.protocol == IPPROTO_ICMP:
        return segment
    return addresses + struct.pack("!II", packet.l4_size, packet.protocol) + segment


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
    """One hop less to live, where it has any left, and the next link's addresses."""
    with ip_checksum_follows(packet.frame, ETHERNET_HEADER_SIZE, packet.version):
        packet.frame[ttl_at(packet)] -= ttl(packet) > 1
    packet.frame[:12] = hop.destination + hop.source


def ttl_at(packet: Packet) -> int:
    return ETHERNET_HEADER_SIZE + (8 if packet.version == 4 else 7)


def ttl(packet: Packet) -> int:
    return packet.frame[ttl_at(packet)]


def quic_server_id(packet: Packet, lengths: Mapping[int, int]) -> tuple[int, bytes] | None:
    """Config rotation codepoint and server ID in the destination connection ID; lengths: codepoint -> bytes of its IDs.

    RFC 9000, sections 17.2 and 17.3; draft-ietf-quic-load-balancers. None where there is none to be read.
    """
    quic = bytes(packet.frame[packet.l4 + 8 :])
    if len(quic) < 7:
        return None
    is_long = bool(quic[0] & 0x80)
    connection_id = quic[6:] if is_long else quic[1:]
    config = connection_id[0] >> 5
    length = lengths.get(config, 0)
    if not length or len(connection_id) < 1 + length or (is_long and quic[5] < 1 + length):
        return None
    return config, connection_id[1 : 1 + length]


# The maximum segment size


def clamp_mss(packet: Packet, mss: int) -> None:
    """In the MSS option of a TCP packet, if it has one that says more (RFC 9293, section 3.2)."""
    at = mss_at(packet)
    if at is not None and number(packet.frame, at) > mss:
        with l4_checksum_follows(packet):
            packet.frame[at : at + 2] = mss.to_bytes(2, "big")


def mss_at(packet: Packet) -> int | None:
    """Where in the frame the value is; what is behind an option of no length cannot be read."""
    at, end = packet.l4 + 20, packet.l4 + (packet.frame[packet.l4 + 12] >> 4) * 4
    while at + 4 <= end and packet.frame[at] != 0:
        kind, size = packet.frame[at], packet.frame[at + 1]
        if kind == 2 and size == 4:
            return at + 2
        if kind != 1 and size < 2:
            return None
        at += 1 if kind == 1 else size
    return None


# Tunnels


@dataclass(frozen=True)
class Tunnel:
    """The outer addresses before the flow's bits are in them, and what varies by flow."""

    source: bytes
    destination: bytes
    source_bits: int
    hash32: int


@dataclass(frozen=True)
class Gue:
    """Between the outer IP header and the packet. second_chance: the address of the slot's other member."""

    port: int
    has_checksum: bool
    second_chance: bytes | None

    @property
    def size(self) -> int:
        return 12 if self.second_chance is None else 32


def outer_size(destination: bytes, gue: Gue | None) -> int:
    return (20 if len(destination) == 4 else 40) + (gue.size if gue else 0)


def encapsulated(packet: Packet, tunnel: Tunnel, gue: Gue | None) -> bytes:
    """The frame with the headers of ipip (RFC 2003, 2473, 4213) or GUE in front of the packet."""
    inner = bytes(packet.frame[ETHERNET_HEADER_SIZE:][: packet.ip_size])
    behind = bytes(packet.frame[ETHERNET_HEADER_SIZE:][packet.ip_size :])
    protocol = IPPROTO_IPIP if packet.version == 4 else IPPROTO_IPV6
    payload = gue_headers(packet, tunnel, gue, protocol, inner) + inner if gue else inner
    outer = outer_ip(packet, tunnel, IPPROTO_UDP if gue else protocol, len(payload))
    ethertype = ETHERTYPES[4 if len(tunnel.destination) == 4 else 6]
    return bytes(packet.frame[:12]) + ethertype + outer + payload + behind


def varied_source(tunnel: Tunnel) -> bytes:
    """Its low bits follow the flow."""
    bits = tunnel.hash32 & (1 << tunnel.source_bits) - 1
    return (int.from_bytes(tunnel.source, "big") | bits).to_bytes(len(tunnel.source), "big")


def outer_ip(packet: Packet, tunnel: Tunnel, protocol: int, payload_size: int) -> bytes:
    addresses = varied_source(tunnel) + tunnel.destination
    if len(tunnel.destination) == 16:
        first = 6 << 28 | packet.traffic_class << 20 | tunnel.hash32 & 0xFFFFF
        return struct.pack("!IHBB", first, payload_size, protocol, ANSWER_TTL) + addresses
    before = struct.pack("!BBHHHBB", 0x45, packet.traffic_class, 20 + payload_size, 0, 0x4000, ANSWER_TTL, protocol)
    return before + checksum(before + addresses) + addresses


def gue_headers(packet: Packet, tunnel: Tunnel, gue: Gue, protocol: int, inner: bytes) -> bytes:
    size = gue.size + len(inner)
    ports_and_size = struct.pack("!HHH", 0xC000 | tunnel.hash32 >> 16, gue.port, size)
    data = second_chance_data(gue.second_chance) if gue.second_chance else b""
    header = bytes([len(data) // 4, protocol, 0, 0]) + data
    if not (gue.has_checksum and l4_checksum_covers_all(packet)):
        return ports_and_size + bytes(2) + header
    pseudo = varied_source(tunnel) + tunnel.destination + struct.pack("!HH", IPPROTO_UDP, size)
    covered = internet_sum(pseudo + ports_and_size + header + inner) - inner_fault(packet)
    return ports_and_size + (-covered % 0xFFFF or 0xFFFF).to_bytes(2, "big") + header


def second_chance_data(other: bytes) -> bytes:
    return b"X2" + bytes([4 if len(other) == 4 else 6, 0]) + other.ljust(16, b"\0")


def l4_checksum_covers_all(packet: Packet) -> bool:
    if packet.protocol == IPPROTO_UDP:
        udp = packet.frame[packet.l4 : packet.l4 + 8]
        return packet.fragment is None and number(udp, 6) != 0 and number(udp, 4) == packet.l4_size
    return packet.fragment is None


def inner_fault(packet: Packet) -> int:
    """By how much its checksums are wrong: so much is the outer one, for which the packet is not read."""
    fault = internet_sum(l4_covered(packet))
    if packet.version == 4:
        fault += internet_sum(packet.frame[ETHERNET_HEADER_SIZE : packet.l4])
    return fault


# Answers


def is_echo_request(packet: Packet) -> bool:
    return packet.frame[packet.l4] == ECHO_REQUEST[packet.version] and packet.frame[packet.l4 + 1] == 0


def echo_reply(frame: bytearray) -> bytes:
    """To an echo request whose addresses the caller has looked at."""
    version, ip = version_of(frame), ETHERNET_HEADER_SIZE
    source, destination = addresses_at(frame, ip, version)
    l4 = ip + IP_HEADER_SIZE[version]
    reply = frame[6:12] + frame[:6] + frame[12:]
    with ip_checksum_follows(reply, ip, version):
        set_addresses(reply, ip, destination, source)
        reply[ip + (8 if version == 4 else 7)] = ANSWER_TTL
    with checksum_follows(reply, l4 + 2, lambda: bytes(reply[l4 : l4 + 4])):
        reply[l4] = ECHO_REPLY[version]
    if not number(reply, l4 + 2):  # a message of zeros would add up to zero
        reply[l4 + 2 : l4 + 4] = b"\xff\xff"
    return bytes(reply)


QUOTED = {4: 128, 6: 256}
QUOTED_OF_EXPIRED = {4: 28, 6: 48}


def too_big_answer(packet: Packet, mtu: int) -> bytes:
    """Fragmentation needed (RFC 1191) or packet too big (RFC 4443, section 3.2), from the VIP to the sender."""
    kind = b"\x03\x04" if packet.version == 4 else b"\x02\x00"
    return error_answer(packet, kind, mtu, QUOTED[packet.version])


def time_exceeded_answer(packet: Packet) -> bytes:
    """RFC 792; RFC 4443, section 3.3."""
    kind = b"\x0b\x00" if packet.version == 4 else b"\x03\x00"
    return error_answer(packet, kind, 0, QUOTED_OF_EXPIRED[packet.version])


def error_answer(packet: Packet, kind: bytes, more: int, size: int) -> bytes:
    """About the packet, of which `size` bytes are quoted."""
    version = packet.version
    quoted = bytes(packet.frame[ETHERNET_HEADER_SIZE:][:size])
    source, destination = addresses_at(quoted, 0, version)
    rest = struct.pack("!I", more) + quoted
    header, pseudo = answer_header(destination, source, 4 + len(rest))
    ethernet = bytes(packet.frame[6:12] + packet.frame[:6]) + ETHERTYPES[version]
    return ethernet + header + kind + checksum(pseudo + kind + rest) + rest


def answer_header(source: bytes, destination: bytes, size: int) -> tuple[bytes, bytes]:
    """The IP header of an ICMP message of the balancer's own, and what the message's checksum covers of it."""
    addresses = source + destination
    if len(source) == 4:
        before = struct.pack("!BBHHHBB", 0x45, 0, 20 + size, 0, 0, ANSWER_TTL, IPPROTO_ICMP)
        return before + checksum(before + addresses) + addresses, b""
    before = struct.pack("!IHBB", 6 << 28, size, IPPROTO_ICMPV6, ANSWER_TTL)
    return before + addresses, addresses + struct.pack("!II", size, IPPROTO_ICMPV6)
