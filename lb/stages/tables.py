"""Tables of a user's program -> lines for people, and documents.

Enters: entries as plain values, current and from one interval ago. Leaves: tables with rates, or histograms as bars.
The largest entries come first; lines show at most ROWS of them, documents all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lb.formats.documents import Document
from lb.formats.text import Column, table

ROWS = 20
BAR = 40  # characters of the largest

Entry = tuple[Any, Any]


@dataclass(frozen=True)
class Snapshot:
    """The entries of one table; `before` and `seconds`: the same, so long ago."""

    name: str
    kind: str
    entries: Sequence[Entry]
    before: Sequence[Entry] = ()
    seconds: float = 0

    @cached_property
    def _values_before(self) -> dict[str, Any]:
        return {str(key): value for key, value in self.before}

    @property
    def is_histogram(self) -> bool:
        return self.kind.endswith("histogram")

    @property
    def shown(self) -> list[Entry]:
        """Of arrays the entries that are not zero, by index; of others all, the largest value first."""
        if self.kind == "array":
            return [(key, value) for key, value in self.entries if _weight(value)]
        return sorted(self.entries, key=lambda entry: (-_weight(entry[1]), str(entry[0])))

    def per_second(self, key: Any, value: Any) -> Any:
        """Rate of a number, or of each number of a struct; None without an earlier snapshot."""
        if not self.seconds:
            return None
        return _rates(value, self._values_before.get(str(key)), self.seconds)


def _rates(value: Any, before: Any, seconds: float) -> Any:
    if isinstance(value, dict):
        rates = {name: _rates(each, before and before[name], seconds) for name, each in value.items()}
        return {name: rate for name, rate in rates.items() if rate is not None}
    return (value - (before or 0)) / seconds if _is_number(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _weight(value: Any) -> int:
    """What entries are sorted by: a number, or the first number in a struct or array."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return next((weight for each in value if (weight := _weight(each))), 0)
    return int(value) if isinstance(value, int) else 0


# Lines


def lines(shown_table: Document, *, colour: bool) -> list[str]:
    """Of a document."""
    body = _bars(shown_table["histograms"]) if "histograms" in shown_table else _rows(shown_table["entries"], colour)
    return [f"{shown_table['table']}{'' if body else ': empty'}", *(f"  {line}" for line in body)]


def _rows(entries: Sequence[Document], colour: bool) -> list[str]:
    if not entries:
        return []
    left_out = [f"({len(entries) - ROWS} more)"] if len(entries) > ROWS else []
    cells = [_cells(**entry) for entry in entries[:ROWS]]
    columns = [Column(name.upper().replace("_", " "), number=_is_number(cell)) for name, cell in cells[0]]
    return [*table(columns, [[_text(cell) for _, cell in row] for row in cells], colour=colour), *left_out]


def _cells(key: Any, value: Any, per_second: Any) -> list[tuple[str, Any]]:
    """A column for each field of a struct."""
    cells = [*_named("key", key), *_named("value", value)]
    if per_second is None:
        return cells
    is_struct = isinstance(per_second, dict)
    named = {f"{name}/s": rate for name, rate in per_second.items()} if is_struct else {"per second": per_second}
    return [*cells, *((name, round(rate)) for name, rate in named.items())]


def _named(name: str, value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else [(name, value)]


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _bars(histograms: Sequence[Document]) -> list[str]:
    return [line for histogram in histograms for line in _bars_of(histogram["key"], histogram["buckets"])]


def _bars_of(key: Any, buckets: Sequence[Document]) -> Iterator[str]:
    if key is not None:
        yield ", ".join(f"{name}: {value}" for name, value in _named("key", key))
    most = max(bucket["count"] for bucket in buckets)
    ranges = [f"{b['low']} -> {b['high']}" if "low" in b else str(b["value"]) for b in buckets]
    width, digits = max(map(len, ranges)), len(str(most))
    for text, bucket in zip(ranges, buckets, strict=True):
        stars = "*" * (bucket["count"] * BAR // most)
        yield f"{text:>{width}} : {bucket['count']:>{digits}} |{stars:<{BAR}}|"


# Histograms


def _histograms(snapshot: Snapshot) -> Iterator[tuple[Any, list[Document]]]:
    """Key (None: the table is one histogram) and buckets. A key that is a struct ends with the bucket, as in BCC."""
    counted: dict[str, tuple[Any, list[tuple[int, int]]]] = {}
    for key, count in snapshot.entries:
        if count:
            rest, slot = _split(key)
            counted.setdefault(str(rest), (rest, []))[1].append((slot, count))
    make = _log2_buckets if snapshot.kind == "log2_histogram" else _linear_buckets
    for _, (rest, slots) in sorted(counted.items()):
        yield rest, make(dict(slots))


def _split(key: Any) -> tuple[Any, int]:
    if not isinstance(key, dict):
        return None, key
    *rest, slot = key
    return {name: key[name] for name in rest}, key[slot]


def _linear_buckets(slots: Mapping[int, int]) -> list[Document]:
    return [{"value": slot, "count": slots[slot]} for slot in sorted(slots)]


def _log2_buckets(slots: Mapping[int, int]) -> list[Document]:
    """All from the first to the last; bpf_log2l() gives 1 for both 0 and 1."""
    return [
        {"low": 1 << slot - 1 if slot > 1 else 0, "high": (1 << slot) - 1, "count": slots.get(slot, 0)}
        for slot in range(min(slots), max(slots) + 1)
    ]


# Documents


def document(snapshot: Snapshot) -> Document:
    """`table`, `kind`, and `entries` [{key, value, per_second}] or `histograms` [{key, buckets}]."""
    head = {"table": snapshot.name, "kind": snapshot.kind}
    if snapshot.is_histogram:
        return head | {"histograms": [{"key": key, "buckets": buckets} for key, buckets in _histograms(snapshot)]}
    return head | {
        "entries": [
            {"key": key, "value": value, "per_second": snapshot.per_second(key, value)} for key, value in snapshot.shown
        ]
    }
