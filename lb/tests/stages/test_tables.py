"""Tables and histograms of a user's program, as lines and as documents."""

from __future__ import annotations

import json

from lb.stages.tables import ROWS, Entry, Snapshot, document, lines


def rows(*entries: Entry, kind: str = "hash") -> list[str]:
    return lines(document(Snapshot("found", kind, entries)), colour=False)


def test_the_largest_comes_first() -> None:
    assert rows(("10.0.0.1", 5), ("10.0.0.2", 100)) == [
        "found",
        "  KEY       VALUE",
        "  10.0.0.2    100",
        "  10.0.0.1      5",
    ]


def test_fields_are_columns_with_what_was_added_a_second() -> None:
    before = [({"source": "10.0.0.1", "port": 80}, {"packets": 10, "bytes": 1000})]
    now = [({"source": "10.0.0.1", "port": 80}, {"packets": 30, "bytes": 5000})]
    assert lines(document(Snapshot("found", "hash", now, before, 2.0)), colour=False) == [
        "found",
        "  SOURCE    PORT  PACKETS  BYTES  PACKETS/S  BYTES/S",
        "  10.0.0.1    80       30   5000         10     2000",
    ]


def test_a_new_entry_was_added_as_a_whole() -> None:
    snapshot = Snapshot("found", "hash", [("new", 8)], [("old", 1)], 4.0)
    assert document(snapshot)["entries"] == [{"key": "new", "value": 8, "per_second": 2.0}]


def test_of_an_array_the_entries_that_are_not_zero_are_shown_by_index() -> None:
    assert rows((0, 1), (1, 0), (2, 7), kind="array") == ["found", "  KEY  VALUE", "    0      1", "    2      7"]


def test_lines_show_the_largest_and_how_many_more_there_are() -> None:
    found = rows(*((f"{n:03}", n) for n in range(ROWS + 3)))
    assert found[-1] == "  (3 more)"
    assert len(found) == ROWS + 3
    assert len(document(Snapshot("found", "hash", [(n, n) for n in range(ROWS + 3)]))["entries"]) == ROWS + 3


def test_what_is_empty_says_so() -> None:
    assert rows() == ["found: empty"]
    assert rows((0, 0), kind="array") == ["found: empty"]
    assert rows((3, 0), kind="log2_histogram") == ["found: empty"]


def test_a_log2_histogram_has_the_intervals_of_bpf_log2l() -> None:
    entries = [(slot, {1: 2, 2: 0, 3: 8}.get(slot, 0)) for slot in range(64)]
    assert rows(*entries, kind="log2_histogram") == [
        "found",
        f"  0 -> 1 : 2 |{'*' * 10}{' ' * 30}|",
        f"  2 -> 3 : 0 |{' ' * 40}|",
        f"  4 -> 7 : 8 |{'*' * 40}|",
    ]
    (histogram,) = document(Snapshot("found", "log2_histogram", entries))["histograms"]
    assert histogram == {
        "key": None,
        "buckets": [
            {"low": 0, "high": 1, "count": 2},
            {"low": 2, "high": 3, "count": 0},
            {"low": 4, "high": 7, "count": 8},
        ],
    }


def test_a_histogram_without_logarithms_has_a_row_for_each_value() -> None:
    assert rows((64, 1), (0, 0), (255, 4), kind="histogram") == [
        "found",
        f"   64 : 1 |{'*' * 10}{' ' * 30}|",
        f"  255 : 4 |{'*' * 40}|",
    ]


def test_a_struct_before_the_bucket_makes_a_histogram_each() -> None:
    entries = [({"source": source, "slot": slot}, 1) for source in ("10.0.0.2", "10.0.0.1") for slot in (5, 6)]
    assert rows(*entries, kind="histogram") == [
        "found",
        *(
            line
            for source in ("10.0.0.1", "10.0.0.2")
            for line in (f"  source: {source}", f"  5 : 1 |{'*' * 40}|", f"  6 : 1 |{'*' * 40}|")
        ),
    ]


def test_documents_can_be_written() -> None:
    snapshot = Snapshot("found", "hash", [({"a": 1}, {"name": "x", "n": 2})], [], 1.0)
    assert json.loads(json.dumps(document(snapshot))) == {
        "table": "found",
        "kind": "hash",
        "entries": [{"key": {"a": 1}, "value": {"name": "x", "n": 2}, "per_second": {"n": 2.0}}],
    }
