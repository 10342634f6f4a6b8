"""The wait between two harvests, in C and its oracle in Python. What the rings hold is tested in test_capture.py."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from filters import native
from filters.capture.ring import MIN_SIZE, Rings

LONG_S = 60.0


@pytest.fixture(params=["C", "Python"])
def rings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rings]:
    """Of which nobody writes any but the tests."""
    if request.param == "Python":
        monkeypatch.setattr(native, "wait_library", None)
    with Rings(MIN_SIZE) as made:
        yield made


def is_over_early(rings: Rings) -> bool:
    start = time.monotonic()
    rings.wait(LONG_S)
    return time.monotonic() - start < LONG_S / 2


def test_the_library_is_built() -> None:
    assert native.wait_library, "filters/native/wait.so: run make build"


def test_wait_is_over_when_a_ring_is_full_by_a_quarter(rings: Rings) -> None:
    rings._lines[-1].head = MIN_SIZE // 4
    assert is_over_early(rings)


def test_what_lies_on_both_sides_of_the_end_counts(rings: Rings) -> None:
    line = rings._lines[0]
    line.tail, line.wrap, line.head = MIN_SIZE - 8, MIN_SIZE + 92, MIN_SIZE // 4 - 100
    assert is_over_early(rings)


@pytest.mark.parametrize("tail", [0, 1000])
def test_wait_for_less_takes_its_time(rings: Rings, tail: int) -> None:
    for line in rings._lines:
        line.tail, line.head = tail, tail + MIN_SIZE // 4 - 1
    start = time.monotonic()
    rings.wait(0.02)
    assert time.monotonic() - start >= 0.02


def test_ring_that_wraps_is_not_taken_for_a_full_one(rings: Rings) -> None:
    line = rings._lines[0]
    line.tail, line.wrap, line.head = MIN_SIZE - 8, MIN_SIZE, 100
    start = time.monotonic()
    rings.wait(0.02)
    assert time.monotonic() - start >= 0.02


def test_signal_ends_the_wait() -> None:
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        with Rings(MIN_SIZE) as rings:
            signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)  # again and again: the first may come before the wait
            assert is_over_early(rings)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
