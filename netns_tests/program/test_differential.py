"""The program against its model: services, events and frames are drawn, and both must do the same with each.

Verdict, reason and bytes are compared after every frame, the members' counters at the end; at the very end every
reason must have been seen that a test run can have, if there were frames enough. `make test` draws the same 20,000
frames every time; with FUZZ_PACKETS set the frames are new ones, as many as it says, and FUZZ_SEED repeats those that a
failure names.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from netns_tests.oracle.generator import STEPS, Run, World
from netns_tests.oracle.model import Undetermined
from netns_tests.oracle.program import LoadedProgram

FUZZ = "FUZZ_PACKETS" in os.environ
FRAMES = int(os.environ.get("FUZZ_PACKETS", 20_000))
ENOUGH_FOR_EVERY_REASON = 20_000
FIRST_SEED = int(os.environ.get("FUZZ_SEED", time.time_ns() if FUZZ else 0))
SEEDS = range(FIRST_SEED, FIRST_SEED + math.ceil(FRAMES / STEPS))
# What drivers without room in front of the frame come to, and no packet's end.
NOT_IN_A_TEST_RUN = {"GO_ON", "DROP_NO_HEADROOM", "REASON_COUNT"}


def go_through(program: LoadedProgram, interfaces: tuple[int, int], run: Run) -> Counter[str]:
    """How often each reason was seen."""
    world = World(program, interfaces, run.offers, run.echo)
    with contextlib.suppress(Undetermined):
        for step in run.steps:
            world.take(step)
    world.check_counters()
    return world.seen


def shortened(run: Run, fails: Callable[[Run], bool]) -> Run:
    """Without the steps that a failure does not need."""
    for step in reversed(run.steps):
        shorter = replace(run, steps=tuple(other for other in run.steps if other is not step))
        run = shorter if fails(shorter) else run
    return run


def test_program_and_model_do_the_same_with_every_frame(
    drawn_program: LoadedProgram, interfaces: tuple[int, int]
) -> None:
    seen: Counter[str] = Counter()
    for seed in SEEDS:
        run = Run.drawn(seed)
        try:
            seen += go_through(drawn_program, interfaces, run)
        except AssertionError:
            report(drawn_program, interfaces, run, seed)
    if FRAMES >= ENOUGH_FOR_EVERY_REASON:
        assert set(drawn_program.bpf.types.enum("reason")) - set(seen) == NOT_IN_A_TEST_RUN


def report(program: LoadedProgram, interfaces: tuple[int, int], run: Run, seed: int) -> None:
    """Fails again, with as little before it as possible."""

    def fails(shorter: Run) -> bool:
        try:
            go_through(program, interfaces, shorter)
        except AssertionError:
            return True
        return False

    short = shortened(run, fails)
    print(f"FUZZ_SEED={seed} FUZZ_PACKETS={STEPS}", *short.offers, *short.steps, sep="\n")
    go_through(program, interfaces, short)
