"""What the program does with one frame after another: which service and which member a packet gets by more than its
VIP, port and flow: VIP prefixes and port ranges, the client's prefix, affinity, QUIC connection IDs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from netns_tests.oracle import packets, table
from netns_tests.oracle.model import Prefix, Service, Slot
from netns_tests.oracle.table import (
    V4,
    V6,
    Balancer,
    Family,
    both_families,
    dropped,
    from_client,
    member_reached,
    segment,
    with_hops,
)
from netns_tests.oracle.wire import address

MOVED = Slot(current=2, previous=1, track=True)
# More slots than one, all of which have the member 1 or 2.
EITHER = [Slot(1), Slot(2)] * 8


def of_member(balancer: Balancer, family: Family, number: int, **fields: Any) -> Service:
    """A service in mode dr that is known by its only member."""
    standard: dict[str, Any] = {"mode": "dr", "members": {1: balancer.member(family, number)}}
    return balancer.service(family, **(standard | fields))


def request_to(family: Family, destination: str, port: int, source: str = "", **fields: Any) -> bytes:
    header = family.header(source or family.client, destination)
    return packets.frame(header, segment("tcp", packets.CLIENT_PORT, port, **fields))


# VIP prefixes and port ranges


NETWORKS = {4: ("203.0.113.0", 24), 6: ("2001:db8:2::", 64)}
NEIGHBOURS = {4: "203.0.113.77", 6: "2001:db8:2::77"}
OUTSIDERS = {4: "203.0.112.255", 6: "2001:db8:1:ffff::"}


def network(family: Family) -> dict[str, Any]:
    base, bits = NETWORKS[family.version]
    return {"address": address(base), "prefix_bits": bits}


@both_families
def test_every_address_of_a_vip_prefix_is_served(balancer: Balancer, family: Family) -> None:
    balancer.serve(of_member(balancer, family, 1, **network(family)))
    inside = [family.vip, NEIGHBOURS[family.version], NETWORKS[family.version][0]]
    assert [member_reached(balancer.send(request_to(family, vip, 80))) for vip in inside] == [1, 1, 1]
    outside = balancer.send(request_to(family, OUTSIDERS[family.version], 80))
    assert outside.reason == "PASS_NOT_A_SERVICE"


@both_families
@pytest.mark.parametrize(("first", "last"), [(8000, 8010), (1, 65535), (80, 81), (1023, 1025), (32768, 65535)])
def test_a_range_of_ports_has_its_ends_and_no_more(balancer: Balancer, family: Family, first: int, last: int) -> None:
    balancer.serve(of_member(balancer, family, 1, port=first, last_port=last))
    inside = {first, last, (first + last) // 2}
    assert {member_reached(balancer.send(request_to(family, family.vip, port))) for port in inside} == {1}
    outside = {first - 1, last + 1} - {65536}
    reasons = {balancer.send(request_to(family, family.vip, port)).reason for port in outside}
    assert reasons == {"PASS_NOT_A_SERVICE"}


@both_families
def test_the_narrowest_service_takes_the_packet(balancer: Balancer, family: Family) -> None:
    """One address and port, then the longest prefix, then the fewest ports."""
    vip, neighbour = family.vip, NEIGHBOURS[family.version]
    balancer.serve(
        of_member(balancer, family, 1, port=443),
        of_member(balancer, family, 2, port=0),
        of_member(balancer, family, 3, port=80, **network(family)),
        of_member(balancer, family, 1, port=8000, last_port=8999, **network(family)),
        of_member(balancer, family, 2, port=8100, last_port=8199, **network(family)),
    )
    expected = {
        (vip, 443): 1,
        (vip, 80): 2,
        (vip, 8150): 2,
        (neighbour, 80): 3,
        (neighbour, 443): 0,
        (neighbour, 8099): 1,
        (neighbour, 8100): 2,
        (neighbour, 8199): 2,
        (neighbour, 8200): 1,
    }
    reached = {where: member_reached(balancer.send(request_to(family, *where))) for where in expected}
    assert reached == expected


@both_families
def test_what_a_longer_prefix_has_no_service_for_a_shorter_one_may_have(balancer: Balancer, family: Family) -> None:
    udp = {"protocol": 17, "port": 0}
    balancer.serve(of_member(balancer, family, 1, **network(family)), of_member(balancer, family, 2, **udp))
    assert member_reached(balancer.send(request_to(family, family.vip, 80))) == 1
    assert member_reached(balancer.send(family.request(from_client("udp")))) == 2


@both_families
def test_nat_translates_for_the_address_and_port_that_the_client_asked_for(balancer: Balancer, family: Family) -> None:
    nat: dict[str, Any] = {"mode": "nat", "port": 0, "members": {1: balancer.member(family, 1, port=0)}}
    balancer.serve(balancer.service(family, **nat, **network(family)))
    neighbour = NEIGHBOURS[family.version]
    port = balancer.opened(request_to(family, neighbour, 8443))
    answer = balancer.answer(family.from_member(segment("tcp", 8443, port, "SA")))
    back = packets.frame(
        family.header(neighbour, family.client, 63),
        segment("tcp", 8443, packets.CLIENT_PORT, "SA"),
        src_mac=packets.LB_MAC,
        dst_mac=packets.CLIENT_MAC,
    )
    assert answer == table.redirected(back)


# The client's prefix


CLIENTS = {4: "192.0.2.0", 6: "2001:db8:1::"}
FELLOWS = {4: "192.0.2.99", 6: "2001:db8:1::99"}  # of the client, in its prefix
STRANGERS = {4: "198.51.100.200", 6: "2001:db8:7::1"}
HALF = {4: 25, 6: 64}


def clients(family: Family) -> Prefix:
    return address(CLIENTS[family.version]), HALF[family.version]


def one_client(family: Family) -> Prefix:
    return address(family.client), 8 * len(address(family.client))


def as_set(service: Service) -> Service:
    return replace(service, is_set=True)


@both_families
def test_only_clients_of_allowed_prefixes_are_served(balancer: Balancer, family: Family) -> None:
    balancer.serve(of_member(balancer, family, 1, sources={clients(family): 0}, only_sources=True))
    assert member_reached(balancer.send(family.request(from_client()))) == 1
    for flags in ("S", "A", "R"):
        stranger = request_to(family, family.vip, 80, STRANGERS[family.version], flags=flags)
        assert balancer.send(stranger) == dropped("DROP_SOURCE_NOT_ALLOWED", stranger)


@both_families
def test_a_service_without_allowed_prefixes_is_for_everyone(balancer: Balancer, family: Family) -> None:
    balancer.serve(of_member(balancer, family, 1))
    stranger = request_to(family, family.vip, 80, STRANGERS[family.version])
    assert member_reached(balancer.send(stranger)) == 1


@both_families
def test_a_clients_prefix_gets_the_set_of_members_that_is_for_it(balancer: Balancer, family: Family) -> None:
    """The longest prefix decides; who is in none has the VIP's own members."""
    sources = {clients(family): 1, one_client(family): 2}
    balancer.serve(
        of_member(balancer, family, 1, sources=sources),
        as_set(of_member(balancer, family, 2)),
        as_set(of_member(balancer, family, 3)),
    )
    expected = {STRANGERS[family.version]: 1, FELLOWS[family.version]: 2, family.client: 3}
    reached = {client: member_reached(balancer.send(request_to(family, family.vip, 80, client))) for client in expected}
    assert reached == expected


