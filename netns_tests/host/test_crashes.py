"""SIGKILL at any moment of a change, while clients keep asking: the old or the new state is in force, nothing fails.

A command is started under a driver (netns_tests.bed.killed) that counts what Python calls in the modules that write,
from the first step of the change to its last, and ends the process at a given one: each dies at the same place.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lb.control.open import open_balancer
from lb.dataplane.dataplane import KernelDataplane
from lb.model.state import State
from lb.paths import Paths
from lb.store.store import Store
from netns_tests.bed.servers import REPOSITORY, start_http
from netns_tests.bed.topology import Bed
from netns_tests.bed.traffic import connections, curl, go_on, loading

POINTS = 4  # spread evenly over a change, its ends included
WEB = "10.99.1.100:80"
OTHER = "10.99.1.101:80"
SMALL = ("--ring-size", "251")
EXTRA_PORTS = range(8001, 8001 + POINTS + 1)


def paths_of(bed: Bed) -> Paths:
    return Paths(bed.directory / "state", bed.directory / "run", bed.lb.name)


def run_to(bed: Bed, calls: int, *words: str) -> subprocess.CompletedProcess[str]:
    """The command, killed after so many calls; it prints how many there were if it comes to its end."""
    paths = paths_of(bed)
    places = {"XDP_LB_STATE_DIR": str(paths.state_dir), "XDP_LB_RUN_DIR": str(paths.run_dir)}
    driver = [sys.executable, "-m", "netns_tests.bed.killed", str(calls), *words]
    return bed.lb.run(driver, check=False, cwd=REPOSITORY, env=os.environ | places)


def calls_of(bed: Bed, *words: str) -> int:
    """How many there are in the command, which is carried out."""
    done = run_to(bed, -1, *words)
    assert done.returncode == 0, done.stderr
    return int(next(line for line in done.stderr.splitlines() if line.isdigit()))


def kill(bed: Bed, calls: int, point: int, *words: str) -> None:
    """Start the command and end it at one of the POINTS of its way."""
    done = run_to(bed, max(1, calls * point // (POINTS - 1)), *words)
    killed = done.returncode == -signal.SIGKILL
    assert killed or (done.returncode == 0 and point == POINTS - 1), done.stderr


def stored(bed: Bed) -> State:
    with Store.open(paths_of(bed).store, write=False) as store:
        return store.load()


def assert_in_force(bed: Bed) -> None:
    """The kernel holds what is stored, to the last slot, member and interface, and nothing is left over."""
    with bed.lb.entered(), open_balancer(paths_of(bed), write=False) as balancer:
        dataplane, state = balancer.writer.dataplane, balancer.state
        assert isinstance(dataplane, KernelDataplane)
        assert dataplane.generation == balancer.writer.store.generation
        assert dataplane.attachments().keys() == {interface.name for interface in state.interfaces}
        assert dataplane.vips() == {service.vip for service in state.services}
        members = {vip: {str(b) for b in found} for vip, found in dataplane.statistics().backends.items()}
        assert members == {service.vip: {str(b) for b in service.backends} for service in state.services}
        assert [dataplane.plan(service).moved for service in state.services] == [0] * len(state.services)
        assert dataplane.programs._pins.others() == []
        for own in state.own_addresses:
            assert balancer.network.owner(own.address) == own.interface


@pytest.fixture
def bed() -> Iterator[Bed]:
    with Bed(backends=2, router=True) as made:
        for backend in made.backends:
            start_http(made, backend, [80, *EXTRA_PORTS])
        yield made


def serve(bed: Bed) -> None:
    bed.xdp_lb("attach", "eth0", "--vip", WEB, "--backends", "10.99.2.11,10.99.2.12", *SMALL)


# A change to make, the n-th time: it must not be the same as the last.
CHANGES: dict[str, Callable[[int], list[str]]] = {
    "backend add": lambda n: ["backend", "add", WEB, f"10.99.2.11:{EXTRA_PORTS[n]}"],
    "backend drain": lambda n: ["backend", "drain" if n % 2 == 0 else "weight", WEB, "10.99.2.12", *["1"] * (n % 2)],
    "backend weight": lambda n: ["backend", "weight", WEB, "10.99.2.11", str(n + 2)],
    "vip add, vip remove": lambda n: (
        ["vip", "add", OTHER, "--backends", "10.99.2.11,10.99.2.12", *SMALL] if n % 2 == 0 else ["vip", "remove", OTHER]
    ),
    "attach": lambda n: ["attach", "eth0"],
}


@pytest.mark.parametrize("change", CHANGES)
def test_killed_change_leaves_the_old_or_the_new_state_and_no_request_fails(bed: Bed, change: str) -> None:
    serve(bed)
    words = CHANGES[change]
    address = WEB.partition(":")[0]
    with loading(bed, f"http://{WEB}/") as load, connections(bed, address, count=10) as held:
        labels = [connection.ask() for connection in held]
        calls = calls_of(bed, *words(0))
        for point in range(POINTS):
            before = stored(bed)
            changed = 1 if change == "backend add" else 0
            kill(bed, calls, point, *words(point + 1))
            after = stored(bed)
            assert len(after.services[0].backends) - len(before.services[0].backends) in (0, changed)
            go_on(20, load)
            assert [connection.ask() for connection in held] == labels
            bed.xdp_lb("apply", "-f", str(file_of(bed, after)))
            assert stored(bed) == after
            assert_in_force(bed)
            if after == before:
                bed.xdp_lb(*words(point + 1))
        report = load.stop()
    assert (report.failed, report.reasons) == (0, {})


def file_of(bed: Bed, state: State) -> Path:
    """What is stored, as `apply` takes it: the next command, which changes nothing by itself."""
    path = bed.directory / "lb.toml"
    path.write_text(
        "\n".join(
            f"[[service]]\nvip = '{service.vip}'\nring_size = {service.ring_size}\nbackends = ["
            + ", ".join(
                f"{{address = '{b}', weight = {b.weight}, drain = {str(b.draining).lower()}}}" for b in service.backends
            )
            + "]"
            for service in state.services
        )
    )
    return path


def test_killed_first_attach_is_completed_by_the_next(bed: Bed) -> None:
    words = ["attach", "eth0", "--vip", WEB, "--backends", "10.99.2.11,10.99.2.12", *SMALL]
    calls = calls_of(bed, *words)
    for point in range(POINTS):
        bed.xdp_lb("detach")
        bed.xdp_lb("vip", "remove", WEB)
        kill(bed, calls, point, *words)
        assert [str(service) for service in stored(bed).services] in ([], [f"{WEB}/tcp"])
        bed.xdp_lb(*words)
        assert_in_force(bed)
        assert curl(bed.client, f"http://{WEB}/") in {"b1", "b2"}


def test_killed_detach_is_completed_by_the_next(bed: Bed) -> None:
    serve(bed)
    calls = calls_of(bed, "detach")
    for point in range(POINTS):
        bed.xdp_lb("attach", "eth0")
        kill(bed, calls, point, "detach")
        bed.xdp_lb("detach")
        assert '"xdp"' not in bed.lb.run(["ip", "-json", "link"]).stdout
        assert "10.99.1.100" not in bed.lb.run(["ip", "address"]).stdout
        assert not (bed.directory / "run" / "bpf" / bed.lb.name).exists()
        assert len(stored(bed).services) == 1
