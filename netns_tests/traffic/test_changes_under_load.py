"""Changes while traffic flows: no request fails, and what is connected stays where it is.

Each test starts with b1 and b2 of three backends; what earlier tests changed is part of the rings'
history, as it is in the field.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from itertools import product

import pytest

from netns_tests.bed.servers import start_http
from netns_tests.bed.topology import Bed, wait_until
from netns_tests.bed.traffic import (
    FAMILIES,
    MODES,
    HttpConnection,
    RunningLoad,
    Way,
    addresses,
    apply,
    connections,
    curl,
    every_service,
    go_on,
    load,
    loading,
    service_status,
    status,
    udp_flows,
)


@pytest.fixture
def bed(balanced: Bed) -> Bed:
    """Every service over two of the three backends."""
    apply(balanced, *every_service(balanced, balanced.backends[:2]))
    return balanced


@pytest.fixture(params=list(product(MODES, FAMILIES)), ids="-".join)
def way(bed: Bed, request: pytest.FixtureRequest) -> Way:
    return Way(bed, *request.param)


@pytest.fixture(params=MODES)
def ipv4_way(bed: Bed, request: pytest.FixtureRequest) -> Way:
    return Way(bed, request.param, "ipv4")


def backends_of(way: Way) -> list[str]:
    """The addresses of b1, b2 and b3."""
    return addresses(way.bed.backends, way.family)


def new_connections(way: Way) -> Counter[str]:
    """Who answers connections that are opened now; all of them are answered."""
    report = load(way.bed.client, way.http_url, connections=20, requests=200)
    assert (report.failed, report.reasons) == (0, {})
    return report.backends


def assert_no_request_failed(*loads: RunningLoad) -> None:
    reports = [one.stop() for one in loads]
    assert [(report.failed, report.reasons) for report in reports] == [(0, {})] * len(loads)


def test_no_request_fails_while_backends_are_added_weighed_and_drained(bed: Bed, way: Way) -> None:
    b1, b2, b3 = backends_of(way)
    with (
        loading(bed, way.http_url, connections=10) as short,
        loading(bed, way.http_url, connections=50, keepalive=True) as long,
    ):
        bed.xdp_lb("backend", "add", way.http_service, b3)
        assert set(new_connections(way)) == {"b1", "b2", "b3"}
        bed.xdp_lb("backend", "weight", way.http_service, b2, "5")
        weighed = new_connections(way)
        assert weighed["b2"] > 2 * max(weighed["b1"], weighed["b3"])
        bed.xdp_lb("backend", "drain", way.http_service, b1)
        assert set(new_connections(way)) == {"b2", "b3"}
        go_on(100, short, long)
        assert_no_request_failed(short, long)


def test_established_connections_stay_whatever_is_added_weighed_or_drained(bed: Bed, way: Way) -> None:
    _, b2, b3 = backends_of(way)
    with contextlib.ExitStack() as open_connections:
        held: list[HttpConnection] = []
        for change in (["add", b3], ["drain", b2], ["weight", b3, "7"], ["weight", b2, "1"]):
            held += open_connections.enter_context(connections(bed, way.vip, way.http_port, count=30))
            before = [connection.ask() for connection in held]
            command, *words = change
            bed.xdp_lb("backend", command, way.http_service, *words)
            assert [connection.ask() for connection in held] == before, change


def test_drained_backend_keeps_its_connections_and_gets_no_new_ones_until_it_has_a_weight(bed: Bed, way: Way) -> None:
    b1, _, _ = backends_of(way)
    with connections(bed, way.vip, way.http_port) as held:
        before = [connection.ask() for connection in held]
        bed.xdp_lb("backend", "drain", way.http_service, b1)
        assert set(before) == {"b1", "b2"}
        assert set(new_connections(way)) == {"b2"}
        assert [connection.ask() for connection in held] == before
        bed.xdp_lb("backend", "weight", way.http_service, b1, "1")
        assert set(new_connections(way)) == {"b1", "b2"}
        assert [connection.ask() for connection in held] == before


def test_datagrams_of_one_source_port_stay_when_a_backend_is_added(bed: Bed, way: Way) -> None:
    with udp_flows(bed, way.vip, way.echo_port) as flows:
        before = [flow.ask() for flow in flows]
        bed.xdp_lb("backend", "add", way.echo_service, backends_of(way)[2])
        assert [flow.ask() for flow in flows] == before


def test_no_request_fails_while_everything_is_written_anew(bed: Bed, ipv4_way: Way) -> None:
    with loading(bed, ipv4_way.http_url, connections=20) as running:
        bed.xdp_lb("attach", "eth0")
        go_on(200, running)
        assert_no_request_failed(running)


def test_no_request_fails_while_another_service_comes_and_goes(bed: Bed, ipv4_way: Way) -> None:
    another = f"{ipv4_way.vip}:9000/tcp"
    with loading(bed, ipv4_way.http_url, connections=20) as running:
        bed.xdp_lb("vip", "add", another, "--mode", ipv4_way.mode, "--backends", backends_of(ipv4_way)[0])
        bed.xdp_lb("vip", "remove", another)
        go_on(200, running)
        assert_no_request_failed(running)


def test_detach_and_attach_bring_back_weights_and_drains(bed: Bed, ipv4_way: Way) -> None:
    b1, b2, _ = backends_of(ipv4_way)
    bed.xdp_lb("backend", "drain", ipv4_way.http_service, b1)
    bed.xdp_lb("backend", "weight", ipv4_way.http_service, b2, "9")
    bed.xdp_lb("detach")
    assert not status(bed)["loaded"]
    bed.xdp_lb("attach", "eth0")
    backends = service_status(bed, ipv4_way.http_service)["backends"]
    assert [(b["address"], b["weight"], b["draining"]) for b in backends] == [(b1, 1, True), (b2, 9, False)]
    assert set(new_connections(ipv4_way)) == {"b2"}


def test_maps_grow_and_the_program_is_replaced_without_a_failed_request() -> None:
    """The translation tables of IPv6 have no room until a service wants it."""
    with Bed(backends=2) as bed:
        for server in bed.backends:
            start_http(bed, server)
        old, new = Way(bed, "nat", "ipv4"), Way(bed, "nat", "ipv6")
        bed.xdp_lb("attach", "eth0", "--vip", old.http_service, "--backends", ",".join(backends_of(old)))
        first = program_ids(bed)
        with (
            loading(bed, old.http_url, connections=20) as short,
            loading(bed, old.http_url, connections=50, keepalive=True) as long,
        ):
            bed.xdp_lb("vip", "add", new.http_service, "--backends", ",".join(backends_of(new)))
            go_on(200, short, long)
            assert_no_request_failed(short, long)
        assert program_ids(bed).isdisjoint(first)
        wait_until(lambda: curl(bed.client, new.http_url) == "b2", "b2 answering over IPv6")


def program_ids(bed: Bed) -> set[int]:
    return {interface["program_id"] for interface in status(bed)["interfaces"]}
