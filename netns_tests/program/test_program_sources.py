"""What may not be balanced, nor answered: martian sources, VIPs as sources, frames to a group; and hop limits that are
at their end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, ICMPv6TimeExceeded, IPv6, IPv6ExtHdrFragment
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from netns_tests.oracle import packets
from netns_tests.oracle.model import Count, Outcome
from netns_tests.oracle.packets import Verdict
from netns_tests.oracle.table import (
    V4,
    V6,
    Balancer,
    Family,
    both_families,
    both_protocols,
    dropped,
    from_client,
    passed,
    segment,
)
from netns_tests.oracle.wire import address

OTHER_VIP = {4: "203.0.113.99", 6: "2001:db8:2::99"}
MARTIANS = {
    4: ("0.0.0.0", "0.1.2.3", "127.0.0.1", "224.0.0.1", "239.1.2.3", "240.0.0.1", "255.255.255.255"),
    6: ("::", "::1", "::ffff:192.0.2.1", "fe80::1", "febf::1", "ff02::1"),
}
NEIGHBOURS_OF_MARTIANS = {
    4: ("1.0.0.1", "126.255.255.255", "128.0.0.1", "223.255.255.255"),
    6: ("0:0:1::1", "fdff::1", "fec0::1", "2001:db8::"),
}
GROUP_MACS = ("ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01", "33:33:00:00:00:01")

every_mode = pytest.mark.parametrize("mode", ["nat", "dr", "ipip", "gue"])


def of(sources: Mapping[int, Sequence[str]]) -> pytest.MarkDecorator:
    rows = [(family, source) for family in (V4, V6) for source in sources[family.version]]
    return pytest.mark.parametrize(("family", "source"), rows, ids=[source for _, source in rows])


def sent_by(family: Family, source: str, payload: Packet, dst_mac: str = packets.LB_MAC) -> bytes:
    return packets.frame(family.header(source, family.vip), payload, dst_mac=dst_mac)


def echo_request(family: Family, payload: bytes = b"ping") -> Packet:
    ping: Packet = ICMP(type=8, id=1) if family.version == 4 else ICMPv6EchoRequest(id=1)
    return ping / Raw(payload)


@of(MARTIANS)
@every_mode
@both_protocols
def test_martian_is_dropped(balancer: Balancer, family: Family, source: str, mode: str, protocol: str) -> None:
    balancer.serve(balancer.service(family, mode=mode, protocol=protocol))
    packet = sent_by(family, source, from_client(protocol))
    assert balancer.send(packet) == dropped("DROP_MARTIAN_SOURCE", packet)
    assert balancer.program.count(1) == Count()


@of(NEIGHBOURS_OF_MARTIANS)
def test_address_beside_the_martians_is_a_client(balancer: Balancer, family: Family, source: str) -> None:
    balancer.serve(balancer.service(family, mode="dr"))
    assert balancer.send(sent_by(family, source, from_client())).reason == "FORWARDED"


@both_families
@every_mode
@both_protocols
def test_vip_is_no_client(balancer: Balancer, family: Family, mode: str, protocol: str) -> None:
    """Neither of its own service nor of another: two that answer everything would answer each other for ever."""
    served = balancer.service(family, mode=mode, protocol=protocol)
    other = balancer.service(family, mode="dr", protocol=protocol, address=address(OTHER_VIP[family.version]))
    balancer.serve(served, other)
    for source in (family.vip, OTHER_VIP[family.version]):
        packet = sent_by(family, source, segment(protocol, packets.SERVICE_PORT, packets.SERVICE_PORT))
        assert balancer.send(packet) == dropped("DROP_MARTIAN_SOURCE", packet)
    balancer.serve(served)
    assert balancer.send(packet).reason == "FORWARDED"


@both_families
@pytest.mark.parametrize("mac", GROUP_MACS)
@every_mode
def test_frame_to_a_group_is_the_hosts(balancer: Balancer, family: Family, mac: str, mode: str) -> None:
    balancer.serve(balancer.service(family, mode=mode))
    packet = sent_by(family, family.client, from_client(), dst_mac=mac)
    assert balancer.send(packet) == passed("PASS_GROUP_MAC", packet)


@of(MARTIANS)
def test_martian_gets_no_echo_reply(balancer: Balancer, family: Family, source: str) -> None:
    balancer.serve(balancer.service(family), echo=[address(family.vip)])
    packet = sent_by(family, source, echo_request(family))
    assert balancer.send(packet) == passed("PASS_ICMP", packet)


@both_families
@pytest.mark.parametrize("mac", GROUP_MACS)
def test_echo_request_to_a_group_gets_no_reply(balancer: Balancer, family: Family, mac: str) -> None:
    balancer.serve(balancer.service(family), echo=[address(family.vip)])
    packet = sent_by(family, family.client, echo_request(family), dst_mac=mac)
    assert balancer.send(packet) == passed("PASS_ICMP", packet)


def test_echo_reply_of_zeros_has_a_checksum_that_holds(balancer: Balancer) -> None:
    balancer.serve(balancer.service(V4), echo=[address(V4.vip)])
    request = sent_by(V4, V4.client, ICMP(type=8, id=0, seq=0) / Raw(bytes(8)))
    reply = balancer.send(request)
    assert reply.reason == "ANSWERED_ECHO"
    assert Ether(reply.frame)[ICMP].chksum == 0xFFFF


@both_families
@pytest.mark.parametrize("mode", ["dr", "ipip"])
def test_fragment_from_a_martian_is_dropped(balancer: Balancer, family: Family, mode: str) -> None:
    balancer.serve(balancer.service(family, mode=mode, protocol="udp"))
    source = MARTIANS[family.version][2]
    udp = UDP(sport=packets.CLIENT_PORT, dport=packets.SERVICE_PORT) / Raw(bytes(64))
    if family.version == 4:
        packet = packets.frame(IP(src=source, dst=family.vip, flags="MF"), udp)
    else:
        packet = packets.frame(IPv6(src=source, dst=family.vip), IPv6ExtHdrFragment(m=1, id=7), udp)
    assert balancer.send(packet) == dropped("DROP_MARTIAN_SOURCE", packet)


# The last hop


def time_exceeded(family: Family, request: bytes) -> bytes:
    quoted = request[packets.ETHERNET_HEADER_SIZE :][: 28 if family.version == 4 else 48]
    if family.version == 4:
        error: Packet = IP(src=family.vip, dst=family.client, id=0) / ICMP(type=11, code=0)
    else:
        error = IPv6(src=family.vip, dst=family.client) / ICMPv6TimeExceeded()
    return packets.frame(error, Raw(quoted), src_mac=packets.LB_MAC, dst_mac=packets.CLIENT_MAC)


@both_families
@both_protocols
@pytest.mark.parametrize("mode", ["dr", "ipip", "gue"])
@pytest.mark.parametrize("hops", [0, 1])
def test_packet_on_its_last_hop_is_answered(
    balancer: Balancer, family: Family, protocol: str, mode: str, hops: int
) -> None:
    balancer.serve(balancer.service(family, mode=mode, protocol=protocol))
    request = family.request(from_client(protocol, payload=b""), hops)
    answer = Outcome(Verdict.TX, "ANSWERED_TTL_EXPIRED", time_exceeded(family, request))
    assert balancer.send(request) == answer
    assert balancer.program.count(1) == Count()


@both_families
@pytest.mark.parametrize("hops", [0, 1])
def test_packet_on_its_last_hop_has_arrived_at_a_vip_of_mode_nat(balancer: Balancer, family: Family, hops: int) -> None:
    balancer.serve(balancer.service(family))
    sent = balancer.send(family.request(from_client(), hops))
    assert sent.reason == "FORWARDED"
    header = Ether(sent.frame)[IP if family.version == 4 else IPv6]
    assert (header.ttl if family.version == 4 else header.hlim) == hops


@both_families
def test_icmp_error_on_its_last_hop_is_not_answered(balancer: Balancer, family: Family) -> None:
    balancer.serve(balancer.service(family, mode="dr"))
    answer = family.to_client(segment("tcp", packets.SERVICE_PORT, packets.CLIENT_PORT))
    error = family.error(answer, family.router, quoted_size=8, hops=1)
    assert balancer.send(error) == dropped("DROP_TTL_EXPIRED", error)


# IPv6 packets in one fragment (RFC 6946)


@every_mode
@both_protocols
def test_atomic_fragment_is_the_packet_that_it_holds(balancer: Balancer, mode: str, protocol: str) -> None:
    balancer.serve(balancer.service(V6, mode=mode, protocol=protocol))
    payload = from_client(protocol)
    expected = balancer.send(V6.request(payload))
    assert expected.reason == "FORWARDED"
    whole = packets.frame(packets.ip6(), IPv6ExtHdrFragment(offset=0, m=0, id=0x1234), payload)
    assert balancer.send(whole) == expected


def test_atomic_fragment_of_no_service_is_left_as_it_is(balancer: Balancer) -> None:
    balancer.serve(balancer.service(V6, mode="dr"))
    packet = packets.frame(packets.ip6(), IPv6ExtHdrFragment(offset=0, m=0, id=7), from_client() / Raw(b"x"))
    other = packets.frame(packets.ip6(), IPv6ExtHdrFragment(offset=0, m=0, id=7), segment("tcp", 4000, 81))
    assert balancer.send(packet).reason == "FORWARDED"
    assert balancer.send(other).frame == other


def test_atomic_fragment_whose_header_is_damaged_is_left_as_it_is(balancer: Balancer) -> None:
    balancer.serve(balancer.service(V6, mode="dr"))
    whole = packets.frame(packets.ip6(), IPv6ExtHdrFragment(offset=0, m=0, id=7), from_client())
    ip = packets.ETHERNET_HEADER_SIZE
    other_version = whole[:ip] + b"\x00" + whole[ip + 1 :]
    assert balancer.send(other_version) == passed("PASS_MALFORMED", other_version)
    too_long = whole[: ip + 4] + (len(whole)).to_bytes(2, "big") + whole[ip + 6 :]
    assert balancer.send(too_long) == dropped("DROP_MALFORMED", too_long)
