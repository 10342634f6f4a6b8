"""What is said to be captured is in the file, and what is lost is said. No test asserts a time."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from bench import capture
from bench.capture import FILE_HEADER, PROGRAMS, RECORD, Account, CaptureRig, memory
from bench.filter import EXPRESSIONS
from bench.report import BenchError
from netns_tests.bed.topology import remaining_namespaces

ROOT = Path(__file__).parents[2]
TINY = ("--packets", "500", "--rounds", "1", "--repeat", "100", "--rate", "20000", "--seconds", "0.05")
PACKETS = 1000


@pytest.mark.parametrize("way", PROGRAMS)
def test_every_packet_of_a_turn_is_in_the_file(way: str, tmp_path: Path) -> None:
    with ExitStack() as resources:
        rig = CaptureRig(way, tmp_path, resources)
        rig.start()
        assert rig.cost_ns(PACKETS) > 0
        rig.check()
    assert (tmp_path / f"{way}.pcap").stat().st_size >= FILE_HEADER + PACKETS * RECORD


def test_packets_that_are_missing_are_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Account, "lost", lambda self, sent: 7)
    with ExitStack() as resources:
        rig = CaptureRig("xdp-dump", tmp_path, resources)
        rig.start()
        rig.cost_ns(PACKETS)
        with pytest.raises(BenchError, match=f"{PACKETS} packets sent, 7 lost"):
            rig.check()


def test_lost_is_what_was_dropped_and_what_never_came() -> None:
    assert Account(captured=90, received=100, dropped=10).lost(100) == 10
    assert Account(captured=90, received=97, dropped=7).lost(100) == 10
    assert Account(captured=95, received=103, dropped=0).lost(100) == 0  # others were captured too, some not fetched


def test_what_the_command_says_instead_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROGRAMS, "xdp-dump", lambda: [str(capture.XDP_DUMP), "--nonsense"])
    with ExitStack() as resources, pytest.raises(BenchError, match="--nonsense"):
        CaptureRig("xdp-dump", tmp_path, resources).start()


def test_memory_that_is_short_is_asked_for() -> None:
    with pytest.raises(BenchError, match=r"/dev/shm: needs 1073741824 MiB there"), memory(1 << 50):
        pass


def test_json_has_each_question_for_each_command() -> None:
    before = remaining_namespaces()
    command = [sys.executable, "-m", "bench", "capture", "--json", *TINY]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert remaining_namespaces() == before
    figures = {figure["case"]: figure for figure in json.loads(done.stdout)}
    assert [*figures] == [
        *(f"match=all by={way}" for way in PROGRAMS),
        *(f"match=none expr={e.name} by={way}" for e in EXPRESSIONS for way in ("xdp-dump", "hand-written")),
        *(f"rate=20000 by={way}{metric}" for way in PROGRAMS for metric in ("", " metric=loss")),
        *(f"path=first-packet by={way}" for way in PROGRAMS),
    ]
    assert figures["rate=20000 by=xdp-dump metric=loss"]["value"] == 0
    assert 0 < figures["rate=20000 by=xdp-dump"]["value"] <= 20000
    assert figures["path=first-packet by=xdp-dump"]["unit"] == "s"
