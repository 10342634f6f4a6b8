"""Where the capture program puts its records: one ring for each CPU, in memory that user space maps.

Enters: records of the pcap format, one after the other, written by the kernel. Leaves: spans of that memory, ready to
be written to a file. A ring has one writer, the program on its CPU, and one reader, and neither waits for the other:
the writer alone moves `head`, the reader alone `tail`. All of it is one array map, a large value for each CPU:

    value   writers' line | reader's line | shared line (of CPU 0) | counters | records | room for one more record

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
from typing import Self

from filters import native
from filters.compiler.expr import SNAPLEN
from filters.errors import FilterError
from filters.programs.program import refused
from filters.records.counts import Counts
from filters.records.metadata import METADATA_SIZE
from xdp import libbpf
from xdp.errors import MapError
from xdp.maps import Map

LARGEST_RECORD = 16 + METADATA_SIZE + SNAPLEN
MIN_SIZE, MAX_SIZE = 1 << 16, 1 << 28  # the verifier takes offsets up to 1 << 29

MAX_COUNTER_SETS = 64

_MAP_TYPE_ARRAY, _F_MMAPABLE = 2, 1 << 10
_SETTLED_WITHIN_S = 1.0
_NAP_NS = 5_000_000  # packets arriving in this time must fit into three quarters of a ring: 16 MiB take 2.4 GB/s
_READINGS, _UNNOTICED_NS = 8, 10_000
_CACHE_LINE = 64


class CaptureCounters(ctypes.Structure):
    """Of one program: `matched` packets were accepted by its filter; `captured` of them recorded, `lost` for want of
    room in the ring, `over` beyond the limit."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("matched", "captured", "lost", "over"))


