"""Filter rules, reports and test results <-> JSON documents.

The keys are stable; the help of each command names them. What `read_...` returns prints like the original value, but
has no instructions, and slots of its own. It raises KeyError, TypeError, ValueError or LbError for an invalid document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields

from lb.formats.documents import Document
from lb.model.rule_report import Counts, FilterReport, FilterTestResult, RuleChange, RuleStatus
from lb.model.rules import Action, At, Rate, Rule, SetSource

_NS = 1_000_000_000


def rule_document(rule: Rule, number: int) -> Document:
    return {"interface": rule.interface, "number": number, **_own_document(rule)}


def _own_document(rule: Rule) -> Document:
    return {
        "at": str(rule.at),
        "action": str(rule.action),
        "rate": str(rule.rate) if rule.rate else None,
        "expression": rule.expression,
        "set": asdict(rule.set) if rule.set else None,
    }


def wanted_document(rules: Sequence[Rule]) -> Document:
    """`rules`, in order: the desired rules of an interface, without state."""
    return {
        "rules": [_own_document(rule) | {"until": rule.deadline.unix_s if rule.deadline else None} for rule in rules]
    }


def status_document(rules: Sequence[RuleStatus]) -> list[Document]:
    return [
        {
            **rule_document(status.rule, status.number),
            **asdict(status.counts),
            "in_force": status.in_force,
            "expired": status.is_expired,
            "left_s": None if status.left_ns is None else max(0, -(-status.left_ns // _NS)),
        }
        for status in rules
    ]


def report_document(report: FilterReport) -> Document:
    return {
        "dry_run": report.dry_run,
        "changes": [
            {"change": change.what, "detail": change.detail, **rule_document(change.rule, change.number)}
            for change in report.changes
        ],
        "warnings": list(report.warnings),
    }


def trial_document(trial: FilterTestResult) -> Document:
    return {
        "packets": trial.packets,
        "dropped": trial.dropped,
        "untested": trial.untested,
        "rules": [
            {**rule_document(rule, number), "matched": trial.matched[rule.slot]}
            for number, rule in enumerate(trial.rules, 1)
        ],
    }


# The way back


def read_rule(document: Document, slot: int = 0) -> Rule:
    rate, source = document["rate"], document["set"]
    return Rule(
        slot,
        document["interface"],
        At(document["at"]),
        Action(document["action"]),
        document["expression"],
        b"",
        Rate.parse(rate) if rate is not None else None,
        SetSource(**source) if source is not None else None,
    )


def read_status(documents: Sequence[Document]) -> list[RuleStatus]:
    return [_read_one_status(document) for document in documents]


def _read_one_status(document: Document) -> RuleStatus:
    counts = Counts(**{field.name: document[field.name] for field in fields(Counts)})
    left_ns = None if document["left_s"] is None else document["left_s"] * _NS
    return RuleStatus(read_rule(document), document["number"], counts, document["in_force"], left_ns)


def read_report(document: Document) -> FilterReport:
    changes = tuple(
        RuleChange(change["change"], read_rule(change), change["number"], change["detail"])
        for change in document["changes"]
    )
    return FilterReport(changes, tuple(document["warnings"]), document["dry_run"])


def read_trial(document: Document) -> FilterTestResult:
    rules = tuple(read_rule(each, slot) for slot, each in enumerate(document["rules"]))
    matched = {slot: each["matched"] for slot, each in enumerate(document["rules"])}
    return FilterTestResult(rules, matched, document["packets"], document["dropped"], document["untested"])
