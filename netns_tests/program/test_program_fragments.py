"""What the program does with one frame after another: the fragments of datagrams.

Datagrams are cut by hand: a first piece that has the UDP header, and later ones.
"""

from __future__ import annotations

from typing import Any

import pytest
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment
from scapy.packet import Packet, Raw

from netns_tests.oracle import packets
from netns_tests.oracle.model import MASK32, Member, Slot, flow_hash
from netns_tests.oracle.table import (
    SETTINGS,
    V4,
    V6,
    Balancer,
    Family,
    both_families,
    dropped,
    from_client,
    member_reached,
    passed,
    redirected,
    with_hops,
    with_macs,
)
from netns_tests.oracle.wire import Flow, address

PIECE = 1000  # bytes in the first fragment, a multiple of 8
UDP_PROTOCOL, TCP_PROTOCOL = 17, 6
EITHER = [Slot(1), Slot(2)] * 8

every_mode_without_translation = pytest.mark.parametrize("mode", ["dr", "ipip", "gue"])


def fragment(
    family: Family, payload: bytes, offset: int, more: bool, datagram: int = 7, protocol: int = UDP_PROTOCOL
) -> bytes:
    """offset: in bytes."""
    if family.version == 4:
        flags = "MF" if more else 0
        header: Packet = IP(
            src=family.client, dst=family.vip, id=datagram, flags=flags, frag=offset // 8, proto=protocol
        )
    else:
        extension = IPv6ExtHdrFragment(nh=protocol, offset=offset // 8, m=more, id=datagram)
        header = IPv6(src=family.client, dst=family.vip) / extension
    return packets.frame(header, Raw(payload))


def datagram(family: Family, sport: int = packets.CLIENT_PORT, protocol: str = "udp") -> bytes:
    """UDP header and payload, more than fits into one fragment."""
    whole = family.request(from_client(protocol, sport, payload=bytes(PIECE + 500)))
    return whole[packets.ETHERNET_HEADER_SIZE + (20 if family.version == 4 else 40) :]


def first_of(family: Family, sport: int = packets.CLIENT_PORT, number: int = 7) -> bytes:
    return fragment(family, datagram(family, sport)[:PIECE], 0, more=True, datagram=number)


def later_of(family: Family, size: int = 500, number: int = 7) -> bytes:
    return fragment(family, datagram(family)[PIECE : PIECE + size], PIECE, more=False, datagram=number)


def members(balancer: Balancer, family: Family) -> dict[int, Member]:
    return {number: balancer.member(family, number, port=0) for number in (1, 2)}


def serve(balancer: Balancer, family: Family, mode: str, **fields: Any) -> None:
    standard: dict[str, Any] = {"members": members(balancer, family), "mode": mode, "slots": EITHER}
    balancer.serve(balancer.service(family, "udp", **(standard | fields)))


@both_families
@every_mode_without_translation
@pytest.mark.parametrize("size", [500, 8, 1])
def test_later_fragments_follow_the_first(balancer: Balancer, family: Family, mode: str, size: int) -> None:
    serve(balancer, family, mode)
    for sport in range(40000, 40010):
        whole = member_reached(balancer.send(family.request(from_client("udp", sport))))
        first = member_reached(balancer.send(first_of(family, sport, number=sport)))
        later = member_reached(balancer.send(later_of(family, size, number=sport)))
        assert whole == first == later != 0


@both_families
def test_a_fragment_goes_to_its_member_with_a_hop_less_and_unchanged(balancer: Balancer, family: Family) -> None:
    serve(balancer, family, "dr", slots=[Slot(1)])
    for piece in (first_of(family), later_of(family)):
        sent_on = with_macs(with_hops(piece, 63), packets.LB_MAC, packets.BACKEND_MACS[0])
        assert balancer.send(piece) == redirected(sent_on)


@both_families
def test_a_fragment_goes_into_the_tunnel_behind_its_flows_headers(balancer: Balancer, family: Family) -> None:
    """Of the whole flow: the fragments of a datagram are one way for the receiver's NIC too."""
    in_ipv6 = {1: balancer.member(V6, 1, port=0)}
    serve(balancer, family, "ipip", members=in_ipv6, slots=[Slot(1)])
    flow = Flow(address(family.client), packets.CLIENT_PORT, address(family.vip), packets.SERVICE_PORT, UDP_PROTOCOL)
    label = flow_hash(flow, SETTINGS.hash_seed) & MASK32 & 0xFFFFF
    for piece in (first_of(family), later_of(family)):
        outer = IPv6(src=V6.balancer, dst=V6.backends[0], nh=4 if family.version == 4 else 41, fl=label, hlim=64)
        inner = Raw(with_hops(piece, 63)[packets.ETHERNET_HEADER_SIZE :])
        sent_on = packets.frame(outer, inner, src_mac=packets.LB_MAC, dst_mac=packets.BACKEND_MACS[0])
        assert balancer.send(piece) == redirected(sent_on)


@both_families
def test_the_outer_checksum_is_left_out_in_front_of_a_fragment(balancer: Balancer, family: Family) -> None:
    serve(balancer, family, "gue", outer_checksum=True)
    for piece in (first_of(family), later_of(family)):
        udp_at = packets.ETHERNET_HEADER_SIZE + (20 if family.version == 4 else 40)
        assert balancer.send(piece).frame[udp_at + 6 : udp_at + 8] == bytes(2)


@both_families
def test_a_fragment_that_comes_before_the_first_is_the_hosts(balancer: Balancer, family: Family) -> None:
    serve(balancer, family, "dr")
    early = later_of(family)
    assert balancer.send(early) == passed("PASS_FRAGMENT", early)


@both_families
@pytest.mark.parametrize("differs", ["datagram", "protocol", "source"])
def test_a_later_fragment_of_another_datagram_does_not_follow(balancer: Balancer, family: Family, differs: str) -> None:
    serve(balancer, family, "dr")
    balancer.send(first_of(family))
    other = {
        "datagram": later_of(family, number=8),
        "protocol": fragment(family, bytes(8), PIECE, more=False, protocol=TCP_PROTOCOL),
        "source": later_of(family).replace(address(family.client), address(family.router)),
    }[differs]
    assert balancer.send(other) == passed("PASS_FRAGMENT", other)


@both_families
def test_the_next_datagram_of_the_same_number_goes_its_own_way(balancer: Balancer, family: Family) -> None:
    serve(balancer, family, "dr")
    reached = {}
    for sport in range(40000, 40010):
        first = member_reached(balancer.send(first_of(family, sport)))
        reached[sport] = first
        assert member_reached(balancer.send(later_of(family))) == first
    assert set(reached.values()) == {1, 2}


@both_families
def test_fragments_stay_together_when_the_ring_changes_between_them(balancer: Balancer, family: Family) -> None:
    serve(balancer, family, "dr", slots=[Slot(1)])
    assert member_reached(balancer.send(first_of(family))) == 1
    balancer.change(slots=[Slot(2)])
    assert member_reached(balancer.send(later_of(family))) == 1


@both_families
@pytest.mark.parametrize("fields", [{"alive": False}, {"uid": 99}], ids=["dead", "another member's number"])
def test_a_later_fragment_whose_member_is_gone_is_dropped(
    balancer: Balancer, family: Family, fields: dict[str, int]
) -> None:
    serve(balancer, family, "dr", slots=[Slot(1)])
    balancer.send(first_of(family))
    balancer.change(members={1: balancer.member(family, 1, **fields), 2: balancer.member(family, 2)})
    later = later_of(family)
    assert balancer.send(later) == dropped("DROP_NO_BACKEND", later)


@both_families
def test_the_first_fragment_of_a_client_with_affinity_goes_where_the_client_goes(
    balancer: Balancer, family: Family
) -> None:
    serve(balancer, family, "dr", affinity_s=100)
    home = member_reached(balancer.send(family.request(from_client("udp"))))
    firsts = {member_reached(balancer.send(first_of(family, sport, sport))) for sport in range(40000, 40010)}
    assert firsts == {home}


@both_families
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_fragments_are_dropped_where_they_cannot_be_balanced(balancer: Balancer, family: Family, protocol: str) -> None:
    """TCP's, and those of mode nat."""
    mode = "dr" if protocol == "tcp" else "nat"
    balancer.serve(balancer.service(family, protocol, mode=mode))
    number = TCP_PROTOCOL if protocol == "tcp" else UDP_PROTOCOL
    first = fragment(family, datagram(family, protocol=protocol)[:PIECE], 0, more=True, protocol=number)
    assert balancer.send(first) == dropped("DROP_FRAGMENT", first)


@both_families
def test_a_fragment_of_no_service_is_the_hosts(balancer: Balancer, family: Family) -> None:
    serve(balancer, family, "dr", port=53)
    first = first_of(family)
    assert balancer.send(first) == passed("PASS_NOT_A_SERVICE", first)


@both_families
def test_a_fragment_without_a_hop_left_is_dropped(balancer: Balancer, family: Family) -> None:
    serve(balancer, family, "dr")
    for piece in (first_of(family), later_of(family)):
        last = with_hops(piece, 1)
        assert balancer.send(last) == dropped("DROP_TTL_EXPIRED", last)


def test_a_first_fragment_cut_off_in_its_udp_header_is_the_hosts(balancer: Balancer) -> None:
    serve(balancer, V4, "dr")
    cut = fragment(V4, datagram(V4)[:7], 0, more=True)
    assert balancer.send(cut) == passed("PASS_FRAGMENT", cut)
