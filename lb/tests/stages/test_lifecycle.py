"""Records of stages, and the words of `xdp-lb stage`."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click import BadParameter
from click.testing import CliRunner

from lb.cli.commands.stage import parse_interval
from lb.cli.main import cli
from lb.paths import Paths
from lb.stages.lifecycle import Condition, Record, Records, listed

OWN = Record(
    number=1,
    interface="eth0",
    at="xdp",
    file="/a/hello.c",
    function="stage",
    pid=os.getpid(),
    born=int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]),
    place=2,
    program_id=77,
    since="2026-01-01T00:00:00+00:00",
)


@pytest.fixture
def gone() -> Record:
    """Of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return replace(OWN, pid=process.pid)


def test_a_stage_runs_as_long_as_its_process() -> None:
    assert OWN.condition({2: 77}) is Condition.RUNNING
    assert replace(OWN, program_id=0).condition({}) is Condition.COMPILING


def test_a_program_that_its_process_left_in_place_is_an_orphan(gone: Record) -> None:
    assert gone.condition({2: 77}) is Condition.ORPHANED


def test_a_process_that_got_the_pid_of_another_is_not_taken_for_it() -> None:
    assert replace(OWN, born=OWN.born - 1).condition({2: 77}) is Condition.ORPHANED


@pytest.mark.parametrize("occupied", [{}, {2: 78}, {1: 77}])
def test_of_a_stage_whose_place_another_has_nothing_is_left(gone: Record, occupied: dict[int, int]) -> None:
    assert gone.condition(occupied) is Condition.GONE


def test_of_a_killed_stage_alone_on_its_interface_nothing_is_left(gone: Record) -> None:
    assert replace(gone, place=None).condition({}) is Condition.GONE


def test_records_are_kept_by_number_until_they_are_removed(tmp_path: Path) -> None:
    records = Records(Paths(tmp_path, tmp_path, "blue"))
    tenth, second = replace(OWN, number=10), replace(OWN, number=2, place=None)
    records.write(tenth)
    records.write(second)
    records.write(replace(tenth, program_id=5))
    assert records.all() == [second, replace(tenth, program_id=5)]
    assert Records(Paths(tmp_path, tmp_path, "red")).all() == []
    records.remove(second)
    records.remove(second)
    assert records.all() == [replace(tenth, program_id=5)]


def test_without_records_the_kernel_is_not_asked(tmp_path: Path) -> None:
    assert listed(Paths(tmp_path, tmp_path, "blue")) == []


@pytest.mark.parametrize(("text", "seconds"), [("1s", 1), ("500ms", 0.5), ("2m", 120), ("3", 3), ("0.25s", 0.25)])
def test_intervals_have_units(text: str, seconds: float) -> None:
    assert parse_interval(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "1h", "1sm", "-1s", "99ms", "nan", "inf", "1e9s", "1 s s"])
def test_what_is_no_interval_is_refused(text: str) -> None:
    with pytest.raises(BadParameter):
        parse_interval(text)


@pytest.mark.parametrize(
    "words", [("stop",), ("stop", "1", "--all"), ("run", "eth0"), ("run", "eth0", "a.c", "--at", "tc")]
)
def test_words_that_say_too_little_or_too_much_are_usage_errors(words: tuple[str, ...]) -> None:
    assert CliRunner().invoke(cli, ["stage", *words]).exit_code == 2


def test_a_number_that_no_stage_has_is_told(tmp_path: Path) -> None:
    places = {"XDP_LB_RUN_DIR": str(tmp_path), "XDP_LB_STATE_DIR": str(tmp_path)}
    done = CliRunner().invoke(cli, ["stage", "stop", "5"], env=places)
    assert (done.exit_code, done.stderr) == (1, "xdp-lb: stage 5: not running: see xdp-lb stage list\n")


def test_other_commands_do_not_import_what_compiles() -> None:
    code = "import sys, lb.cli.main; print(*sorted(name for name in sys.modules if name.startswith('lb.stages')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
