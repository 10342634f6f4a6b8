"""The daemon's health checks, with its real owner thread: servers on the loopback interface, the kernel in memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from lb.balancer import Balancer
from lb.checker import Key, Way
from lb.health_check import HealthCheck
from lb.health_task import HealthTask
from lb.memory import MemoryDataplane, MemoryNetwork
from lb.model import Backend, Interface, Service
from lb.options import Options
from lb.owner import Owner
from lb.store import Store
from lb.vip import Vip, parse_address

WEB = Vip.parse("10.0.0.1:80")
A, B = (Backend.parse(f"10.0.0.1{n}:80") for n in (1, 2))


class Loopback:
    def find(self, services: Sequence[Service]) -> Mapping[Key, Way]:
        return {(s.vip, str(b)): Way(parse_address("127.0.0.1")) for s in services for b in s.backends}

    def close(self) -> None:
        pass


@asynccontextmanager
async def daemon(path: Path) -> AsyncIterator[Owner]:
    @contextmanager
    def opened() -> Iterator[Balancer]:
        with Store.open(path / "state.db", write=True) as store:
            yield Balancer(store, MemoryDataplane(), MemoryNetwork({"eth0": ["10.0.0.254/24"]}))

    async with Owner.open(opened) as owner:
        await owner.change(lambda b: b.attach([Interface("eth0")], [Service(WEB, backends=(A, B), ring_size=251)]))
        running = asyncio.create_task(HealthTask(Loopback).run(owner))
        try:
            yield owner
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def states(owner: Owner) -> list[str]:
    status = await owner.call(lambda balancer: balancer.status())
    return [backend.state for backend in status.services[0].backends]


async def until(owner: Owner, condition: Callable[[list[str]], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition(await states(owner)):
            await asyncio.sleep(0.01)


def health_events(owner: Owner) -> list[dict[str, Any]]:
    texts = (event.text.decode() for event in owner.events._kept)
    return [json.loads(text.split("data: ")[1]) for text in texts if "event: health\n" in text]


def test_a_check_that_is_asked_for_later_is_heeded_and_its_findings_are_events(tmp_path: Path) -> None:
    async def run() -> tuple[list[dict[str, Any]], Sequence[str]]:
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        async with daemon(tmp_path) as owner:
            assert await states(owner) == ["active", "active"]
            options = Options(health=HealthCheck.parse(f"tcp interval=100ms port={port}"), fail_closed=True)
            done = await owner.change(lambda balancer: balancer.set_options(WEB, options))
            await until(owner, lambda found: found == ["down", "down"])
            server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", port)
            await until(owner, lambda found: found == ["active", "active"])
            async with asyncio.timeout(10):
                while len(told := health_events(owner)) < 4:
                    await asyncio.sleep(0.01)
        server.close()
        await server.wait_closed()
        return told, done.report.notes

    told, notes = asyncio.run(run())
    turned = [(each["vip"], each["backend"], each["state"], each["why"]) for each in told]
    assert sorted(turned[:2]) == [(str(WEB), str(b), "down", "connection refused") for b in (A, B)]
    assert sorted(turned[2:]) == [(str(WEB), str(b), "active", "") for b in (A, B)]
    assert notes == ()
