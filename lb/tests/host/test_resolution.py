"""The frames of ARP and neighbour discovery are whole and those that a host sends."""

from __future__ import annotations

from ipaddress import ip_address

from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6ND_NS, ICMPv6NDOptSrcLLAddr, IPv6
from scapy.layers.l2 import ARP, Ether

from lb.host.resolution import End, resolution_frames

US, PEER = "02:00:00:00:00:0a", "02:00:00:00:00:0b"


def end(address: str, mac: str) -> End:
    return End(ip_address(address), bytes.fromhex(mac.replace(":", "")))


def test_arp_is_a_request_to_all_one_to_the_host_and_a_reply() -> None:
    packets = [Ether(frame) for frame in resolution_frames(end("10.0.0.9", PEER), end("10.0.0.1", US))]
    assert [(p.dst, p.src, p[ARP].op, p[ARP].psrc, p[ARP].pdst) for p in packets] == [
        ("ff:ff:ff:ff:ff:ff", PEER, 1, "10.0.0.9", "10.0.0.1"),
        (US, PEER, 1, "10.0.0.9", "10.0.0.1"),
        (US, PEER, 2, "10.0.0.9", "10.0.0.1"),
    ]


def test_neighbour_discovery_is_a_solicitation_to_the_group_one_to_the_host_and_an_advertisement() -> None:
    packets = [Ether(frame) for frame in resolution_frames(end("fe80::9", PEER), end("2001:db8::12:3456", US))]
    assert [(p.dst, p[IPv6].src, p[IPv6].dst, p[IPv6].hlim) for p in packets] == [
        ("33:33:ff:12:34:56", "fe80::9", "ff02::1:ff12:3456", 255),
        (US, "fe80::9", "2001:db8::12:3456", 255),
        (US, "fe80::9", "2001:db8::12:3456", 255),
    ]
    assert [p[ICMPv6ND_NS].tgt for p in packets[:2]] == ["2001:db8::12:3456"] * 2
    assert [p[ICMPv6NDOptSrcLLAddr].lladdr for p in packets[:2]] == [PEER] * 2
    assert (packets[2][ICMPv6ND_NA].tgt, packets[2][ICMPv6ND_NA].S) == ("fe80::9", 1)


def test_checksums_of_neighbour_discovery_are_right() -> None:
    for frame in resolution_frames(end("fe80::9", PEER), end("2001:db8::12:3456", US)):
        packet = Ether(frame)
        message = packet[IPv6].payload
        sent = message.cksum
        del message.cksum
        assert Ether(bytes(packet))[IPv6].payload.cksum == sent
