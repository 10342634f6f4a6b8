"""Both modes and both families side by side: real clients, real servers, one set of maps."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections import Counter
from itertools import product

import pytest

from netns_tests.bed.servers import big_file
from netns_tests.bed.topology import Bed
from netns_tests.bed.traffic import FAMILIES, MODES, Way, apply, curl, every_service, go_on, load, loading, status

BACKENDS = {"b1", "b2", "b3"}


@pytest.fixture(scope="module")
def bed(balanced: Bed) -> Bed:
    """Every service over all three backends, its ring without a history: UDP would heed that."""
    apply(balanced)
    apply(balanced, *every_service(balanced, balanced.backends))
    return balanced


@pytest.fixture(params=list(product(MODES, FAMILIES)), ids="-".join)
def way(bed: Bed, request: pytest.FixtureRequest) -> Way:
    return Way(bed, *request.param)


def assert_even(answers: Counter[str], labels: set[str]) -> None:
    """Within five standard deviations of even, and the 1 % that Maglev's shares may differ by."""
    total, share = sum(answers.values()), 1 / len(labels)
    bound = 5 * math.sqrt(total * share * (1 - share)) + total * share / 100
    assert set(answers) == labels
    assert all(abs(n - total * share) < bound for n in answers.values()), answers


def test_curl_reaches_every_backend_through_the_vip(bed: Bed, way: Way) -> None:
    answers: set[str] = set()
    for _ in range(60):
        answers.add(curl(bed.client, way.http_url))
        if answers == BACKENDS:
            break
    assert answers == BACKENDS


def test_two_thousand_connections_at_once_all_get_their_answers(bed: Bed, way: Way) -> None:
    report = load(bed.client, way.http_url, connections=2000, requests=2000, keepalive=True)
    assert (report.failed, report.reasons) == (0, {})
    assert (report.requests, report.peak_connections) == (2000, 2000)


def test_connections_spread_evenly_over_the_backends(bed: Bed, way: Way) -> None:
    report = load(bed.client, way.http_url, connections=50, requests=1500)
    assert (report.failed, report.reasons) == (0, {})
    assert_even(report.backends, BACKENDS)


def test_datagrams_are_echoed_by_every_backend_evenly(bed: Bed, way: Way) -> None:
    report = load(bed.client, way.echo_url, connections=50, requests=1500)
    assert (report.failed, report.reasons) == (0, {})
    assert_even(report.backends, BACKENDS)


def test_a_hundred_megabytes_arrive_whole(bed: Bed, way: Way) -> None:
    target = bed.directory / "downloaded"
    bed.client.run(["curl", "-sSf", "-o", str(target), f"{way.http_url}/big"])
    with target.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == big_file().sha256


def test_all_ways_carry_traffic_at_the_same_time(bed: Bed) -> None:
    ways = [Way(bed, mode, family) for mode, family in product(MODES, FAMILIES)]
    with contextlib.ExitStack() as loads:
        running = [loads.enter_context(loading(bed, way.http_url, connections=5)) for way in ways]
        go_on(100, *running)
        assert [one.stop().failed for one in running] == [0, 0, 0, 0]


def test_status_lists_services_interfaces_and_reasons(bed: Bed) -> None:
    document = status(bed)
    assert document["loaded"]
    assert [(i["name"], i["xdp_mode"], i["attached"]) for i in document["interfaces"]] == [
        ("eth0", "native", True),
        ("eth1", "native", True),  # nat replies come in there
    ]
    assert len(document["services"]) == 8
    assert all(backend["resolved"] for service in document["services"] for backend in service["backends"])
    assert {"drop_no_backend", "drop_malformed"} <= set(document["drops"])


@pytest.mark.parametrize("family", FAMILIES)
def test_vip_answers_pings_itself(bed: Bed, family: str) -> None:
    assert bed.client.pings(Way(bed, "nat", family).vip)
