"""What the program does with one frame after another: whole frames in, whole frames out, built by scapy.

The services are put straight into its maps and its clock is set by hand. Where nat chose a port, the expected frame has
the port that was chosen; which ports may be chosen is the matter of tests of their own.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_Router_Alert
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet, Raw

from netns_tests import packets
from netns_tests.model import SECOND_NS, Count, Member, Outcome, Service, Settings, Slot
from netns_tests.packets import Case, Verdict
from netns_tests.program import LoadedProgram, loaded_program
from netns_tests.topology import Bed
from netns_tests.wire import Hop, address

SETTINGS = Settings(nat_port_first=2000, nat_port_count=1000)
START_NS = 1_000_000 * SECOND_NS
MEMBER_PORT = 8080
OTHER_CLIENT_MAC = "02:00:00:00:00:09"
GATEWAY_MAC = "02:00:00:00:00:fe"


@dataclass(frozen=True)
class Family:
    """The addresses of a family, and its header."""

    version: int
    client: str
    vip: str
    balancer: str
    backends: tuple[str, ...]
    router: str

    def header(self, src: str, dst: str, hops: int = 64) -> Packet:
        return IP(src=src, dst=dst, ttl=hops) if self.version == 4 else IPv6(src=src, dst=dst, hlim=hops)

    def request(self, segment: Packet, hops: int = 64, src_mac: str = packets.CLIENT_MAC) -> bytes:
        """As the client sends it."""
        return packets.frame(self.header(self.client, self.vip, hops), segment, src_mac=src_mac)

    def to_member(self, segment: Packet, member: int = 1) -> bytes:
        """As nat sends it on, the segment having the new ports."""
        header = self.header(self.balancer, self.backends[member - 1], 63)
        return packets.frame(header, segment, src_mac=packets.LB_MAC, dst_mac=packets.BACKEND_MACS[member - 1])

    def from_member(self, segment: Packet, member: int = 1, hops: int = 64) -> bytes:
        header = self.header(self.backends[member - 1], self.balancer, hops)
        return packets.frame(header, segment, src_mac=packets.BACKEND_MACS[member - 1])

    def to_client(self, segment: Packet, dst_mac: str = packets.CLIENT_MAC) -> bytes:
        header = self.header(self.vip, self.client, 63)
        return packets.frame(header, segment, src_mac=packets.LB_MAC, dst_mac=dst_mac)

    def error(self, quoted: bytes, src: str, quoted_size: int, hops: int = 64) -> bytes:
        """An ICMP error that quotes so many bytes behind the quoted packet's IP header; to its sender."""
        if self.version == 4:
            error = packets.icmp_error4(quoted, src=src, size=20 + quoted_size)
        else:
            error = packets.icmp_error6(quoted, src=src, size=40 + quoted_size)
        return with_hops(error, hops)


V4 = Family(4, packets.CLIENT4, packets.VIP4, packets.LB4, packets.BACKEND4, packets.ROUTER4)
V6 = Family(6, packets.CLIENT6, packets.VIP6, packets.LB6, packets.BACKEND6, packets.ROUTER6)

both_families = pytest.mark.parametrize("family", [V4, V6], ids=["ipv4", "ipv6"])
both_protocols = pytest.mark.parametrize("protocol", ["tcp", "udp"])


def with_hops(frame: bytes, hops: int) -> bytes:
    """The frame with another TTL or hop limit; scapy computes the checksum anew."""
    packet = Ether(frame)
    if IP in packet:
        packet[IP].ttl = hops
        del packet[IP].chksum
    else:
        packet[IPv6].hlim = hops
    return bytes(packet)


def segment(
    protocol: str, sport: int, dport: int, flags: str = "S", payload: bytes = b"hello", **fields: Any
) -> Packet:
    if protocol == "udp":
        return UDP(sport=sport, dport=dport, **fields) / Raw(payload)
    return TCP(sport=sport, dport=dport, flags=flags, **fields) / Raw(payload)


