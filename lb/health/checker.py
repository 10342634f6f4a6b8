"""The engine that checks all backends of all services, as a task in an event loop.

Enters: the desired services, on each change. Leaves: conditions for Writer.set_conditions(), on each change. One task
per backend of each service, at intervals with jitter to keep checks out of step.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from lb.errors import LbError
from lb.health.probes import CannotCheck, Target, probe
from lb.health.state import BackendHealth, SavedHealth, steps_of, words_of
from lb.host.events import Changes
from lb.model.conditions import Condition, Conditions
from lb.model.health_check import Kind
from lb.model.state import Backend, Service
from lb.model.vip import Address, Vip

GATHER_S = 0.02  # changes within this time go into one change of the rings
RETRY_S = 1.0
STARTS_PER_S = 2000  # of checks that are new
Key = tuple[Vip, str]


@dataclass(frozen=True, slots=True)
class CheckPath:
    """How a check reaches a backend: destination and source address; or why there is no path."""

    address: Address
    source: Address | None = None
    fault: str = ""


class CheckPaths(Protocol):
    def find(self, services: Sequence[Service]) -> Mapping[Key, CheckPath]:
        """For each backend of these services, replacing all paths found before. Runs in a thread; may block. Raises
        LbError."""

    def concerned(self, changes: Changes) -> bool:
        """Whether find() may find other paths after these changes of the host's network. Does not block."""

    def close(self) -> None:
        """Release everything. Runs in a thread, too."""


class Direct:
    """To the backend's own address: for mode nat, whose packets go there too. lb.health.path has the others."""

    def find(self, services: Sequence[Service]) -> Mapping[Key, CheckPath]:
        return {(s.vip, str(b)): CheckPath(b.address) for s in services for b in s.backends}

    def concerned(self, changes: Changes) -> bool:
        return False

    def close(self) -> None:
        pass


@dataclass(slots=True)
class _Watched:
    service: Service
    backend: Backend
    path: CheckPath
    health: BackendHealth
    target: Target
    task: asyncio.Task[None] | None = field(default=None)

    @classmethod
    def of(cls, service: Service, backend: Backend, path: CheckPath, health: BackendHealth) -> _Watched:
        port = health.check.port or backend.port
        names = (("XDP_LB_BACKEND", str(backend)), ("XDP_LB_VIP", str(service.vip)))
        source = str(path.source) if path.source else ""
        return cls(service, backend, path, health, Target(health.check, str(path.address), port, source, names))

    @property
    def not_checked(self) -> str:
        return f"not checked: {self.path.fault}"


def conditions_of(remembered: Mapping[Key, SavedHealth]) -> Conditions:
    found: dict[Vip, dict[str, Condition]] = {}
    for (vip, name), each in remembered.items():
        found.setdefault(vip, {})[name] = each.condition
    return found


