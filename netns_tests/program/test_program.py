"""What the program does with one frame after another: whole frames in, whole frames out, built by scapy.

Here: modes nat and dr, transitions, ICMP errors, and what is passed to the host. Where nat chose a port, the expected
frame has the port that was chosen; which ports may be chosen is the matter of tests of their own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_Router_Alert
from scapy.layers.inet6 import IPv6ExtHdrDestOpt, IPv6ExtHdrFragment
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet

from netns_tests.bed.topology import Bed
from netns_tests.oracle import packets
from netns_tests.oracle.model import SECOND_NS, Count, Outcome, Slot
from netns_tests.oracle.packets import Case, Verdict
from netns_tests.oracle.program import loaded_program
from netns_tests.oracle.table import (
    GATEWAY_MAC,
    MEMBER_PORT,
    OTHER_CLIENT_MAC,
    SETTINGS,
    START_NS,
    V4,
    V6,
    Balancer,
    Family,
    both_families,
    both_protocols,
    client_port_of,
    dropped,
    from_client,
    mac,
    member_reached,
    on_one_cpu,
    passed,
    redirected,
    segment,
    with_hops,
    with_macs,
)
from netns_tests.oracle.wire import Hop

# Forwarding


@both_families
@both_protocols
def test_nat_sends_a_request_from_an_address_and_port_of_its_own(
    balancer: Balancer, family: Family, protocol: str
) -> None:
    balancer.serve(balancer.service(family, protocol))
    outcome = balancer.send(family.request(from_client(protocol)))
    port = client_port_of(outcome.frame)
    assert outcome == redirected(family.to_member(segment(protocol, port, MEMBER_PORT)))
    assert 2000 <= port < 3000


@both_families
@both_protocols
def test_nat_sends_a_reply_as_if_from_the_vip(balancer: Balancer, family: Family, protocol: str) -> None:
    balancer.serve(balancer.service(family, protocol))
    port = balancer.opened(family.request(from_client(protocol)))
    reply = family.from_member(segment(protocol, MEMBER_PORT, port, "SA", payload=b"odd"))
    back = family.to_client(segment(protocol, packets.SERVICE_PORT, packets.CLIENT_PORT, "SA", payload=b"odd"))
    assert balancer.answer(reply) == redirected(back)


@both_families
@both_protocols
def test_dr_changes_nothing_but_mac_addresses_and_hop_limit(balancer: Balancer, family: Family, protocol: str) -> None:
    balancer.serve(balancer.service(family, protocol, mode="dr"))
    header = family.header(family.client, family.vip, 63)
    sent_on = packets.frame(header, from_client(protocol), src_mac=packets.LB_MAC, dst_mac=packets.BACKEND_MACS[0])
    assert balancer.send(family.request(from_client(protocol))) == redirected(sent_on)


def test_a_member_on_the_interface_of_the_clients_is_reached_by_tx(balancer: Balancer) -> None:
    hop = Hop(balancer.front, mac(packets.BACKEND_MACS[0]), mac(packets.LB_MAC))
    balancer.serve(balancer.service(mode="dr", members={1: balancer.member(V4, 1, hop=hop)}))
    assert balancer.send(V4.request(from_client())).verdict == Verdict.TX


@both_families
def test_a_member_without_a_port_gets_the_one_the_client_asked_for(balancer: Balancer, family: Family) -> None:
    balancer.serve(balancer.service(family, members={1: balancer.member(family, 1, port=0)}))
    outcome = balancer.send(family.request(from_client()))
    port = client_port_of(outcome.frame)
    assert outcome.frame == family.to_member(segment("tcp", port, packets.SERVICE_PORT))


@both_families
def test_a_service_of_every_port_takes_what_no_other_service_has(balancer: Balancer, family: Family) -> None:
    every = balancer.service(family, port=0, members={1: balancer.member(family, 1, port=0)})
    https = balancer.service(family, port=443, members={1: balancer.member(family, 2)})
    balancer.serve(every, https)
    for destination_port, member, member_port in [(443, 2, MEMBER_PORT), (22, 1, 22)]:
        outcome = balancer.send(family.request(segment("tcp", packets.CLIENT_PORT, destination_port)))
        port = client_port_of(outcome.frame)
        assert outcome.frame == family.to_member(segment("tcp", port, member_port), member)


@both_families
@both_protocols
def test_replies_of_flows_that_nobody_opened_are_the_hosts(balancer: Balancer, family: Family, protocol: str) -> None:
    balancer.serve(balancer.service(family, protocol))
    port = balancer.opened(family.request(from_client(protocol)))
    other_port = family.from_member(segment(protocol, MEMBER_PORT, port + 1))
    assert balancer.answer(other_port) == passed("PASS_NOT_A_SERVICE", other_port)


@both_families
@pytest.mark.parametrize("mode", ["nat", "dr"])
def test_requests_and_connections_are_counted_for_the_member(balancer: Balancer, family: Family, mode: str) -> None:
    balancer.serve(balancer.service(family, mode=mode))
    requests = [family.request(from_client(flags=flags)) for flags in ("S", "A", "PA")]
    for request in requests:
        balancer.send(request)
    assert balancer.program.count(1) == Count(packets=3, bytes=sum(map(len, requests)), connections=1)


def test_replies_are_counted_for_the_member(balancer: Balancer) -> None:
    balancer.serve(balancer.service())
    port = balancer.opened(V4.request(from_client()))
    reply = V4.from_member(segment("tcp", MEMBER_PORT, port, "SA"))
    balancer.answer(reply)
    count = balancer.program.count(1)
    assert (count.reply_packets, count.reply_bytes) == (1, len(reply))


def test_replies_go_the_way_the_latest_request_came(balancer: Balancer) -> None:
    balancer.serve(balancer.service())
    port = balancer.opened(V4.request(from_client()))
    balancer.after(2)
    balancer.send(V4.request(from_client(flags="A"), src_mac=OTHER_CLIENT_MAC))
    reply = balancer.answer(V4.from_member(segment("tcp", MEMBER_PORT, port, "A")))
    back = segment("tcp", packets.SERVICE_PORT, packets.CLIENT_PORT, "A")
    assert reply == redirected(V4.to_client(back, dst_mac=OTHER_CLIENT_MAC))


# Headers at their edges


@both_families
def test_a_reply_that_has_no_hop_left_is_dropped(balancer: Balancer, family: Family) -> None:
    balancer.serve(balancer.service(family))
    port = balancer.opened(family.request(from_client()))
    reply = family.from_member(segment("tcp", MEMBER_PORT, port, "SA"), hops=1)
    assert balancer.answer(reply) == dropped("DROP_TTL_EXPIRED", reply)


@both_families
def test_the_last_hop_but_one_is_enough(balancer: Balancer, family: Family) -> None:
    balancer.serve(balancer.service(family, mode="dr"))
    outcome = balancer.send(family.request(from_client(), hops=2))
    expected = family.header(family.client, family.vip, 1)
    assert outcome.frame[14:] == bytes(expected / from_client())


@pytest.mark.parametrize("checksum", [0x0000, 0x0001, 0xFEFE, 0xFEFF, 0xFF00, 0xFFFE])
def test_one_hop_less_leaves_the_header_checksum_right_where_it_wraps(balancer: Balancer, checksum: int) -> None:
    balancer.serve(balancer.service(mode="dr"))
    plain = IP(bytes(IP(src=V4.client, dst=V4.vip, id=0) / from_client()))
    # One's complement: what the checksum has to lose, the identification gains.
    header = IP(src=V4.client, dst=V4.vip, id=(plain.chksum - checksum) % 0xFFFF)
    frame = packets.frame(header, from_client())
    assert Ether(frame)[IP].chksum == checksum
    assert balancer.send(frame).frame == with_macs(with_hops(frame, 63), packets.LB_MAC, packets.BACKEND_MACS[0])


@both_families
def test_udp_without_a_checksum_stays_without(balancer: Balancer, family: Family) -> None:
    balancer.serve(balancer.service(family, "udp"))
    outcome = balancer.send(family.request(from_client("udp", chksum=0)))
    port = client_port_of(outcome.frame)
    assert outcome.frame == family.to_member(segment("udp", port, MEMBER_PORT, chksum=0))


@both_families
def test_a_udp_checksum_that_becomes_zero_is_sent_as_all_ones(balancer: Balancer, family: Family) -> None:
    balancer.serve(balancer.service(family, "udp"))
    port = balancer.opened(family.request(from_client("udp", payload=b"\0\0")))
    as_sent = UDP(family.to_member(segment("udp", port, MEMBER_PORT, payload=b"\0\0"))[-10:])
    balances = as_sent.chksum.to_bytes(2, "big")
    outcome = balancer.send(family.request(from_client("udp", payload=balances)))
    assert Ether(outcome.frame)[UDP].chksum == 0xFFFF
    assert outcome.frame == family.to_member(segment("udp", port, MEMBER_PORT, payload=balances))


@both_families
@both_protocols
def test_what_follows_the_ip_datagram_stays_as_it_is(balancer: Balancer, family: Family, protocol: str) -> None:
    balancer.serve(balancer.service(family, protocol))
    padding = b"\xff\x00\xaa"
    outcome = balancer.send(family.request(from_client(protocol)) + padding)
    port = client_port_of(outcome.frame)
    assert outcome.frame == family.to_member(segment(protocol, port, MEMBER_PORT)) + padding


def test_a_wrong_checksum_stays_as_wrong_as_it_was(balancer: Balancer) -> None:
    balancer.serve(balancer.service())
    right = V4.request(from_client())
    right_check = Ether(right)[TCP].chksum
    outcome = balancer.send(V4.request(from_client(chksum=(right_check + 1) % 0xFFFF)))
    check = Ether(outcome.frame)[TCP].chksum
    port = client_port_of(outcome.frame)
    assert outcome.frame == V4.to_member(segment("tcp", port, MEMBER_PORT, chksum=check))
    assert check == (Ether(balancer.send(right).frame)[TCP].chksum + 1) % 0xFFFF


def tcp4_with_header(**fields: Any) -> bytes:
    return packets.frame(packets.ip4(**fields), packets.tcp())


def tcp6_behind(extension: Packet) -> bytes:
    return packets.frame(packets.ip6(), extension, packets.tcp())


REFUSED = [
    Case("ipv4 options", tcp4_with_header(options=[IPOption_Router_Alert()]), Verdict.DROP, "DROP_IP_OPTIONS"),
    Case("ipv4 first fragment", tcp4_with_header(flags="MF"), Verdict.DROP, "DROP_FRAGMENT"),
    Case("ipv6 first fragment", tcp6_behind(IPv6ExtHdrFragment(m=1)), Verdict.DROP, "DROP_FRAGMENT"),
    Case("ipv4 length beyond the frame", tcp4_with_header(len=41), Verdict.DROP, "DROP_MALFORMED"),
    Case("ipv4 length below a header", tcp4_with_header(len=19), Verdict.DROP, "DROP_MALFORMED"),
    Case(
        "ipv6 length beyond the frame",
        packets.frame(packets.ip6(plen=21), packets.tcp()),
        Verdict.DROP,
        "DROP_MALFORMED",
    ),
    Case("tcp offset below a header", packets.tcp4(dataofs=4), Verdict.DROP, "DROP_MALFORMED"),
    Case("tcp offset beyond the segment", packets.tcp6(dataofs=6), Verdict.DROP, "DROP_MALFORMED"),
    Case("tcp shorter than a header, padded", tcp4_with_header(len=39), Verdict.DROP, "DROP_MALFORMED"),
    Case("udp length below a header", packets.udp4(len=7), Verdict.DROP, "DROP_MALFORMED"),
    Case("udp length beyond the datagram", packets.udp6(len=9), Verdict.DROP, "DROP_MALFORMED"),
]
NOT_FOR_US = [
    Case("arp", packets.frame(ARP(pdst=packets.VIP4)), Verdict.PASS, "PASS_NOT_IP"),
    Case("ethernet alone", packets.tcp4()[:14], Verdict.PASS, "PASS_MALFORMED"),
    Case("ipv4 header cut off", packets.tcp4()[:33], Verdict.PASS, "PASS_MALFORMED"),
    Case("ipv6 header cut off", packets.tcp6()[:53], Verdict.PASS, "PASS_MALFORMED"),
    Case("ipv4 header below 20 bytes", tcp4_with_header(ihl=4), Verdict.PASS, "PASS_MALFORMED"),
    Case("version 5", tcp4_with_header(version=5), Verdict.PASS, "PASS_MALFORMED"),
    Case("tcp cut off in length and frame", tcp4_with_header(len=39)[:-1], Verdict.PASS, "PASS_MALFORMED"),
    Case("ipv4 later fragment", tcp4_with_header(frag=1), Verdict.PASS, "PASS_FRAGMENT"),
    Case("ipv6 later fragment", tcp6_behind(IPv6ExtHdrFragment(offset=1)), Verdict.PASS, "PASS_FRAGMENT"),
    Case("ipv6 extension", tcp6_behind(IPv6ExtHdrDestOpt()), Verdict.PASS, "PASS_IPV6_EXTENSION"),
    Case("another protocol", tcp4_with_header(proto=132), Verdict.PASS, "PASS_NOT_TCP_OR_UDP"),
    Case("another port", packets.tcp4(dport=81), Verdict.PASS, "PASS_NOT_A_SERVICE"),
    Case("another address", packets.tcp6(dst=packets.LB6), Verdict.PASS, "PASS_NOT_A_SERVICE"),
    Case(
        "options, another port",
        packets.frame(packets.ip4(options=[IPOption_Router_Alert()]), packets.tcp(dport=81)),
        Verdict.PASS,
        "PASS_NOT_A_SERVICE",
    ),
    Case(
        "fragment, another address", tcp4_with_header(dst=packets.LB4, flags="MF"), Verdict.PASS, "PASS_NOT_A_SERVICE"
    ),
    Case("echo request", packets.frame(packets.ip4(), ICMP()), Verdict.PASS, "PASS_ICMP"),
    Case(
        "error about nothing known",
        packets.icmp_error4(packets.tcp4(src=V4.vip, dst=V4.client)),
        Verdict.PASS,
        "PASS_ICMP_NO_FLOW",
    ),
    Case(
        "error with half a quote",
        packets.icmp_error4(packets.tcp4(src=V4.vip, dst=V4.client), size=27),
        Verdict.PASS,
        "PASS_MALFORMED",
    ),
    Case(
        "error about another's packet", packets.icmp_error4(packets.tcp4(), dst=packets.VIP4), Verdict.PASS, "PASS_ICMP"
    ),
]


@pytest.mark.parametrize("case", REFUSED + NOT_FOR_US, ids=lambda case: case.name)
def test_what_cannot_be_balanced_is_counted_by_its_reason_and_left_as_it_is(balancer: Balancer, case: Case) -> None:
    families = [V4, V6]
    balancer.serve(*(balancer.service(family, protocol) for family in families for protocol in ("tcp", "udp")))
    assert balancer.send(case.packet) == Outcome(case.expect_verdict, case.expect_reason, case.leaves)


def test_a_fragment_of_a_reply_is_dropped(balancer: Balancer) -> None:
    balancer.serve(balancer.service())
    port = balancer.opened(V4.request(from_client()))
    header = IP(src=packets.BACKEND4[0], dst=packets.LB4, flags="MF")
    fragment = packets.frame(header, segment("tcp", MEMBER_PORT, port, "A"))
    assert balancer.answer(fragment) == dropped("DROP_FRAGMENT", fragment)


# ICMP errors


quotes = pytest.mark.parametrize(
    ("protocol", "fields", "size"),
    [
        pytest.param("tcp", {}, 8, id="8 bytes of tcp"),
        pytest.param("tcp", {}, 16, id="tcp without its checksum"),
        pytest.param("tcp", {}, 18, id="tcp up to its checksum"),
        pytest.param("tcp", {}, 1000, id="all of tcp"),
        pytest.param("udp", {}, 8, id="8 bytes of udp"),
        pytest.param("udp", {"chksum": 0}, 8, id="udp without a checksum"),
        pytest.param("udp", {}, 11, id="an odd piece of udp"),
    ],
)


@both_families
@quotes
def test_an_error_about_a_request_reaches_the_client_as_about_his_own_packet(
    balancer: Balancer, family: Family, protocol: str, fields: dict[str, Any], size: int
) -> None:
    balancer.serve(balancer.service(family, protocol))
    sent_on = balancer.send(family.request(from_client(protocol, **fields))).frame
    outcome = balancer.answer(family.error(sent_on, family.router, size))
    as_sent = family.request(from_client(protocol, **fields), hops=63)
    error = family.error(as_sent, family.vip, size, hops=63)
    assert outcome == redirected(with_macs(error, packets.LB_MAC, packets.CLIENT_MAC))


@both_families
@quotes
def test_an_error_about_a_reply_reaches_the_member_as_about_its_own_packet(
    balancer: Balancer, family: Family, protocol: str, fields: dict[str, Any], size: int
) -> None:
    balancer.serve(balancer.service(family, protocol))
    port = balancer.opened(family.request(from_client(protocol)))
    reply = segment(protocol, MEMBER_PORT, port, "SA", **fields)
    back = balancer.answer(family.from_member(reply)).frame
    outcome = balancer.send(family.error(back, family.router, size))
    error = family.error(family.from_member(reply, hops=63), family.balancer, size, hops=63)
    assert outcome == redirected(with_macs(error, packets.LB_MAC, packets.BACKEND_MACS[0]))


@both_families
def test_in_dr_an_error_follows_its_flow_unchanged(balancer: Balancer, family: Family) -> None:
    service = balancer.service(family, mode="dr", size=2)
    balancer.serve(replace(service, slots=[Slot(1), Slot(2)] * 8))
    for sport in range(1, 17):
        request = family.request(from_client(sport=sport))
        reply = packets.frame(
            family.header(family.vip, family.client), segment("tcp", packets.SERVICE_PORT, sport, "SA")
        )
        error = family.error(reply, family.router, 8)
        outcome = balancer.send(error)
        assert member_reached(outcome) == member_reached(balancer.send(request))
        assert outcome.frame[14:] == with_hops(error, 63)[14:]


# Members


@pytest.mark.parametrize("mode", ["nat", "dr"])
@pytest.mark.parametrize("slot", [Slot(1), Slot(0), Slot(2)], ids=["dead", "none", "never was"])
def test_without_a_live_member_a_request_is_dropped(balancer: Balancer, mode: str, slot: Slot) -> None:
    members = {1: balancer.member(V4, 1, alive=False), 3: balancer.member(V4, 3)}
    balancer.serve(balancer.service(mode=mode, members=members, slots=[slot]))
    request = V4.request(from_client())
    assert balancer.send(request) == dropped("DROP_NO_BACKEND", request)


@both_families
@pytest.mark.parametrize("mode", ["nat", "dr"])
def test_a_member_whose_next_hop_nobody_knows_gets_nothing(balancer: Balancer, family: Family, mode: str) -> None:
    balancer.serve(balancer.service(family, mode=mode, members={1: balancer.member(family, 1, resolved=False)}))
    request = family.request(from_client())
    assert balancer.send(request) == dropped("DROP_NO_NEIGHBOUR", request)


@both_families
def test_a_member_whose_next_hop_only_the_kernel_knows_is_reached(balancer: Balancer, bed: Bed, family: Family) -> None:
    balancer.serve(balancer.service(family, mode="dr", members={1: balancer.member(family, 1, resolved=False)}))
    gateway = bed.lb.interfaces[1].network
    via = gateway.ipv4(9) if family.version == 4 else gateway.ipv6(9)
    bed.lb.forward(True)
    with bed.lb.netlink() as ip:
        ip.neigh("replace", dst=via, lladdr=GATEWAY_MAC, ifindex=balancer.back, state="permanent")
        ip.route("replace", dst=f"{family.backends[0]}/{32 if family.version == 4 else 128}", gateway=via)
        (link,) = ip.get_links(balancer.back)
    outcome = balancer.send(family.request(from_client()))
    bed.lb.forward(False)
    assert outcome.reason == "FORWARDED"
    assert Ether(outcome.frame).dst == GATEWAY_MAC
    assert Ether(outcome.frame).src == link.get("address")


@pytest.mark.parametrize("fields", [{"alive": False}, {"uid": 99}], ids=["dead", "another member's number"])
def test_an_open_connection_whose_member_is_gone_gets_the_current_one(
    balancer: Balancer, fields: dict[str, Any]
) -> None:
    service = balancer.service(size=2)
    balancer.serve(service)
    balancer.opened(V4.request(from_client()))
    gone = {**service.members, 1: replace(service.members[1], **fields)}
    balancer.change(members=gone, slots=[Slot(2)])
    assert member_reached(balancer.send(V4.request(from_client(flags="A")))) == 2


@both_families
@both_protocols
def test_an_open_flow_of_nat_stays_with_its_member_when_the_ring_changes(
    balancer: Balancer, family: Family, protocol: str
) -> None:
    balancer.serve(balancer.service(family, protocol, size=2))
    port = balancer.opened(family.request(from_client(protocol)))
    balancer.change(slots=[Slot(2, previous=1, track=True)])
    outcome = balancer.send(family.request(from_client(protocol, flags="A")))
    assert outcome == redirected(family.to_member(segment(protocol, port, MEMBER_PORT, "A")))


MOVED = Slot(current=2, previous=1, track=True)


@both_families
@pytest.mark.parametrize("mode", ["nat", "dr"])
@pytest.mark.parametrize(("flags", "member"), [("S", 2), ("SA", 1), ("A", 1), ("PA", 1), ("FA", 1)])
def test_on_a_slot_in_transition_an_unknown_connection_is_older_unless_it_opens(
    balancer: Balancer, family: Family, mode: str, flags: str, member: int
) -> None:
    balancer.serve(balancer.service(family, mode=mode, size=2, slots=[MOVED]))
    assert member_reached(balancer.send(family.request(from_client(flags=flags)))) == member


@both_families
@pytest.mark.parametrize("first", ["S", "A"])
def test_what_a_slot_in_transition_has_seen_stays_where_it_went(balancer: Balancer, family: Family, first: str) -> None:
    balancer.serve(balancer.service(family, mode="dr", size=2, slots=[MOVED]))
    member = member_reached(balancer.send(family.request(from_client(flags=first))))
    balancer.change(slots=[Slot(current=1 if member == 2 else 2, track=True)])
    assert member_reached(balancer.send(family.request(from_client(flags="A")))) == member
    balancer.after(balancer.services[0].flow_timeout_s + 1)
    assert member_reached(balancer.send(family.request(from_client(flags="A")))) != member


@pytest.mark.parametrize("end", ["FA", "R"])
def test_a_client_that_reuses_its_port_after_the_end_is_a_new_connection(balancer: Balancer, end: str) -> None:
    balancer.serve(balancer.service(mode="dr", size=2, slots=[MOVED]))
    assert [
        member_reached(balancer.send(V4.request(from_client(flags=flags)))) for flags in ("A", end, "A", "S", "A")
    ] == [1, 1, 1, 2, 2]


@pytest.mark.parametrize("first", ["S", "FA"])
def test_a_closed_connections_port_does_not_go_back_to_the_member_that_drains(balancer: Balancer, first: str) -> None:
    balancer.serve(balancer.service(mode="dr", size=2, slots=[MOVED]))
    for flags in (first, "R"):
        balancer.send(V4.request(from_client(flags=flags)))
    assert member_reached(balancer.send(V4.request(from_client(flags="S")))) == 2


@both_families
def test_a_flood_of_connections_leaves_nothing_behind_on_a_steady_service(balancer: Balancer, family: Family) -> None:
    balancer.serve(balancer.service(family, mode="dr"))
    for sport in range(1, 1001):
        assert balancer.send(family.request(from_client(sport=sport, flags="S"))).reason == "FORWARDED"
    tables = ("flows4", "flows6", "nat_flows4", "nat_flows6", "nat_replies4", "nat_replies6")
    assert not any(balancer.program.entries(table) for table in tables)


def test_a_flood_of_connections_is_forwarded_but_no_longer_recorded(interfaces: tuple[int, int]) -> None:
    with loaded_program(replace(SETTINGS, recorded_syns_per_s=2)) as program:
        balancer = Balancer(program, *interfaces)
        balancer.serve(balancer.service(mode="dr", size=2, slots=[MOVED]))
        with on_one_cpu():
            flood = [balancer.send(V4.request(from_client(sport=sport))) for sport in (1, 2, 3)]
            balancer.after(1)
            later = balancer.send(V4.request(from_client(sport=4)))
        assert [o.noted for o in (*flood, later)] == ["", "", "NOTED_SYN_NOT_RECORDED", ""]
        assert {o.frame[:6] for o in (*flood, later)} == {balancer.member(V4, 2).hop.destination}
        assert {key.source_port for key, _ in program.entries("flows4")} == {1, 2, 4}


def test_when_the_previous_member_is_dead_the_current_one_gets_its_connections(balancer: Balancer) -> None:
    members = {1: balancer.member(V4, 1, alive=False), 2: balancer.member(V4, 2)}
    balancer.serve(balancer.service(mode="dr", members=members, slots=[MOVED]))
    assert member_reached(balancer.send(V4.request(from_client(flags="A")))) == 2


@pytest.mark.parametrize(("age_s", "member"), [(0, 1), (119, 1), (121, 2)])
def test_on_a_slot_in_transition_unknown_udp_is_older_for_a_while(balancer: Balancer, age_s: int, member: int) -> None:
    balancer.serve(
        balancer.service(V4, "udp", mode="dr", size=2, slots=[MOVED], changed_ns=START_NS - age_s * SECOND_NS)
    )
    assert member_reached(balancer.send(V4.request(from_client("udp")))) == member
