"""The loop of filters.merge in C: merge.so, through ctypes.

Without merge.so, which `make build` compiles and the wheel carries, records are merged in Python, thirty times slower.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class _Source(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p), ("end", ctypes.c_void_p))


def _load() -> Any:
    """merge.so, or None where it is not built."""
    try:
        library = ctypes.CDLL(str(Path(__file__).with_name("merge.so")))
    except OSError:
        return None
    library.merge_records.argtypes = (ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p)
    library.merge_records.restype = None
    return library


library: Any = _load()


def merged(spans: Sequence[memoryview]) -> memoryview:
    """The records of spans of writable memory, in the order of time."""
    views = [(ctypes.c_char * len(span)).from_buffer(span) for span in spans]
    starts = [ctypes.addressof(view) for view in views]
    ends = [at + len(span) for at, span in zip(starts, spans, strict=True)]
    sources = (_Source * len(spans))(*map(_Source, starts, ends))
    out = bytearray(sum(map(len, spans)))
    library.merge_records(sources, len(spans), (ctypes.c_char * len(out)).from_buffer(out))
    return memoryview(out)