@both_families
@pytest.mark.parametrize("mode", ["nat", "dr"])
def test_a_set_has_a_mode_and_counters_of_its_own(balancer: Balancer, family: Family, mode: str) -> None:
    own = of_member(balancer, family, 1, mode="nat", sources={clients(family): 1})
    balancer.serve(own, as_set(of_member(balancer, family, 2, mode=mode)))
    outcome = balancer.send(family.request(from_client()))
    is_translated = address(family.vip) not in outcome.frame
    assert is_translated == (mode == "nat")
    assert balancer.program.count(1, service=1).packets == 1
    assert balancer.program.count(1, service=0).packets == 0


@both_families
def test_an_error_about_a_flow_of_a_set_reaches_the_set(balancer: Balancer, family: Family) -> None:
    own = of_member(balancer, family, 1, sources={clients(family): 1})
    balancer.serve(own, as_set(of_member(balancer, family, 2)))
    reply = packets.frame(
        family.header(family.vip, family.client), segment("tcp", packets.SERVICE_PORT, packets.CLIENT_PORT, "SA")
    )
    assert member_reached(balancer.send(family.error(reply, STRANGERS[family.version], 8))) == 2


# Affinity


def home_of(balancer: Balancer, family: Family, protocol: str = "tcp", **fields: Any) -> set[int]:
    """The members that a client's flows reach."""
    frames = [family.request(from_client(protocol, sport, **fields)) for sport in range(40000, 40020)]
    return {member_reached(balancer.send(frame)) for frame in frames}


