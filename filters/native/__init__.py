"""The loops of filters.records.merge, filters.files.pcapng and filters.capture.ring in C: merge.so, pcapng.so and
wait.so, through ctypes.

Without them, which `make build` compiles and the wheel carries, it is done in Python, thirty times slower.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any


class _Source(ctypes.Structure):
    _fields_ = (("at", c_void_p), ("end", c_void_p))


class Ring(ctypes.Structure):
    """struct ring, wait.c: addresses of three fields of a filters.capture.ring.Line."""

    _fields_ = (("head", c_void_p), ("tail", c_void_p), ("wrap", c_void_p))


class Table(ctypes.Structure):
    """struct table, pcapng.c. What it points at lives as long as it does."""

    _fields_ = (
        ("ifindexes", c_void_p),
        ("interfaces", c_uint32),
        ("directions", c_void_p),
        ("comments", c_void_p),
        ("comment_ends", c_void_p),
        ("actions", c_uint32),
        ("reasons", c_uint32),
    )
    kept: Sequence[Any]
    longest_comment: int


def _load(name: str) -> Any:
    """A library, or None where it is not built."""
    try:
        return ctypes.CDLL(str(Path(__file__).with_name(name)))
    except OSError:
        return None


def _load_merge() -> Any:
    if found := _load("merge.so"):
        found.merge_records.argtypes = (c_void_p, c_uint32, c_void_p)
        found.merge_records.restype = None
    return found


def _load_blocks() -> Any:
    if found := _load("pcapng.so"):
        found.to_blocks.argtypes = (c_void_p, c_void_p, c_void_p, c_void_p)
        found.strip_metadata.argtypes = (c_void_p, c_void_p, c_void_p)
        found.count_records.argtypes = (c_void_p, c_void_p)
        for function in (found.to_blocks, found.strip_metadata, found.count_records):
            function.restype = c_size_t
    return found


def _load_wait() -> Any:
    if found := _load("wait.so"):
        found.wait_for_records.argtypes = (c_void_p, c_uint32, c_uint64, c_uint64, c_uint32)
        found.wait_for_records.restype = None
    return found


library: Any = _load_merge()
blocks_library: Any = _load_blocks()
wait_library: Any = _load_wait()

# Beyond a record: the rest of the block's head, its size once more, what aligns the packet, a flag, the end of options.
_MAX_OVERHEAD = 12 + 4 + 3 + 8 + 4


def merged(spans: Sequence[memoryview]) -> memoryview:
    """The records of spans of writable memory, in the order of time."""
    views = [(ctypes.c_char * len(span)).from_buffer(span) for span in spans]
    starts = [ctypes.addressof(view) for view in views]
    ends = [at + len(span) for at, span in zip(starts, spans, strict=True)]
    sources = (_Source * len(spans))(*map(_Source, starts, ends))
    out = bytearray(sum(map(len, spans)))
    library.merge_records(sources, len(spans), (ctypes.c_char * len(out)).from_buffer(out))
    return memoryview(out)


def table(
    ifindexes: Sequence[int],
    directions: Sequence[int],
    comments: bytes,
    ends: Sequence[int],
    actions: int,
    reasons: int,
) -> Table:
    words = [(c_uint32 * len(numbers))(*numbers) for numbers in (ifindexes, directions, ends)]
    text = ctypes.create_string_buffer(comments)
    by_interface, by_point, by_comment = map(ctypes.addressof, words)
    result = Table(by_interface, len(ifindexes), by_point, ctypes.addressof(text), by_comment, actions, reasons)
    result.kept = (*words, text)
    result.longest_comment = max(end - start for start, end in zip([0, *ends], ends, strict=False))
    return result


def blocks(span: memoryview | bytes | bytearray, layout: Table) -> memoryview:
    """The packets of records with metadata as blocks of the pcapng format."""
    given, start, end = _bounds(span)
    surplus = blocks_library.count_records(start, end) * (_MAX_OVERHEAD + layout.longest_comment)
    out = (ctypes.c_char * (len(span) + surplus))()
    size = blocks_library.to_blocks(ctypes.byref(layout), start, end, out)
    del given
    return memoryview(out).cast("B")[:size]


def strip_metadata(span: memoryview | bytes | bytearray) -> memoryview:
    given, start, end = _bounds(span)
    out = (ctypes.c_char * len(span))()
    size = blocks_library.strip_metadata(start, end, out)
    del given
    return memoryview(out).cast("B")[:size]


def _bounds(span: memoryview | bytes | bytearray) -> tuple[Any, int, int]:
    """What keeps the memory where it is, and its first and last address. What is not writable is copied."""
    writable = not isinstance(span, bytes) and not memoryview(span).readonly
    view = (ctypes.c_char * len(span)).from_buffer(span if writable else bytearray(span))
    start = ctypes.addressof(view)
    return view, start, start + len(span)
