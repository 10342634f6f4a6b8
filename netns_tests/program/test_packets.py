"""The builders themselves: what tables of cases rely on."""

from __future__ import annotations

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach, IPv6
from scapy.layers.l2 import Ether

from netns_tests.oracle import packets
from netns_tests.oracle.packets import Case, Verdict

FRAMES = {
    "tcp4": packets.tcp4(flags="PA", payload=b"GET /"),
    "tcp6": packets.tcp6(flags="PA", payload=b"GET /"),
    "udp4": packets.udp4(payload=b"odd"),
    "udp6": packets.udp6(payload=b"odd"),
    "icmp_error4": packets.icmp_error4(packets.tcp4()),
    "icmp_error6": packets.icmp_error6(packets.tcp6()),
}


def ones_complement_sum(data: bytes) -> int:
    """RFC 1071: 0xffff over a header or datagram whose checksum is right."""
    padded = data + bytes(len(data) % 2)
    total = sum(int.from_bytes(padded[i : i + 2], "big") for i in range(0, len(padded), 2))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def pseudo_header(packet: IP | IPv6, transport: bytes) -> bytes:
    """Addresses, length and protocol, in the order and sizes that sum alike for both families."""
    addresses = bytes(packet)[12:20] if packet.version == 4 else bytes(packet)[8:40]
    protocol = packet.proto if packet.version == 4 else packet.nh
    return addresses + len(transport).to_bytes(4, "big") + int(protocol).to_bytes(4, "big")


@pytest.mark.parametrize("name", FRAMES)
def test_checksums_and_lengths_of_every_frame_are_right(name: str) -> None:
    ip = FRAMES[name][packets.ETHERNET_HEADER_SIZE :]
    packet = IP(ip) if ip[0] >> 4 == 4 else IPv6(ip)
    header_size = 20 if packet.version == 4 else 40
    transport = ip[header_size:]
    # ICMP for IPv4 alone has no pseudo header (RFC 792).
    pseudo = b"" if name == "icmp_error4" else pseudo_header(packet, transport)
    assert ones_complement_sum(pseudo + transport) == 0xFFFF
    if packet.version == 4:
        assert ones_complement_sum(ip[:20]) == 0xFFFF
        assert packet.len == len(ip)
    else:
        assert packet.plen == len(transport)


def test_frames_go_from_the_client_to_the_vip() -> None:
    frame = Ether(packets.tcp4())
    assert (frame.src, frame.dst) == (packets.CLIENT_MAC, packets.LB_MAC)
    assert (frame[IP].src, frame[IP].dst) == (packets.CLIENT4, packets.VIP4)
    assert (frame[TCP].sport, frame[TCP].dport) == (packets.CLIENT_PORT, packets.SERVICE_PORT)


def test_header_field_that_a_case_sets_stays_as_set() -> None:
    assert Ether(packets.udp4(chksum=0, payload=b"x"))[UDP].chksum == 0
    odd = packets.frame(packets.ip4(ttl=1, chksum=0xBAD), packets.tcp())
    assert (Ether(odd)[IP].ttl, Ether(odd)[IP].chksum) == (1, 0xBAD)


def test_icmp_error_of_ipv4_quotes_the_header_and_eight_bytes() -> None:
    quoted = packets.tcp4(src=packets.VIP4, dst=packets.CLIENT4, payload=b"a" * 100)
    error = Ether(packets.icmp_error4(quoted, type=3, code=4, nexthopmtu=1400))
    assert bytes(error[ICMP])[8:] == quoted[14:42]
    assert (error[IP].dst, error[ICMP].code, error[ICMP].nexthopmtu) == (packets.VIP4, 4, 1400)


def test_icmp_error_of_ipv6_quotes_what_fits_the_minimum_mtu() -> None:
    quoted = packets.udp6(payload=b"a" * 1400)
    error = Ether(packets.icmp_error6(quoted))
    assert len(error[IPv6]) == 1280
    assert bytes(error[ICMPv6DestUnreach])[8:] == quoted[14:][:1232]


def test_case_without_expected_bytes_leaves_as_it_came() -> None:
    untouched = Case("not for a VIP", packets.tcp4(), Verdict.PASS, "no_service")
    assert untouched.leaves == untouched.packet
    rewritten = Case("for a VIP", packets.tcp4(), Verdict.TX, "forwarded", packets.udp4())
    assert rewritten.leaves == packets.udp4()