@both_families
@pytest.mark.parametrize("mode", ["nat", "dr", "ipip", "gue"])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_all_flows_of_a_client_with_affinity_go_to_one_member(
    balancer: Balancer, family: Family, mode: str, protocol: str
) -> None:
    service = balancer.service(family, protocol, size=2, mode=mode, slots=EITHER)
    balancer.serve(service)
    assert home_of(balancer, family, protocol) == {1, 2}
    balancer.program.forget()
    balancer.change(affinity_s=100)
    assert len(home_of(balancer, family, protocol)) == 1


def affine(balancer: Balancer, family: Family, **fields: Any) -> Service:
    standard: dict[str, Any] = {"mode": "dr", "slots": [MOVED], "affinity_s": 100, "changed_ns": table.START_NS}
    return balancer.service(family, size=2, **(standard | fields))


@both_families
def test_a_client_with_affinity_stays_through_a_change_with_new_connections_too(
    balancer: Balancer, family: Family
) -> None:
    balancer.serve(affine(balancer, family))
    assert home_of(balancer, family, flags="S") == {1}


@both_families
def test_a_client_that_is_new_after_the_affinitys_timeout_gets_the_current_member(
    balancer: Balancer, family: Family
) -> None:
    balancer.serve(affine(balancer, family))
    balancer.after(101)
    assert home_of(balancer, family, flags="S") == {2}


@both_families
def test_a_client_that_speaks_in_time_keeps_its_member(balancer: Balancer, family: Family) -> None:
    balancer.serve(affine(balancer, family))
    for sport in range(40000, 40005):
        assert member_reached(balancer.send(family.request(from_client(sport=sport)))) == 1
        balancer.after(99)


@both_families
@pytest.mark.parametrize("mode", ["nat", "dr"])
def test_a_client_that_talks_on_an_open_connection_gets_its_member_for_new_ones(
    balancer: Balancer, family: Family, mode: str
) -> None:
    balancer.serve(affine(balancer, family, mode=mode))
    for flags in ("S", "A", "A", "A"):
        assert member_reached(balancer.send(family.request(from_client(flags=flags)))) == 1
        balancer.after(60)
    assert home_of(balancer, family, flags="S") == {1}


@both_families
@pytest.mark.parametrize(("flags", "member"), [("S", 2), ("A", 1)])
def test_a_client_that_was_silent_too_long_is_new_with_its_next_connection(
    balancer: Balancer, family: Family, flags: str, member: int
) -> None:
    balancer.serve(affine(balancer, family))
    assert member_reached(balancer.send(family.request(from_client()))) == 1
    balancer.after(101)
    assert member_reached(balancer.send(family.request(from_client(flags=flags)))) == member


@pytest.mark.parametrize("end", ["FA", "R"])
def test_the_end_of_one_connection_does_not_end_a_clients_affinity(balancer: Balancer, end: str) -> None:
    balancer.serve(affine(balancer, V4))
    for flags in ("S", end):
        assert member_reached(balancer.send(V4.request(from_client(flags=flags)))) == 1
    assert home_of(balancer, V4, flags="S") == {1}


def test_a_client_whose_member_died_gets_another_and_stays_there(balancer: Balancer) -> None:
    balancer.serve(affine(balancer, V4))
    assert home_of(balancer, V4) == {1}
    members = balancer.services[0].members
    balancer.change(members={**members, 1: replace(members[1], alive=False)})
    assert home_of(balancer, V4) == {2}
    balancer.change(members=members)
    assert home_of(balancer, V4) == {2}


# QUIC


NONCE = bytes(range(10))
SERVER_IDS = {(1, b"\1\2"): 1, (1, b"\3\4"): 2, (6, bytes(range(15))): 2, (0, b"\7"): 1}


def connection_id(config: int, server_id: bytes, nonce: bytes = NONCE) -> bytes:
    return bytes([config << 5 | 0x11]) + server_id + nonce


def short_header(connection_id: bytes) -> bytes:
    return b"\x40" + connection_id + b"protected"


def long_header(connection_id: bytes, length: int | None = None) -> bytes:
    """RFC 9000, section 17.2: version 1, the destination's ID with its length, no ID of the source."""
    size = len(connection_id) if length is None else length
    return b"\xc3\0\0\0\1" + bytes([size]) + connection_id + b"\0protected"


def quic(balancer: Balancer, family: Family, **fields: Any) -> Service:
    standard: dict[str, Any] = {"mode": "dr", "slots": EITHER, "server_ids": SERVER_IDS}
    return balancer.service(family, "udp", size=2, **(standard | fields))


def reached_by(balancer: Balancer, family: Family, payload: bytes) -> set[int]:
    """From many ports of the client."""
    frames = [family.request(from_client("udp", sport, payload=payload)) for sport in range(40000, 40020)]
    return {member_reached(balancer.send(frame)) for frame in frames}


