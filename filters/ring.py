"""Where the capture program puts its records: one ring for each CPU, in memory that user space maps.

Enters: records of the pcap format, one behind the other, written in the kernel. Leaves: spans of that memory, ready to
be written to a file. A ring has one writer, the program on its CPU, and one reader, and neither waits for the other:
the writer alone moves `head`, the reader alone `tail`. All of it is one array map, a large value for each CPU:

    value   writer's line | reader's line | shared line (of CPU 0) | records | room for one more record

A record that begins before the end of the records runs into the room behind them; the next one begins at the start, and
`wrap` says where the records before it end. Stores become visible in order, as they do on x86.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from filters.errors import FilterError
from filters.expr import SNAPLEN
from filters.program import refused
from xdp import libbpf
from xdp.errors import MapError
from xdp.maps import Map

LARGEST_RECORD = 16 + SNAPLEN
LEAST_SIZE, MOST_SIZE = 1 << 16, 1 << 28  # the verifier takes offsets up to 1 << 29

_MAP_TYPE_ARRAY, _F_MMAPABLE = 2, 1 << 10
_SETTLED_WITHIN_S = 1.0
_CACHE_LINE = 64


class Line(ctypes.Structure):
    """The head of a ring. Offsets count bytes from the first record's place.

    `matched` packets were accepted by the filter; of them `captured` are records, `lost` found no room, and `over` came
    after as many as were asked for. `second` and its start in nanoseconds are the writer's memory. The reader sets
    `tail` and `tai_offset_ns`, which is CLOCK_TAI - CLOCK_REALTIME. `taken` counts for all CPUs.
    """

    _fields_ = (
        ("head", ctypes.c_uint64),
        ("wrap", ctypes.c_uint64),
        ("matched", ctypes.c_uint64),
        ("captured", ctypes.c_uint64),
        ("lost", ctypes.c_uint64),
        ("over", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
        ("second_ns", ctypes.c_uint64),
        ("tail", ctypes.c_uint64),
        ("tai_offset_ns", ctypes.c_int64),
        ("_reader", ctypes.c_uint8 * (_CACHE_LINE - 16)),
        ("taken", ctypes.c_uint64),
        ("_shared", ctypes.c_uint8 * (_CACHE_LINE - 8)),
    )


RECORDS = ctypes.sizeof(Line)


@dataclass(frozen=True, slots=True)
class Counts:
    """matched = captured + lost + over."""

    matched: int = 0
    captured: int = 0
    lost: int = 0
    over: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.matched + other.matched,
            self.captured + other.captured,
            self.lost + other.lost,
            self.over + other.over,
        )


class Rings:
    """One ring for each possible CPU, of `size` bytes each. Raises FilterError, NotPermitted, LoadError."""

    def __init__(self, size: int) -> None:
        if not LEAST_SIZE <= size <= MOST_SIZE:
            raise FilterError(f"buffer of {size} bytes: {LEAST_SIZE} to {MOST_SIZE} for each CPU are possible")
        self.size, self.stride = size, RECORDS + size + LARGEST_RECORD + 7 & ~7
        self.map = _create_map(self.stride, libbpf.possible_cpus())
        self._memory: mmap.mmap = self.map.bytes()
        starts = range(0, len(self._memory), self.stride)
        self._lines = [Line.from_buffer(self._memory, start) for start in starts]
        self._records = [memoryview(self._memory)[start + RECORDS : start + self.stride] for start in starts]
        self.set_clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for records in self._records:
            records.release()
        self._lines.clear()
        os.close(self.map.fd)

    def set_clock(self) -> None:
        """Tells the writers what to take off CLOCK_TAI, which alone they can read, to get the time of day."""
        offset = _tai_offset_ns()
        for line in self._lines:
            line.tai_offset_ns = offset

    def filled(self) -> bool:
        return any(line.head != line.tail for line in self._lines)

    @contextmanager
    def harvest(self) -> Iterator[list[list[memoryview]]]:
        """What every CPU has written and nobody has read, by CPU: no span, one, or two; whole records in each.

        At the end of the block the memory goes back to the writers, but not if an exception ends it.
        """
        heads = [line.head for line in self._lines]
        yield [
            [span for span in _between(line, head, records) if len(span)]
            for line, head, records in zip(self._lines, heads, self._records, strict=True)
        ]
        for line, head in zip(self._lines, heads, strict=True):
            line.tail = head

    def counts(self) -> Counts:
        return sum((_counts(line) for line in self._lines), Counts())

    def settled(self) -> Counts:
        """The counts once no writer is at work any more; to be asked for when the programs have been detached."""
        deadline = time.monotonic() + _SETTLED_WITHIN_S
        before, now = None, self.counts()
        while before != now or now.matched != now.captured + now.lost + now.over:
            if time.monotonic() > deadline:
                raise MapError(f"capture buffers: still written to {_SETTLED_WITHIN_S:g} s after the end")
            os.sched_yield()
            before, now = now, self.counts()
        return now


def _counts(line: Line) -> Counts:
    return Counts(line.matched, line.captured, line.lost, line.over)


def _between(line: Line, head: int, records: memoryview) -> Iterator[memoryview]:
    tail = line.tail
    if head >= tail:
        yield records[tail:head]
    else:
        yield records[tail : line.wrap]
        yield records[:head]


def _tai_offset_ns() -> int:
    """Whole seconds, as the kernel keeps them: what lies between the two readings is rounded off."""
    between = time.clock_gettime_ns(time.CLOCK_TAI) - time.clock_gettime_ns(time.CLOCK_REALTIME)
    return round(between / 1e9) * 10**9


def _create_map(value_size: int, entries: int) -> Map:
    options = libbpf.MapCreateOpts(sz=ctypes.sizeof(libbpf.MapCreateOpts), map_flags=_F_MMAPABLE)
    try:
        fd = libbpf.map_create(_MAP_TYPE_ARRAY, b"capture_rings", 4, value_size, entries, ctypes.byref(options))
    except OSError as error:
        raise refused("capture_rings", error, []) from error
    return Map("capture_rings", fd, ctypes.c_uint32, ctypes.c_uint8 * value_size)
