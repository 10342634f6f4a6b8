"""What `make test-kernels` makes of a kernel that refuses, fails or hangs; no machine is started."""

from __future__ import annotations

import contextlib
import os
import sys
import tarfile
from pathlib import Path

import pytest
from rich.console import Console

from netns_tests.bed.topology import wait_until
from netns_tests.kernels import checks, runner
from netns_tests.kernels.checks import Check, Column

REPORT = """<testsuites><testsuite>
<testcase classname="test_a" name="test_that_passes"/>
<testcase classname="test_a" name="test_that_fails"><failure message="1 is not 2">assert 1 == 2
test_a.py:7: AssertionError</failure></testcase>
<testcase classname="test_a" name="test_without_a_bed"><error message="no bed">bed.py:9: OSError</error></testcase>
<testcase classname="test_a" name="test_elsewhere"><skipped message="not here"/></testcase>
</testsuite></testsuites>"""


def test_report_is_counted_and_failures_are_told(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    assert checks.summary("traffic", report) == Check(
        "traffic",
        "1 passed, 2 failed, 1 skipped",
        failed=True,
        details="test_a.test_that_fails: 1 is not 2\n  test_a.py:7: AssertionError\n"
        "test_a.test_without_a_bed: no bed\n  bed.py:9: OSError",
    )


def test_group_that_ran_no_test_has_failed(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text("<testsuites><testsuite/></testsuites>")
    assert checks.summary("traffic", report) == Check("traffic", "0 passed", failed=True)


def test_column_comes_back_as_it_was_written(tmp_path: Path) -> None:
    column = Column(
        "6.1.0", [Check("tcx", "no"), Check("traffic", "no end", failed=True, details="...")], complete=True
    )
    column.write(tmp_path / "result.json")
    assert Column.read(tmp_path / "result.json") == column


@pytest.mark.parametrize(
    ("in_time", "value"), [(True, "stopped early"), (False, f"stopped after {runner.TIMEOUT_S} s")]
)
def test_kernel_that_stops_half_way_keeps_what_it_found_and_has_failed(
    tmp_path: Path, in_time: bool, value: str
) -> None:
    result = tmp_path / "result.json"
    Column("6.1.0", [Check("tcx", "no")]).write(result)
    column = runner.column_of(result, "6.1.0-50", in_time, "booting\nKernel panic")
    assert column.checks == [
        Check("tcx", "no"),
        Check("came to the end", value, failed=True, details="booting\nKernel panic"),
    ]


def test_kernel_that_never_starts_has_failed(tmp_path: Path) -> None:
    column = runner.column_of(tmp_path / "result.json", "6.1.0-50", True, "vng: no qemu")
    assert (column.kernel, [check.failed for check in column.checks]) == ("6.1.0-50", [True])


def test_what_takes_too_long_is_ended_with_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "TIMEOUT_S", 1)
    in_time, said = runner.run(["sh", "-c", "sleep 100 & echo $!; trap '' TERM; wait; wait"])
    assert not in_time
    child = int(said)
    wait_until(lambda: not is_running(child), f"process {child} ended")


def test_machine_gets_the_modules_that_tests_import_and_nothing_large(tmp_path: Path) -> None:
    archive = tmp_path / "files.tar"
    runner.write_archive(archive)
    with tarfile.open(archive) as files:
        names = {f"/{name}" for name in files.getnames()}
    assert {tarfile.__file__, runner.__file__, pytest.__file__, sys.executable} <= names
    assert not any("/.git/" in name or "/numpy/" in name for name in names)


def is_running(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    return False


def test_table_has_a_row_for_each_check_and_a_column_for_each_kernel() -> None:
    old = Column("6.1.0", [Check("lb.bpf.o", "refused", failed=True)])
    new = Column("6.18.0", [Check("lb.bpf.o", "40317 instructions"), Check("tcx", "yes")])
    console = Console(width=runner.WIDTH)
    with console.capture() as shown:
        console.print(runner.table([old, new]))
    lines = [line.split() for line in shown.get().splitlines()]
    assert ["check", "6.1.0", "6.18.0"] in lines
    assert ["lb.bpf.o", "refused", "40317", "instructions"] in lines
    assert ["tcx", "-", "yes"] in lines
