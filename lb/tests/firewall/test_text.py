"""Filter rules as people and programs read them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lb.firewall.documents import (
    read_report,
    read_status,
    read_trial,
    report_document,
    status_document,
    trial_document,
)
from lb.firewall.text import duration, report_lines, status_lines, trial_lines
from lb.model.rule_report import Counts, FilterReport, FilterTestResult, RuleChange, RuleStatus
from lb.model.rules import Action, At, Rate, Rule, SetSource

NS = 1_000_000_000
DROP = Rule(0, "eth0", At.XDP, Action.DROP, "udp port 53", b"", set=SetSource("/etc/bad.txt", "src", 1000))
LIMIT = Rule(1, "eth0", At.TC_IN, Action.LIMIT, "", b"", rate=Rate(1000))


def status(rule: Rule, number: int, counts: Counts, *, in_force: bool = True, left_ns: int | None = None) -> RuleStatus:
    return RuleStatus(rule, number, counts, in_force, left_ns)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59, "59s"), (600, "10m"), (3661, "1h1m"), (90_000, "1d1h"), (86_401, "1d1s")]
)
def test_time_is_told_in_two_units(seconds: int, text: str) -> None:
    assert duration(seconds) == text


def test_rules_are_a_table() -> None:
    rules = [
        status(DROP, 1, Counts(12_345, 1_000_000, 12_345, 1_000_000), left_ns=90 * NS),
        status(LIMIT, 2, Counts(9, 900, 4, 400)),
    ]
    assert status_lines(rules, colour=False) == [
        "IFACE  N  AT     ACTION      PACKETS  BYTES  DROPPED  LEFT   EXPRESSION",
        "eth0   1  xdp    drop          12.3k  1.00M    12.3k  1m30s  src in /etc/bad.txt (1000) and udp port 53",
        "eth0   2  tc-in  limit 1k/s        9    900        4         all",
    ]
    assert status_lines([], colour=False) == ["no rules: add one with xdp-lb filter add"]


def test_heading_in_bold_is_no_wider_than_its_words() -> None:
    heading, *_ = status_lines([status(DROP, 1, Counts())], colour=True)
    assert heading.endswith("EXPRESSION\x1b[0m")


def test_what_is_not_in_force_is_said_but_not_of_what_is_over() -> None:
    idle = status(LIMIT, 1, Counts(), in_force=False)
    assert status_lines([idle], colour=False)[-1] == "not active on eth0: run xdp-lb filter restore"
    over = replace(idle, left_ns=-1)
    assert "expired" in status_lines([over], colour=False)[-1]


def test_document_of_a_rule_has_all_its_keys() -> None:
    (document,) = status_document([status(DROP, 3, Counts(5, 500, 5, 500), left_ns=1_500_000_000)])
    assert document == {
        "interface": "eth0",
        "number": 3,
        "at": "xdp",
        "action": "drop",
        "rate": None,
        "expression": "udp port 53",
        "set": {"path": "/etc/bad.txt", "side": "src", "prefixes": 1000},
        "packets": 5,
        "bytes": 500,
        "dropped_packets": 5,
        "dropped_bytes": 500,
        "in_force": True,
        "expired": False,
        "left_s": 2,
    }


def test_changes_are_sentences() -> None:
    changes = (
        RuleChange("expired", LIMIT, 1),
        RuleChange("moved", DROP, 3, "to 1"),
        RuleChange("reloaded", DROP, 1, "2 added, 0 removed"),
    )
    assert report_lines(FilterReport(changes)) == [
        "eth0: rule 1 expired: limit 1k/s at tc-in: all",
        "eth0: rule 3 moved to 1: drop at xdp: src in /etc/bad.txt (1000) and udp port 53",
        "eth0: rule 1 reloaded (2 added, 0 removed): drop at xdp: src in /etc/bad.txt (1000) and udp port 53",
    ]
    assert report_lines(FilterReport(dry_run=True)) == ["dry run: nothing to change"]
    assert report_document(FilterReport(changes[:1], ("careful",)))["changes"][0]["change"] == "expired"


def test_trial_says_what_became_of_each_packet() -> None:
    trial = FilterTestResult((DROP, LIMIT), {0: 3, 1: 6}, packets=10, dropped=3, untested=1)
    assert trial_lines(trial)[-1] == "10 packets: 3 dropped, 6 passed, 1 not tested (too short or too long)"
    assert trial_lines(trial)[1].split()[:4] == ["1", "xdp", "drop", "3"]


def test_what_is_read_of_documents_prints_as_what_they_were_made_of() -> None:
    rules = [
        status(DROP, 1, Counts(5, 500, 5, 500), left_ns=1_500_000_000),
        status(LIMIT, 1, Counts(), in_force=False),
        status(DROP, 2, Counts(), left_ns=-1),
    ]
    read = read_status(status_document(rules))
    assert status_lines(read, colour=False) == status_lines(rules, colour=False)
    assert status_document(read) == status_document(rules)
    report = FilterReport((RuleChange("moved", DROP, 3, "to 1"), RuleChange("added", LIMIT, 2)), ("careful",), True)
    assert report_lines(read_report(report_document(report))) == report_lines(report)
    assert report_document(read_report(report_document(report))) == report_document(report)
    trial = FilterTestResult((DROP, LIMIT), {0: 3, 1: 6}, packets=10, dropped=3, untested=1)
    assert trial_lines(read_trial(trial_document(trial))) == trial_lines(trial)
    assert trial_document(read_trial(trial_document(trial))) == trial_document(trial)
