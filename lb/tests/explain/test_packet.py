"""Frames that `xdp-lb explain` makes and reads."""

from __future__ import annotations

import struct
from ipaddress import ip_address
from socket import IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_TCP, IPPROTO_UDP

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lb.errors import InvalidInput
from lb.explain.packet import (
    ACK,
    ICMP_OF,
    SYN,
    Flow,
    Kind,
    check_size,
    checksum,
    describe,
    flags_text,
    make_frame,
    parse_flags,
    parse_hex,
    read,
)

CLIENT_MAC, OWN_MAC = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")
ENDS = {4: ("192.0.2.7", "203.0.113.10"), 6: ("2001:db8::7", "2001:db8::10")}
ports = st.integers(1, 65535)


def flow(version: int, protocol: int, source_port: int = 40000, port: int = 443) -> Flow:
    client, vip = map(ip_address, ENDS[version])
    return Flow(protocol, client, source_port, vip, port)


def made(version: int, protocol: int = IPPROTO_TCP, flags: int = SYN) -> bytes:
    return make_frame(flow(version, protocol), flags, CLIENT_MAC, OWN_MAC)


def ip4_of(payload: bytes, protocol: int = IPPROTO_UDP, fragment: int = 0) -> bytes:
    """An Ethernet frame with an IPv4 header of no checksum."""
    ends = b"".join(ip_address(end).packed for end in ENDS[4])
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 77, fragment, 64, protocol, 0)
    return OWN_MAC + CLIENT_MAC + b"\x08\0" + header + ends + payload


@given(st.sampled_from([4, 6]), st.sampled_from([IPPROTO_TCP, IPPROTO_UDP]), ports, ports, st.integers(0, 255))
def test_frame_is_read_as_it_was_made(version: int, protocol: int, source_port: int, port: int, flags: int) -> None:
    asked = flow(version, protocol, source_port, port)
    packet = read(make_frame(asked, flags, CLIENT_MAC, OWN_MAC))
    assert packet
    assert packet.flow == asked
    assert packet.kind is (Kind.TCP if protocol == IPPROTO_TCP else Kind.UDP)
    assert packet.tcp_flags == (flags if protocol == IPPROTO_TCP else 0)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [IPPROTO_TCP, IPPROTO_UDP, IPPROTO_ICMP])
def test_checksums_of_a_frame_that_is_made_are_right(version: int, protocol: int) -> None:
    number = ICMP_OF[version] if protocol == IPPROTO_ICMP else protocol
    frame = make_frame(flow(version, number)._replace(source_port=1), SYN, CLIENT_MAC, OWN_MAC)
    header = {4: 20, 6: 40}[version]
    segment, addresses = frame[14 + header :], frame[14 + header - (8 if version == 4 else 32) : 14 + header]
    pseudo = b"" if number == IPPROTO_ICMP else addresses + struct.pack("!II", len(segment), number)
    assert checksum(pseudo + segment) == 0
    assert version == 6 or checksum(frame[14:34]) == 0


def test_vlan_tags_are_seen_through() -> None:
    frame = made(4)
    tagged = frame[:12] + bytes.fromhex("88a8000781000008") + frame[12:]
    assert read(tagged) == read(frame)
    assert describe(tagged)[0] == "02:00:00:00:00:01 > 02:00:00:00:00:02, vlan 7, vlan 8"


def test_icmp_error_has_the_flow_that_it_quotes_turned_round() -> None:
    quoted = ip4_of(struct.pack("!HHHH", 443, 40000, 8, 0))[14:]
    backwards = quoted[:12] + quoted[16:20] + quoted[12:16] + quoted[20:]
    packet = read(ip4_of(struct.pack("!BBHI", 3, 3, 0, 0) + backwards, IPPROTO_ICMP))
    assert packet
    assert (packet.kind, packet.flow) == (Kind.ICMP_ERROR, flow(4, IPPROTO_UDP))


def test_error_about_somebody_elses_packet_has_no_flow() -> None:
    quoted = ip4_of(struct.pack("!HHHH", 443, 40000, 8, 0))[14:]
    packet = read(ip4_of(struct.pack("!BBHI", 3, 3, 0, 0) + quoted, IPPROTO_ICMP))
    assert packet
    assert packet.kind is Kind.OTHER


