"""Health checks as a task of the daemon (lb.daemon.server.Task).

Enters: the desired state from the snapshot, and changes of the host's network. Leaves: conditions applied by the
balancer, an event `health` for each backend that goes up or down, and the health file.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager

import structlog

from lb.daemon.reconcile import HostChanges
from lb.formats.documents import Document
from lb.health.checker import Checker, CheckPaths, conditions_of
from lb.health.file import Found, HealthFile
from lb.model.conditions import UP, Condition, Conditions
from lb.model.vip import Vip
from lb.runtime.balancer_thread import BalancerThread

log = structlog.get_logger("xdp-lb")

LOOK_S = 0.1  # after changes of the desired state
ALIVE_S = 1.0
AGAIN_S = 1.0  # between two updates of paths
QUIET_S = 3600.0


class HealthTask:
    """`paths` makes the CheckPaths, and `listen` opens the source of host changes, for each run."""

    def __init__(
        self,
        paths: Callable[[], CheckPaths],
        file: HealthFile,
        listen: Callable[[], AbstractContextManager[HostChanges]],
    ) -> None:
        self._paths, self._file, self._listen = paths, file, listen
        self._found: Found | None = None  # by an earlier run
        self._fault = ""

    async def run(self, thread: BalancerThread) -> None:
        found = await asyncio.to_thread(self._file.read) if self._found is None else self._found
        reported = conditions_of(found)

        async def put_in_force(conditions: Conditions) -> None:
            nonlocal reported
            await self._remember(checker.remembered)
            await thread.call(lambda balancer: balancer.writer.set_conditions(conditions))
            for document in turns(reported, conditions):
                thread.events.publish("health", document)
            reported = conditions

        paths = self._paths()
        checker = Checker(put_in_force, paths, previous=found)
        await thread.call(lambda balancer: balancer.writer.set_conditions(reported))
        with self._listen() as host:
            async with asyncio.TaskGroup() as group:
                group.create_task(checker.run())
                group.create_task(_follow(thread, checker))
                group.create_task(_follow_host(host, paths, checker))
                group.create_task(self._stay_fresh())

    async def _remember(self, found: Found) -> None:
        """Saved before it is applied: after a kill in between the next process applies it."""
        self._found = found
        try:
            await asyncio.to_thread(self._file.write, found)
            self._fault = ""
        except OSError as error:
            if self._fault != str(error):
                log.warning("cannot save health state: it is lost when this process exits", reason=str(error))
            self._fault = str(error)

    async def _stay_fresh(self) -> None:
        while True:
            self._file.touch()
            await asyncio.sleep(ALIVE_S)


async def _follow(thread: BalancerThread, checker: Checker) -> None:
    watched = None
    while True:
        if thread.snapshot.state is not watched:
            watched = thread.snapshot.state
            checker.watch(watched.services)
        await asyncio.sleep(LOOK_S)


async def _follow_host(host: HostChanges, paths: CheckPaths, checker: Checker) -> None:
    while True:
        if paths.concerned(await host.next(QUIET_S)):
            checker.update_paths()
        await asyncio.sleep(AGAIN_S)


def turns(before: Conditions, after: Conditions) -> Iterator[Document]:
    """`vip`, `backend`, `state` (active or down), `why`, `since` of each backend that went up or down."""
    for vip, name, condition in _each(after):
        if before.get(vip, {}).get(name, UP).down != condition.down:
            state = "down" if condition.down else "active"
            yield {"vip": str(vip), "backend": name, "state": state, "why": condition.why, "since": condition.since}


def _each(conditions: Mapping[Vip, Mapping[str, Condition]]) -> Iterator[tuple[Vip, str, Condition]]:
    return ((vip, name, each) for vip, found in conditions.items() for name, each in found.items())
