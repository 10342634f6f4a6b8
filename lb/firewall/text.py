"""Filter rules, reports and trials -> lines for people."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from lb.formats.text import Column, short, table
from lb.model.rule_report import FilterReport, FilterTestResult, RuleChange, RuleStatus
from lb.model.rules import Rule

_NS = 1_000_000_000
_LONGEST = 200  # characters of an expression
_UNITS = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))

COLUMNS = (
    Column("IFACE"),
    Column("N", number=True),
    Column("AT"),
    Column("ACTION"),
    Column("PACKETS", number=True),
    Column("BYTES", number=True),
    Column("DROPPED", number=True),
    Column("LEFT"),
    Column("EXPRESSION"),
)


def duration(seconds: int) -> str:
    """At most two units: 1h30m, 45s."""
    words = []
    for unit, size in _UNITS:
        if seconds >= size:
            words.append(f"{seconds // size}{unit}")
            seconds %= size
    return "".join(words[:2]) or "0s"


def action_words(rule: Rule) -> str:
    return f"{rule.action} {rule.rate}" if rule.rate else str(rule.action)


def match_words(rule: Rule) -> str:
    """What it is for: the set, then the expression, which may have thousands of words: --json has them all."""
    words = [f"{rule.set.side} in {rule.set.path} ({rule.set.prefixes})"] if rule.set else []
    return " and ".join([*words, *([shortened(rule.expression)] if rule.expression else [])]) or "all"


def shortened(expression: str) -> str:
    return expression if len(expression) <= _LONGEST else f"{expression[: _LONGEST - 3]}..."


def status_lines(rules: Sequence[RuleStatus], *, colour: bool) -> list[str]:
    if not rules:
        return ["no rules: add one with xdp-lb filter add"]
    lines = [_without_padding(line) for line in table(COLUMNS, [_row(status) for status in rules], colour=colour)]
    idle = dict.fromkeys(s.rule.interface for s in rules if not s.in_force and not s.is_expired)
    if idle:
        lines += ["", f"not active on {', '.join(idle)}: run xdp-lb filter restore"]
    return lines


def _without_padding(line: str) -> str:
    """Expressions may be longer than a terminal is wide: spaces in bold behind the last heading would be a line."""
    return re.sub(r" +(\x1b\[0m)$", r"\1", line)


def _row(status: RuleStatus) -> tuple[str, ...]:
    rule, counts = status.rule, status.counts
    figures = (short(counts.packets), short(counts.bytes), short(counts.dropped_packets))
    return (
        rule.interface,
        str(status.number),
        str(rule.at),
        action_words(rule),
        *figures,
        _left(status),
        match_words(rule),
    )


def _left(status: RuleStatus) -> str:
    if status.left_ns is None:
        return ""
    return "expired" if status.is_expired else duration(-(-status.left_ns // _NS))


def report_lines(report: FilterReport) -> list[str]:
    head = "dry run: " if report.dry_run else ""
    return [f"{head}{_sentence(change)}" for change in report.changes] or [f"{head}nothing to change"]


def _sentence(change: RuleChange) -> str:
    """`eth0: rule 2 added: drop at xdp: udp port 53`"""
    rule = change.rule
    done = f"{change.what} {change.detail}" if change.what == "moved" else change.what
    detail = f" ({change.detail})" if change.detail and change.what != "moved" else ""
    return (
        f"{rule.interface}: rule {change.number} {done}{detail}: {action_words(rule)} at {rule.at}: {match_words(rule)}"
    )


def _numbered(trial: FilterTestResult) -> Iterator[tuple[int, Rule]]:
    yield from enumerate(trial.rules, 1)


def trial_lines(trial: FilterTestResult) -> list[str]:
    columns = (
        Column("N", number=True),
        Column("AT"),
        Column("ACTION"),
        Column("MATCHED", number=True),
        Column("EXPRESSION"),
    )
    rows = [
        (str(number), str(rule.at), action_words(rule), str(trial.matched[rule.slot]), match_words(rule))
        for number, rule in _numbered(trial)
    ]
    untested = f", {trial.untested} not tested (too short or too long)" if trial.untested else ""
    plural = "" if trial.packets == 1 else "s"
    onward = trial.packets - trial.dropped - trial.untested
    return [
        *table(columns, rows, colour=False),
        "",
        f"{trial.packets} packet{plural}: {trial.dropped} dropped, {onward} passed{untested}",
    ]