def test_fragments_share_a_datagram_and_only_the_first_has_ports() -> None:
    udp = struct.pack("!HHHH", 40000, 443, 100, 0)
    first, later = read(ip4_of(udp, fragment=0x2000)), read(ip4_of(bytes(16), fragment=2))
    assert first
    assert later
    assert (first.kind, first.datagram, first.flow) == (Kind.FIRST_FRAGMENT, 77, flow(4, IPPROTO_UDP))
    assert (later.kind, later.datagram, later.flow.destination_port) == (Kind.LATER_FRAGMENT, 77, 0)


@given(st.integers(0, 90))
def test_frame_that_is_cut_off_is_read_as_far_as_it_goes(size: int) -> None:
    frame = made(6)
    packet = read(frame[:size])
    whole = size >= len(frame)
    assert (packet is not None and packet.kind is Kind.TCP) == whole
    assert describe(frame[:size].ljust(14, b"\0"))


@pytest.mark.parametrize("damage", [(14, 0x46), (17, 0xFF), (46, 0xF0)])
def test_packet_whose_lengths_are_wrong_cannot_be_balanced(damage: tuple[int, int]) -> None:
    """IP options, a length beyond the frame, a TCP header longer than the packet."""
    at, value = damage
    frame = made(4)
    packet = read(frame[:at] + bytes([value]) + frame[at + 1 :])
    assert packet
    assert packet.kind is Kind.OTHER


def test_what_is_not_ip_is_not_read() -> None:
    arp = OWN_MAC + CLIENT_MAC + bytes.fromhex("0806") + bytes(28)
    assert read(arp) is None
    assert describe(arp) == ["02:00:00:00:00:01 > 02:00:00:00:00:02", "ethertype 0x0806"]


def test_tunnels_are_described_header_by_header() -> None:
    inner = made(6)[14:]
    second_chance = b"X2\4\0" + ip_address("10.1.0.12").packed + bytes(12)
    gue = struct.pack("!BBH", 5, 41, 0) + second_chance + inner
    udp = struct.pack("!HHHH", 50000, 6080, 8 + len(gue), 0)
    assert describe(ip4_of(udp + gue))[1:] == [
        "IPv4 192.0.2.7 > 203.0.113.10, ttl 64, UDP 50000 > 6080, GUE, second chance 10.1.0.12",
        "IPv6 2001:db8::7 > 2001:db8::10, hop limit 64, TCP 40000 > 443 [S]",
    ]
    assert describe(ip4_of(inner, 41))[1:] == [
        "IPv4 192.0.2.7 > 203.0.113.10, ttl 64",
        "IPv6 2001:db8::7 > 2001:db8::10, hop limit 64, TCP 40000 > 443 [S]",
    ]


def test_echo_request_is_described() -> None:
    frame = make_frame(flow(6, IPPROTO_ICMPV6, 0, 0), 0, CLIENT_MAC, OWN_MAC)
    assert describe(frame)[1] == "IPv6 2001:db8::7 > 2001:db8::10, hop limit 64, ICMPv6 type 128 code 0"


@pytest.mark.parametrize(("text", "flags"), [("S", SYN), ("sa", SYN | ACK), ("S.", SYN | ACK), ("", 0), ("AA", ACK)])
def test_flags_are_tcpdumps_letters(text: str, flags: int) -> None:
    assert parse_flags(text) == flags


@pytest.mark.parametrize(("flags", "text"), [(SYN, "S"), (SYN | ACK, "S."), (ACK, "."), (0, "none")])
def test_flags_are_shown_as_tcpdump_does(flags: int, text: str) -> None:
    assert flags_text(flags) == text


@pytest.mark.parametrize("text", ["0102ff", "01 02\nff", "01:02:ff", "0x0102ff"])
def test_hexadecimal_digits_may_have_spaces_or_colons_between_them(text: str) -> None:
    assert parse_hex(text) == b"\x01\x02\xff"


@pytest.mark.parametrize("text", ["012", "zz", "01-02"])
def test_what_is_not_hexadecimal_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="hex: not pairs of hexadecimal digits"):
        parse_hex(text)


@pytest.mark.parametrize("size", [0, 13, 3457, 9000])
def test_frame_that_the_kernel_would_not_take_is_refused(size: int) -> None:
    with pytest.raises(InvalidInput, match=f"packet of {size} bytes: out of range 14 to 3456"):
        check_size(bytes(size))
