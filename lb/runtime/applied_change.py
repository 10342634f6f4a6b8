"""A change that was made, as the daemon tells of it: to who asked, in the audit log, in the events of /v1/events.

Enters: the Report of a change, and its encoded document. Leaves: an AppliedChange.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from lb.formats import text
from lb.formats.documents import Document, plan_document
from lb.model.report import Report
from lb.runtime.events import KEPT

SENTENCES = 4  # of a summary


@dataclass(frozen=True)
class AppliedChange:
    """A change that was made. All of it may be large, so it is made in the balancer's thread.

    body: the document of the report. summary: a line. events: kind and document of each, none of a dry run.
    """

    report: Report
    body: bytes
    summary: str
    events: tuple[tuple[str, Document], ...]

    @classmethod
    def of(cls, report: Report, body: bytes) -> AppliedChange:
        events = tuple(islice(_events(report), KEPT))
        sentences = [document["summary"] for _, document in events[:SENTENCES]] or ["nothing to change"]
        more = len(report.attached) + len(report.detached) + len(report.changes) - SENTENCES
        summary = "; ".join([*sentences, f"{more} more"] if more > 0 else sentences)
        return cls(report, body, f"dry run: {summary}", ()) if report.dry_run else cls(report, body, summary, events)


def _events(report: Report) -> Iterator[tuple[str, Document]]:
    for attachment in report.attached:
        summary = text.attachment_sentence(attachment)
        yield "attach", {"interface": attachment.interface, "xdp_mode": attachment.mode, "summary": summary}
    for name in report.detached:
        yield "detach", {"interface": name, "summary": f"{name}: detached"}
    for change in report.changes:
        document = {"vip": str(change.vip), "change": str(change.kind), "summary": text.change_sentence(change)}
        yield "change", document | {"plan": plan_document(change.plan) if change.plan else None}
