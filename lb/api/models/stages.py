"""Answers of `/stages`."""

from __future__ import annotations

from lb.api.models.common import Answer


class StageAnswer(Answer):
    number: int
    interface: str
    at: str
    place: int | None
    file: str
    function: str
    pid: int
    program_id: int | None
    since: str
    state: str


class TableAnswer(Answer):
    """With `entries` or `histograms`."""

    time: str
    table: str
    kind: str