class Checker:
    """`on_change` gets the conditions of all backends that are checked. If it raises LbError, it is called again.

    `previous`: results of an earlier process; they stay in effect until checks say otherwise."""

    def __init__(
        self,
        on_change: Callable[[Conditions], Awaitable[object]],
        paths: CheckPaths | None = None,
        previous: Mapping[Key, SavedHealth] | None = None,
    ) -> None:
        self.checks_done = 0
        self._on_change = on_change
        self._paths = paths or Direct()
        self._previous = dict(previous or {})
        self._watched: dict[Key, _Watched] = {}
        self._services: tuple[Service, ...] = ()
        self._reported = conditions_of(self._previous)
        self._changed = asyncio.Event()
        self._outdated = False

    def watch(self, services: Sequence[Service]) -> None:
        """Set what to check; call it in the event loop, initially and after each change."""
        self._services = tuple(s for s in services if s.options.health)
        self._outdated = True
        self._changed.set()

    def update_paths(self) -> None:
        """Find paths again after a change of the network. Call it in the event loop, too."""
        self._outdated = True
        self._changed.set()

    @property
    def conditions(self) -> Conditions:
        """Of backends with a result, and of those without a path, which keep their state."""
        found: dict[Vip, dict[str, Condition]] = {}
        now_s = asyncio.get_running_loop().time()
        for (vip, name), watched in self._watched.items():
            if watched.path.fault:
                found.setdefault(vip, {})[name] = replace(watched.health.condition(now_s), why=watched.not_checked)
            elif watched.health.is_reported:
                found.setdefault(vip, {})[name] = watched.health.condition(now_s)
        return found

    @property
    def remembered(self) -> Mapping[Key, SavedHealth]:
        """What another process needs to resume from here."""
        now_s = asyncio.get_running_loop().time()
        words = {service.vip: words_of(service) for service in self._services}
        return {
            (vip, name): SavedHealth(words[vip], watched.health.condition(now_s), watched.health.ramp)
            for (vip, name), watched in self._watched.items()
            if watched.health.is_reported and vip in words
        }

    async def run(self) -> None:
        """Runs until cancelled; then releases everything."""
        try:
            while True:
                await self._wait_for_change()
                if self._outdated:
                    await self._update_watched()
                await self._report()
        finally:
            await self._end([watched for watched in self._watched.values() if watched.task])
            await asyncio.to_thread(self._paths.close)

    async def _wait_for_change(self) -> None:
        """For a result of a check, a change of the desired state, or the next step of a slow start."""
        loop = asyncio.get_running_loop()
        ramps = [watched.health.ramp for watched in self._watched.values() if watched.health.ramp]
        step_s = min((ramp.next_step_s(loop.time()) for ramp in ramps), default=None)
        try:
            async with asyncio.timeout_at(step_s):
                await self._changed.wait()
        except TimeoutError:
            return
        await asyncio.sleep(GATHER_S)
        self._changed.clear()

    async def _report(self) -> None:
        conditions = self.conditions
        if conditions == self._reported:
            return
        try:
            await self._on_change(conditions)
        except LbError:
            asyncio.get_running_loop().call_later(RETRY_S, self._changed.set)
        else:
            self._reported = conditions

    # Watched backends

    async def _update_watched(self) -> None:
        self._outdated, services = False, self._services
        try:
            paths = await asyncio.to_thread(self._paths.find, services)
        except LbError as error:
            paths, fault = {}, str(error)
            asyncio.get_running_loop().call_later(RETRY_S, self.update_paths)
        else:
            fault = ""
        wanted = {(s.vip, str(b)): (s, b) for s in services for b in s.backends}
        await self._end([watched for key, watched in self._watched.items() if key not in wanted])
        self._watched = {
            key: self._continued(
                key, service, backend, paths.get(key) or CheckPath(backend.address, fault=fault or "no path")
            )
            for key, (service, backend) in wanted.items()
        }
        self._previous = {}
        await self._start_new()

    def _continued(self, key: Key, service: Service, backend: Backend, path: CheckPath) -> _Watched:
        """A backend keeps its history when its check changes."""
        check = service.options.health
        assert check
        old = self._watched.get(key)
        if old is None:
            left = self._previous.get(key)
            health = BackendHealth.resumed(check, left, known=left.still_holds(service)) if left else None
            return _Watched.of(service, backend, path, health or BackendHealth(check))
        old.health.check = check
        new = _Watched.of(service, backend, path, old.health)
        old.service, old.backend, old.path, old.target = service, backend, path, new.target
        return old

    async def _start_new(self) -> None:
        new = [watched for watched in self._watched.values() if not watched.task]
        spread_s = len(new) / STARTS_PER_S
        for watched in new:
            watched.task = asyncio.create_task(self._check(watched, random.uniform(0, spread_s)))

    @staticmethod
    async def _end(ending: Sequence[_Watched]) -> None:
        tasks = [watched.task for watched in ending if watched.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _check(self, watched: _Watched, delay_s: float) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(delay_s)
        while True:
            start_s = loop.time()
            if not watched.path.fault or watched.health.check.kind is Kind.SCRIPT:
                await self._check_once(watched)
            check = watched.health.check
            varied = 1 + random.uniform(-check.jitter, check.jitter) / 100
            await asyncio.sleep(max(0, start_s + check.interval_s * varied - loop.time()))

    async def _check_once(self, watched: _Watched) -> None:
        try:
            outcome = await probe(watched.target)
        except CannotCheck:
            return
        self.checks_done += 1
        health, service = watched.health, watched.service
        was_known = health.known
        turned = health.record(
            outcome,
            asyncio.get_running_loop().time(),
            time.time(),
            slow_start_s=service.options.slow_start_s,
            steps=steps_of(service, watched.backend.weight) if health.down else 1,
        )
        if turned or not was_known:
            self._changed.set()
