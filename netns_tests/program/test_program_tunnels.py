"""What the program does with one frame after another: modes ipip and gue, whole frames with every outer header.

Expected frames are built by scapy, but for GUE's own header, which it does not know. What the outer headers take from
the flow's hash is told by the model's hash.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import ICMPv6PacketTooBig, IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from netns_tests.oracle import packets, table
from netns_tests.oracle.model import MASK32, Count, Member, Outcome, Service, Slot, flow_hash
from netns_tests.oracle.packets import Verdict
from netns_tests.oracle.program import loaded_program
from netns_tests.oracle.table import (
    SETTINGS,
    V4,
    V6,
    Balancer,
    Family,
    both_families,
    both_protocols,
    dropped,
    from_client,
    mac,
    redirected,
    segment,
    with_hops,
    with_macs,
)
from netns_tests.oracle.wire import Flow, Hop, address

IPIP, IPV6 = 4, 41  # protocol numbers of what is inside
GUE_PORT = 6080
MTU = 1500
OUTER_SIZE = {4: 20, 6: 40}
MOVED = Slot(current=2, previous=1, track=True)

outer_families = pytest.mark.parametrize("outer", [V4, V6], ids=["in ipv4", "in ipv6"])
both_modes = pytest.mark.parametrize("mode", ["ipip", "gue"])


def member(balancer: Balancer, outer: Family, number: int = 1, **fields: Any) -> Member:
    return balancer.member(outer, number, **({"port": 0} | fields))


def service(
    balancer: Balancer, family: Family, outer: Family, mode: str, protocol: str = "tcp", **fields: Any
) -> Service:
    members = fields.pop("members", {1: member(balancer, outer)})
    return balancer.service(family, protocol, mode=mode, members=members, **fields)


def hash32(family: Family, protocol: str = "tcp", sport: int = packets.CLIENT_PORT) -> int:
    flow = Flow(
        address(family.client), sport, address(family.vip), packets.SERVICE_PORT, 6 if protocol == "tcp" else 17
    )
    return flow_hash(flow, SETTINGS.hash_seed) & MASK32


def outer_ip(outer: Family, inner_version: int, of_flow: int, mode: str = "ipip", traffic_class: int = 0) -> Packet:
    protocol = 17 if mode == "gue" else IPIP if inner_version == 4 else IPV6
    ends: dict[str, Any] = {"src": outer.balancer, "dst": outer.backends[0]}
    if outer.version == 4:
        return IP(**ends, id=0, flags="DF", proto=protocol, tos=traffic_class, ttl=64)
    return IPv6(**ends, nh=protocol, tc=traffic_class, fl=of_flow & 0xFFFFF, hlim=64)


def gue(inner: bytes, inner_version: int, of_flow: int, data: bytes = b"", **fields: Any) -> Packet:
    header = bytes([len(data) // 4, IPIP if inner_version == 4 else IPV6, 0, 0])
    ports = {"sport": 0xC000 | of_flow >> 16, "dport": GUE_PORT, "chksum": 0}
    return UDP(**(ports | fields)) / Raw(header + data + inner)


def sent_on(*layers: Packet, member: int = 1) -> Outcome:
    macs = {"src_mac": packets.LB_MAC, "dst_mac": packets.BACKEND_MACS[member - 1]}
    return redirected(packets.frame(*layers, **macs))


def inner_of(frame: bytes) -> bytes:
    """What goes into the tunnel: the packet with a hop less."""
    return with_hops(frame, 63)[packets.ETHERNET_HEADER_SIZE :]


# Outer headers


@both_families
@outer_families
@both_protocols
def test_ipip_puts_an_ip_header_in_front_of_the_packet(
    balancer: Balancer, family: Family, outer: Family, protocol: str
) -> None:
    balancer.serve(service(balancer, family, outer, "ipip", protocol))
    request = family.request(from_client(protocol))
    header = outer_ip(outer, family.version, hash32(family, protocol))
    assert balancer.send(request) == sent_on(header, Raw(inner_of(request)))


@both_families
@outer_families
@both_protocols
def test_gue_puts_ip_udp_and_gue_in_front_of_the_packet(
    balancer: Balancer, family: Family, outer: Family, protocol: str
) -> None:
    balancer.serve(service(balancer, family, outer, "gue", protocol))
    request, of_flow = family.request(from_client(protocol)), hash32(family, protocol)
    header = outer_ip(outer, family.version, of_flow, mode="gue")
    assert balancer.send(request) == sent_on(header, gue(inner_of(request), family.version, of_flow))


@both_families
@outer_families
@pytest.mark.parametrize("traffic_class", [0xB8, 0x03, 0xFF])
def test_dscp_and_ecn_are_copied(balancer: Balancer, family: Family, outer: Family, traffic_class: int) -> None:
    balancer.serve(service(balancer, family, outer, "ipip"))
    packet = family.header(family.client, family.vip)
    setattr(packet, "tos" if family.version == 4 else "tc", traffic_class)
    request = packets.frame(packet, from_client())
    header = outer_ip(outer, family.version, hash32(family), traffic_class=traffic_class)
    assert balancer.send(request) == sent_on(header, Raw(inner_of(request)))


@both_families
@both_modes
@pytest.mark.parametrize(
    ("outer", "prefix", "bits", "source"),
    [
        (V4, "198.18.0.0", 16, "198.18.{high}.{low}"),
        (V4, "198.18.7.0", 8, "198.18.7.{low}"),
        (V6, "2001:db8:9::", 16, "2001:db8:9::{word:x}"),
    ],
    ids=["ipv4 /16", "ipv4 /24", "ipv6 /112"],
)
def test_the_low_bits_of_the_outer_source_follow_the_flow(
    balancer: Balancer, family: Family, mode: str, outer: Family, prefix: str, bits: int, source: str
) -> None:
    fields: dict[str, Any] = {"source": address(prefix), "source_bits": bits}
    balancer.serve(service(balancer, family, outer, mode, members={1: member(balancer, outer, **fields)}))
    for sport in range(40000, 40008):
        word = hash32(family, sport=sport) & 0xFFFF
        expected = source.format(high=word >> 8, low=word & 0xFF, word=word)
        outcome = balancer.send(family.request(from_client(sport=sport)))
        packet = Ether(outcome.frame)
        assert address((packet[IP] if outer is V4 else packet[IPv6]).src) == address(expected)


def test_flows_spread_over_the_udp_source_ports_of_gue(balancer: Balancer) -> None:
    balancer.serve(service(balancer, V4, V4, "gue"))
    ports = {Ether(balancer.send(V4.request(from_client(sport=sport))).frame)[UDP].sport for sport in range(1000, 1100)}
    assert len(ports) > 90
    assert min(ports) >= 0xC000


@both_families
@outer_families
@both_protocols
@pytest.mark.parametrize("payload", [b"even", b"odd"])
def test_the_outer_checksum_is_right(
    balancer: Balancer, family: Family, outer: Family, protocol: str, payload: bytes
) -> None:
    """scapy computes it over all of the packet; the program does not look at the payload."""
    balancer.serve(service(balancer, family, outer, "gue", protocol, outer_checksum=True))
    request, of_flow = family.request(from_client(protocol, payload=payload)), hash32(family, protocol)
    header = outer_ip(outer, family.version, of_flow, mode="gue")
    body = gue(inner_of(request), family.version, of_flow, chksum=None)
    assert balancer.send(request) == sent_on(header, body)


@both_families
@outer_families
def test_the_outer_checksum_of_an_icmp_error_is_right(balancer: Balancer, family: Family, outer: Family) -> None:
    balancer.serve(service(balancer, family, outer, "gue", outer_checksum=True))
    reply = packets.frame(
        family.header(family.vip, family.client), segment("tcp", packets.SERVICE_PORT, packets.CLIENT_PORT, "SA")
    )
    error, of_flow = family.error(reply, family.router, 8), hash32(family)
    header = outer_ip(outer, family.version, of_flow, mode="gue")
    assert balancer.send(error) == sent_on(header, gue(inner_of(error), family.version, of_flow, chksum=None))


@both_families
@pytest.mark.parametrize(
    "fields",
    [{"chksum": 0}, {"len": 10}],
    ids=["a datagram without one", "a datagram that ends before its packet"],
)
def test_the_outer_checksum_is_left_out_where_it_does_not_follow_from_the_inner_one(
    balancer: Balancer, family: Family, fields: dict[str, int]
) -> None:
    balancer.serve(service(balancer, family, V4, "gue", "udp", outer_checksum=True))
    request, of_flow = family.request(from_client("udp", **fields)), hash32(family, "udp")
    header = outer_ip(V4, family.version, of_flow, mode="gue")
    assert balancer.send(request) == sent_on(header, gue(inner_of(request), family.version, of_flow))


@both_modes
@outer_families
def test_an_empty_datagram_in_an_unpadded_frame_fits_into_a_tunnel(
    balancer: Balancer, mode: str, outer: Family
) -> None:
    balancer.serve(service(balancer, V4, outer, mode, "udp"))
    request, of_flow = V4.request(from_client("udp", payload=b"")), hash32(V4, "udp")
    header = outer_ip(outer, 4, of_flow, mode=mode)
    inner = inner_of(request)
    assert balancer.send(request) == sent_on(header, gue(inner, 4, of_flow) if mode == "gue" else Raw(inner))


@both_modes
def test_padding_stays_behind_the_packet_and_is_not_in_the_outer_length(balancer: Balancer, mode: str) -> None:
    balancer.serve(service(balancer, V4, V4, mode))
    plain = V4.request(from_client(payload=b""))
    expected = balancer.send(plain).frame + b"\xff\x00\xaa"
    assert balancer.send(plain + b"\xff\x00\xaa") == redirected(expected)


@both_families
@outer_families
@both_modes
def test_a_tunnels_packets_are_counted_as_the_client_sent_them(
    balancer: Balancer, family: Family, outer: Family, mode: str
) -> None:
    balancer.serve(service(balancer, family, outer, mode))
    requests = [family.request(from_client(flags=flags)) for flags in ("S", "A")]
    for request in requests:
        balancer.send(request)
    assert balancer.program.count(1) == Count(packets=2, bytes=sum(map(len, requests)), connections=1)


@outer_families
@both_modes
def test_a_tunnel_whose_next_hop_nobody_knows_takes_nothing(balancer: Balancer, outer: Family, mode: str) -> None:
    balancer.serve(service(balancer, V4, outer, mode, members={1: member(balancer, outer, resolved=False)}))
    request = V4.request(from_client())
    assert balancer.send(request) == dropped("DROP_NO_NEIGHBOUR", request)


@both_families
@both_modes
def test_an_icmp_error_follows_its_flow_into_the_tunnel_unchanged(
    balancer: Balancer, family: Family, mode: str
) -> None:
    members = {number: member(balancer, V4, number) for number in (1, 2)}
    balancer.serve(service(balancer, family, V4, mode, members=members, slots=[Slot(1), Slot(2)] * 8))
    for sport in range(1, 17):
        reply = packets.frame(
            family.header(family.vip, family.client), segment("tcp", packets.SERVICE_PORT, sport, "SA")
        )
        error = family.error(reply, family.router, 8)
        request = balancer.send(family.request(from_client(sport=sport))).frame
        outcome = balancer.send(error).frame
        outer_size = packets.ETHERNET_HEADER_SIZE + 20 + (12 if mode == "gue" else 0)
        assert outcome[:14] == request[:14]
        assert outcome[outer_size:] == inner_of(error)


# What does not fit


def overhead(mode: str, outer: Family) -> int:
    return OUTER_SIZE[outer.version] + (12 if mode == "gue" else 0)


def request_of_size(family: Family, size: int) -> bytes:
    """An IP packet of so many bytes; TCP without options."""
    return family.request(from_client(flags="A", payload=bytes(size - OUTER_SIZE[family.version] - 20)))


def too_big_error(family: Family, request: bytes, mtu: int) -> bytes:
    quoted = request[packets.ETHERNET_HEADER_SIZE :][: 128 if family.version == 4 else 256]
    if family.version == 4:
        error: Packet = IP(src=family.vip, dst=family.client, id=0) / ICMP(type=3, code=4, nexthopmtu=mtu)
    else:
        error = IPv6(src=family.vip, dst=family.client) / ICMPv6PacketTooBig(mtu=mtu)
    return packets.frame(error, Raw(quoted), src_mac=packets.LB_MAC, dst_mac=packets.CLIENT_MAC)


@both_families
@outer_families
@both_modes
def test_a_packet_that_just_fits_into_the_tunnel_is_sent_on(
    balancer: Balancer, family: Family, outer: Family, mode: str
) -> None:
    balancer.serve(service(balancer, family, outer, mode))
    outcome = balancer.send(request_of_size(family, MTU - overhead(mode, outer)))
    assert outcome.reason == "FORWARDED"
    assert len(outcome.frame) == packets.ETHERNET_HEADER_SIZE + MTU


@both_families
@outer_families
@both_modes
def test_a_packet_one_byte_too_big_for_the_tunnel_is_answered_with_what_fits(
    balancer: Balancer, family: Family, outer: Family, mode: str
) -> None:
    balancer.serve(service(balancer, family, outer, mode))
    fits = MTU - overhead(mode, outer)
    request = request_of_size(family, fits + 1)
    error = too_big_error(family, request, fits)
    assert balancer.send(request) == Outcome(Verdict.TX, "ANSWERED_TOO_BIG", error)
    assert balancer.program.count(1) == Count()


@both_families
def test_the_room_for_a_second_chance_is_kept_free(balancer: Balancer, family: Family) -> None:
    members = {number: member(balancer, V4, number) for number in (1, 2)}
    balancer.serve(service(balancer, family, V4, "gue", members=members, slots=[MOVED], second_chance=True))
    request = request_of_size(family, MTU - 20 - 12)
    error = too_big_error(family, request, MTU - 20 - 32)
    assert balancer.send(request) == Outcome(Verdict.TX, "ANSWERED_TOO_BIG", error)


def test_an_icmp_error_that_does_not_fit_is_not_answered_with_another(balancer: Balancer) -> None:
    balancer.serve(service(balancer, V4, V4, "ipip", members={1: member(balancer, V4, mtu=600)}))
    reply = packets.frame(
        V4.header(V4.vip, V4.client), segment("tcp", packets.SERVICE_PORT, packets.CLIENT_PORT, "A", bytes(1000))
    )
    error = V4.error(reply, V4.router, 1000)
    assert balancer.send(error) == dropped("DROP_TOO_BIG", error)


@pytest.fixture
def balancer_of_few_answers(interfaces: tuple[int, int]) -> Iterator[Balancer]:
    with loaded_program(replace(SETTINGS, icmp_errors_per_s=2)) as program, table.on_one_cpu():
        yield Balancer(program, *interfaces)


@both_families
def test_senders_are_told_so_many_times_a_second_that_their_packets_are_too_big(
    balancer_of_few_answers: Balancer, family: Family
) -> None:
    balancer = balancer_of_few_answers
    balancer.serve(service(balancer, family, V4, "ipip"))
    request = request_of_size(family, MTU)
    reasons = [balancer.send(request).reason for _ in range(3)]
    assert reasons == ["ANSWERED_TOO_BIG", "ANSWERED_TOO_BIG", "DROP_TOO_BIG"]
    assert balancer.send(request) == dropped("DROP_TOO_BIG", request)
    balancer.after(1)
    assert balancer.send(request).reason == "ANSWERED_TOO_BIG"


# The second chance


def names(other: Family, number: int) -> bytes:
    """The private data that name a member."""
    return b"X2" + bytes([other.version, 0]) + address(other.backends[number - 1]).ljust(16, b"\0")


def second_chance(balancer: Balancer, family: Family, outer: Family, **fields: Any) -> Service:
    """Member 1 is of the outer family, member 2 of the other one."""
    other = V6 if outer is V4 else V4
    members = {1: member(balancer, outer, 1), 2: member(balancer, other, 2)}
    standard: dict[str, Any] = {"members": members, "slots": [MOVED], "second_chance": True}
    return service(balancer, family, outer, "gue", **(standard | fields))


@both_families
@outer_families
def test_a_packet_on_a_slot_in_transition_names_the_member_that_it_does_not_go_to(
    balancer: Balancer, family: Family, outer: Family
) -> None:
    balancer.serve(second_chance(balancer, family, outer))
    request, of_flow = family.request(from_client(flags="A")), hash32(family)
    header = outer_ip(outer, family.version, of_flow, mode="gue")
    data = names(V6 if outer is V4 else V4, 2)
    assert balancer.send(request) == sent_on(header, gue(inner_of(request), family.version, of_flow, data))


@both_families
@outer_families
def test_a_new_connection_on_a_slot_in_transition_names_the_previous_member(
    balancer: Balancer, family: Family, outer: Family
) -> None:
    balancer.serve(second_chance(balancer, family, outer, slots=[Slot(current=1, previous=2, track=True)]))
    request, of_flow = family.request(from_client(flags="S")), hash32(family)
    header = outer_ip(outer, family.version, of_flow, mode="gue")
    data = names(V6 if outer is V4 else V4, 2)
    assert balancer.send(request) == sent_on(header, gue(inner_of(request), family.version, of_flow, data))


def test_a_flow_recorded_during_the_transition_still_has_its_second_chance_when_that_is_over(
    balancer: Balancer,
) -> None:
    """It may have been recorded by guess: its connection opened through another balancer."""
    balancer.serve(second_chance(balancer, V4, V4))
    request, of_flow = V4.request(from_client(flags="A")), hash32(V4)
    balancer.send(request)
    balancer.change(slots=[Slot(current=2, track=True)])
    header = outer_ip(V4, 4, of_flow, mode="gue")
    assert balancer.send(request) == sent_on(header, gue(inner_of(request), 4, of_flow, names(V6, 2)))


@both_families
def test_the_outer_checksum_covers_the_private_data(balancer: Balancer, family: Family) -> None:
    balancer.serve(second_chance(balancer, family, V4, outer_checksum=True))
    request, of_flow = family.request(from_client(flags="A")), hash32(family)
    header = outer_ip(V4, family.version, of_flow, mode="gue")
    body = gue(inner_of(request), family.version, of_flow, names(V6, 2), chksum=None)
    assert balancer.send(request) == sent_on(header, body)


@pytest.mark.parametrize(
    ("fields", "protocol"),
    [
        pytest.param({"slots": [Slot(1)]}, "tcp", id="a stable slot"),
        pytest.param({"slots": [Slot(1, track=True)]}, "tcp", id="a slot whose transition is over"),
        pytest.param({"slots": [Slot(1, 3, track=True)]}, "tcp", id="a member that is gone"),
        pytest.param({"second_chance": False}, "tcp", id="no second chance asked for"),
        pytest.param({}, "udp", id="udp"),
    ],
)
def test_without_a_second_chance_no_private_data_are_sent(
    balancer: Balancer, fields: dict[str, Any], protocol: str
) -> None:
    fields = {"changed_ns": table.START_NS, "protocol": protocol} | fields
    balancer.serve(second_chance(balancer, V4, V4, **fields))
    request, of_flow = V4.request(from_client(protocol, flags="A")), hash32(V4, protocol)
    header = outer_ip(V4, 4, of_flow, mode="gue")
    assert balancer.send(request) == sent_on(header, gue(inner_of(request), 4, of_flow))


def test_a_member_on_the_interface_of_the_clients_gets_its_tunnel_by_tx(balancer: Balancer) -> None:
    hop = Hop(balancer.front, mac(packets.BACKEND_MACS[0]), mac(packets.LB_MAC))
    balancer.serve(service(balancer, V4, V4, "ipip", members={1: member(balancer, V4, hop=hop)}))
    assert balancer.send(V4.request(from_client())).verdict == Verdict.TX


def test_a_tunnels_frame_has_the_next_hops_addresses(balancer: Balancer) -> None:
    balancer.serve(service(balancer, V4, V6, "gue"))
    outcome = balancer.send(V4.request(from_client()))
    assert outcome.frame == with_macs(outcome.frame, packets.LB_MAC, packets.BACKEND_MACS[0])
