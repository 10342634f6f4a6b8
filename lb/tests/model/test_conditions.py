"""Conditions laid over the desired state by the balancer: in force at once, through every change, and never stored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from lb.control.balancer import Balancer
from lb.control.writer import UNCHECKED
from lb.errors import DataplaneError
from lb.formats import documents, text
from lb.hashing.ring import current_member, previous_member
from lb.model.conditions import Condition
from lb.model.health_check import HealthCheck
from lb.model.options import Options
from lb.model.state import Backend, Interface, Service, State
from lb.model.vip import Vip
from lb.store.store import Store
from lb.tests.fakes.memory import Fuse, MemoryDataplane, MemoryNetwork

WEB, OTHER = Vip.parse("10.0.0.1:80"), Vip.parse("10.0.0.2:80")
A, B, C = map(Backend.parse, ("10.0.0.11:80", "10.0.0.12:80", "10.0.0.13:80"))
CHECKED = Options(health=HealthCheck.parse("tcp"))
DOWN = Condition(down=True, why="connection refused", since=1_700_000_000)
SMALL = 251


def service(vip: Vip, *backends: Backend, options: Options = CHECKED) -> Service:
    return Service(vip, backends=backends, ring_size=SMALL, options=options)


@dataclass
class Host:
    path: Path
    dataplane: MemoryDataplane = field(default_factory=MemoryDataplane)

    @contextmanager
    def balancer(self) -> Iterator[Balancer]:
        network = MemoryNetwork({"eth0": ["10.0.0.254/24"]})
        with Store.open(self.path, write=True) as store:
            store.load()
            yield Balancer(store, self.dataplane, network)

    @property
    def stored(self) -> State:
        with Store.open(self.path, write=False) as store:
            return store.load()

    def owners(self, vip: Vip = WEB) -> set[str]:
        """Who gets new connections."""
        return {str(backend) for backend in self.dataplane.rings[vip].currents}

    def slots_of(self, backend: Backend) -> int:
        return [str(each) for each in self.dataplane.rings[WEB].currents].count(str(backend))

    def mentioned(self) -> set[int]:
        """The members that slots name, now or for older connections."""
        words = self.dataplane.rings[WEB].words
        return {current_member(w) for w in words} | {previous_member(w) for w in words} - {0}


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "state.db")


@pytest.fixture
def balancer(host: Host) -> Iterator[Balancer]:
    """WEB is served by A, B and C, OTHER by A alone."""
    with host.balancer() as balancer:
        balancer.writer.in_daemon = True
        balancer.attach([Interface("eth0")], [service(WEB, A, B, C), service(OTHER, A)])
        yield balancer


def test_a_backend_that_is_down_has_no_slot_at_once_and_nothing_is_stored(host: Host, balancer: Balancer) -> None:
    before = host.stored
    number = host.dataplane.rings[WEB].ids[A]
    plans = balancer.writer.set_conditions({WEB: {str(A): DOWN}})
    assert host.owners() == {str(B), str(C)}
    assert number not in host.mentioned()
    assert (host.stored, balancer.state) == (before, before)
    assert plans.keys() == {WEB}
    assert plans[WEB].minimum <= plans[WEB].moved <= plans[WEB].minimum + SMALL / 20


def test_a_backend_that_is_up_again_gets_the_slots_it_had_and_the_others_keep_their_connections(
    host: Host, balancer: Balancer
) -> None:
    before = host.dataplane.rings[WEB].currents
    balancer.writer.set_conditions({WEB: {str(A): DOWN}})
    (plan,) = balancer.writer.set_conditions({}).values()
    assert host.dataplane.rings[WEB].currents == before
    assert plan.in_transition == host.slots_of(A)  # those of B and C that it takes back


def test_a_share_is_a_part_of_the_slots_and_each_step_moves_few(host: Host, balancer: Balancer) -> None:
    whole = host.slots_of(A)
    balancer.writer.set_conditions({WEB: {str(A): DOWN}})
    for share in range(10, 101, 10):
        (plan,) = balancer.writer.set_conditions({WEB: {str(A): Condition(share=share)}}).values()
        # A weight of a tenth that grows by a tenth: 1/21 of the ring at first.
        assert 0 < plan.moved <= SMALL / 15
        assert host.slots_of(A) <= whole
    assert host.slots_of(A) == whole


def test_a_change_of_the_desired_state_leaves_the_conditions_in_force(host: Host, balancer: Balancer) -> None:
    balancer.writer.set_conditions({WEB: {str(A): DOWN}})
    balancer.set_weight(WEB, B, 5)
    assert host.owners() == {str(B), str(C)}
    balancer.set_weight(WEB, A, 7)
    assert host.owners() == {str(B), str(C)}
    balancer.attach([Interface("eth0")])  # writes everything
    assert host.owners() == {str(B), str(C)}
    assert host.stored.service(WEB).backend(A) == replace(A, weight=7)


def test_a_plan_knows_of_conditions(balancer: Balancer) -> None:
    balancer.writer.set_conditions({WEB: {str(A): DOWN}})
    (change,) = balancer.set_weight(WEB, A, 7, dry_run=True).changes
    assert change.plan
    assert change.plan.moved == 0


def test_only_services_whose_conditions_differ_are_written(host: Host, balancer: Balancer) -> None:
    found = {WEB: {str(A): DOWN}, OTHER: {str(A): DOWN}}
    assert balancer.writer.set_conditions(found).keys() == {WEB}  # of OTHER nobody is left: it stays as it was
    writes = host.dataplane.fuse.writes
    assert balancer.writer.set_conditions({vip: dict(each) for vip, each in found.items()}) == {}
    assert host.dataplane.fuse.writes == writes


def test_conditions_of_what_is_not_served_do_nothing(host: Host, balancer: Balancer) -> None:
    writes = host.dataplane.fuse.writes
    assert balancer.writer.set_conditions({Vip.parse("10.0.0.9:80"): {str(A): DOWN}, WEB: {"10.0.0.99:80": DOWN}}) == {}
    assert host.dataplane.fuse.writes == writes


def test_conditions_that_are_found_before_the_first_attach_are_in_force_with_it(host: Host) -> None:
    with host.balancer() as balancer:
        balancer.add_service(service(WEB, A, B))
        assert balancer.writer.set_conditions({WEB: {str(A): DOWN}}) == {}
        balancer.attach([Interface("eth0")])
        assert host.owners() == {str(B)}


@pytest.mark.parametrize("writes", range(3))
def test_conditions_that_are_cut_short_are_in_force_when_they_are_repeated(
    host: Host, balancer: Balancer, writes: int
) -> None:
    fuse: Fuse = host.dataplane.fuse
    fuse.fail_after(writes)
    with pytest.raises(DataplaneError):
        balancer.writer.set_conditions({WEB: {str(A): DOWN}})
    fuse.mend()
    balancer.writer.set_conditions({WEB: {str(A): DOWN}})
    assert host.owners() == {str(B), str(C)}


# What people and programs are told


def test_status_tells_who_is_down_why_and_since_when(balancer: Balancer) -> None:
    balancer.writer.set_conditions({WEB: {str(A): DOWN, str(B): Condition(share=30, since=1_700_000_060)}})
    lines = text.status_lines(balancer.status(), colour=False)
    start = lines.index(next(line for line in lines if line.startswith(str(WEB))))
    shown = lines[start : start + 8]
    assert [line.split()[2] for line in shown[2:5]] == ["down", "active", "active"]
    assert shown[6].startswith("  10.0.0.11:80: down since 2023-11-1")
    assert shown[6].endswith(": connection refused")
    assert shown[7].startswith("  10.0.0.12:80: up since 2023-11-1")
    assert shown[7].endswith(": slow start at 30 %")


def test_status_as_json_tells_it_too_and_is_read_back(balancer: Balancer) -> None:
    balancer.writer.set_conditions({WEB: {str(A): DOWN}})
    document = documents.status_document(balancer.status())
    web = next(each for each in document["services"] if each["vip"] == str(WEB))
    keys = ("backend", "state", "share", "why", "since")
    assert [tuple(each[key] for key in keys) for each in web["backends"]] == [
        (str(A), "down", 100, "connection refused", 1_700_000_000),
        (str(B), "active", 100, "", None),
        (str(C), "active", 100, "", None),
    ]


def test_without_a_checker_a_change_of_a_checked_service_says_that_nobody_checks(host: Host) -> None:
    with host.balancer() as balancer:
        assert UNCHECKED in balancer.add_service(service(WEB, A)).notes
        assert UNCHECKED not in balancer.add_service(service(OTHER, A, options=Options())).notes
        balancer.writer.in_daemon = True
        assert UNCHECKED not in balancer.set_weight(WEB, A, 2).notes
