"""Records of several CPUs in the order of time: in C, and its oracle in Python."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters import native
from filters.records.merge import in_order, merged
from filters.records.pcap import offsets, record

_TIMES = st.lists(st.tuples(st.sampled_from([0, 1, 2**32 - 1]), st.integers(0, 5)), min_size=1, max_size=20)


def span(times: list[tuple[int, int]], mark: int) -> memoryview:
    """Of one CPU: the records say which, and have various lengths."""
    return memoryview(
        bytearray(
            b"".join(record(*when, bytes([mark]) * (number % 5), 60) for number, when in enumerate(sorted(times)))
        )
    )


def times(one: memoryview) -> list[tuple[int, int]]:
    return [(seconds, fraction) for _, seconds, fraction in offsets(one)]


def test_the_library_is_built() -> None:
    assert native.library, "filters/native/merge.so: run make build"


@given(st.lists(_TIMES, min_size=1, max_size=5))
def test_records_come_in_the_order_of_time(by_cpu: list[list[tuple[int, int]]]) -> None:
    whole = merged([span(own, mark) for mark, own in enumerate(by_cpu)])
    assert times(whole) == sorted(when for own in by_cpu for when in own)


@given(st.lists(_TIMES, min_size=1, max_size=5))
def test_merged_in_c_is_what_is_merged_in_python(by_cpu: list[list[tuple[int, int]]]) -> None:
    spans = [span(own, mark) for mark, own in enumerate(by_cpu)]
    assert native.merged(spans) == merged(spans)


@pytest.mark.parametrize("built", [True, False], ids=["C", "Python"])
def test_records_keep_their_bytes(monkeypatch: pytest.MonkeyPatch, built: bool) -> None:
    if not built:
        monkeypatch.setattr(native, "library", None)
    first, third, second = record(1, 5, b"abc", 3), record(3, 0, b"", 9), record(2, 0, b"defg", 4)
    whole = in_order([[memoryview(bytearray(first + third))], [], [memoryview(bytearray(second))]])
    assert b"".join(whole) == first + second + third


def test_records_of_one_cpu_are_not_touched() -> None:
    spans = [span([(1, 2)], 1), span([(3, 4)], 1)]
    assert in_order([[], spans, []]) is spans
    assert list(in_order([[], []])) == []