def from_client(protocol: str = "tcp", sport: int = packets.CLIENT_PORT, **fields: Any) -> Packet:
    return segment(protocol, sport, packets.SERVICE_PORT, **fields)


def client_port_of(frame: bytes) -> int:
    """The source port of a frame that leaves, which is nat's."""
    packet = Ether(frame)
    return int(packet[TCP].sport if TCP in packet else packet[UDP].sport)


class Balancer:
    """The program with its interfaces: clients come in on `front`, members are behind `back`."""

    def __init__(self, program: LoadedProgram, front: int, back: int) -> None:
        self.program, self.front, self.back = program, front, back
        self.now_ns = START_NS
        self.services: list[Service] = []
        program.forget()
        program.set_clock(START_NS)
        program.install([])

    def serve(self, *services: Service) -> None:
        self.services = list(services)
        self.program.install(self.services)

    def service(self, family: Family = V4, protocol: str = "tcp", size: int = 1, **fields: Any) -> Service:
        """A service of the VIP on port 80, in mode nat, its ring all the first member's, unless told otherwise."""
        standard: dict[str, Any] = {
            "address": address(family.vip),
            "port": packets.SERVICE_PORT,
            "protocol": 6 if protocol == "tcp" else 17,
            "mode": "nat",
            "members": {number: self.member(family, number) for number in range(1, size + 1)},
            "slots": [Slot(current=1)],
        }
        return Service(**(standard | fields))

    def member(self, family: Family, number: int, **fields: Any) -> Member:
        hop = Hop(self.back, mac(packets.BACKEND_MACS[number - 1]), mac(packets.LB_MAC))
        backend, balancer = address(family.backends[number - 1]), address(family.balancer)
        return replace(Member(number, backend, balancer, hop, counter=number, port=MEMBER_PORT), **fields)

    def change(self, **fields: Any) -> None:
        """Change the (only) service while its flows stay."""
        self.serve(replace(self.services[0], **fields))

    def after(self, seconds: float) -> None:
        self.now_ns += int(seconds * SECOND_NS)
        self.program.set_clock(self.now_ns)

    def send(self, frame: bytes) -> Outcome:
        return self.program.run(frame, self.front)

    def answer(self, frame: bytes) -> Outcome:
        """Run a frame that comes from a member."""
        return self.program.run(frame, self.back)

    def opened(self, frame: bytes) -> int:
        """The port that nat gives to the flow of a frame."""
        outcome = self.send(frame)
        assert outcome.reason == "FORWARDED"
        return client_port_of(outcome.frame)


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def redirected(frame: bytes) -> Outcome:
    return Outcome(Verdict.REDIRECT, "FORWARDED", frame)


def dropped(reason: str, frame: bytes) -> Outcome:
    return Outcome(Verdict.DROP, reason, frame)


def passed(reason: str, frame: bytes) -> Outcome:
    return Outcome(Verdict.PASS, reason, frame)


def member_reached(outcome: Outcome) -> int:
    """Which member a frame leaves for, by its MAC address; 0 if it does not leave."""
    if outcome.reason != "FORWARDED":
        return 0
    return packets.BACKEND_MACS.index(Ether(outcome.frame).dst) + 1


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    with Bed(backends=0) as bed, bed.lb.entered():
        yield bed


@pytest.fixture(scope="module")
def interfaces(bed: Bed) -> tuple[int, int]:
    with bed.lb.netlink() as ip:
        front, back = (ip.link_lookup(ifname=interface.name)[0] for interface in bed.lb.interfaces)
    return front, back


@pytest.fixture(scope="module")
def program(bed: Bed) -> Iterator[LoadedProgram]:
    with loaded_program(SETTINGS) as program:
        yield program


@pytest.fixture
def balancer(program: LoadedProgram, interfaces: tuple[int, int]) -> Balancer:
    return Balancer(program, *interfaces)


