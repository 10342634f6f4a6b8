"""What a change of a ring takes: the Maglev table built anew, the slot words that follow from it, and their way into
the kernel's map, in milliseconds.

In come ring sizes and numbers of backends; out go the median times of adding one backend to as many as there are, by
the compiled code and by the pure Python that is its oracle. The map is a real one. What it holds in the end is compared
with what was to be installed, and both ways have to come to the same words.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from statistics import median

import click

from bench import report
from bench.report import BenchError, Result
from lb.hashing import maglev, native, ring
from lb.model.state import check_ring_size
from xdp.object import LB_OBJECT, BpfObject

SIZES = (16381, 65537, 131071)
BACKENDS = (10, 100, 1000)


class Ring:
    """The slot words of one service in a map of its own."""

    def __init__(self, obj: BpfObject, size: int) -> None:
        line = len(obj.types.struct("slot_words")().words)
        obj.resize("rings", -(-size // line))
        obj.load()
        self._words = memoryview(obj.map("rings").bytes()).cast("B").cast("I")[:size]

    def words(self) -> array[int]:
        return array("I", self._words)

    def replace(self, old: array[int], new: array[int]) -> None:
        fresh = memoryview(new)
        for start, stop in ring.changed_runs(old, new):
            self._words[start:stop] = fresh[start:stop]

    def change(self, backends: int) -> None:
        """Have `backends` in the ring, whatever was there: what lb.dataplane.dataplane does for a change."""
        old = self.words()
        members = range(1, 1 + backends)
        weights = {f"10.0.{number >> 8}.{number & 255}:80": 1 for number in members}
        table = maglev.table(weights, len(old), members)
        self.replace(old, ring.transition(old, table, frozenset(members)))

    def clear(self) -> None:
        self._words[:] = array("I", bytes(4 * len(self._words)))


@contextmanager
def without_native() -> Iterator[None]:
    """The pure functions do the work."""
    library, native.library = native.library, None
    try:
        yield
    finally:
        native.library = library


WAYS: dict[str, Callable[[], AbstractContextManager[None]]] = {"native": nullcontext, "python": without_native}


def timed(size: int, backends: int, rounds: int) -> tuple[float, array[int]]:
    """Median milliseconds of the change from `backends` to one more, and the words it leaves."""
    with BpfObject.open(LB_OBJECT) as obj:
        installed = Ring(obj, size)
        times = []
        for _ in range(rounds):
            installed.clear()
            installed.change(backends)
            start = time.perf_counter()
            installed.change(backends + 1)
            times.append(1000 * (time.perf_counter() - start))
        return median(times), installed.words()


def check(case: str, words: array[int], backends: int) -> None:
    """Each member, the new one too, has its slots. Raises BenchError."""
    holders = {ring.current_member(word) for word in words}
    if holders != set(range(1, backends + 2)):
        raise BenchError(f"ring: {case}: {len(holders)} members hold slots instead of {backends + 1}")


def measure(size: int, backends: int, rounds: int) -> Iterator[Result]:
    """One Result by the compiled code, one by Python. Raises BenchError."""
    if native.library is None:
        raise BenchError("ring: lb/hashing/native/ring.so: not built: run make build")
    found = {}
    for way, in_force in WAYS.items():
        case = f"size={size} backends={backends} by={way}"
        with in_force():
            milliseconds, found[way] = timed(size, backends, rounds)
        check(case, found[way], backends)
        yield Result("ring", case, milliseconds, "ms")
    if found["native"] != found["python"]:
        raise BenchError(f"ring: size={size} backends={backends}: compiled code and Python differ")


@report.command
@click.option("--size", "sizes", type=int, multiple=True, default=SIZES, show_default=True, help="Slots, a prime.")
@click.option("--backends", "counts", type=click.IntRange(1, 6000), multiple=True, default=BACKENDS, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
def command(sizes: tuple[int, ...], counts: tuple[int, ...], rounds: int) -> Iterator[Result]:
    """How long a change of a ring takes, by its size and the number of backends."""
    for size in sizes:
        check_ring_size(size)
    for size in sizes:
        for backends in counts:
            yield from measure(size, backends, rounds)
