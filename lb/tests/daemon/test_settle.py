"""Transitions that have had their time, ended by the daemon's task: the kernel in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lb.control.balancer import Balancer
from lb.daemon.settle import SettleTask
from lb.model.state import Backend, Interface, Service
from lb.model.vip import Vip
from lb.runtime.balancer_thread import BalancerThread
from lb.store.store import Store
from lb.tests.fakes.memory import MemoryDataplane, MemoryNetwork

WEB, OTHER = Vip.parse("10.0.0.1:80"), Vip.parse("10.0.0.2:80")
A, B = (Backend.parse(f"10.0.0.1{n}:80") for n in (1, 2))


def in_transition(dataplane: MemoryDataplane) -> set[Vip]:
    return {vip for vip, slots in dataplane.statistics().slots_in_transition.items() if slots}


def test_a_transition_whose_time_is_over_is_ended_without_a_further_change_and_no_other_is(tmp_path: Path) -> None:
    dataplane = MemoryDataplane()

    @contextmanager
    def opened() -> Iterator[Balancer]:
        with Store.open(tmp_path / "state.db", write=True) as store:
            store.load()
            yield Balancer(store, dataplane, MemoryNetwork({"eth0": ["10.0.0.254/24"]}))

    async def run() -> None:
        async with BalancerThread.open(opened) as thread:
            services = [Service(vip, backends=(A, B), ring_size=251) for vip in (WEB, OTHER)]
            await thread.change(lambda b: b.attach([Interface("eth0")], services))
            for vip in (WEB, OTHER):
                await thread.change(lambda b, vip=vip: b.drain_backend(vip, B))  # type: ignore[misc]
            assert in_transition(dataplane) == {WEB, OTHER}
            running = asyncio.create_task(SettleTask(period_s=0.01).run(thread))
            dataplane.overdue.add(WEB)
            async with asyncio.timeout(10):
                while WEB in in_transition(dataplane):
                    await asyncio.sleep(0.01)
            assert in_transition(dataplane) == {OTHER}
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(run())


def test_where_a_change_was_cut_short_nothing_is_settled(tmp_path: Path) -> None:
    dataplane = MemoryDataplane()
    with Store.open(tmp_path / "state.db", write=True) as store:
        store.load()
        balancer = Balancer(store, dataplane, MemoryNetwork({"eth0": ["10.0.0.254/24"]}))
        balancer.attach([Interface("eth0")], [Service(WEB, backends=(A, B), ring_size=251)])
        balancer.drain_backend(WEB, B)
        dataplane.overdue.add(WEB)
        dataplane.generation = 0
        balancer.writer.settle(WEB)
        assert in_transition(dataplane) == {WEB}
        balancer.repairs.reconcile()
        balancer.writer.settle(WEB)
        assert in_transition(dataplane) == set()
