"""What has happened lately, for whoever listens: the events behind GET /v1/events.

Enters: a kind and a document. Leaves: text of server-sent events (WHATWG HTML, section 9.2), each with an id by which a
listener that was cut off goes on: the last events are kept, and one that comes too late for them is told so.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

KEPT = 1024
HEARTBEAT_S = 15.0  # a comment, by which both sides notice that the other has gone
HEARTBEAT = b": still here\n\n"


@dataclass(frozen=True, slots=True)
class Event:
    number: int
    text: bytes


class Events:
    """Used by the event loop's thread alone. An id is RUN-NUMBER: another run of the daemon has other events."""

    def __init__(self, kept: int = KEPT, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._run = secrets.token_hex(4)
        self._kept: deque[Event] = deque(maxlen=kept)
        self._heartbeat_s = heartbeat_s
        self._last = 0
        self._news = asyncio.Event()
        self._closed = False

    def publish(self, kind: str, document: dict[str, Any]) -> None:
        self._last += 1
        self._kept.append(Event(self._last, self._text(kind, document | {"time": round(time.time(), 3)})))
        self._wake()

    def close(self) -> None:
        """Ends every `follow`."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def _text(self, kind: str, document: dict[str, Any]) -> bytes:
        return f"id: {self._run}-{self._last}\nevent: {kind}\ndata: {json.dumps(document)}\n\n".encode()

    async def follow(self, last_id: str | None = None) -> AsyncIterator[bytes]:
        """The events behind the one with `last_id`, or those that come from now on. First a comment, so that the
        listener knows that it is connected."""
        yield HEARTBEAT
        seen = self._last if last_id is None else self._number(last_id)
        while not self._closed:
            if seen < self._first - 1:
                yield self._missed()
                seen = self._first - 1
            for event in [event for event in self._kept if event.number > seen]:
                yield event.text
                seen = event.number
            if seen == self._last and not await self._something_new():
                yield HEARTBEAT

    @property
    def _first(self) -> int:
        return self._kept[0].number if self._kept else self._last + 1

    def _number(self, event_id: str) -> int:
        """Of an event of this run; -1, which is before all of them, where it is not."""
        run, _, number = event_id.partition("-")
        known = run == self._run and number.isascii() and number.isdigit() and len(number) < 18
        return min(int(number), self._last) if known else -1

    def _missed(self) -> bytes:
        """Without an id, so that what the listener has seen stays what it was."""
        return b'event: missed\ndata: {"detail": "older events were dropped: reload the state"}\n\n'

    async def _something_new(self) -> bool:
        try:
            await asyncio.wait_for(self._news.wait(), self._heartbeat_s)
        except TimeoutError:
            return False
        return True
