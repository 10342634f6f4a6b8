"""Waiting until draining backends are idle: `xdp-lb backend drain --wait`.

Enters: the status, again and again. Leaves: the backends as they become idle, or a Failure at the timeout.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from lb.cli.failures import Failure
from lb.model.report import BackendStatus, Status
from lb.model.state import Backend
from lb.model.vip import Vip

POLL_S = 1.0
QUIET_S = 10.0


@dataclass
class Idleness:
    """A backend is idle when it has no open connection. Where their number is an estimate, or unknown, no packet must
    have passed it for QUIET_S either: connections that have been silent since the drain are not in it."""

    _last: dict[str, tuple[int, float]] = field(default_factory=dict)  # backend -> packets, and since when so many

    def is_idle(self, status: BackendStatus, now_s: float) -> bool:
        name, packets = str(status.backend), status.counters.packets + status.counters.reply_packets
        if name not in self._last or self._last[name][0] != packets:
            self._last[name] = packets, now_s
        if status.open.number:
            return False
        is_exact = status.open.number == 0 and not status.open.estimated
        return is_exact or now_s - self._last[name][1] >= QUIET_S


def wait_until_idle(
    status: Callable[[], Status],
    vip: Vip,
    backends: Iterable[Backend],
    timeout_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[str]:
    """The backends as they become idle, or are removed by others. Raises Failure."""
    waiting, idleness = [str(backend) for backend in backends], Idleness()
    deadline = clock() + timeout_s
    while True:
        busy = _busy(status(), vip, idleness, clock())
        yield from (name for name in waiting if name not in busy)
        waiting = [name for name in waiting if name in busy]
        if not waiting:
            return
        if clock() >= deadline:
            raise Failure(f"{vip}: still in use after {timeout_s} s: {', '.join(waiting)}: draining continues")
        sleep(POLL_S)


def _busy(status: Status, vip: Vip, idleness: Idleness, now_s: float) -> set[str]:
    """None is where no program is loaded."""
    found = (b for s in status.services if s.service.vip == vip for b in s.backends) if status.loaded else ()
    return {str(b.backend) for b in found if not idleness.is_idle(b, now_s)}
