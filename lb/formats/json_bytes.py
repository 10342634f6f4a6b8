"""JSON as it is sent: compact, in UTF-8, also put together from values that are encoded already.

Enters: what `json` can write, or encoded values. Leaves: one encoded value (RFC 8259).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping


def encode(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def array(items: Iterable[bytes]) -> bytes:
    """An array of encoded values."""
    return b"[%b]" % b",".join(items)


def object_of(members: Mapping[str, bytes]) -> bytes:
    """An object of encoded values, in their order."""
    return b"{%b}" % b",".join(b"%b:%b" % (encode(name), value) for name, value in members.items())


def members(document: Mapping[str, object]) -> dict[str, bytes]:
    """Each value of a document by itself, for `object_of`."""
    return {name: encode(value) for name, value in document.items()}
