"""A backend removed at once, not drained: its connections end, and no others.

In a bed of its own and with few connections: a packet of an ended connection that meets another
connection's TIME_WAIT on the backend it is sent to now is not answered with a reset.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest

from netns_tests.bed.servers import start_http
from netns_tests.bed.topology import Bed
from netns_tests.bed.traffic import FAMILIES, HTTP_PORTS, MODES, Way, addresses, apply, connections, curl, every_service


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    with Bed(backends=2, one_arm=True) as b:
        for backend in b.backends:
            b.own_vip(backend)
            start_http(b, backend, list(HTTP_PORTS.values()))
        apply(b, *every_service(b, b.backends))
        b.xdp_lb("attach", "eth0")
        yield b


@pytest.mark.parametrize(("mode", "family"), list(product(MODES, FAMILIES)))
def test_removed_backend_ends_its_connections_and_no_others(bed: Bed, mode: str, family: str) -> None:
    way = Way(bed, mode, family)
    with connections(bed, way.vip, way.http_port, count=30) as held:
        before = [connection.ask() for connection in held]
        assert set(before) == {"b1", "b2"}
        bed.xdp_lb("backend", "remove", way.http_service, addresses(bed.backends, family)[0])
        for connection, label in zip(held, before, strict=True):
            if label == "b1":
                with pytest.raises(ConnectionResetError):
                    connection.ask()
            else:
                assert connection.ask() == label
    assert {curl(bed.client, way.http_url) for _ in range(10)} == {"b2"}
