"""Explanations -> JSON documents, and documents -> the lines that people read: those of a daemon are no others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import click

from lb.documents import Document
from lb.explain import Choice, Explanation, Source, Stage, found_by, words
from lb.explain_packet import describe, mac_text
from lb.options import GUE_PORT

LABEL_WIDTH = 11
COLOURS = {"drop": "red", "aborted": "red", "pass": "yellow", "tx": "green", "redirect": "green"}
SOURCES = {
    Source.RING_CURRENT: "from the ring (current)",
    Source.RING_PREVIOUS: "from the ring (previous): older than the last change",
    Source.FLOW_TABLE: "from the flow table",
    Source.NAT_TABLE: "from the nat table: an open connection",
    Source.NAT_REPLY: "the sender: a reply, by the nat table",
    Source.CONNECTION_ID: "named by the QUIC connection ID",
    Source.FRAGMENT_TABLE: "from the fragment table: where the first fragment went",
}
ACTIONS = {"pass": "passed to the host", "drop": "dropped", "tx": "sent back out", "redirect": "sent on"}


def lines(told: Document, *, colour: bool) -> list[str]:
    """A paragraph of a document, with a label in front of each line."""
    found = [*_packet(told), *_verdict(told, colour), *_choice(told), *_bytes_out(told)]
    if told["disagreement"]:
        text = f"{told['disagreement']}: please report this"
        found.append(("BUG", click.style(text, fg="red") if colour else text))
    found += [("note", note) for note in told["notes"]]
    return [f"{label:{LABEL_WIDTH}}{text}" for label, text in found]


def _packet(told: Document) -> Iterator[tuple[str, str]]:
    yield from zip(_labels("packet"), told["packet"]["headers"], strict=False)
    yield "in", told["interface"]


def _verdict(told: Document, colour: bool) -> Iterator[tuple[str, str]]:
    said = told["verdict"]
    yield "verdict", click.style(said, fg=COLOURS.get(told["action"])) if colour else said
    if told["reason"]:
        yield "reason", told["reason"]
    yield from zip(_labels("ended by"), map(_stage_words, told["ended_by"]), strict=False)
    if told["fix"]:
        yield "fix", told["fix"]


def _stage_words(stage: Document) -> str:
    if stage["rule"]:
        return f"filter {stage['rule']}"
    place = "the filter" if stage["place"] == "filter" else f"a stage {stage['place']}"
    return f"{place}: program {stage['program']}, id {stage['program_id']}"


def _choice(told: Document) -> Iterator[tuple[str, str]]:
    if service := told["service"]:
        yield "service", f"{service['vip']}, {service['found_by']}, mode {service['mode']}"
    if told["reply_to"]:
        yield "reply to", told["reply_to"]
    if told["slot"]:
        yield "slot", _slot(told["slot"], affinity=told["affinity"])
    if told["member"]:
        yield "member", _member(told)
    if told["member"] and not told["reply_to"]:
        yield "next hop", _next_hop(told["member"])


def _slot(slot: Document, *, affinity: bool) -> str:
    text = f"{slot['number']} of {slot['ring_size']}, hash {slot['hash']}: current {slot['current'] or 'none'}"
    if slot["previous"]:
        text += f", previous {slot['previous']}"
    if slot["tracked"]:
        text += ", flows tracked"
    return text + (" (of the client: affinity)" if affinity else "")


def _member(told: Document) -> str:
    backend: str = told["member"]["backend"]
    return f"{backend}, {SOURCES[Source(told['source'])]}" if told["source"] else backend


def _next_hop(member: Document) -> str:
    if not member["resolved"]:
        return "not resolved: the kernel's FIB decides"
    return f"{member['mac']} on {member['interface']}, from {member['source_mac']}"


def _bytes_out(told: Document) -> Iterator[tuple[str, str]]:
    if told["out"]:
        yield "bytes out", f"{told['out']['bytes']} (in: {told['packet']['bytes']})"
        for line in told["out"]["headers"]:
            yield "", line


def _labels(first: str) -> Iterator[str]:
    yield first
    while True:
        yield ""


# Documents


def verdict(explanation: Explanation) -> tuple[str, str | None]:
    """What became of the packet, in a sentence, and what to do about it."""
    outcome = explanation.outcome
    if outcome.stages or outcome.reason is None:
        where = "by a program that is not the balancer's"
        return f"{ACTIONS.get(outcome.action, outcome.action)} {where}", _fix_of_stages(outcome.stages, outcome.action)
    said, fix = words(outcome.reason)
    if outcome.egress:
        said += f": out on {outcome.egress[1]}"
    return said, fix


def _fix_of_stages(stages: Iterable[Stage], action: str) -> str | None:
    if action != "drop":
        return None
    by_filter = any(stage.place == "filter" for stage in stages)
    return "xdp-lb filter list" if by_filter else "xdp-lb stage list"


def _gue_port(explanation: Explanation) -> int:
    served = explanation.choice.served
    return (served.gue_port if served else 0) or GUE_PORT


def document(explanation: Explanation) -> Document:
    """The keys are listed in the help of `xdp-lb explain`."""
    outcome, choice = explanation.outcome, explanation.choice
    said, fix = verdict(explanation)
    return {
        "interface": explanation.interface,
        "packet": _frame_document(explanation.frame, explanation),
        "action": outcome.action,
        "reason": outcome.reason,
        "verdict": said,
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
    if choice.served is None:
        return None
    placed = choice.served.placed
    return {"vip": str(placed.vip), "mode": str(placed.mode), "found_by": found_by(choice.served)}


def _slot_document(explanation: Explanation) -> Document | None:
    slot, served = explanation.choice.slot, explanation.choice.served
    if slot is None or served is None:
        return None
    current, previous = explanation.slot_members
    return {
        "hash": f"{slot.hash_value:016x}",
        "number": slot.number,
        "ring_size": served.placed.ring_size,
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