@pytest.fixture
def balancer_with_ports(interfaces: tuple[int, int]) -> Iterator[Callable[[int], Balancer]]:
    """A factory of balancers whose nat has only so many ports, from 2000 on."""
    with contextlib.ExitStack() as programs:
        yield lambda count: Balancer(
            programs.enter_context(loaded_program(replace(SETTINGS, nat_port_count=count))), *interfaces
        )


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
@pytest.mark.parametrize("mode", ["nat", "dr"])
@pytest.mark.parametrize("hops", [0, 1])
def test_a_request_that_has_no_hop_left_is_dropped(balancer: Balancer, family: Family, mode: str, hops: int) -> None:
    balancer.serve(balancer.service(family, mode=mode))
    request = family.request(from_client(), hops)
    assert balancer.send(request) == dropped("DROP_TTL_EXPIRED", request)


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


def with_macs(frame: bytes, src: str, dst: str) -> bytes:
    return mac(dst) + mac(src) + frame[12:]


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
    Case("vlan", packets.frame(Dot1Q(vlan=7), packets.ip4(), packets.tcp()), Verdict.PASS, "PASS_NOT_IP"),
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
    home = os.sched_getaffinity(0)
    with loaded_program(replace(SETTINGS, recorded_syns_per_s=2)) as program:
        balancer = Balancer(program, *interfaces)
        balancer.serve(balancer.service(mode="dr", size=2, slots=[MOVED]))
        try:
            os.sched_setaffinity(0, {min(home)})  # each CPU has a limit of its own
            flood = [balancer.send(V4.request(from_client(sport=sport))) for sport in (1, 2, 3)]
            balancer.after(1)
            later = balancer.send(V4.request(from_client(sport=4)))
        finally:
            os.sched_setaffinity(0, home)
        assert [o.reason for o in (*flood, later)] == [*["FORWARDED"] * 2, "NOTED_SYN_NOT_RECORDED", "FORWARDED"]
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


# The life of a translation


def test_a_reset_without_a_connection_opens_none(balancer: Balancer) -> None:
    balancer.serve(balancer.service())
    reset = V4.request(from_client(flags="R"))
    assert balancer.send(reset) == dropped("DROP_NAT_NO_FLOW", reset)


@pytest.mark.parametrize("end", ["FA", "RA"])
def test_a_connection_opened_again_after_its_end_is_a_new_one_with_the_same_port(balancer: Balancer, end: str) -> None:
    balancer.serve(balancer.service(size=2))
    port = balancer.opened(V4.request(from_client()))
    balancer.send(V4.request(from_client(flags=end)))
    balancer.change(slots=[Slot(2)])
    assert member_reached(balancer.send(V4.request(from_client(flags="A")))) == 1
    outcome = balancer.send(V4.request(from_client()))
    assert outcome == redirected(V4.to_member(segment("tcp", port, MEMBER_PORT), member=2))


def test_a_repeated_syn_opens_nothing_new(balancer: Balancer) -> None:
    balancer.serve(balancer.service())
    first, second = (balancer.send(V4.request(from_client())) for _ in range(2))
    assert first == second
    assert balancer.program.count(1).connections == 1


@pytest.mark.parametrize(
    ("flags", "answer", "lives_s"),
    [
        ("S", None, SETTINGS.nat_opening_timeout_s),
        ("A", "A", 3600),
        ("FA", "A", 3600),
        ("FA", "FA", SETTINGS.nat_closed_timeout_s),
        ("A", "R", SETTINGS.nat_closed_timeout_s),
        ("R", None, SETTINGS.nat_closed_timeout_s),
    ],
)
def test_a_connection_lives_as_long_as_its_state_says(
    balancer_with_ports: Callable[[int], Balancer], flags: str, answer: str | None, lives_s: int
) -> None:
    balancer = balancer_with_ports(1)
    balancer.serve(balancer.service())
    port = balancer.opened(V4.request(from_client()))
    balancer.send(V4.request(from_client(flags=flags)))
    if answer:
        balancer.answer(V4.from_member(segment("tcp", MEMBER_PORT, port, answer)))
    other = V4.request(from_client(sport=5))
    balancer.after(lives_s)
    assert balancer.send(other) == dropped("DROP_NAT_NO_PORT", other)
    balancer.after(1)
    assert balancer.opened(other) == port


