"""Regular expressions that match in time linear in the text (RE2): no pattern and no answer of a server can hang the
daemon. What that rules out is refused: backreferences and lookaround."""

from __future__ import annotations

from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1024)
def compiled(pattern: str) -> Any:
    """Has `search`. Raises ValueError."""
    import re2  # 8 ms, which commands that need none do not wait for

    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        (why,) = error.args
        raise ValueError(why.decode(errors="replace") if isinstance(why, bytes) else str(why)) from None
