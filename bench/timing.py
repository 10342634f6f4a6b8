"""A program beside its floor, by turns: the median times of a packet, and the proof that each took its way.

In comes something that runs programs and counts what they do; out goes a Result, or a BenchError where a packet was
counted otherwise than its scenario says.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any, Protocol

from bench.report import BenchError, Result
from xdp.object import TestRun


class Timed(Protocol):
    @property
    def program(self) -> str:
        """What is timed. Its floor is the program that has `_floor` behind its name."""
        ...

    def run(self, program: str, packets: int, /) -> TestRun: ...

    def counts(self) -> Any:
        """What the timed program, and never its floor, has counted; the difference of two says what lies between."""
        ...

    def expected(self, packets: int, /) -> Any:
        """What so many timed packets add to the counts."""
        ...

    def refused(self) -> Mapping[str, int]:
        """Packets that took another way, by reason."""
        ...


def compare(rig: Timed, repeat: int, rounds: int) -> tuple[float, float]:
    """(total, floor) of a packet in ns: medians over the rounds, which time `repeat` packets each, by turns."""
    runs = [(rig.run(rig.program, repeat), rig.run(f"{rig.program}_floor", repeat)) for _ in range(rounds)]
    return median(run.duration_ns for run, _ in runs), median(run.duration_ns for _, run in runs)


def timed(rig: Timed, case: str, repeat: int, rounds: int) -> Result:
    """Raises BenchError, XdpError."""
    before = rig.counts()
    total, floor = compare(rig, repeat, rounds)
    counted, expected = rig.counts() - before, rig.expected(repeat * rounds)
    if counted != expected or rig.refused():
        raise BenchError(f"dataplane: {case}: counted {counted} instead of {expected}; refused {dict(rig.refused())}")
    return Result("dataplane", case, total, "ns/packet", floor)
