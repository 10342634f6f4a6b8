"""Records of several CPUs, in the order of time.

Enters: spans by CPU, each in order. Leaves: spans in order; where only one CPU has any, they are not touched.
"""

from __future__ import annotations

from collections.abc import Sequence

from filters import native
from filters.records.pcap import offsets


def in_order(by_cpu: Sequence[Sequence[memoryview]]) -> Sequence[memoryview]:
    """The spans are of writable memory. What is merged is copied."""
    busy = [spans for spans in by_cpu if spans]
    if len(busy) <= 1:
        return busy[0] if busy else ()
    spans = [span for spans in busy for span in spans]
    return [native.merged(spans) if native.library else merged(spans)]


def merged(spans: Sequence[memoryview]) -> memoryview:
    """All records in the order of time; of equal ones those of the first span come first."""
    times: list[int] = []
    records: list[memoryview] = []
    for span in spans:
        found = list(offsets(span))
        times += [seconds << 32 | fraction for _, seconds, fraction in found]
        starts = [at for at, _, _ in found]
        records += [span[start:end] for start, end in zip(starts, [*starts[1:], len(span)], strict=True)]
    by_time = sorted(range(len(times)), key=times.__getitem__)  # finds the runs, and keeps what is equal as it was
    return memoryview(b"".join([records[number] for number in by_time]))
