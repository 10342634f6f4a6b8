"""Packets as text without a tcpdump: scapy's summary of each, one a line, behind a time as tcpdump writes it.

Enters: records of a capture file. Leaves: lines on standard output.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from filters.errors import DumpError
from filters.records.pcap import Span, offsets, unpacked

_NOT_FOUND = "tcpdump: not found: install it, or scapy, to see packets as text, or write them to a file with -w"


class Times:
    """What stands before a line, by the number of -t options that were given."""

    def __init__(self, style: int, *, nano: bool) -> None:
        self._style, self._digits = style, 9 if nano else 6
        self._base: int | None = None

    def text(self, seconds: int, fraction: int) -> str:
        match self._style:
            case 1:
                return ""
            case 2:
                return f"{seconds}.{self._fraction(fraction)} "
            case 3 | 5:
                return self._delta(seconds, fraction)
        form = "%Y-%m-%d %H:%M:%S" if self._style == 4 else "%H:%M:%S"
        return f"{time.strftime(form, time.localtime(seconds))}.{self._fraction(fraction)} "

    def _fraction(self, fraction: int) -> str:
        return f"{fraction:0{self._digits}}"

    def _delta(self, seconds: int, fraction: int) -> str:
        """From the line before (3) or from the first one (5)."""
        second = 10**self._digits
        now = seconds * second + fraction
        between = now - (now if self._base is None else self._base)
        if self._base is None or self._style == 3:
            self._base = now
        whole, rest = divmod(abs(between), second)
        clock = f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}"
        return f"{'-' if between < 0 else ' '}{clock}.{self._fraction(rest)} "


class Summaries:
    """A Sink. Raises DumpError where there is no scapy."""

    def __init__(self, link_type: int, times: Times) -> None:
        self._packet, self._times = _packet_class(link_type), times

    def write(self, spans: Sequence[Span]) -> None:
        for span in spans:
            view = memoryview(span)
            for at, seconds, fraction in offsets(span):
                data, _ = unpacked(view, at)
                sys.stdout.write(f"{self._times.text(seconds, fraction)}{self._packet(bytes(data)).summary()}\n")
        sys.stdout.flush()

    def check(self) -> None:
        """A closed reader is only noticed on write."""

    def close(self) -> None:
        """Nothing is held back."""


def _packet_class(link_type: int) -> Any:
    try:
        from scapy.config import conf
        from scapy.layers import inet, inet6, l2  # noqa: F401  (they register what summaries know)
        from scapy.packet import Raw
    except ImportError:
        raise DumpError(_NOT_FOUND) from None
    return conf.l2types.num2layer.get(link_type, Raw)