@both_families
def test_a_port_taken_over_belongs_to_its_new_flow(
    balancer_with_ports: Callable[[int], Balancer], family: Family
) -> None:
    balancer = balancer_with_ports(1)
    balancer.serve(balancer.service(family, "udp"))
    port = balancer.opened(family.request(from_client("udp", sport=1)))
    balancer.after(SETTINGS.udp_timeout_s + 1)
    balancer.opened(family.request(from_client("udp", sport=2)))
    reply = balancer.answer(family.from_member(segment("udp", MEMBER_PORT, port)))
    assert reply == redirected(family.to_client(segment("udp", packets.SERVICE_PORT, 2)))


@both_families
@both_protocols
def test_traffic_of_either_side_keeps_a_flow(balancer: Balancer, family: Family, protocol: str) -> None:
    balancer.serve(balancer.service(family, protocol, size=2, flow_timeout_s=120))
    port = balancer.opened(family.request(from_client(protocol)))
    balancer.send(family.request(from_client(protocol, flags="A")))
    for _ in range(3):
        balancer.after(100)
        balancer.answer(family.from_member(segment(protocol, MEMBER_PORT, port, "A")))
    balancer.change(slots=[Slot(2)])
    assert member_reached(balancer.send(family.request(from_client(protocol, flags="A")))) == 1


@both_families
def test_a_reply_entry_that_was_evicted_is_made_again(balancer: Balancer, family: Family) -> None:
    balancer.serve(balancer.service(family))
    port = balancer.opened(family.request(from_client()))
    balancer.program.forget_replies()
    balancer.after(1)
    request = balancer.send(family.request(from_client(flags="A")))
    reply = balancer.answer(family.from_member(segment("tcp", MEMBER_PORT, port, "A")))
    assert client_port_of(request.frame) == port
    assert reply == redirected(family.to_client(segment("tcp", packets.SERVICE_PORT, packets.CLIENT_PORT, "A")))


# Ports


@both_families
@both_protocols
def test_every_port_is_given_once_and_then_none(
    balancer_with_ports: Callable[[int], Balancer], family: Family, protocol: str
) -> None:
    balancer = balancer_with_ports(2)
    balancer.serve(balancer.service(family, protocol))
    requests = [family.request(from_client(protocol, sport)) for sport in (1, 2, 3)]
    assert {balancer.opened(request) for request in requests[:2]} == {2000, 2001}
    assert balancer.send(requests[2]) == dropped("DROP_NAT_NO_PORT", requests[2])


def test_members_have_ports_of_their_own(balancer_with_ports: Callable[[int], Balancer]) -> None:
    balancer = balancer_with_ports(1)
    balancer.serve(balancer.service(size=2))
    assert balancer.opened(V4.request(from_client(sport=1))) == 2000
    balancer.change(slots=[Slot(2)])
    assert balancer.opened(V4.request(from_client(sport=2))) == 2000


def test_a_flow_that_lost_its_port_to_another_never_shares_it(
    balancer_with_ports: Callable[[int], Balancer],
) -> None:
    balancer = balancer_with_ports(1)
    balancer.serve(balancer.service())
    balancer.opened(V4.request(from_client(sport=1)))
    balancer.program.forget_replies()
    balancer.opened(V4.request(from_client(sport=2)))
    balancer.after(2)
    robbed = V4.request(from_client(sport=1, flags="A"))
    assert balancer.send(robbed) == dropped("DROP_NAT_NO_PORT", robbed)


