"""Open connections for readers that ask again and again: full tables are not read each time.

Enters: a function that counts. Leaves: its last result, reused for a while that depends on how long it took.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from lb.model.forwarding import OpenConnections
from lb.model.state import State
from lb.model.vip import Vip

REST = 20  # times as long as it took: then counting takes no more than 5 % of one CPU

OpenByBackend = Mapping[Vip, Mapping[str, OpenConnections]]


class OpenCount:
    def __init__(self, count: Callable[[State], OpenByBackend], clock: Callable[[], float] = time.monotonic) -> None:
        self._count, self._clock = count, clock
        self._state: State | None = None
        self._found: OpenByBackend = {}
        self._good_until_s = 0.0

    def of(self, state: State) -> OpenByBackend:
        """The count of a state; a changed one is counted anew."""
        start_s = self._clock()
        if state is not self._state or start_s >= self._good_until_s:
            self._found, self._state = self._count(state), state
            end_s = self._clock()
            self._good_until_s = end_s + REST * (end_s - start_s)
        return self._found
