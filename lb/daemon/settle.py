"""Ends expired transitions, as a task of the daemon (lb.daemon.server.Task).

Enters: timer ticks. Leaves: slots with a single member, whose packets need no flow lookup and, in mode gue, no second
address. Without the daemon the next change of any service does it.
"""

from __future__ import annotations

import asyncio
import time

from lb.model.vip import Vip
from lb.runtime.balancer_thread import BalancerThread

PERIOD_S = 2.0


class SettleTask:
    def __init__(self, period_s: float = PERIOD_S) -> None:
        self._period_s = period_s

    async def run(self, thread: BalancerThread) -> None:
        while True:
            for vip in await thread.call(lambda balancer: balancer.writer.dataplane.due()):
                began = time.monotonic()
                await _settle(thread, vip)
                await asyncio.sleep(time.monotonic() - began)  # requests come in between
            await asyncio.sleep(self._period_s)


async def _settle(thread: BalancerThread, vip: Vip) -> None:
    await thread.call(lambda balancer: balancer.writer.settle(vip))
