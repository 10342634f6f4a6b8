"""Packets as JSON, one object per line, on standard output.

Enters: records with metadata, times in nanoseconds. Leaves: time (UTC, ISO 8601), where it was seen, its lengths, the
fields of its headers, and at xdp-exit the verdict.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from filters.compiler.expr import ETHERNET
from filters.files.fields import fields
from filters.records.metadata import CapturedPacket, CapturePoint, action_words, captured_packets
from filters.records.pcap import Span


class JsonLines:
    """A Sink. `names`: of interfaces, by index; `reasons`: the balancer's reason names, by number."""

    def __init__(self, link_type: int, names: Mapping[int, str]) -> None:
        self._is_ethernet, self._names = link_type == ETHERNET, names
        self.reasons: Sequence[str] = ("",)

    def write(self, spans: Sequence[Span]) -> None:
        lines = [f"{json.dumps(self._document(packet))}\n" for span in spans for packet in captured_packets(span)]
        sys.stdout.write("".join(lines))
        sys.stdout.flush()

    def check(self) -> None:
        """A closed reader is only noticed on write."""

    def close(self) -> None:
        """Nothing is buffered."""

    def _document(self, packet: CapturedPacket) -> dict[str, Any]:
        document: dict[str, Any] = {"time": _iso(packet.seconds, packet.fraction)} | self._seen(packet)
        document |= {"length": packet.length, "captured": len(packet.data)}
        if self._is_ethernet:
            document |= fields(packet.data)
        return document | self._verdict(packet)

    def _seen(self, packet: CapturedPacket) -> dict[str, Any]:
        point = CapturePoint(packet.metadata.point)
        if point is CapturePoint.FILE:
            return {}
        return {"interface": self._name(packet.metadata.ifindex), "at": point.words, "direction": point.direction}

    def _verdict(self, packet: CapturedPacket) -> dict[str, Any]:
        metadata, document = packet.metadata, {}
        if words := action_words(metadata.action):
            document["verdict"] = words
        if metadata.reason:
            document["reason"] = (
                self.reasons[metadata.reason] if metadata.reason < len(self.reasons) else str(metadata.reason)
            )
        if metadata.egress:
            document["egress"] = self._name(metadata.egress)
        return document

    def _name(self, ifindex: int) -> str:
        return self._names.get(ifindex) or str(ifindex)


def _iso(seconds: int, nanoseconds: int) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{nanoseconds:09}Z"
