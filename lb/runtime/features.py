"""The features that the API reaches next to the balancer: filter rules, explanations, users' stages.

Enters: work for one of them, from the event loop. Leaves: what the work returns. Each is opened for a request and
closed behind it, as a command would, with locks of its own; so the balancer waits for none of them. Filter rules have a
thread, since a set of a million prefixes takes seconds, and the others share one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from lb.explain.explainer import Explainer, open_explainer
from lb.firewall.firewall import Firewall, open_firewall
from lb.host.ssh import Connection
from lb.paths import Paths

T = TypeVar("T")


class FeatureThreads:
    """All methods raise what the work raises, and LbError."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._filters = ThreadPoolExecutor(1, thread_name_prefix="filters")
        self._others = ThreadPoolExecutor(1, thread_name_prefix="features")

    async def filters(self, work: Callable[[Firewall], T]) -> T:
        """Work that only reads."""

        def do() -> T:
            with open_firewall(self._paths, write=False) as firewall:
                return work(firewall)

        return await _run(self._filters, do)

    async def change_filters(self, work: Callable[[Firewall], T], own_connection: Connection | None) -> T:
        """`own_connection`: the connection that the change may not end."""

        def do() -> T:
            with open_firewall(self._paths, write=True, own_connection=lambda: own_connection) as firewall:
                return work(firewall)

        return await _run(self._filters, do)

    async def explainer(self, work: Callable[[Explainer], T]) -> T:
        def do() -> T:
            with open_explainer(self._paths) as explainer:
                return work(explainer)

        return await _run(self._others, do)

    async def stages(self, work: Callable[[Paths], T]) -> T:
        return await _run(self._others, lambda: work(self._paths))

    def close(self) -> None:
        """When what is under way has ended."""
        self._filters.shutdown()
        self._others.shutdown()


async def _run(thread: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(thread, work)
