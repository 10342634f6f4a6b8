"""Health checks as a task of the daemon (lb.server.Task): the engine between the balancer's owner and the network.

Enters: the desired state, as the owner's snapshot has it. Leaves: conditions that the balancer puts in force, and an
event `health` for each backend that goes up or down.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping

from lb.balancer import Balancer
from lb.checker import Checker, Ways
from lb.conditions import UP, Condition, Conditions
from lb.documents import Document
from lb.owner import Owner
from lb.vip import Vip

LOOK_S = 0.1  # after changes of the desired state


class HealthTask:
    """`ways` makes what lb.check_path.RealPath is, for each run."""

    def __init__(self, ways: Callable[[], Ways]) -> None:
        self._ways = ways
        self._found: Conditions = {}

    async def run(self, owner: Owner) -> None:
        async def put_in_force(conditions: Conditions) -> None:
            await owner.call(lambda balancer: balancer.writer.set_conditions(conditions))
            for document in turns(self._found, conditions):
                owner.events.publish("health", document)
            self._found = conditions

        await owner.call(_announce)
        checker = Checker(put_in_force, self._ways(), previous=self._found)
        async with asyncio.TaskGroup() as group:
            group.create_task(checker.run())
            group.create_task(_follow(owner, checker))


def _announce(balancer: Balancer) -> None:
    balancer.writer.checks_run = True


async def _follow(owner: Owner, checker: Checker) -> None:
    watched = None
    while True:
        if owner.snapshot.state is not watched:
            watched = owner.snapshot.state
            checker.watch(watched.services)
        await asyncio.sleep(LOOK_S)


def turns(before: Conditions, after: Conditions) -> Iterator[Document]:
    """`vip`, `backend`, `state` (active or down), `why`, `since` of each that has gone up or down."""
    for vip, name, condition in _each(after):
        if before.get(vip, {}).get(name, UP).down != condition.down:
            state = "down" if condition.down else "active"
            yield {"vip": str(vip), "backend": name, "state": state, "why": condition.why, "since": condition.since}


def _each(conditions: Mapping[Vip, Mapping[str, Condition]]) -> Iterator[tuple[Vip, str, Condition]]:
    return ((vip, name, each) for vip, found in conditions.items() for name, each in found.items())
