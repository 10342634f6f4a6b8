"""Passive detection: SYNs that come again are counted for the backend that has left them without an answer.

First frame by frame, through the program alone; then with real clients, and a backend that drops what they send.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from netns_tests.bed.servers import start_http
from netns_tests.bed.topology import Bed, wait_until
from netns_tests.bed.traffic import Way, apply, deaf, service_status, trying
from netns_tests.oracle import table
from netns_tests.oracle.model import Count, Slot
from netns_tests.oracle.table import V4, Balancer, Family, both_families, from_client, on_one_cpu

every_mode = pytest.mark.parametrize("mode", ["nat", "dr", "ipip", "gue"])

FIRST = 4_294_967_295  # a sequence number, the largest


@pytest.fixture(autouse=True)
def cpus() -> Iterator[list[int]]:
    """Tests run on the first of them, since each knows its own SYNs."""
    home = sorted(os.sched_getaffinity(0))
    with on_one_cpu():
        yield home


def syn(family: Family = V4, seq: int = FIRST, flags: str = "S", **fields: Any) -> bytes:
    return family.request(from_client(flags=flags, seq=seq, **fields))


def repeated(balancer: Balancer, *frames: bytes, member: int = 1) -> int:
    """How many SYNs are counted as repeated, after these frames."""
    for frame in frames:
        assert balancer.send(frame).reason == "FORWARDED"
    return balancer.program.count(member).repeated_syns


@both_families
@every_mode
def test_a_syn_that_comes_again_is_counted(balancer: Balancer, family: Family, mode: str) -> None:
    balancer.serve(balancer.service(family, mode=mode))
    frame = syn(family)
    assert repeated(balancer, frame, frame, frame) == 2
    connections = 1 if mode == "nat" else 3
    expected = Count(packets=3, bytes=3 * len(frame), connections=connections, repeated_syns=2)
    assert balancer.program.count(1) == expected


@both_families
def test_a_syn_is_known_again_behind_tunnels_of_the_other_family_and_in_a_vlan(
    balancer: Balancer, family: Family
) -> None:
    other = table.V6 if family is V4 else V4
    members = {1: balancer.member(other, 1)}
    balancer.serve(balancer.service(family, mode="gue", second_chance=True, members=members))
    frame = syn(family)
    tagged = frame[:12] + bytes.fromhex("88a8000781000008") + frame[12:]
    assert repeated(balancer, frame, tagged) == 1


@both_families
@every_mode
def test_another_sequence_number_is_another_connection(balancer: Balancer, family: Family, mode: str) -> None:
    balancer.serve(balancer.service(family, mode=mode))
    assert repeated(balancer, syn(family), syn(family, seq=0), syn(family, seq=FIRST - 1)) == 0


@both_families
def test_another_client_with_the_same_sequence_number_is_another_connection(balancer: Balancer, family: Family) -> None:
    balancer.serve(balancer.service(family, mode="dr"))
    assert repeated(balancer, *(syn(family, sport=port) for port in range(40_000, 40_050))) == 0


@pytest.mark.parametrize("flags", ["A", "SA", "FA", "PA"])
def test_what_opens_no_connection_may_come_again(balancer: Balancer, flags: str) -> None:
    balancer.serve(balancer.service(mode="dr"))
    again = syn(flags=flags)
    assert repeated(balancer, syn(), again, again) == 0


def test_datagrams_may_come_again(balancer: Balancer) -> None:
    balancer.serve(balancer.service(protocol="udp", mode="dr"))
    datagram = V4.request(from_client("udp", payload=bytes(64)))
    assert repeated(balancer, datagram, datagram) == 0


def test_a_member_is_not_blamed_for_the_one_that_had_the_connection_before(balancer: Balancer) -> None:
    balancer.serve(balancer.service(mode="dr", size=2))
    assert repeated(balancer, syn()) == 0
    balancer.change(slots=[Slot(current=2)])
    assert repeated(balancer, syn(), member=2) == 0
    assert repeated(balancer, syn(), member=2) == 1
    assert repeated(balancer, member=1) == 0


def test_a_member_that_takes_the_place_of_another_begins_anew(balancer: Balancer) -> None:
    balancer.serve(balancer.service(mode="dr"))
    assert repeated(balancer, syn()) == 0
    members = balancer.services[0].members
    balancer.change(members={1: replace(members[1], uid=77)})
    assert repeated(balancer, syn()) == 0


def test_a_syn_that_is_dropped_is_not_seen(balancer: Balancer) -> None:
    balancer.serve(balancer.service(mode="dr", syn_limit=1))
    assert repeated(balancer, syn()) == 0
    assert balancer.send(syn()).reason == "DROP_SYN_LIMIT"
    assert repeated(balancer) == 0


def test_each_cpu_knows_its_own_syns(balancer: Balancer, cpus: list[int]) -> None:
    if len(cpus) < 2:
        pytest.skip("one CPU")
    balancer.serve(balancer.service(mode="dr"))
    counted = []
    for cpu in (cpus[0], cpus[1], cpus[1], cpus[0]):
        os.sched_setaffinity(0, {cpu})
        counted.append(repeated(balancer, syn()))
    assert counted == [0, 0, 1, 2]


# Real clients


@pytest.fixture(scope="module")
def served() -> Iterator[Bed]:
    """HTTP over two backends in modes nat and dr; the second one hears no SYN."""
    with Bed(backends=2, router=True) as b:
        for backend in b.backends:
            b.own_vip(backend)
            start_http(b, backend, [80, 8080])
        apply(b, *(service for mode in ("nat", "dr") for service in Way(b, mode, "ipv4").services(b.backends)))
        b.xdp_lb("attach", "eth0")
        with deaf(b.backends[1]):
            yield b


@pytest.mark.parametrize("mode", ["nat", "dr"])
def test_a_backend_that_answers_nobody_is_seen_within_seconds_and_no_other(served: Bed, mode: str) -> None:
    way = Way(served, mode, "ipv4")

    def retries() -> list[int]:
        return [backend["repeated_syns"] for backend in service_status(served, way.http_service)["backends"]]

    with trying(served, way.vip, way.http_port):
        wait_until(lambda: retries()[1] >= 10, "SYNs that came again")
        assert retries()[0] == 0
    shown = served.xdp_lb("status").stdout
    assert "RETRIES" in shown[shown.index(way.http_service) :].splitlines()[1]
    metric = f'vip="{way.http_service}",backend="{served.backends[0].ipv4}:{way.http_port}"'
    assert (
        f'xdp_lb_backend_repeated_syns_total{{netns="{served.lb.name}",{metric}}} 0\n'
        in served.xdp_lb("metrics").stdout
    )
