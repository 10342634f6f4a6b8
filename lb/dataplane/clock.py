"""The clock of the programs."""

from __future__ import annotations

import time


def now_ns() -> int:
    """CLOCK_MONOTONIC, as bpf_ktime_get_coarse_ns() reads it."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)
