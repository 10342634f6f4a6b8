"""Fixtures of the test bed, and the check that a run leaves nothing of it behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from netns_tests import durations
from netns_tests.bed.commands import Server, serving
from netns_tests.bed.lanes import open_lanes
from netns_tests.bed.servers import start_http, start_udp_echo
from netns_tests.bed.topology import Bed, own_prefix, remaining_namespaces
from netns_tests.bed.traffic import ECHO_PORTS, HTTP_PORTS, apply, every_service

PR_SET_CHILD_SUBREAPER = 36

# Of a command in the background, shells ignore Ctrl-C, and so would what the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest begin first: begun last, one of them would keep a single process busy at the end."""
    seconds = durations.read()
    unknown = statistics.median(seconds.values())
    items.sort(key=lambda item: -seconds.get(durations.name_of(item.path), unknown))


@pytest.fixture(scope="module")
def console_script() -> Iterator[None]:
    """Commands start as a user starts them, none as a fork of one that has been prepared."""
    with serving(None):
        yield


@pytest.fixture
def bed() -> Iterator[Callable[..., Bed]]:
    """A factory: `bed(backends=3, one_arm=True)` is a Bed, up until the test ends."""
    with contextlib.ExitStack() as beds:
        yield lambda *args, **kwargs: beds.enter_context(Bed(*args, **kwargs))


@pytest.fixture(scope="session")
def balanced(nothing_is_left_behind: None) -> Iterator[Bed]:
    """A bed in which all of `every_service` is attached: both modes, both families, TCP and UDP.

    It has two arms and a router: translated replies come back through the balancer, direct ones
    through the router. Tests share it, so each puts the services it wants in force.
    """
    with Bed(backends=3, router=True) as b:
        for backend in b.backends:
            b.own_vip(backend)
            start_http(b, backend, list(HTTP_PORTS.values()))
            for port in ECHO_PORTS.values():
                start_udp_echo(backend, port)
        apply(b, *every_service(b, b.backends))
        b.xdp_lb("attach", "eth0")
        yield b


@pytest.fixture(scope="session")
def lanes_bed(nothing_is_left_behind: None) -> Iterator[Bed]:
    """A bed with all lanes open over three backends; the router is on the way back, but for mode nat.

    Tests share it, so each leaves the services as they were.
    """
    with Bed(backends=3, router=True) as b:
        open_lanes(b)
        yield b


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fails the run when a namespace, a bpffs mount or a process of the tests outlives them."""
    ours = (f"/{own_prefix()}", str(tmp_path_factory.getbasetemp()))
    children = _children()
    # Processes whose parent ended become children of this one, not of init: none escapes the count.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    server = Server()
    with serving(server):
        yield
    server.close()
    left = [
        *remaining_namespaces(),
        *(f"bpffs at {mount}" for mount in _bpffs_mounts() if any(place in mount for place in ours)),
        *(f"process {pid}: {name}" for pid, name in _children().items() if pid not in children),
    ]
    assert not left


def _bpffs_mounts() -> set[str]:
    mounts = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    return {target for _, target, kind, *_ in mounts if kind == "bpf"}


def _children() -> dict[int, str]:
    """Pid and name of this process's children that still run (zombies do not)."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            pid, name, state, parent = _parse_stat(stat.read_text())
            if parent == os.getpid() and state != "Z":
                children[pid] = name
    return children


def _parse_stat(stat: str) -> tuple[int, str, str, int]:
    """proc(5): pid (name) state ppid ...; the name may hold spaces and parentheses."""
    pid, _, rest = stat.partition(" (")
    name, _, fields = rest.rpartition(") ")
    state, parent, *_ = fields.split()
    return int(pid), name, state, int(parent)
