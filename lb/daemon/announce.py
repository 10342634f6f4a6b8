"""Announces the addresses of VIPs, as a task of the daemon (lb.daemon.server.Task).

Enters: the start of the daemon, and timer ticks. Leaves: gratuitous ARP and unsolicited neighbour advertisements, for
all VIP addresses at the start, and repeated for those that a change has put on an interface.
"""

from __future__ import annotations

import asyncio

import structlog

from lb.model.report import Report
from lb.runtime.balancer_thread import BalancerThread

log = structlog.get_logger("xdp-lb")

PERIOD_S = 1.0


class AnnounceTask:
    def __init__(self, period_s: float = PERIOD_S) -> None:
        self._period_s = period_s

    async def run(self, thread: BalancerThread) -> None:
        _log(await thread.call(lambda balancer: balancer.repairs.announce()))
        while True:
            await asyncio.sleep(self._period_s)
            _log(await thread.call(lambda balancer: balancer.repairs.repeat_announcements()))


def _log(report: Report) -> None:
    for warning in report.warnings:
        log.warning(warning)