both_headers = pytest.mark.parametrize("header", [short_header, long_header], ids=["short header", "long header"])


@both_families
@both_headers
@pytest.mark.parametrize("server", SERVER_IDS, ids=str)
@pytest.mark.parametrize("mode", ["nat", "dr", "ipip", "gue"])
def test_a_quic_packet_goes_to_the_server_in_its_connection_id_whatever_the_clients_port(
    balancer: Balancer, family: Family, header: Any, server: tuple[int, bytes], mode: str
) -> None:
    balancer.serve(quic(balancer, family, mode=mode))
    assert reached_by(balancer, family, header(connection_id(*server))) == {SERVER_IDS[server]}


@both_families
@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(short_header(connection_id(1, b"\5\6")), id="an id of no server"),
        pytest.param(short_header(connection_id(2, b"\1\2")), id="a codepoint that is not configured"),
        pytest.param(short_header(connection_id(7, b"\1\2")), id="the unroutable codepoint"),
        pytest.param(long_header(connection_id(1, b"\1\2"), length=2), id="an id shorter than a server id"),
        pytest.param(long_header(b""), id="no id"),
        pytest.param(b"\x40" + connection_id(6, bytes(range(14)), b""), id="an id cut off"),
        pytest.param(b"\x40\x20\1\2", id="too short for quic"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_a_packet_that_names_no_server_goes_by_its_flow(balancer: Balancer, family: Family, payload: bytes) -> None:
    balancer.serve(quic(balancer, family))
    assert reached_by(balancer, family, payload) == {1, 2}


@pytest.mark.parametrize("payload", [short_header(connection_id(1, b"\1\2")[:3]), b"\x40" + connection_id(1, b"\1\2")])
def test_a_server_id_needs_no_byte_behind_it(balancer: Balancer, payload: bytes) -> None:
    balancer.serve(quic(balancer, V4))
    assert reached_by(balancer, V4, payload) == {1}


def test_a_server_that_is_dead_leaves_its_packets_to_the_ring(balancer: Balancer) -> None:
    members = {1: balancer.member(V4, 1), 2: balancer.member(V4, 2, alive=False)}
    balancer.serve(quic(balancer, V4, members=members, slots=[Slot(1)]))
    assert reached_by(balancer, V4, short_header(connection_id(1, b"\3\4"))) == {1}


def test_server_ids_are_those_of_one_service(balancer: Balancer) -> None:
    other = quic(balancer, V4, port=443, server_ids={(1, b"\1\2"): 2})
    balancer.serve(quic(balancer, V4), other)
    assert reached_by(balancer, V4, short_header(connection_id(1, b"\1\2"))) == {1}
    datagram = packets.udp4(dport=443, payload=short_header(connection_id(1, b"\1\2")))
    assert member_reached(balancer.send(datagram)) == 2


def test_a_packet_without_a_known_server_id_follows_its_clients_affinity(balancer: Balancer) -> None:
    balancer.serve(quic(balancer, V4, affinity_s=100))
    assert len(reached_by(balancer, V4, short_header(connection_id(1, b"\5\6")))) == 1
    assert reached_by(balancer, V4, short_header(connection_id(1, b"\1\2"))) == {1}
    assert reached_by(balancer, V4, short_header(connection_id(1, b"\3\4"))) == {2}


@both_families
@pytest.mark.parametrize("mode", ["nat", "dr"])
def test_connection_id_comes_before_what_the_clients_port_was_last_used_for(
    balancer: Balancer, family: Family, mode: str
) -> None:
    balancer.serve(quic(balancer, family, mode=mode))
    sent = [(1, b"\1\2"), (1, b"\3\4"), (1, b"\3\4"), (1, b"\1\2")]
    frames = [family.request(from_client("udp", payload=short_header(connection_id(*server)))) for server in sent]
    assert [member_reached(balancer.send(frame)) for frame in frames] == [1, 2, 2, 1]


def test_tcp_is_not_read_as_quic(balancer: Balancer) -> None:
    service = balancer.service(V4, "tcp", size=2, mode="dr", slots=EITHER, server_ids=SERVER_IDS)
    balancer.serve(service)
    payload = short_header(connection_id(1, b"\1\2"))
    assert home_of(balancer, V4, payload=payload, flags="A") == {1, 2}


def test_a_frames_bytes_do_not_change_where_its_connection_id_decides(balancer: Balancer) -> None:
    balancer.serve(quic(balancer, V6))
    request = V6.request(from_client("udp", payload=short_header(connection_id(1, b"\3\4"))))
    outcome = balancer.send(request)
    assert outcome.frame[14:] == with_hops(request, 63)[14:]
