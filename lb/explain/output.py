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


def lines(document: Document, *, colour: bool) -> list[str]:
    """A paragraph of a document, with a label in front of each line."""
    found = [*_packet(document), *_verdict(document, colour), *_choice(document), *_bytes_out(document)]
    if document["disagreement"]:
        text = f"{document['disagreement']}: please report this"
        found.append(("BUG", click.style(text, fg="red") if colour else text))
    found += [("note", note) for note in document["notes"]]
    return [f"{label:{LABEL_WIDTH}}{text}" for label, text in found]


def _packet(document: Document) -> Iterator[tuple[str, str]]:
    yield from zip(_labels("packet"), document["packet"]["headers"], strict=False)
    yield "in", document["interface"]


def _verdict(document: Document, colour: bool) -> Iterator[tuple[str, str]]:
    sentence = document["verdict"]
    yield "verdict", click.style(sentence, fg=COLOURS.get(document["action"])) if colour else sentence
    if document["reason"]:
        yield "reason", document["reason"]
    yield from zip(_labels("stopped by"), map(_stage_text, document["ended_by"]), strict=False)
    if document["fix"]:
        yield "fix", document["fix"]


def _stage_text(stage: Document) -> str:
    if stage["rule"]:
        return f"filter {stage['rule']}"
    place = "the filter" if stage["place"] == "filter" else f"a stage {stage['place']}"
    return f"{place}: program {stage['program']}, id {stage['program_id']}"


def _choice(document: Document) -> Iterator[tuple[str, str]]:
    if service := document["service"]:
        yield "service", f"{service['vip']}, {service['found_by']}, mode {service['mode']}"
    if document["reply_to"]:
        yield "reply to", document["reply_to"]
    if document["slot"]:
        yield "slot", _slot(document["slot"], affinity=document["affinity"])
    if document["member"]:
        yield "member", _member(document)
    if document["member"] and not document["reply_to"]:
        yield "next hop", _next_hop(document["member"])


def _slot(slot: Document, *, affinity: bool) -> str:
    text = f"{slot['number']} of {slot['ring_size']}, hash {slot['hash']}: current {slot['current'] or 'none'}"
    if slot["previous"]:
        text += f", previous {slot['previous']}"
    if slot["tracked"]:
        text += ", flows tracked"
    return text + (" (of the client: affinity)" if affinity else "")


def _member(document: Document) -> str:
    backend: str = document["member"]["backend"]
    return f"{backend}, {SOURCES[Source(document['source'])]}" if document["source"] else backend


def _next_hop(member: Document) -> str:
    if not member["resolved"]:
        return "unresolved: looked up in the kernel's FIB"
    return f"{member['mac']} on {member['interface']}, from {member['source_mac']}"


def _bytes_out(document: Document) -> Iterator[tuple[str, str]]:
    if document["out"]:
        yield "bytes out", f"{document['out']['bytes']} (in: {document['packet']['bytes']})"
        for line in document["out"]["headers"]:
            yield "", line


def _labels(first: str) -> Iterator[str]:
    yield first
    while True:
        yield ""


# Documents
