"""How long commands take from start to end, on a balancer of one service: imports are most of it.

In come a host that the balancer is attached to and its paths; out goes the median time of each command, in
milliseconds, with that of a bare Python interpreter as its floor. Both are started by turns.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from statistics import median

from bench.report import Result
from lb.paths import Paths
from netns_tests.bed.topology import XDP_LB, Host

COMMANDS = (
    ("--help",),
    ("vip", "list"),
    ("backend", "list"),
    ("status",),
    ("metrics",),
    ("filter", "list"),
    ("stage", "list"),
)
BARE = (sys.executable, "-c", "pass")


def measure_starts(host: Host, paths: Paths, runs: int) -> Iterator[Result]:
    """Raises CalledProcessError for a command that fails."""
    places = {"XDP_LB_STATE_DIR": str(paths.state_dir), "XDP_LB_RUN_DIR": str(paths.run_dir)}
    for words in COMMANDS:
        pairs = [(started(host, (str(XDP_LB), *words), places), started(host, BARE, places)) for _ in range(runs)]
        taken, floor = (median(column) for column in zip(*pairs, strict=True))
        yield Result("control", f"path=start command={'-'.join(words).strip('-')}", taken, "ms", floor)


def started(host: Host, argv: Sequence[str], places: dict[str, str]) -> float:
    """Milliseconds until it has ended."""
    start = time.perf_counter()
    host.run(argv, env=os.environ | places)
    return 1000 * (time.perf_counter() - start)
