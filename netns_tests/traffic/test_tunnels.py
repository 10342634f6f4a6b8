"""Real traffic in every mode, every client family in every outer family: web servers, datagrams, changes under load."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

import pytest

from netns_tests.bed import lanes
from netns_tests.bed.lanes import LANES, TUNNELS, Lane
from netns_tests.bed.servers import big_file
from netns_tests.bed.topology import Bed
from netns_tests.bed.traffic import connections, curl, go_on, loading, udp_flows
from netns_tests.bed.tunnelled import decap_status

LABELS = {"b1", "b2", "b3"}
every_lane = pytest.mark.parametrize("lane", LANES, ids=lanes.name, indirect=True)
every_tunnel = pytest.mark.parametrize("lane", TUNNELS, ids=lanes.name, indirect=True)
# Each mode, client family and outer family twice: a change is about the ring, which the headers are not.
some_tunnels = pytest.mark.parametrize(
    "lane",
    [("ipip", "ipv4", "ipv4"), ("ipip", "ipv6", "ipv4"), ("gue", "ipv4", "ipv6"), ("gue", "ipv6", "ipv6")],
    ids=lanes.name,
    indirect=True,
)


@pytest.fixture
def lane(lanes_bed: Bed, request: pytest.FixtureRequest) -> Lane:
    return Lane(lanes_bed, *request.param)


@every_lane
def test_requests_and_datagrams_spread_over_the_backends(lane: Lane) -> None:
    for flows in (connections(lane.bed, lane.vip, count=60), udp_flows(lane.bed, lane.vip, lanes.ECHO_PORT, count=60)):
        with flows as opened:
            answers = [[flow.ask() for _ in range(3)] for flow in opened]
        assert all(len(set(each)) == 1 for each in answers)
        assert {each[0] for each in answers} == LABELS


@every_tunnel
def test_a_hundred_megabytes_come_back_past_the_tunnel_whole(lane: Lane) -> None:
    target = lane.bed.directory / "downloaded"
    lane.bed.client.run(["curl", "-sSf", "--max-time", "50", "-o", str(target), f"{lane.http_url}/big"])
    with target.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == big_file().sha256


@every_lane
def test_backend_sees_the_clients_address_but_in_mode_nat(lane: Lane) -> None:
    seen = lane.bed.lb.interfaces[-1] if lane.mode == "nat" else lane.bed.client.interfaces[0]
    expected = seen.ipv4 if lane.family == "ipv4" else seen.ipv6
    assert curl(lane.bed.client, f"{lane.http_url}/client") == expected


def test_backends_count_what_they_decapsulate_by_the_kind_of_tunnel(lanes_bed: Bed) -> None:
    before = decapsulated(lanes_bed)
    for tunnel in TUNNELS:
        assert curl(lanes_bed.client, Lane(lanes_bed, *tunnel).http_url) in LABELS
    after = decapsulated(lanes_bed)
    assert {kind for kind in after if after[kind] - before[kind] >= 4} == {  # SYN, ACK, request, FIN
        f"{mode}_{family[-1]}_in_{outer[-1]}" for mode, family, outer in TUNNELS
    }


def decapsulated(bed: Bed) -> dict[str, int]:
    """Kind of tunnel -> packets, of all backends together."""
    tunnels = [decap_status(bed, host)["tunnels"] for host in bed.backends]
    return {kind: sum(each[kind]["packets"] for each in tunnels) for kind in tunnels[0]}


# Changes


@pytest.fixture
def two_backends(lane: Lane) -> Iterator[Lane]:
    """The same lane with another web service, over b1 and b2, its ring without a history."""
    other = replace(lane, web_port=lanes.OTHER_HTTP_PORT)
    backends = ",".join(lane.backends(lane.bed.backends[:2]))
    lane.bed.xdp_lb("vip", "add", other.http_service, "--mode", lane.mode, "--backends", backends)
    yield other
    lane.bed.xdp_lb("vip", "remove", other.http_service)


def answering(lane: Lane) -> set[str]:
    """Who answers connections that are opened now; all of them are answered."""
    with connections(lane.bed, lane.vip, lane.http_port, count=100) as opened:
        return {connection.ask() for connection in opened}


@some_tunnels
def test_no_request_fails_while_backends_are_added_and_drained(two_backends: Lane) -> None:
    lane = two_backends
    bed, web = lane.bed, lane.http_service
    first, _, third = lane.backends(bed.backends)
    with (
        loading(bed, lane.http_url, connections=10) as short,
        loading(bed, lane.http_url, connections=30, keepalive=True) as long,
    ):
        bed.xdp_lb("backend", "add", web, third)
        assert answering(lane) == LABELS
        bed.xdp_lb("backend", "drain", web, first)
        assert answering(lane) == {"b2", "b3"}
        go_on(100, short, long)
        reports = [running.stop() for running in (short, long)]
    assert [(report.failed, report.reasons) for report in reports] == [(0, {}), (0, {})]


@some_tunnels
def test_open_connections_stay_while_backends_are_added_and_drained(two_backends: Lane) -> None:
    lane = two_backends
    first, _, third = lane.backends(lane.bed.backends)
    with connections(lane.bed, lane.vip, lane.http_port, count=40) as held:
        before = [connection.ask() for connection in held]
        assert set(before) == {"b1", "b2"}
        for change in (["add", lane.http_service, third], ["drain", lane.http_service, first]):
            lane.bed.xdp_lb("backend", *change)
            assert [connection.ask() for connection in held] == before, change
