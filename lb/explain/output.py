"""Explanations -> JSON documents, and documents -> the lines that people read: those of a daemon are no others."""

from __future__ import annotations

from collections.abc import Iterator

import click

from lb.explain.reasons import Source
from lb.formats.documents import Document

LABEL_WIDTH = 11
COLOURS = {"drop": "red", "aborted": "red", "pass": "yellow", "tx": "green", "redirect": "green"}
SOURCES = {
    Source.RING_CURRENT: "from the ring (current)",
    Source.RING_PREVIOUS: "from the ring (previous): connection older than the last change",
    Source.FLOW_TABLE: "from the flow table",
    Source.NAT_TABLE: "from the nat table: existing connection",
    Source.NAT_REPLY: "sender of a reply, from the nat table",
    Source.CONNECTION_ID: "from the QUIC connection ID",
    Source.FRAGMENT_TABLE: "from the fragment table: same as the first fragment",
}


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
    yield from zip(_labels("stopped by"), map(_stage_words, told["ended_by"]), strict=False)
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
        return "unresolved: looked up in the kernel's FIB"
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