def test_a_late_reset_of_a_dead_member_does_not_close_the_flow_that_has_moved(balancer: Balancer) -> None:
    balancer.serve(balancer.service(size=2))
    port = balancer.opened(V4.request(from_client()))
    balancer.change(members={**balancer.services[0].members, 1: balancer.member(V4, 1, alive=False)}, slots=[Slot(2)])
    assert balancer.opened(V4.request(from_client())) == port
    balancer.send(V4.request(from_client(flags="A")))
    balancer.answer(V4.from_member(segment("tcp", MEMBER_PORT, port, "R")))
    (_, flow), *_ = balancer.program.entries("nat_flows4")
    assert flow.state == balancer.program.bpf.types.enum("nat_state")["NAT_ESTABLISHED"]


def test_nothing_is_translated_while_the_way_to_the_member_is_unknown(balancer: Balancer) -> None:
    balancer.serve(balancer.service(members={1: balancer.member(V4, 1, resolved=False)}))
    frame = V4.request(from_client())
    assert balancer.send(frame) == dropped("DROP_NO_NEIGHBOUR", frame)
    assert not balancer.program.entries("nat_flows4")
    assert not balancer.program.entries("nat_replies4")


def test_a_later_fragment_with_options_is_the_hosts(balancer: Balancer) -> None:
    balancer.serve(balancer.service())
    fragment = packets.frame(packets.ip4(options=[IPOption_Router_Alert()], frag=3), packets.tcp())
    assert balancer.send(fragment).reason == "PASS_FRAGMENT"


@both_families
def test_the_port_of_a_service_on_nats_own_address_is_never_given(
    balancer_with_ports: Callable[[int], Balancer], family: Family
) -> None:
    balancer = balancer_with_ports(2)
    own = balancer.service(family, address=address(family.balancer), port=2000)
    balancer.serve(balancer.service(family), own)
    assert balancer.opened(family.request(from_client(sport=1))) == 2001
    second = family.request(from_client(sport=2))
    assert balancer.send(second) == dropped("DROP_NAT_NO_PORT", second)


def test_cpus_that_open_flows_at_once_never_share_a_port(balancer: Balancer) -> None:
    balancer.serve(balancer.service())
    frames = [V4.request(from_client(sport=sport)) for sport in range(10_000, 10_800)]
    on_every_cpu(lambda worker: send_all(balancer, frames[worker::WORKERS]))
    assert_every_flow_has_a_port_of_its_own(balancer, len(frames))


def test_cpus_that_open_the_same_flow_at_once_agree_on_its_port(balancer: Balancer) -> None:
    balancer.serve(balancer.service())
    frames = [V4.request(from_client(sport=sport)) for sport in range(10_000, 10_400)]
    on_every_cpu(lambda worker: send_all(balancer, frames))
    assert_every_flow_has_a_port_of_its_own(balancer, len(frames))


WORKERS = 4


def send_all(balancer: Balancer, frames: list[bytes]) -> None:
    for frame in frames:
        balancer.program.run_uncounted(frame, balancer.front)


def on_every_cpu(work: Callable[[int], None]) -> None:
    """Start the workers at the same moment, each on a CPU of its own as far as there are so many."""
    cpus = sorted(os.sched_getaffinity(0))
    start = threading.Barrier(WORKERS)

    def run(worker: int) -> None:
        os.sched_setaffinity(0, {cpus[worker % len(cpus)]})
        start.wait()
        work(worker)

    with ThreadPoolExecutor(WORKERS) as workers:
        list(workers.map(run, range(WORKERS)))


def assert_every_flow_has_a_port_of_its_own(balancer: Balancer, flows: int) -> None:
    client_ports = {value.port: key.source_port for key, value in balancer.program.entries("nat_flows4")}
    reply_ports = {key.destination_port: value.client_port for key, value in balancer.program.entries("nat_replies4")}
    assert len(client_ports) == flows
    assert client_ports == reply_ports
