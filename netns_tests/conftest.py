"""Fixtures of the test bed, and the check that a run leaves nothing of it behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from netns_tests.topology import Bed, remaining_namespaces

PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture
def bed() -> Iterator[Callable[..., Bed]]:
    """A factory: `bed(backends=3, one_arm=True)` is a Bed, up until the test ends."""
    with contextlib.ExitStack() as beds:
        yield lambda *args, **kwargs: beds.enter_context(Bed(*args, **kwargs))


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Fails the run when a namespace, a bpffs mount or a process of the tests outlives them."""
    mounts = _bpffs_mounts()
    children = _children()
    # Processes whose parent ended become children of this one, not of init: none escapes the count.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    yield
    left = [
        *remaining_namespaces(),
        *(f"bpffs at {mount}" for mount in _bpffs_mounts() - mounts),
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
