"""What becomes of a loaded program and what its maps take, against the kernel's own figures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from xdp.features import map_memory, verified
from xdp.object import LB_OBJECT, BpfObject
from xdp.tests.kernels import MAP_MEMORY

ENTRIES = 10_000


@pytest.fixture(scope="module")
def small() -> Iterator[BpfObject]:
    with BpfObject.open(LB_OBJECT) as obj:
        obj.load()
        yield obj


@pytest.fixture(scope="module")
def large() -> Iterator[BpfObject]:
    with BpfObject.open(LB_OBJECT) as obj:
        for name in ("services4", "rings", "counters", "flows6"):
            obj.resize(name, ENTRIES)
        obj.load()
        yield obj


def memory_by_the_kernel(fd: int) -> int:
    lines = (line.split() for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines())
    return next(int(value) for name, value, *_ in lines if name == "memlock:")


def test_the_verifier_has_walked_at_least_the_instructions_there_are(small: BpfObject) -> None:
    made = verified(small.program("xdp_lb").fd)
    assert made.jited
    assert 1000 < made.instructions < 1_000_000  # the kernel's limit, BPF_COMPLEXITY_LIMIT_INSNS


@MAP_MEMORY
@pytest.mark.parametrize("name", ["services4", "rings", "counters", "flows6"])
def test_memory_of_a_map_is_what_the_kernel_accounts_for(small: BpfObject, large: BpfObject, name: str) -> None:
    estimate, real = map_memory(small.map(name), ENTRIES), memory_by_the_kernel(large.map(name).fd)
    assert abs(estimate - real) < 0.02 * real
