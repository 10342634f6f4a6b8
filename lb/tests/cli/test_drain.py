"""Waiting for idle backends, on a clock of the test's own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest

from lb.cli.drain import POLL_S, QUIET_S, wait_until_idle
from lb.cli.failures import Failure
from lb.model.forwarding import UNKNOWN, Counters, OpenConnections
from lb.model.report import BackendStatus, ServiceStatus, Status
from lb.model.state import Backend, Service
from lb.model.vip import Vip

VIP = Vip.parse("10.0.0.1:80")
A, B = Backend.parse("10.0.0.11:80"), Backend.parse("10.0.0.12:80")


@dataclass
class Traffic:
    """Each backend gets a packet a second until its time, and is then gone from the service if it is in `removed`."""

    until_s: dict[Backend, float]
    removed: tuple[Backend, ...] = ()
    loaded: bool = True
    open: OpenConnections = UNKNOWN
    now_s: float = 0.0
    idle: list[tuple[str, float]] = field(default_factory=list)

    def status(self) -> Status:
        there = [b for b in self.until_s if b not in self.removed or self.now_s < self.until_s[b]]
        backends = tuple(
            BackendStatus(b, True, Counters(packets=int(min(self.now_s, self.until_s[b])) + 1), open=self.open)
            for b in there
        )
        services = (ServiceStatus(Service(VIP, backends=tuple(there)), 0, backends),)
        return Status("default", self.loaded, (), services, {}, {})

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def wait(self, backends: Iterable[Backend], timeout_s: float = 1000) -> list[tuple[str, float]]:
        for name in wait_until_idle(self.status, VIP, backends, timeout_s, clock=lambda: self.now_s, sleep=self.sleep):
            self.idle.append((name, self.now_s))
        return self.idle


def test_a_backend_is_idle_when_no_packet_has_passed_for_a_while() -> None:
    assert Traffic({A: 5.0, B: 0.0}).wait([A, B]) == [(str(B), QUIET_S), (str(A), 5.0 + QUIET_S)]


def test_the_timeout_names_those_still_in_use() -> None:
    traffic = Traffic({A: 5.0, B: 100.0})
    with pytest.raises(Failure) as caught:
        traffic.wait([A, B], timeout_s=30)
    assert traffic.idle == [(str(A), 5.0 + QUIET_S)]
    assert caught.value.message == "10.0.0.1:80/tcp: still in use after 30 s: 10.0.0.12:80: draining continues"
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("connections", "idle_at_s"),
    [(OpenConnections(0), 0.0), (OpenConnections(0, estimated=True), QUIET_S), (UNKNOWN, QUIET_S)],
    ids=["exact", "estimated", "unknown"],
)
def test_a_backend_without_open_connections_is_idle_at_once_where_they_are_counted(
    connections: OpenConnections, idle_at_s: float
) -> None:
    assert Traffic({A: 0.0}, open=connections).wait([A]) == [(str(A), idle_at_s)]


def test_a_silent_connection_is_waited_for() -> None:
    traffic = Traffic({A: 0.0}, open=OpenConnections(1))
    with pytest.raises(Failure, match="still in use after 100 s"):
        traffic.wait([A], timeout_s=100)


def test_a_backend_that_others_remove_is_not_waited_for() -> None:
    assert Traffic({A: 5.0, B: 0.0}, removed=(A,)).wait([A]) == [(str(A), 5.0)]


def test_nothing_is_in_use_where_no_program_is_loaded() -> None:
    assert Traffic({A: 5.0}, loaded=False).wait([A]) == [(str(A), 0.0)]


def test_the_status_is_asked_for_once_in_a_while() -> None:
    traffic, asked = Traffic({A: 0.0}), 0

    def status() -> Status:
        nonlocal asked
        asked += 1
        return traffic.status()

    list(wait_until_idle(status, VIP, [A], 1000, clock=lambda: traffic.now_s, sleep=traffic.sleep))
    assert asked == QUIET_S / POLL_S + 1
