"""The filters that are timed side by side accept the same packets, and drop them wherever they run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from bench import filter as bench_filter
from bench.filter import EXPRESSIONS, UDP_53, WAYS, XDP_DROP, XDP_PASS, DropRig, Expression, check_verdicts
from bench.report import BenchError
from filters.compiler.expr import compile_expression
from filters.compiler.hook import XDP
from filters.selftest.frames import frames
from filters.selftest.selftest import is_runnable
from filters.tests.packets import FRAMES
from netns_tests.bed.topology import remaining_namespaces
from xdp.object import BpfObject

ROOT = Path(__file__).parents[2]
TINY = ("--seconds", "0.001", "--rounds", "1", "--repeat", "100")
PACKETS, MADE = 64, 200
WHOLE = 200  # bytes; of a header that is cut off each may look at what it needs


@pytest.fixture(scope="module")
def by_hand() -> Iterator[BpfObject]:
    with bench_filter.written_by_hand() as obj:
        yield obj


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=lambda expression: expression.name)
def test_what_is_written_by_hand_drops_what_the_expression_drops(by_hand: BpfObject, expression: Expression) -> None:
    made = [frame for frame in frames(compile_expression(expression.text), MADE) if is_runnable(frame, XDP)]
    program = by_hand.program(expression.by_hand)
    with expression.dropped(XDP) as translated:
        for cut in (*FRAMES.values(), *made, expression.accepted, expression.other):
            frame = cut.ljust(WHOLE, b"\0")
            assert program.test_run(frame).verdict == translated.test_run(frame).verdict, frame.hex()
        assert translated.test_run(expression.accepted).verdict == XDP_DROP
        assert translated.test_run(expression.other).verdict == XDP_PASS


def test_filter_that_accepts_something_else_is_not_timed(by_hand: BpfObject) -> None:
    with pytest.raises(BenchError, match="udp port 53: bare_pass: verdict 2 instead of 1"):
        check_verdicts(UDP_53, "accepted", [by_hand.program("bare_pass")], UDP_53.accepted)


@pytest.mark.parametrize("way", WAYS)
def test_every_packet_is_dropped_by_each_way(way: str) -> None:
    with ExitStack() as resources:
        assert DropRig(way, resources).flood(PACKETS).packets == PACKETS


def test_packets_that_are_not_dropped_are_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WAYS, "nobody", lambda line, ifindex, resources: None)
    with ExitStack() as resources, pytest.raises(BenchError, match=r"64 arrived, \d\d+ not dropped"):
        DropRig("nobody", resources).flood(PACKETS)


def test_json_has_each_way_and_each_expression() -> None:
    before = remaining_namespaces()
    command = [sys.executable, "-m", "bench", "filter", "--json", *TINY]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert remaining_namespaces() == before
    figures = {figure["case"]: figure for figure in json.loads(done.stdout)}
    drops = [f"expr=udp-53 by={way}" for way in WAYS]
    code = [
        f"expr={expression.name} packet={packet} by={way}"
        for expression in EXPRESSIONS
        for packet in ("accepted", "other")
        for way in ("xdp", "hand-written")
    ]
    assert [*figures] == drops + code
    assert all(figures[case]["unit"] == "packets/s" and figures[case]["value"] > 0 for case in drops)
    assert all(figures[case]["unit"] == "ns/packet" and figures[case]["floor"] > 0 for case in code)
