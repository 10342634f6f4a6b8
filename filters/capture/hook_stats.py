"""What each hook of a capture has cost and done: for --hook-stats.

Enters: a Session that has come to its end. Leaves: a table. Times are the kernel's, measured while statistics are on
for them (BPF_ENABLE_STATS), around the whole of a program; of stages in the balancer's path it does not take any.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from filters.capture.session import Session
from filters.capture.taps import Tap
from filters.records.counts import Counts
from xdp import libbpf
from xdp.errors import NotPermitted
from xdp.object import program_info

_RUN_TIME = 0  # enum bpf_stats_type
_COLUMNS = ("HOOK", "INTERFACE", "RUNS", "NS/RUN", "MATCHED", "CAPTURED", "LOST", "OVER")
_LEFT = 2  # columns of words, the others are of numbers


@contextmanager
def measured() -> Iterator[None]:
    """All programs of the machine are, during the block: it costs each of them some tens of nanoseconds a run."""
    try:
        fd = libbpf.enable_stats(_RUN_TIME)
    except OSError as error:
        raise NotPermitted(f"--hook-stats: cannot enable BPF statistics: {error.strerror}") from error
    try:
        yield
    finally:
        os.close(fd)


def table(session: Session) -> str:
    """As the kernel has counted, before the file had its say."""
    hooks = [_row(tap, session.counts_of(tap)) for tap in session.taps]
    cpus = [("cpu", str(number), "", "", *_numbers(counts)) for number, counts in enumerate(session.counts_by_cpu())]
    return _aligned([_COLUMNS, *hooks, *(row for row in cpus if row[4] != "0")])


def _row(tap: Tap, counts: Counts) -> Sequence[str]:
    info = program_info(tap.program.fd)
    runs, mean = str(info.run_cnt), f"{info.run_time_ns / info.run_cnt:.0f}" if info.run_cnt else "-"
    interfaces = ",".join(interface.name for interface in tap.interfaces)
    return tap.point.words, interfaces, *(("-", "-") if tap.is_staged else (runs, mean)), *_numbers(counts)


def _numbers(counts: Counts) -> Sequence[str]:
    return tuple(map(str, (counts.matched, counts.captured, counts.lost, counts.over)))


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            word.ljust(width) if number < _LEFT else word.rjust(width)
            for number, (word, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
