"""The time of day jumps under the daemon: libfaketime sets its clock, and nobody else's. What takes time goes by clocks
that do not jump."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from netns_tests.bed.daemon import SERVE, WEB, end, start, states
from netns_tests.bed.servers import start_http
from netns_tests.bed.topology import Bed, wait_until
from netns_tests.bed.traffic import connections, go_on, loading

(LIBRARY,) = Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")
JUMPS = {"+3650d": 10, "-3650d": -10}  # as faketime(1) writes them, and in years


@pytest.fixture
def bed() -> Iterator[Bed]:
    with Bed(backends=2, router=True) as made:
        for backend in made.backends:
            start_http(made, backend, [80])
        made.xdp_lb(*SERVE)
        yield made


def clock(bed: Bed) -> Path:
    return bed.directory / "clock"


def faked(bed: Bed) -> list[str]:
    """What to start a program with whose time of day is off by what the file says."""
    return [
        "env",
        f"LD_PRELOAD={LIBRARY}",
        f"FAKETIME_TIMESTAMP_FILE={clock(bed)}",
        "FAKETIME_CACHE_DURATION=1",
        "FAKETIME_DONT_FAKE_MONOTONIC=1",
        "FAKETIME_FORCE_MONOTONIC_FIX=0",  # else no thread waits in pthread_cond_timedwait(3): it spins
        "NO_FAKE_STAT=1",  # else all that Python has compiled would be older than its source, or younger
    ]


def year_of_a_change(bed: Bed) -> int:
    """As the daemon writes it down."""
    bed.xdp_lb("vip", "set", WEB, "--echo")
    bed.xdp_lb("vip", "set", WEB, "--no-echo")
    return datetime.fromtimestamp(json.loads(bed.xdp_lb("audit", "--json").stdout)[-1]["time_s"], UTC).year


def test_the_clock_may_jump_while_packets_flow_and_backends_are_checked(bed: Bed) -> None:
    clock(bed).write_text("+0")
    process = start(bed, under=faked(bed))
    bed.xdp_lb("vip", "set", WEB, "--health", "tcp interval=0.2s")
    this_year = datetime.now(UTC).year
    with loading(bed, f"http://{WEB}/") as load, connections(bed, "10.99.1.100", count=5) as held:
        labels = [connection.ask() for connection in held]
        for number, (jump, years) in enumerate(JUMPS.items(), start=1):
            clock(bed).write_text(jump)
            shown = {this_year + years - 1, this_year + years}  # a year of faketime has 365 days
            wait_until(lambda: year_of_a_change(bed) in shown, "the jump seen")  # noqa: B023
            bed.xdp_lb("backend", "add", WEB, f"10.99.2.11:{8080 + number}@0")  # where nobody listens
            wait_until(lambda: states(bed).count("down") == number, "the fault found", timeout_s=30)  # noqa: B023
            go_on(10, load)
            assert end(process, signal.SIGKILL) == -signal.SIGKILL
            process = start(bed, under=faked(bed))
            assert states(bed).count("down") == number
            assert [connection.ask() for connection in held] == labels
        report = load.stop()
    assert (report.failed, report.reasons) == (0, {})
    assert end(process) == 0
