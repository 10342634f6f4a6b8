"""What the daemon turns away: each is counted, few are logged, so that a flood fills no disk.

Enters: a reason, one of REASONS. Leaves: a counter per reason, and at most one log line per reason in LOG_S.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

REASONS = (
    "host", "cross_site", "invalid_token", "connections", "connections_of_address", "descriptors", "requests_of_token",
    "streams", "body_size",
)  # fmt: skip
LOG_S = 10.0

log = structlog.get_logger("xdp-lb")


class Rejections:
    """Used by the event loop's thread alone."""

    def __init__(self, count: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._count, self._clock = count, clock
        self._logged_s: dict[str, float] = {}
        self._unlogged: dict[str, int] = {}

    def add(self, reason: str, detail: str, address: str = "") -> None:
        self._count(reason)
        now_s = self._clock()
        if now_s - self._logged_s.get(reason, -LOG_S) < LOG_S:
            self._unlogged[reason] = self._unlogged.get(reason, 0) + 1
            return
        self._logged_s[reason] = now_s
        more = {"not_logged": count} if (count := self._unlogged.pop(reason, 0)) else {}
        log.warning("rejected", reason=reason, detail=detail, **({"address": address} if address else {}), **more)
