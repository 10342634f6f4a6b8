"""Explanations -> the lines that people read, and JSON documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import click

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


def lines(explanation: Explanation, *, colour: bool) -> list[str]:
    """A paragraph, with a label in front of each line."""
    found = [*_packet(explanation), *_verdict(explanation, colour), *_choice(explanation), *_bytes_out(explanation)]
    if explanation.disagreement:
        text = f"{explanation.disagreement}: please report this"
        found.append(("BUG", click.style(text, fg="red") if colour else text))
    found += [("note", note) for note in explanation.notes]
    return [f"{label:{LABEL_WIDTH}}{text}" for label, text in found]


def _packet(explanation: Explanation) -> Iterator[tuple[str, str]]:
    yield from zip(_labels("packet"), describe(explanation.frame, _gue_port(explanation)), strict=False)
    yield "in", explanation.interface


def _verdict(explanation: Explanation, colour: bool) -> Iterator[tuple[str, str]]:
    outcome = explanation.outcome
    said, fix = verdict(explanation)
    yield "verdict", click.style(said, fg=COLOURS.get(outcome.action)) if colour else said
    if outcome.reason:
        yield "reason", outcome.reason
    yield from zip(_labels("ended by"), map(stage_words, outcome.stages), strict=False)
    if fix:
        yield "fix", fix


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


def stage_words(stage: Stage) -> str:
    if stage.rule:
        return f"filter {stage.rule}"
    place = "the filter" if stage.place == "filter" else f"a stage {stage.place}"
    return f"{place}: program {stage.program}, id {stage.program_id}"


def _choice(explanation: Explanation) -> Iterator[tuple[str, str]]:
    choice = explanation.choice
    if choice.served:
        yield "service", f"{choice.served.placed.vip}, {found_by(choice.served)}, mode {choice.served.placed.mode}"
    if choice.request:
        yield "reply to", str(choice.request)
    if choice.slot and choice.served:
        yield "slot", _slot(explanation, choice)
    if explanation.member:
        yield "member", _member(explanation)
    if explanation.member and not choice.request:
        yield "next hop", _next_hop(explanation)


def _slot(explanation: Explanation, choice: Choice) -> str:
    assert choice.slot
    assert choice.served
    current, previous = explanation.slot_members
    text = f"{choice.slot.number} of {choice.served.placed.ring_size}, hash {choice.slot.hash_value:016x}"
    text += f": current {current or ('gone' if choice.slot.current else 'none')}"
    if choice.slot.previous:
        text += f", previous {previous or 'gone'}"
    if choice.slot.is_tracked:
        text += ", flows tracked"
    return text + (" (of the client: affinity)" if choice.affinity else "")


def _member(explanation: Explanation) -> str:
    source = explanation.choice.source
    if source is None or explanation.member != explanation.choice.member:
        return str(explanation.member)
    return f"{explanation.member}, {SOURCES[source]}"


def _next_hop(explanation: Explanation) -> str:
    member = explanation.member
    assert member
    if not member.is_resolved:
        return "not resolved: the kernel's FIB decides"
    return f"{mac_text(member.destination_mac)} on {explanation.hop_interface}, from {mac_text(member.source_mac)}"


def _bytes_out(explanation: Explanation) -> Iterator[tuple[str, str]]:
    outcome = explanation.outcome
    if outcome.action not in ("tx", "redirect"):
        return
    yield "bytes out", f"{len(outcome.frame)} (in: {len(explanation.frame)})"
    for line in describe(outcome.frame, _gue_port(explanation)):
        yield "", line


def _gue_port(explanation: Explanation) -> int:
    served = explanation.choice.served
    return (served.gue_port if served else 0) or GUE_PORT


def _labels(first: str) -> Iterator[str]:
    yield first
    while True:
        yield ""


def document(explanation: Explanation) -> dict[str, Any]:
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
        "source": choice.source,
        "affinity": choice.affinity,
        "member": _member_document(explanation),
        "reply_to": str(choice.request) if choice.request else None,
        "egress": outcome.egress[1] if outcome.egress else None,
        "out": _frame_document(outcome.frame, explanation) if outcome.action in ("tx", "redirect") else None,
        "disagreement": explanation.disagreement,
        "notes": list(explanation.notes),
    }


def _frame_document(frame: bytes, explanation: Explanation) -> dict[str, Any]:
    return {"bytes": len(frame), "headers": describe(frame, _gue_port(explanation)), "hex": frame.hex()}


def _stage_document(stage: Stage) -> dict[str, Any]:
    return {"place": stage.place, "program": stage.program, "program_id": stage.program_id, "rule": stage.rule}


def _service_document(choice: Choice) -> dict[str, Any] | None:
    if choice.served is None:
        return None
    placed = choice.served.placed
    return {"vip": str(placed.vip), "mode": str(placed.mode), "found_by": found_by(choice.served)}


def _slot_document(explanation: Explanation) -> dict[str, Any] | None:
    slot, served = explanation.choice.slot, explanation.choice.served
    if slot is None or served is None:
        return None
    current, previous = explanation.slot_members
    return {
        "hash": f"{slot.hash_value:016x}",
        "number": slot.number,
        "ring_size": served.placed.ring_size,
        "current": current,
        "previous": previous,
        "tracked": slot.is_tracked,
    }


def _member_document(explanation: Explanation) -> dict[str, Any] | None:
    member = explanation.member
    if member is None:
        return None
    return {
        "backend": str(member),
        "resolved": member.is_resolved,
        "mac": mac_text(member.destination_mac) if member.is_resolved else None,
        "interface": explanation.hop_interface,
    }
