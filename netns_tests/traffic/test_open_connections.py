"""Connections open now, as status and previews count them, against those that really end.

In a bed of its own and with few connections, as in test_removed_backend.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest

from netns_tests.bed.servers import start_http
from netns_tests.bed.topology import Bed, wait_until
from netns_tests.bed.traffic import (
    FAMILIES,
    HTTP_PORTS,
    MODES,
    Way,
    addresses,
    apply,
    connections,
    every_service,
    service_status,
)


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    with Bed(backends=2, one_arm=True) as b:
        for backend in b.backends:
            b.own_vip(backend)
            start_http(b, backend, list(HTTP_PORTS.values()))
        apply(b, *every_service(b, b.backends))
        b.xdp_lb("attach", "eth0")
        yield b


def open_now(way: Way) -> list[dict[str, Any]]:
    """Of each backend."""
    return [backend["open"] for backend in service_status(way.bed, way.http_service)["backends"]]


def ending(way: Way, *words: str) -> object:
    return json.loads(way.bed.xdp_lb(*words, "--dry-run", "--json").stdout)["ending"]


@pytest.mark.parametrize(("mode", "family"), list(product(MODES, FAMILIES)))
def test_as_many_connections_end_with_a_drained_backend_as_were_open(bed: Bed, mode: str, family: str) -> None:
    way, leaving = Way(bed, mode, family), addresses(bed.backends, family)[0]
    with connections(bed, way.vip, way.http_port, count=40) as held:
        before = [connection.ask() for connection in held]
        count = before.count("b1")
        assert 0 < count < len(held)
        bed.xdp_lb("backend", "drain", way.http_service, leaving)
        assert [connection.ask() for connection in held] == before
        counted = {"connections": count, "estimated": mode != "nat"}
        assert open_now(way)[0] == counted
        assert ending(way, "backend", "remove", way.http_service, leaving) == counted
        removed = bed.xdp_lb("backend", "remove", way.http_service, leaving).stdout
        assert f"ends {'~' if mode != 'nat' else ''}{count} open connection" in removed
        for connection, label in zip(held, before, strict=True):
            if label == "b1":
                with pytest.raises(ConnectionResetError):
                    connection.ask()
            else:
                assert connection.ask() == label


@pytest.mark.parametrize("family", FAMILIES)
def test_a_service_whose_clients_have_gone_has_no_open_connections(bed: Bed, family: str) -> None:
    way = Way(bed, "nat", family)
    with connections(bed, way.vip, way.http_port, count=10) as held:
        assert len([connection.ask() for connection in held]) == 10
        assert sum(each["connections"] for each in open_now(way)) >= 10
    wait_until(lambda: all(each["connections"] == 0 for each in open_now(way)), "no open connection")
    assert ending(way, "vip", "remove", way.http_service) == {"connections": 0, "estimated": False}


def test_a_steady_service_of_direct_routing_ends_an_unknown_number(bed: Bed) -> None:
    way = Way(bed, "dr", "ipv4")
    unknown = {"connections": None, "estimated": False}
    assert unknown in open_now(way)
    assert ending(way, "vip", "remove", way.http_service) == unknown
    assert ending(way, "detach") == unknown
