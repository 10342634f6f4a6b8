"""The one thread that owns the balancer, for all others in the daemon to ask.

Enters: work to be done on the balancer, from the event loop. Leaves: what the work returns, and after each piece of
work a snapshot of the desired state, ready to be sent, which the event loop reads without waiting.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager
from typing import TypeVar

from lb.control.balancer import Balancer
from lb.errors import LbError
from lb.model.report import Report
from lb.model.state import State
from lb.runtime.applied_change import AppliedChange
from lb.runtime.events import Events
from lb.runtime.metrics import DaemonMetrics
from lb.runtime.snapshot import Snapshot

T = TypeVar("T")


class BalancerThread:
    """Work is done one piece after the other, in the order in which it was given."""

    def __init__(self, opener: Callable[[], AbstractContextManager[Balancer]]) -> None:
        self.events = Events()
        self.metrics = DaemonMetrics()
        self.snapshot = Snapshot()
        self.refused = ""  # why the installed program is not in force
        self.config_fault = ""  # why the configuration file is not in force
        self._opened = opener()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="balancer")
        self._balancer: Balancer | None = None

    @classmethod
    @asynccontextmanager
    async def open(cls, opener: Callable[[], AbstractContextManager[Balancer]]) -> AsyncIterator[BalancerThread]:
        """Raises what the opener raises; the balancer is opened, used and closed in the thread."""
        thread, loop = cls(opener), asyncio.get_running_loop()
        try:
            await loop.run_in_executor(thread._thread, thread._enter)
            yield thread
        finally:
            thread.events.close()
            await loop.run_in_executor(thread._thread, thread._exit)
            thread._thread.shutdown()

    def _enter(self) -> None:
        self._balancer = self._opened.__enter__()
        self.snapshot = self.snapshot.following(self._balancer.state)

    def _exit(self) -> None:
        if self._balancer:
            self._balancer = None
            self._opened.__exit__(None, None, None)

    async def call(self, work: Callable[[Balancer], T]) -> T:
        """The result of `work`, done in the thread; `snapshot` is of the time after it."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._do, work)

    def _do(self, work: Callable[[Balancer], T]) -> T:
        assert self._balancer, "closed"
        try:
            return work(self._balancer)
        finally:
            self.snapshot = self.snapshot.following(self._balancer.state)
            if self.refused and not self._balancer.outdated:
                self._refuse("")

    async def upgrade(self) -> tuple[str, ...]:
        """Have the installed program take over; if it cannot, the one in force goes on. What listeners are told."""
        try:
            notes = (await self.call(Balancer.upgrade)).notes
            refused = ""
        except LbError as error:
            notes, refused = (str(error),), str(error)
        self._refuse(refused)
        for note in notes:
            self.events.publish("upgrade", {"refused": bool(refused), "summary": note})
        return notes

    def _refuse(self, why: str) -> None:
        self.refused = why
        self.metrics.upgrade_refused(bool(why))

    def set_config_fault(self, why: str) -> None:
        self.config_fault = why
        self.metrics.config_loaded(not why)

    async def change(self, work: Callable[[Balancer], Report]) -> AppliedChange:
        """As `call`, and listeners are told of what has changed."""
        applied = await self.call(lambda balancer: self._applied(work(balancer), balancer.state))
        self.metrics.changed(applied.report)
        for kind, document in applied.events:
            self.events.publish(kind, document)
        return applied

    def _applied(self, report: Report, state: State) -> AppliedChange:
        before, self.snapshot = self.snapshot, self.snapshot.following(state)
        return AppliedChange.of(report, self.snapshot.report_body(report, before))
