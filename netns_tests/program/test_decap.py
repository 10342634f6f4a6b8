"""Decapsulation, one packet at a time: a tunnel packet in, the inner packet or the reason against it out.

The program runs through BPF_PROG_TEST_RUN, loaded as `xdp-lb decap attach` loads it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from scapy.layers.inet import UDP
from scapy.layers.inet6 import IPv6ExtHdrFragment
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet, Raw

from netns_tests.oracle.packets import (
    BACKEND4,
    BACKEND6,
    CLIENT6,
    LB4,
    LB6,
    VIP4,
    VIP6,
    Verdict,
    frame,
    ip4,
    ip6,
    tcp,
    udp,
)
from netns_tests.oracle.tunnels import (
    CE,
    ECT_0,
    ECT_1,
    FAMILIES,
    NOT_ECT,
    OTHER_VIP4,
    OTHER_VIP6,
    Loaded,
    gue,
    in_gue,
    in_ipip,
    inner_packet,
    ipip,
    loaded,
    outer_header,
    second_chance,
    tagged,
)

VIP6_PREFIX = "2001:db8:4::/64"
pairs = pytest.mark.parametrize(("outer", "inner"), list(itertools.product(FAMILIES, FAMILIES)))


@pytest.fixture(scope="module")
def decap() -> Iterator[Loaded]:
    with loaded(VIP4, OTHER_VIP4, "198.18.0.0/24", VIP6, OTHER_VIP6, VIP6_PREFIX) as made:
        yield made


BALANCERS = (f"{LB4}/32", "2001:db8:1::/64")
ANOTHER = ("10.77.0.0/16", "2001:db8:77::1/128")


@pytest.fixture(scope="module", params=[BALANCERS, BALANCERS + ANOTHER], ids=["one source", "several sources"])
def guarded(request: pytest.FixtureRequest) -> Iterator[Loaded]:
    """Only the balancer may send, or others too; one VIP of each family."""
    with loaded(VIP4, VIP6, sources=request.param) as made:
        yield made


# Decapsulated


@pairs
def test_ipip_packet_loses_its_outer_header(decap: Loaded, outer: int, inner: int) -> None:
    packet = inner_packet(inner)
    before = decap.decapsulated_bytes(f"IPIP_{inner}_IN_{outer}")
    assert decap.run(in_ipip(packet, outer)) == (Verdict.PASS, [f"IPIP_{inner}_IN_{outer}"], frame(packet))
    assert decap.decapsulated_bytes(f"IPIP_{inner}_IN_{outer}") - before == len(packet)


@pytest.mark.parametrize("words", [0, 1, 5, 31])
@pairs
def test_gue_packet_loses_its_outer_headers_and_private_data(decap: Loaded, outer: int, inner: int, words: int) -> None:
    packet = inner_packet(inner)
    came = in_gue(packet, outer, private=bytes(range(4 * words)))
    assert decap.run(came) == (Verdict.PASS, [f"GUE_{inner}_IN_{outer}"], frame(packet))


@pytest.mark.parametrize("tags", [1, 2])
@pairs
def test_vlan_tags_stay_in_front_of_the_inner_packet(decap: Loaded, outer: int, inner: int, tags: int) -> None:
    packet = inner_packet(inner)
    for tunnelled in (ipip(outer_header(outer), packet), outer_header(outer) / gue(packet)):
        _, _, out = decap.run(tagged(tags, tunnelled))
        assert out == tagged(tags, packet)


@pytest.mark.parametrize("gue_port", [6080, 4711])
def test_gue_has_the_port_that_was_configured(gue_port: int) -> None:
    with loaded(VIP4, gue_port=gue_port) as decap:
        here, elsewhere = (in_gue(inner_packet(4), port=port) for port in (gue_port, 6081))
        assert decap.run(here)[1] == ["GUE_4_IN_4"]
        assert decap.run(elsewhere) == (Verdict.PASS, ["PASS_NOT_A_TUNNEL"], elsewhere)


@pytest.mark.parametrize("dst", ["198.18.0.77", "2001:db8:4::77"])
def test_prefix_of_destinations_holds_each_address_in_it(decap: Loaded, dst: str) -> None:
    packet = inner_packet(6 if ":" in dst else 4, dst=dst)
    assert decap.run(in_ipip(packet))[2] == frame(packet)


def test_padding_of_a_short_frame_is_no_part_of_the_inner_packet(decap: Loaded) -> None:
    packet = inner_packet(4)
    assert decap.run(in_ipip(packet) + bytes(6)) == (Verdict.PASS, ["IPIP_4_IN_4"], frame(packet) + bytes(6))


# RFC 6040, figure 4: inner, outer -> what leaves; None: dropped
ECN = {
    (NOT_ECT, NOT_ECT): NOT_ECT,
    (NOT_ECT, ECT_0): NOT_ECT,
    (NOT_ECT, ECT_1): NOT_ECT,
    (NOT_ECT, CE): None,
    (ECT_0, NOT_ECT): ECT_0,
    (ECT_0, ECT_0): ECT_0,
    (ECT_0, ECT_1): ECT_1,
    (ECT_0, CE): CE,
    (ECT_1, NOT_ECT): ECT_1,
    (ECT_1, ECT_0): ECT_1,
    (ECT_1, ECT_1): ECT_1,
    (ECT_1, CE): CE,
    (CE, NOT_ECT): CE,
    (CE, ECT_0): CE,
    (CE, ECT_1): CE,
    (CE, CE): CE,
}


@pairs
@pytest.mark.parametrize(("came", "leaves"), ECN.items(), ids=str)
def test_congestion_met_in_the_tunnel_is_told_as_rfc_6040_has_it(
    decap: Loaded, outer: int, inner: int, came: tuple[int, int], leaves: int | None
) -> None:
    inner_ecn, outer_ecn = came
    packet = in_ipip(inner_packet(inner, ecn=inner_ecn), outer, **{"tos" if outer == 4 else "tc": 0x40 | outer_ecn})
    verdict, counted, out = decap.run(packet)
    if leaves is None:
        assert (verdict, counted) == (Verdict.DROP, ["DROP_NOT_ECN_CAPABLE"])
    else:
        assert (verdict, out) == (Verdict.PASS, frame(inner_packet(inner, ecn=leaves)))


# Passed to the host

OPTIONS = [b"\x01" * 4]
LEFT = {
    "arp": (bytes(Ether() / ARP()), "PASS_NOT_IP"),
    "three tags": (bytes(Ether() / Dot1Q() / Dot1Q() / Dot1Q() / outer_header(4)), "PASS_NOT_IP"),
    "tcp to the vip itself": (frame(inner_packet(4)), "PASS_NOT_A_TUNNEL"),
    "tcp over ipv6": (frame(inner_packet(6)), "PASS_NOT_A_TUNNEL"),
    "other udp": (frame(ip4(), udp()), "PASS_NOT_A_TUNNEL"),
    "outer options": (frame(ipip(ip4(LB4, BACKEND4[0], options=OPTIONS), inner_packet(4))), "PASS_IP_OPTIONS"),
    "outer first fragment": (in_ipip(inner_packet(4), flags="MF"), "PASS_FRAGMENT"),
    "outer later fragment": (in_ipip(inner_packet(4), frag=4), "PASS_FRAGMENT"),
    "outer ipv6 fragment": (frame(ip6(LB6, BACKEND6[0]), IPv6ExtHdrFragment(nh=4), Raw(b"x" * 40)), "PASS_FRAGMENT"),
    "outer length beyond the frame": (in_ipip(inner_packet(4), len=200), "PASS_MALFORMED"),
    "outer length below its header": (in_ipip(inner_packet(4), len=19), "PASS_MALFORMED"),
    "outer ipv6 length beyond the frame": (in_ipip(inner_packet(4), 6, plen=200), "PASS_MALFORMED"),
    "outer of another version": (frame(ipip(ip4(LB4, BACKEND4[0], version=5), inner_packet(4))), "PASS_MALFORMED"),
    "gue variant 1": (in_gue(inner_packet(4), first=0x40), "PASS_GUE_UNKNOWN"),
    "gue control message": (in_gue(inner_packet(4), first=0x20), "PASS_GUE_UNKNOWN"),
    "gue flags": (in_gue(inner_packet(4), flags=0x8000), "PASS_GUE_UNKNOWN"),
    "gue of another protocol": (
        frame(outer_header(4), UDP(dport=6080), Raw(b"\0\x2f\0\0" + bytes(60))),
        "PASS_GUE_UNKNOWN",
    ),
    "gue without its header": (frame(outer_header(4), UDP(dport=6080), Raw(b"\0\x04")), "PASS_MALFORMED"),
    "gue header beyond the datagram": (in_gue(inner_packet(4), first=31), "PASS_MALFORMED"),
    "udp length beyond the packet": (
        frame(outer_header(4), UDP(dport=6080, len=999), Raw(b"\0\x04\0\0" + bytes(inner_packet(4)))),
        "PASS_MALFORMED",
    ),
    "inner of another destination": (in_ipip(inner_packet(4, dst="203.0.113.9")), "PASS_NOT_CONFIGURED"),
    "inner ipv6 of another destination": (in_gue(inner_packet(6, dst="2001:db8:9::9")), "PASS_NOT_CONFIGURED"),
    "inner of another version": (frame(ip4(LB4, BACKEND4[0], proto=41), Raw(bytes(inner_packet(4)))), "PASS_MALFORMED"),
    "no inner header": (frame(ip4(LB4, BACKEND4[0], proto=4), Raw(bytes(inner_packet(4))[:19])), "PASS_MALFORMED"),
}


@pytest.mark.parametrize(("packet", "reason"), LEFT.values(), ids=LEFT)
def test_what_is_no_tunnel_packet_of_ours_is_left_as_it_came(decap: Loaded, packet: bytes, reason: str) -> None:
    assert decap.run(packet) == (Verdict.PASS, [reason], packet)


# Dropped


def broken4(**fields: int) -> Packet:
    packet = inner_packet(4)
    for name, value in fields.items():
        setattr(packet, name, value)
    return packet


DROPPED = {
    "header length below 5": (broken4(ihl=4), "DROP_INNER_MALFORMED"),
    "length below its header": (broken4(len=19), "DROP_INNER_MALFORMED"),
    "header beyond its length": (broken4(ihl=15, len=45), "DROP_INNER_MALFORMED"),
    "length beyond the outer packet": (broken4(len=46), "DROP_INNER_MALFORMED"),
    "ipv6 length beyond the outer packet": (
        ip6(CLIENT6, VIP6, plen=26) / tcp() / Raw(b"inner"),
        "DROP_INNER_MALFORMED",
    ),
    "0.0.0.0": (inner_packet(4, "0.0.0.0"), "DROP_SOURCE_UNSPECIFIED"),
    "0.1.2.3": (inner_packet(4, "0.1.2.3"), "DROP_SOURCE_UNSPECIFIED"),
    "127.0.0.1": (inner_packet(4, "127.0.0.1"), "DROP_SOURCE_LOOPBACK"),
    "127.255.255.254": (inner_packet(4, "127.255.255.254"), "DROP_SOURCE_LOOPBACK"),
    "224.0.0.1": (inner_packet(4, "224.0.0.1"), "DROP_SOURCE_MULTICAST"),
    "239.255.255.255": (inner_packet(4, "239.255.255.255"), "DROP_SOURCE_MULTICAST"),
    "255.255.255.255": (inner_packet(4, "255.255.255.255"), "DROP_SOURCE_BROADCAST"),
    "the vip itself": (inner_packet(4, VIP4), "DROP_SOURCE_IS_DESTINATION"),
    "another vip": (inner_packet(4, OTHER_VIP4), "DROP_SOURCE_IS_CONFIGURED"),
    "a vip's prefix": (inner_packet(4, "198.18.0.1"), "DROP_SOURCE_IS_CONFIGURED"),
    "::": (inner_packet(6, "::"), "DROP_SOURCE_UNSPECIFIED"),
    "::1": (inner_packet(6, "::1"), "DROP_SOURCE_LOOPBACK"),
    "ff02::1": (inner_packet(6, "ff02::1"), "DROP_SOURCE_MULTICAST"),
    "fe80::1": (inner_packet(6, "fe80::1"), "DROP_SOURCE_LINK_LOCAL"),
    "febf::1": (inner_packet(6, "febf::1"), "DROP_SOURCE_LINK_LOCAL"),
    "the ipv6 vip itself": (inner_packet(6, VIP6), "DROP_SOURCE_IS_DESTINATION"),
    "another ipv6 vip": (inner_packet(6, OTHER_VIP6), "DROP_SOURCE_IS_CONFIGURED"),
    "an ipv6 vip's prefix": (inner_packet(6, "2001:db8:4::9"), "DROP_SOURCE_IS_CONFIGURED"),
}


@pytest.mark.parametrize("outer", FAMILIES)
@pytest.mark.parametrize(("inner", "reason"), DROPPED.values(), ids=DROPPED)
def test_what_is_no_clients_packet_is_dropped(decap: Loaded, outer: int, inner: Packet, reason: str) -> None:
    assert decap.run(in_ipip(inner, outer))[:2] == (Verdict.DROP, [reason])
    assert decap.run(in_gue(inner, outer))[:2] == (Verdict.DROP, [reason])


@pytest.mark.parametrize(
    "src", ["1.0.0.1", "126.255.255.255", "128.0.0.1", "223.255.255.255", "::2", "fec0::1", "fe00::1"]
)
def test_source_beside_those_that_are_refused_is_taken(decap: Loaded, src: str) -> None:
    packet = inner_packet(6 if ":" in src else 4, src)
    assert decap.run(in_ipip(packet))[2] == frame(packet)


@pytest.mark.parametrize("vip", [VIP4, VIP6])
def test_single_vip_is_no_source_either(guarded: Loaded, vip: str) -> None:
    packet = inner_packet(6 if ":" in vip else 4, vip, vip)
    assert guarded.run(in_ipip(packet))[:2] == (Verdict.DROP, ["DROP_SOURCE_IS_DESTINATION"])


@pairs
def test_outer_sources_that_are_not_allowed_are_refused(guarded: Loaded, outer: int, inner: int) -> None:
    packet = inner_packet(inner)
    stranger = ip4("192.0.2.3", BACKEND4[0]) if outer == 4 else ip6("2001:db8:6::1", BACKEND6[0])
    assert guarded.run(in_ipip(packet, outer))[2] == frame(packet)
    assert guarded.run(in_gue(packet, outer))[2] == frame(packet)
    assert guarded.run(frame(ipip(stranger, packet)))[:2] == (Verdict.DROP, ["DROP_OUTER_SOURCE"])
    assert guarded.run(frame(stranger / gue(packet)))[:2] == (Verdict.DROP, ["DROP_OUTER_SOURCE"])


# Cut off anywhere


@pytest.mark.parametrize("tags", [0, 2])
@pairs
def test_tunnel_packet_cut_off_anywhere_is_never_decapsulated(decap: Loaded, outer: int, inner: int, tags: int) -> None:
    for tunnelled in (ipip(outer_header(outer), inner_packet(inner)), outer_header(outer) / gue(inner_packet(inner))):
        whole = tagged(tags, tunnelled) if tags else frame(tunnelled)
        for size in range(14, len(whole)):
            assert decap.run(whole[:size]) == (Verdict.PASS, ["PASS_MALFORMED"], whole[:size])


# The other member that a second chance names


@pytest.mark.parametrize("other", ["0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255", "::1", "fe80::1", "ff02::1"])
def test_packet_for_another_member_that_is_no_host_is_dropped(decap: Loaded, other: str) -> None:
    packet = in_gue(inner_packet(4), private=second_chance(other))
    assert decap.run(packet)[:2] == (Verdict.DROP, ["DROP_OTHER_MEMBER_MARTIAN"])


# Private data that look like a second chance and are none

NO_SECOND_CHANCE = {
    "of another magic": second_chance(BACKEND4[1], magic=0x5833),
    "of another family": second_chance(BACKEND4[1], family=5),
    "of a later version": second_chance(BACKEND4[1], zero=1),
    "too short": second_chance(BACKEND4[1])[:-4],
    "too long": second_chance(BACKEND4[1]) + bytes(4),
}


@pytest.mark.parametrize("private", NO_SECOND_CHANCE.values(), ids=NO_SECOND_CHANCE)
def test_private_data_of_another_kind_are_ignored(decap: Loaded, private: bytes) -> None:
    packet = inner_packet(4)
    assert decap.run(in_gue(packet, private=private)) == (Verdict.PASS, ["GUE_4_IN_4"], frame(packet))
