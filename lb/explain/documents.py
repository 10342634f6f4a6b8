"""An explanation -> the JSON document that `xdp-lb explain --json` prints."""

from __future__ import annotations

from collections.abc import Iterable

from lb.explain.packet import describe, mac_text
from lb.explain.reasons import Choice, Explanation, Stage, found_by, reason_text
from lb.formats.documents import Document
from lb.model.options import GUE_PORT


def document(explanation: Explanation) -> Document:
    """The keys are listed in the help of `xdp-lb explain`."""
    outcome, choice = explanation.outcome, explanation.choice
    sentence, fix = verdict(explanation)
    return {
        "interface": explanation.interface,
        "packet": _frame_document(explanation.frame, explanation),
        "action": outcome.action,
        "reason": outcome.reason,
        "verdict": sentence,
        "fix": fix,
        "ended_by": [_stage_document(stage) for stage in outcome.stages],
        "service": _service_document(choice),
        "slot": _slot_document(explanation),
        "source": choice.source if explanation.member == choice.member else None,
        "affinity": choice.affinity,
        "member": _member_document(explanation),
        "reply_to": str(choice.request) if choice.request else None,
        "egress": outcome.egress[1] if outcome.egress else None,
        "out": _frame_document(outcome.frame, explanation) if outcome.action in ("tx", "redirect") else None,
        "disagreement": explanation.disagreement,
        "notes": list(explanation.notes),
    }


def _frame_document(frame: bytes, explanation: Explanation) -> Document:
    return {"bytes": len(frame), "headers": describe(frame, _gue_port(explanation)), "hex": frame.hex()}


def _stage_document(stage: Stage) -> Document:
    return {"place": stage.place, "program": stage.program, "program_id": stage.program_id, "rule": stage.rule}


def _service_document(choice: Choice) -> Document | None:
    if choice.service is None:
        return None
    allocation = choice.service.allocation
    return {"vip": str(allocation.vip), "mode": str(allocation.mode), "found_by": found_by(choice.service)}


def _slot_document(explanation: Explanation) -> Document | None:
    slot, service = explanation.choice.slot, explanation.choice.service
    if slot is None or service is None:
        return None
    current, previous = explanation.slot_members
    return {
        "hash": f"{slot.hash_value:016x}",
        "number": slot.number,
        "ring_size": service.allocation.ring_size,
        "current": current or ("gone" if slot.current else None),
        "previous": previous or ("gone" if slot.previous else None),
        "tracked": slot.is_tracked,
    }


def _member_document(explanation: Explanation) -> Document | None:
    member = explanation.member
    if member is None:
        return None
    return {
        "backend": str(member),
        "resolved": member.is_resolved,
        "mac": mac_text(member.destination_mac) if member.is_resolved else None,
        "source_mac": mac_text(member.source_mac) if member.is_resolved else None,
        "interface": explanation.hop_interface,
    }


ACTIONS = {"pass": "passed to the host", "drop": "dropped", "tx": "sent back", "redirect": "redirected"}


def verdict(explanation: Explanation) -> tuple[str, str | None]:
    """What became of the packet, in a sentence, and what to do about it."""
    outcome = explanation.outcome
    if outcome.stages or outcome.reason is None:
        where = "by another program"
        return f"{ACTIONS.get(outcome.action, outcome.action)} {where}", _fix_of_stages(outcome.stages, outcome.action)
    sentence, fix = reason_text(outcome.reason)
    if outcome.egress:
        sentence += f": out on {outcome.egress[1]}"
    return sentence, fix


def _fix_of_stages(stages: Iterable[Stage], action: str) -> str | None:
    if action != "drop":
        return None
    by_filter = any(stage.place == "filter" for stage in stages)
    return "xdp-lb filter list" if by_filter else "xdp-lb stage list"


def _gue_port(explanation: Explanation) -> int:
    service = explanation.choice.service
    return (service.gue_port if service else 0) or GUE_PORT
