"""Reports and status of decapsulation -> lines for people, documents for programs.

The keys of documents are stable; the help of each command names them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from lb.decap.values import DecapConfig, DecapReport, DecapStatus, Prefix, prefix_text
from lb.formats.documents import Document
from lb.formats.text import Column, attachment_sentence, short, table
from lb.model.forwarding import Attachment


def report_lines(report: DecapReport) -> Iterator[str]:
    yield from (attachment_sentence(each) for each in report.attached)
    yield from (f"{name}: detached" for name in report.detached)
    if report.config:
        yield _config_sentence(report.config)
    elif not report.detached:
        yield "nothing to change"
    yield from (f"  {note}" for note in report.notes)


def _config_sentence(config: DecapConfig) -> str:
    destinations, sources = (_joined(prefixes) for prefixes in (config.destinations, config.sources))
    return f"decapsulating for {destinations}, from {sources or 'any source'}, GUE on port {config.gue_port}"


def _joined(prefixes: Sequence[Prefix]) -> str:
    return ", ".join(map(prefix_text, prefixes))


def _config_document(config: DecapConfig | None) -> Document:
    return {
        "destinations": [prefix_text(prefix) for prefix in config.destinations] if config else [],
        "sources": [prefix_text(prefix) for prefix in config.sources] if config else [],
        "gue_port": config.gue_port if config else None,
    }


def report_document(report: DecapReport) -> Document:
    return {
        "attached": [_attachment_document(each) for each in report.attached],
        "detached": list(report.detached),
        **_config_document(report.config),
        "notes": list(report.notes),
        "warnings": list(report.warnings),
    }


def _attachment_document(attachment: Attachment) -> Document:
    return {
        "name": attachment.interface,
        "xdp_mode": attachment.mode,
        "program_id": attachment.program_id,
    }


def status_document(status: DecapStatus) -> Document:
    tunnels = status.statistics.tunnels if status.statistics else {}
    return {
        "netns": status.netns,
        "loaded": status.config is not None,
        "interfaces": [_attachment_document(each) for each in status.interfaces],
        **_config_document(status.config),
        "tunnels": {kind: asdict(counters) for kind, counters in tunnels.items()},
        "sent_to_other_member": _reasons(status, "sent_").get("sent_to_other_member", 0),
        "drops": _reasons(status, "drop_"),
        "passes": _reasons(status, "pass_"),
        "noted": _reasons(status, "noted_"),
    }


def _reasons(status: DecapStatus, *kinds: str) -> dict[str, int]:
    reasons = status.statistics.reasons if status.statistics else {}
    return {name: packets for name, packets in reasons.items() if name.startswith(kinds)}


def status_lines(status: DecapStatus) -> list[str]:
    """Interfaces, then what is configured, what was decapsulated, and why the rest was not."""
    if status.config is None:
        return ["not attached: run xdp-lb decap attach IFACE --vip ADDR"]
    paragraphs = [
        _table(
            [Column("INTERFACE"), Column("XDP"), Column("PROGRAM", number=True)],
            [(each.interface, each.mode, str(each.program_id)) for each in status.interfaces],
        ),
        [_config_sentence(status.config)],
        _tunnels_table(status),
        _reasons_table(status),
    ]
    return [line for paragraph in paragraphs if paragraph for line in ("", *paragraph)][1:]


def _tunnels_table(status: DecapStatus) -> list[str]:
    tunnels = status.statistics.tunnels if status.statistics else {}
    columns = [Column("TUNNEL"), Column("PACKETS", number=True), Column("BYTES", number=True)]
    rows = [(kind, short(c.packets), short(c.bytes)) for kind, c in tunnels.items() if c.packets]
    return _table(columns, rows)


def _reasons_table(status: DecapStatus) -> list[str]:
    columns = [Column("REASON"), Column("PACKETS", number=True)]
    counted = _reasons(status, "sent_", "drop_", "pass_", "noted_").items()
    return _table(columns, [(name, short(packets)) for name, packets in counted if packets])


def _table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[str]:
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return table(columns, rows, colour=colour) if rows else []
