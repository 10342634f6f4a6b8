"""Where the balancer stands: one arm or two, native or generic XDP, its own address or a VIP.

Each test has a bed of its own, and sees what the host itself answers beside what is balanced.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from itertools import product

import pytest

from netns_tests.bed.servers import big_file, start_http, start_udp_echo
from netns_tests.bed.topology import Bed
from netns_tests.bed.traffic import (
    ECHO_PORTS,
    FAMILIES,
    HTTP_PORTS,
    MODES,
    Way,
    addresses,
    apply,
    bracketed,
    curl,
    every_service,
    load,
    service_status,
    status,
)

MakeBed = Callable[..., Bed]

both_families = pytest.mark.parametrize("family", FAMILIES)


def serve_everything(bed: Bed, *attach: str) -> Iterator[Way]:
    """Every service over all backends, attached with the words of `attach`."""
    for backend in bed.backends:
        bed.own_vip(backend)
        start_http(bed, backend, list(HTTP_PORTS.values()))
        for port in ECHO_PORTS.values():
            start_udp_echo(backend, port)
    apply(bed, *every_service(bed, bed.backends))
    bed.xdp_lb("attach", *attach)
    return (Way(bed, mode, family) for mode, family in product(MODES, FAMILIES))


def assert_carries_traffic(way: Way) -> None:
    labels = {backend.label for backend in way.bed.backends}
    for url in (way.http_url, way.echo_url):
        report = load(way.bed.client, url, connections=20, requests=200)
        assert (report.failed, report.reasons) == (0, {}), url
        assert set(report.backends) == labels, url


def download(way: Way) -> str:
    """The SHA-256 of `/big`, as the client got it."""
    target = way.bed.directory / "downloaded"
    way.bed.client.run(["curl", "-sSf", "-o", str(target), f"{way.http_url}/big"])
    with target.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def test_one_arm_carries_traffic_of_both_modes_and_families(bed: MakeBed) -> None:
    b = bed(backends=2, one_arm=True)
    for way in serve_everything(b, "eth0"):
        assert_carries_traffic(way)


def test_one_arm_behind_a_router_carries_traffic_of_both_modes_and_families(bed: MakeBed) -> None:
    b = bed(backends=2, one_arm=True, router=True)
    for way in serve_everything(b, "eth0"):
        assert_carries_traffic(way)


def test_generic_xdp_carries_traffic_of_both_modes_and_families(bed: MakeBed) -> None:
    b = bed(backends=2, router=True)
    for way in serve_everything(b, "eth0", "eth1", "--xdp-mode", "generic"):
        assert_carries_traffic(way)
        assert download(way) == big_file().sha256
    assert {interface["xdp_mode"] for interface in status(b)["interfaces"]} == {"generic"}


@both_families
def test_two_arms_carry_nat_where_the_kernel_forwards_nothing(bed: MakeBed, family: str) -> None:
    b = bed(backends=2)
    for backend in b.backends:
        start_http(b, backend)
    way = Way(b, "nat", family)
    said = b.xdp_lb("attach", "eth0", "--vip", way.http_service, "--backends", ",".join(addresses(b.backends, family)))
    assert "eth1: also attached" in said.stdout
    assert set(load(b.client, way.http_url, connections=20, requests=200).backends) == {"b1", "b2"}
    assert not b.client.pings(addresses(b.backends, family)[0], timeout_s=0.3)


@both_families
def test_backends_alone_are_served_on_the_interfaces_own_address(bed: MakeBed, family: str) -> None:
    b = bed(backends=2, one_arm=True)
    for server in (*b.backends, b.lb):
        start_http(b, server, [80, 2222])
    own = bracketed(addresses([b.lb], family)[0])

    said = b.xdp_lb("attach", "eth0", "--backends", ",".join(addresses(b.backends, family)))
    assert f"{own}:80/tcp is eth0's own address" in said.stdout
    assert set(load(b.client, f"http://{own}", connections=20, requests=200).backends) == {"b1", "b2"}
    assert curl(b.client, f"http://{own}:2222") == "lb", "what is for no service is the host's"

    b.xdp_lb("detach")
    assert curl(b.client, f"http://{own}") == "lb", "detached, the host is as it was"
    assert not status(b)["loaded"]

    b.xdp_lb("attach", "eth0")
    assert curl(b.client, f"http://{own}") in {"b1", "b2"}, "attached again, it serves what is stored"


@both_families
def test_vip_is_put_on_the_interface_and_taken_off_again(bed: MakeBed, family: str) -> None:
    b = bed(backends=1, one_arm=True)
    way = Way(b, "nat", family)
    b.xdp_lb("attach", "eth0", "--vip", way.http_service, "--backends", addresses(b.backends, family)[0])
    assert b.client.pings(way.vip)
    b.xdp_lb("detach")
    assert not b.client.pings(way.vip, timeout_s=0.3)


@both_families
def test_backends_listen_on_a_port_of_their_own(bed: MakeBed, family: str) -> None:
    b = bed(backends=2, one_arm=True)
    for backend in b.backends:
        start_http(b, backend, [8080])
    way = Way(b, "nat", family)
    backends = ",".join(f"{bracketed(address)}:8080" for address in addresses(b.backends, family))
    b.xdp_lb("attach", "eth0", "--vip", way.http_service, "--backends", backends)
    assert way.http_url.endswith(":80")
    assert set(load(b.client, way.http_url, connections=20, requests=200).backends) == {"b1", "b2"}


def test_weights_are_the_shares_of_the_connections(bed: MakeBed) -> None:
    b = bed(backends=2, one_arm=True)
    for backend in b.backends:
        start_http(b, backend)
    b.xdp_lb("attach", "eth0", "--vip", f"{b.vip4}:80", "--backends", f"{b.backends[0].ipv4},{b.backends[1].ipv4}@3")
    report = load(b.client, f"http://{b.vip4}", connections=50, requests=1000)
    assert report.failed == 0
    assert abs(report.backends["b1"] - 250) < 80  # five standard deviations, and Maglev's 1 %


@pytest.mark.parametrize("mode", MODES)
def test_status_counts_every_connection_for_the_backend_that_answered(bed: MakeBed, mode: str) -> None:
    b = bed(backends=2, one_arm=True)
    for backend in b.backends:
        b.own_vip(backend)
        start_http(b, backend, [HTTP_PORTS[mode]])
    way = Way(b, mode, "ipv4")
    backends = ",".join(addresses(b.backends, "ipv4"))
    b.xdp_lb("attach", "eth0", "--vip", way.http_service, "--mode", mode, "--backends", backends)
    report = load(b.client, way.http_url, connections=10, requests=300)
    counted = service_status(b, way.http_service)
    assert [c["connections"] for c in counted["backends"]] == [report.backends["b1"], report.backends["b2"]]
    for c in counted["backends"]:
        assert c["packets"] >= 4 * c["connections"]  # SYN, ACK, request, FIN at least
        assert c["bytes"] > 40 * c["packets"]
        assert (c["reply_packets"] >= 3 * c["connections"]) == (mode == "nat")
    assert counted["packets"] == sum(c["packets"] for c in counted["backends"])


def test_two_balancers_side_by_side_do_not_meet(bed: MakeBed) -> None:
    with contextlib.ExitStack() as stack:
        beds = [stack.enter_context(Bed(backends=1, one_arm=True)) for _ in range(2)]
        for b in beds:
            start_http(b, b.backends[0])
            b.xdp_lb("attach", "eth0", "--vip", f"{b.vip4}:80", "--backends", b.backends[0].ipv4)
        first, second = beds
        first.xdp_lb("detach")
        assert curl(second.client, f"http://{second.vip4}") == "b1"


def test_attach_finds_the_machine_that_has_taken_a_backends_place(bed: MakeBed) -> None:
    b = bed(backends=1)
    start_http(b, b.backends[0])
    b.xdp_lb("attach", "eth0", "--vip", f"{b.vip4}:80", "--backends", b.backends[0].ipv4)
    b.backends[0].run(["ip", "link", "set", "eth0", "address", "02:00:00:00:00:77"])
    b.xdp_lb("attach", "eth0")
    assert curl(b.client, f"http://{b.vip4}") == "b1"
