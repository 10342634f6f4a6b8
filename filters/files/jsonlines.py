"""Packets as JSON, one object a line, on standard output.

Enters: records with notes, times in nanoseconds. Leaves: time (UTC, ISO 8601), where the packet was seen, its lengths,
the fields of its headers, and behind XDP what became of it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from filters.compiler.expr import ETHERNET
from filters.files.fields import fields
from filters.records.notes import CapturePoint, Noted, action_words, noted
from filters.records.pcap import Span


class JsonLines:
    """A Sink. `names`: of interfaces, by index; `reasons`: the balancer's words, by number."""

    def __init__(self, link_type: int, names: Mapping[int, str]) -> None:
        self._is_ethernet, self._names = link_type == ETHERNET, names
        self.reasons: Sequence[str] = ("",)

    def write(self, spans: Sequence[Span]) -> None:
        lines = [f"{json.dumps(self._told(packet))}\n" for span in spans for packet in noted(span)]
        sys.stdout.write("".join(lines))
        sys.stdout.flush()

    def check(self) -> None:
        """Whether somebody reads shows when there is something to say."""

    def close(self) -> None:
        """Nothing is held back."""

    def _told(self, packet: Noted) -> dict[str, Any]:
        told: dict[str, Any] = {"time": _iso(packet.seconds, packet.fraction)} | self._seen(packet)
        told |= {"length": packet.length, "captured": len(packet.data)}
        if self._is_ethernet:
            told |= fields(packet.data)
        return told | self._verdict(packet)

    def _seen(self, packet: Noted) -> dict[str, Any]:
        place = CapturePoint(packet.note.place)
        if place is CapturePoint.FILE:
            return {}
        return {"interface": self._name(packet.note.ifindex), "at": place.words, "direction": place.direction}

    def _verdict(self, packet: Noted) -> dict[str, Any]:
        note, told = packet.note, {}
        if words := action_words(note.action):
            told["verdict"] = words
        if note.reason:
            told["reason"] = self.reasons[note.reason] if note.reason < len(self.reasons) else str(note.reason)
        if note.egress:
            told["egress"] = self._name(note.egress)
        return told

    def _name(self, ifindex: int) -> str:
        return self._names.get(ifindex) or str(ifindex)


def _iso(seconds: int, nanoseconds: int) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{nanoseconds:09}Z"
