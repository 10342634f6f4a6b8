"""What orders the files of a run: read from a report, by file, the longest first."""

from __future__ import annotations

from pathlib import Path

from netns_tests import durations

REPORT = """<testsuites><testsuite>
<testcase classname="netns_tests.bed.test_durations" name="test_a" time="1.25"/>
<testcase classname="netns_tests.bed.test_commands" name="test_b" time="20.0"/>
<testcase classname="netns_tests.bed.test_durations.TestOfAClass" name="test_c" time="2.0"><skipped/></testcase>
</testsuite></testsuites>"""


def test_cases_of_a_file_are_added_up_also_those_of_a_class(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    measured = durations.measured(report)
    assert list(measured.items()) == [("netns_tests/bed/test_commands", 20.0), ("netns_tests/bed/test_durations", 3.2)]


def test_a_file_is_found_by_the_name_that_is_recorded() -> None:
    assert durations.name_of(Path(__file__)) == "netns_tests/bed/test_durations"
    assert all(seconds >= 0 for seconds in durations.read().values())
