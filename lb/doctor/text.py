"""Findings -> lines for people: a paragraph for the host and one per interface, each fault with its fix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import click

from lb.doctor.checks import Finding, Severity

COLOURS = {Severity.OK: "green", Severity.WARN: "yellow", Severity.FAIL: "red"}
STATUS_WIDTH = max(map(len, Severity))


def lines(found: Sequence[Finding], *, colour: bool) -> list[str]:
    """At the end, how many of each status there are."""
    width = max(len(finding.check) for finding in found)
    paragraphs = groupby(found, key=lambda finding: finding.interface or "host")
    return [*(line for name, group in paragraphs for line in _paragraph(name, group, width, colour)), _tally(found)]


def _paragraph(name: str, found: Iterable[Finding], width: int, colour: bool) -> Iterator[str]:
    yield click.style(name, bold=True) if colour else name
    for finding in found:
        yield from _finding_lines(finding, width, colour)
    yield ""


def _finding_lines(finding: Finding, width: int, colour: bool) -> Iterator[str]:
    status = finding.status.ljust(STATUS_WIDTH)
    if colour:
        status = click.style(status, fg=COLOURS[finding.status])
    yield f"  {status}  {finding.check.ljust(width)}  {finding.value}"
    if finding.fix:
        yield f"  {' ' * STATUS_WIDTH}  fix: {finding.fix}"


def _tally(found: Iterable[Finding]) -> str:
    counts = Counter(finding.status for finding in found)
    return ", ".join(f"{counts[status]} {status}" for status in reversed(Severity) if counts[status])
