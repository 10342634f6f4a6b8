"""Requests that are being answered: how many there are of a token, and how many follow events."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from lb.formats.problems import Problem
from lb.runtime.rejections import Rejections

OF_TOKEN = 64  # requests at a time
STREAMS = 256  # of events, in all
STREAMS_OF_TOKEN = 16
EVENTS = "/v1/events"


class InFlight:
    """Used by the event loop's thread alone."""

    def __init__(self, rejections: Rejections) -> None:
        self._rejections = rejections
        self._requests: Counter[str] = Counter()
        self._streams: Counter[str] = Counter()

    @contextmanager
    def entered(self, who: str, path: str, *, limited: bool) -> Iterator[None]:
        """For as long as it is answered. `limited`: the caller has a token. Raises Problem."""
        streams = path == EVENTS
        self._check(who, streams, limited)
        counters = [self._requests, *([self._streams] if streams else [])]
        for counter in counters:
            counter[who] += 1
        try:
            yield
        finally:
            for counter in counters:
                counter[who] -= 1
                if not counter[who]:
                    del counter[who]

    def _check(self, who: str, streams: bool, limited: bool) -> None:
        if streams and self._streams.total() >= STREAMS:
            self._reject("streams", f"too many event streams ({STREAMS})")
        if streams and limited and self._streams[who] >= STREAMS_OF_TOKEN:
            self._reject("streams", f"too many event streams of this token ({STREAMS_OF_TOKEN})")
        if limited and self._requests[who] >= OF_TOKEN:
            self._reject("requests_of_token", f"too many requests of this token at a time ({OF_TOKEN})")

    def _reject(self, reason: str, detail: str) -> None:
        self._rejections.add(reason, detail)
        raise Problem(429, f"{detail}: end some or try again later", headers={"Retry-After": "1"})