class Line(ctypes.Structure):
    """The head of a ring. Offsets count bytes from the first record.

    `second` and its start in nanoseconds belong to the writers. The reader sets `tail` and `clock_offset_ns`, which
    is CLOCK_REALTIME - CLOCK_MONOTONIC. `taken` counts for all CPUs.
    """

    _fields_ = (
        ("head", ctypes.c_uint64),
        ("wrap", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
        ("second_ns", ctypes.c_uint64),
        ("first_counters", CaptureCounters),
        ("tail", ctypes.c_uint64),
        ("clock_offset_ns", ctypes.c_int64),
        ("_reader", ctypes.c_uint8 * (_CACHE_LINE - 16)),
        ("taken", ctypes.c_uint64),
        ("_shared", ctypes.c_uint8 * (_CACHE_LINE - 8)),
        ("more_counters", CaptureCounters * (MAX_COUNTER_SETS - 1)),
    )


def counter_set_offset(number: int) -> int:
    """Offset of a set of counters in a Line: the first set is on the cache line that every packet touches."""
    if number == 0:
        return Line.first_counters.offset
    return Line.more_counters.offset + (number - 1) * ctypes.sizeof(CaptureCounters)


RECORDS = ctypes.sizeof(Line)


class Rings:
    """One ring for each possible CPU, of `size` bytes each. Raises FilterError, NotPermitted, LoadError."""

    def __init__(self, size: int) -> None:
        if not MIN_SIZE <= size <= MAX_SIZE:
            raise FilterError(f"buffer size {size}: out of range {MIN_SIZE} to {MAX_SIZE} bytes per CPU")
        self.size, self.stride = size, RECORDS + size + LARGEST_RECORD + 7 & ~7
        self.map = _create_map(self.stride, libbpf.possible_cpus())
        self._memory: mmap.mmap = self.map.bytes()
        starts = range(0, len(self._memory), self.stride)
        self._lines = [Line.from_buffer(self._memory, start) for start in starts]
        self._watched = (native.Ring * len(self._lines))(*map(_watched, self._lines))
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
        """Sets what writers add to CLOCK_MONOTONIC, the cheapest clock, to get CLOCK_REALTIME.

        The difference is constant until the clock is set; it is only written when it has changed.
        """
        least, most = _clock_offset_ns()
        for line in self._lines:
            if not least - _UNNOTICED_NS <= line.clock_offset_ns <= most + _UNNOTICED_NS:
                line.clock_offset_ns = (least + most) // 2

    def wait(self, seconds: float) -> None:
        """For that long; less if a ring gets a quarter full or, with the native library, on a signal."""
        naps, enough = round(seconds * 1e9 / _NAP_NS), self.size // 4
        if native.wait_library:
            native.wait_library.wait_for_records(self._watched, len(self._watched), enough, _NAP_NS, naps)
            return
        while naps > 0 and not any(_unread(line) >= enough for line in self._lines):
            time.sleep(_NAP_NS / 1e9)
            naps -= 1

    @contextmanager
    def harvest(self) -> Iterator[list[list[memoryview]]]:
        """Unread records by CPU: none, one or two spans of whole records.

        At the end of the block the memory is released to the writers, unless an exception ends it.
        """
        heads = [line.head for line in self._lines]
        yield [
            [span for span in _between(line, head, records) if len(span)]
            for line, head, records in zip(self._lines, heads, self._records, strict=True)
        ]
        for line, head in zip(self._lines, heads, strict=True):
            line.tail = head

    @property
    def taken(self) -> int:
        """Packets counted against the limit."""
        return int(self._lines[0].taken)

    def counts(self) -> Counts:
        return sum(self.counts_by_set(), Counts())

    def counts_by_set(self) -> list[Counts]:
        """Summed over CPUs, by the number of the set."""
        return [self.counts_of(number) for number in range(MAX_COUNTER_SETS)]

    def by_cpu(self) -> list[Counts]:
        return [sum((_counts(counters) for counters in _counter_sets(line)), Counts()) for line in self._lines]

    def counts_of(self, number: int) -> Counts:
        at = counter_set_offset(number)
        return sum((_counts(CaptureCounters.from_buffer(line, at)) for line in self._lines), Counts())

    def settled(self) -> Counts:
        """The counts once no writer is running any more; call it after the programs were detached."""
        deadline = time.monotonic() + _SETTLED_WITHIN_S
        before, now = None, self.counts()
        while before != now or now.matched != now.captured + now.lost + now.over:
            if time.monotonic() > deadline:
                raise MapError(f"capture buffers: still being written {_SETTLED_WITHIN_S:g} s after detach")
            os.sched_yield()
            before, now = now, self.counts()
        return now


def _counter_sets(line: Line) -> Iterator[CaptureCounters]:
    yield line.first_counters
    yield from line.more_counters


def _counts(counters: CaptureCounters) -> Counts:
    return Counts(counters.matched, counters.captured, counters.lost, counters.over)


def _watched(line: Line) -> native.Ring:
    at = ctypes.addressof(line)
    return native.Ring(at + Line.head.offset, at + Line.tail.offset, at + Line.wrap.offset)


def _unread(line: Line) -> int:
    """Bytes."""
    head, tail, wrap = int(line.head), int(line.tail), int(line.wrap)
    return head - tail if head >= tail else wrap - tail + head


def _between(line: Line, head: int, records: memoryview) -> Iterator[memoryview]:
    tail = line.tail
    if head >= tail:
        yield records[tail:head]
    else:
        yield records[tail : line.wrap]
        yield records[:head]


def _clock_offset_ns() -> tuple[int, int]:
    """Bounds of CLOCK_REALTIME - CLOCK_MONOTONIC: the tightest of several readings, any of which may be slow."""
    readings = [_clock_reading() for _ in range(_READINGS)]
    return min(readings, key=lambda bounds: bounds[1] - bounds[0])


def _clock_reading() -> tuple[int, int]:
    before = time.monotonic_ns()
    now = time.time_ns()
    return now - time.monotonic_ns(), now - before


def _create_map(value_size: int, entries: int) -> Map:
    options = libbpf.MapCreateOpts(sz=ctypes.sizeof(libbpf.MapCreateOpts), map_flags=_F_MMAPABLE)
    try:
        fd = libbpf.map_create(_MAP_TYPE_ARRAY, b"capture_rings", 4, value_size, entries, ctypes.byref(options))
    except OSError as error:
        raise refused("capture_rings", error, []) from error
    return Map("capture_rings", fd, ctypes.c_uint32, ctypes.c_uint8 * value_size)
