"""Keeps the kernel in step with the store, as a task of the daemon (lb.daemon.server.Task).

Enters: timer ticks, and changes of the host's network. Leaves: foreign changes repaired, next hops updated, each logged
and published as an event `drift`. What cannot be repaired, such as an interface with a foreign program, is left alone
and reported once while it lasts.

Work is handed to the balancer's thread in small pieces, so that requests are not blocked.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import structlog

from lb.control.balancer import Balancer
from lb.errors import LbError
from lb.host.events import Changes
from lb.model.report import Report
from lb.model.vip import Address, Vip
from lb.runtime.balancer_thread import BalancerThread

log = structlog.get_logger("xdp-lb")

PERIOD_S = 60.0
NEXT_HOPS_AT_ONCE = 8  # backends whose next hops are resolved in one piece of work, about 10 ms
NEXT_HOPS_PER_CHECK = 1000  # backends whose next hops are resolved without a notification
MAX_MESSAGES = 20  # in an event


class HostChanges(Protocol):
    """Implemented by lb.host.events.HostEvents."""

    async def next(self, timeout_s: float) -> Changes:
        """Changes as soon as there are any; empty after the timeout."""


class ReconcileTask:
    """`listen` opens the source of host changes, for each run."""

    def __init__(self, listen: Callable[[], AbstractContextManager[HostChanges]], period_s: float = PERIOD_S) -> None:
        self._listen, self._period_s = listen, period_s
        self._reported: frozenset[str] = frozenset()
        self._next_hops_begin = 0

    async def run(self, thread: BalancerThread) -> None:
        with self._listen() as host:
            check_at = time.monotonic()
            while True:
                changes = await host.next(max(0.0, check_at - time.monotonic()))
                began = time.monotonic()
                if changes.everything or began >= check_at:
                    await self._check(thread, all_next_hops=changes.everything)
                    check_at = time.monotonic() + self._period_s
                else:
                    await self._follow(thread, changes)
                await asyncio.sleep(time.monotonic() - began)  # uses at most half of a CPU

    async def _check(self, thread: BalancerThread, *, all_next_hops: bool) -> None:
        """A full check; of very many next hops, which notifications cover as well, a part each time. A fault that was
        repaired is reported again if it recurs."""
        found = Results(thread)
        await found.add(_host)
        for service in thread.snapshot.state.services:
            await found.add(_service(service.vip))
        addresses = list(dict.fromkeys(b.address for s in thread.snapshot.state.services for b in s.backends))
        await found.add_next_hops(addresses if all_next_hops else self._part_of(addresses))
        self._report(found)
        self._reported = frozenset(found.unrepaired)

    def _part_of(self, addresses: Sequence[Address]) -> Sequence[Address]:
        """The next part, in turn."""
        begin = self._next_hops_begin if self._next_hops_begin < len(addresses) else 0
        self._next_hops_begin = begin + NEXT_HOPS_PER_CHECK
        return addresses[begin : begin + NEXT_HOPS_PER_CHECK]

    async def _follow(self, thread: BalancerThread, changes: Changes) -> None:
        found = Results(thread)
        if changes.links:
            await found.add(_host)
        if changes.up:
            await found.add(lambda balancer: balancer.repairs.announce(changes.up))
        await found.add_next_hops(
            await thread.call(lambda balancer: changes.concerned(balancer.repairs.installed_next_hops()))
        )
        self._report(found)
        self._reported |= frozenset(found.unrepaired)

    def _report(self, found: Results) -> None:
        new = [message for message in found.unrepaired if message not in self._reported]
        for message in _shortened(new):
            log.warning(message)
        for message in _shortened(found.repaired):
            log.info("drift", what=message)
        if messages := [*new, *found.repaired]:
            document = {
                "mended": _shortened(found.repaired),
                "unmended": _shortened(new),
                "summary": "; ".join(_shortened(messages)),
            }
            found.thread.events.publish("drift", document)


class Results:
    """Results of a full or partial check: messages of what was repaired, and of what cannot be."""

    def __init__(self, thread: BalancerThread) -> None:
        self.thread = thread
        self.repaired: list[str] = []
        self.unrepaired: dict[str, None] = {}

    async def add(self, work: Callable[[Balancer], Report]) -> None:
        try:
            report = (await self.thread.change(work)).report
        except LbError as error:
            report = Report(warnings=(str(error),))
        self.repaired += report.notes
        self.unrepaired |= dict.fromkeys(report.warnings)

    async def add_next_hops(self, addresses: Collection[Address]) -> None:
        waiting = list(addresses)
        for at in range(0, len(waiting), NEXT_HOPS_AT_ONCE):
            await self.add(_follow_next_hops(waiting[at : at + NEXT_HOPS_AT_ONCE]))


def _host(balancer: Balancer) -> Report:
    return balancer.repairs.reconcile_host()


def _service(vip: Vip) -> Callable[[Balancer], Report]:
    return lambda balancer: balancer.repairs.reconcile_service(vip)


def _follow_next_hops(addresses: Collection[Address]) -> Callable[[Balancer], Report]:
    return lambda balancer: balancer.repairs.follow(addresses)


def _shortened(messages: Sequence[str]) -> list[str]:
    more = len(messages) - MAX_MESSAGES
    return [*messages[:MAX_MESSAGES], f"{more} more"] if more > 0 else list(messages)
