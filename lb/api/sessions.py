"""Sessions of the web page, for who reaches the Unix socket by a browser: in memory, gone with the daemon.

Enters: a code, offered to the local user who asked for it and good for one use. Leaves: a secret that is sent as a
bearer token. A browser gets none of the authority of the socket itself: at the far end of a forwarded socket anybody
may connect.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from dataclasses import dataclass, field

PREFIX = "xls_"
SECRET_BYTES = 32
OFFERED_S = 300.0  # in which the link has to be opened
OPEN_S = 12 * 3600.0
LARGEST = 256  # codes, and sessions; the oldest goes


@dataclass(slots=True)
class _Secrets:
    """What is known by a secret for some time. Kept by digest, so that a lookup's time tells nothing of it."""

    lasts_s: float
    _known: OrderedDict[bytes, tuple[str, float]] = field(default_factory=OrderedDict)

    def add(self, secret: str, who: str, now_s: float) -> None:
        self._known[_digest(secret)] = who, now_s + self.lasts_s
        while len(self._known) > LARGEST:
            self._known.popitem(last=False)

    def find(self, secret: str, now_s: float, *, take: bool = False) -> str | None:
        key = _digest(secret)
        who, ends_s = self._known.get(key, ("", 0.0))
        if take or ends_s <= now_s:
            self._known.pop(key, None)
        return who if now_s < ends_s else None


class Sessions:
    """Used by the event loop's thread alone; `now_s` is of a monotonic clock."""

    def __init__(self) -> None:
        self._offered, self._open = _Secrets(OFFERED_S), _Secrets(OPEN_S)

    def offer(self, who: str, now_s: float) -> str:
        """A code, to open one session with."""
        code = secrets.token_urlsafe(SECRET_BYTES)
        self._offered.add(code, who, now_s)
        return code

    def open(self, code: str, now_s: float) -> str | None:
        """The secret of a new session; None: the code is unknown, used or too old."""
        who = self._offered.find(code, now_s, take=True)
        if who is None:
            return None
        secret = PREFIX + secrets.token_hex(SECRET_BYTES)
        self._open.add(secret, who, now_s)
        return secret

    def who(self, secret: str, now_s: float) -> str | None:
        return self._open.find(secret, now_s)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode(errors="replace")).digest()
