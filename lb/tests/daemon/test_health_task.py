"""The health task, with the real balancer thread: servers on the loopback interface, the kernel in memory."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lb.control.balancer import Balancer
from lb.daemon.health_task import HealthTask
from lb.health.checker import CheckPath, Key
from lb.health.file import HealthFile
from lb.host.events import Changes
from lb.model.health_check import HealthCheck
from lb.model.options import Options
from lb.model.state import Backend, Interface, Service
from lb.model.vip import Vip, parse_address
from lb.runtime.balancer_thread import BalancerThread
from lb.store.store import Store
from lb.tests.fakes.memory import MemoryDataplane, MemoryNetwork

WEB = Vip.parse("10.0.0.1:80")
A, B = (Backend.parse(f"10.0.0.1{n}:80") for n in (1, 2))
NOTHING = Options()


class Loopback:
    def __init__(self) -> None:
        self.finds = 0

    def find(self, services: Sequence[Service]) -> Mapping[Key, CheckPath]:
        self.finds += 1
        return {(s.vip, str(b)): CheckPath(parse_address("127.0.0.1")) for s in services for b in s.backends}

    def concerned(self, changes: Changes) -> bool:
        return changes.everything

    def close(self) -> None:
        pass


class Quiet:
    """A host in whose network nothing changes but what a test says."""

    def __init__(self) -> None:
        self.changes: asyncio.Queue[Changes] = asyncio.Queue()

    async def next(self, timeout_s: float) -> Changes:
        return await self.changes.get()


@dataclass
class Host:
    """What outlives a daemon."""

    path: Path
    dataplane: MemoryDataplane = field(default_factory=MemoryDataplane)
    paths: list[Loopback] = field(default_factory=list)
    quiets: list[Quiet] = field(default_factory=list)

    @property
    def file(self) -> HealthFile:
        return HealthFile(self.path / "run" / "health.json")

    @contextmanager
    def balancer(self, *, in_daemon: bool = False) -> Iterator[Balancer]:
        with Store.open(self.path / "state.db", write=True) as store:
            store.load()
            balancer = Balancer(store, self.dataplane, MemoryNetwork({"eth0": ["10.0.0.254/24"]}))
            balancer.writer.conditions = self.file.conditions(balancer.state.services)
            balancer.writer.in_daemon = in_daemon
            yield balancer

    def listen(self) -> AbstractContextManager[Quiet]:
        self.quiets.append(Quiet())
        return nullcontext(self.quiets[-1])

    def find_ways(self) -> Loopback:
        self.paths.append(Loopback())
        return self.paths[-1]

    @asynccontextmanager
    async def daemon(self) -> AsyncIterator[BalancerThread]:
        async with BalancerThread.open(partial(self.balancer, in_daemon=True)) as thread:
            await thread.change(lambda balancer: balancer.repairs.reconcile())
            task = HealthTask(self.find_ways, self.file, self.listen)
            running = asyncio.create_task(task.run(thread))
            try:
                yield thread
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)

    def owners(self) -> set[str]:
        """Who gets new connections."""
        return {str(backend) for backend in self.dataplane.rings[WEB].currents}


def serve(host: Host, options: Options = NOTHING) -> None:
    with host.balancer() as balancer:
        balancer.attach([Interface("eth0")], [Service(WEB, backends=(A, B), ring_size=251, options=options)])


async def states(thread: BalancerThread) -> list[str]:
    status = await thread.call(lambda balancer: balancer.status())
    return [backend.state for backend in status.services[0].backends]


async def until(thread: BalancerThread, condition: Callable[[list[str]], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition(await states(thread)):
            await asyncio.sleep(0.01)


def health_events(thread: BalancerThread) -> list[dict[str, Any]]:
    texts = (event.text.decode() for event in thread.events._kept)
    return [json.loads(text.split("data: ")[1]) for text in texts if "event: health\n" in text]


def test_a_check_that_is_asked_for_later_is_heeded_and_its_findings_are_events(tmp_path: Path) -> None:
    async def run() -> tuple[list[dict[str, Any]], Sequence[str]]:
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        host = Host(tmp_path)
        serve(host)
        async with host.daemon() as thread:
            assert await states(thread) == ["active", "active"]
            options = Options(health=HealthCheck.parse(f"tcp interval=100ms port={port}"), fail_closed=True)
            done = await thread.change(lambda balancer: balancer.set_options(WEB, options))
            await until(thread, lambda found: found == ["down", "down"])
            server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", port)
            await until(thread, lambda found: found == ["active", "active"])
            async with asyncio.timeout(10):
                while len(reported := health_events(thread)) < 4:
                    await asyncio.sleep(0.01)
        server.close()
        await server.wait_closed()
        return reported, done.report.notes

    reported, notes = asyncio.run(run())
    turned = [(each["vip"], each["backend"], each["state"], each["why"]) for each in reported]
    assert sorted(turned[:2]) == [(str(WEB), str(b), "down", "connection refused") for b in (A, B)]
    assert sorted(turned[2:]) == [(str(WEB), str(b), "active", "") for b in (A, B)]
    assert notes == ()


def checked(port: int) -> Options:
    return Options(health=HealthCheck.parse(f"tcp interval=100ms port={port}"), fail_closed=True)


def refused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_a_backend_that_was_down_gets_nothing_from_the_start_of_the_next_daemon_on(tmp_path: Path) -> None:
    """Also where the maps are written anew, as after a detach; and nobody is told of it a second time."""

    async def first(host: Host) -> None:
        async with host.daemon() as thread:
            await until(thread, lambda found: found == ["down", "down"])

    async def second(host: Host) -> tuple[list[str], list[dict[str, Any]]]:
        async with BalancerThread.open(host.balancer) as thread:
            await thread.change(lambda balancer: balancer.repairs.reconcile())
            return await states(thread), health_events(thread)

    host = Host(tmp_path)
    serve(host, checked(refused_port()))
    asyncio.run(first(host))
    assert host.owners() == {"None"}
    host.dataplane.forget()
    assert asyncio.run(second(host)) == (["down", "down"], [])
    assert host.owners() == {"None"}


def test_conditions_go_on_from_daemon_to_daemon_and_turns_are_told_once(tmp_path: Path) -> None:
    async def first(host: Host) -> None:
        async with host.daemon() as thread:
            await until(thread, lambda found: found == ["down", "down"])

    async def second(host: Host, port: int) -> tuple[list[str], list[dict[str, Any]]]:
        async with host.daemon() as thread:
            before = await states(thread)
            server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", port)
            await until(thread, lambda found: found == ["active", "active"])
            server.close()
            await server.wait_closed()
            return before, health_events(thread)

    host, port = Host(tmp_path), refused_port()
    serve(host, checked(port))
    asyncio.run(first(host))
    before, reported = asyncio.run(second(host, port))
    assert before == ["down", "down"]
    assert {each["state"] for each in reported} == {"active"}
    assert host.owners() == {str(A), str(B)}


def test_a_change_without_a_daemon_leaves_conditions_in_force_and_says_so(tmp_path: Path) -> None:
    async def run(host: Host) -> None:
        async with host.daemon() as thread:
            await until(thread, lambda found: found == ["down", "down"])

    host = Host(tmp_path)
    serve(host, checked(refused_port()))
    asyncio.run(run(host))
    kept = f"{WEB}: {A} (down), {B} (down) keep their last health state until xdp-lb serve runs or --health off"
    with host.balancer() as balancer:
        assert kept in balancer.set_weight(WEB, A, 2, dry_run=True).notes
        assert kept in balancer.set_weight(WEB, A, 2).notes
        assert kept in balancer.attach([Interface("eth0")]).notes
        assert balancer.status().services[0].backends[0].condition
        assert host.owners() == {"None"}
        assert kept not in balancer.set_options(WEB, NOTHING).notes
        assert host.owners() == {str(A), str(B)}
    with host.balancer() as balancer:
        assert [each.condition for each in balancer.status().services[0].backends] == [None, None]


def test_findings_that_cannot_be_stored_are_in_force_all_the_same(tmp_path: Path) -> None:
    async def run(host: Host) -> None:
        async with host.daemon() as thread:
            await until(thread, lambda found: found == ["down", "down"])

    host = Host(tmp_path)
    (tmp_path / "run").write_text("not a folder")
    serve(host, checked(refused_port()))
    asyncio.run(run(host))
    assert host.owners() == {"None"}
    assert host.file.read() == {}


def test_ways_are_looked_for_again_when_the_network_is_another_one(tmp_path: Path) -> None:
    async def run(host: Host) -> None:
        async with host.daemon() as thread:
            await until(thread, lambda found: found == ["down", "down"])
            (paths,), (quiet,) = host.paths, host.quiets
            before = paths.finds
            quiet.changes.put_nowait(Changes(links={7}))  # which concerns nobody
            quiet.changes.put_nowait(Changes(everything=True))
            async with asyncio.timeout(10):
                while paths.finds == before:
                    await asyncio.sleep(0.01)
            assert paths.finds == before + 1

    host = Host(tmp_path)
    serve(host, checked(refused_port()))
    asyncio.run(run(host))
