"""The engine over servers on the loopback interface: it finds who is down and who is back, and says no more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from lb.errors import DataplaneError
from lb.health.checker import Checker, CheckPath, Key
from lb.health.state import Ramp, SavedHealth, words_of
from lb.host.events import Changes
from lb.model.conditions import Condition, Conditions
from lb.model.health_check import HealthCheck
from lb.model.options import Options
from lb.model.state import Backend, Service
from lb.model.vip import Vip, parse_address

WEB = Vip.parse("10.0.0.1:80")
LOOPBACK = parse_address("127.0.0.1")
A, B = (Backend.parse(f"10.0.0.1{n}:80") for n in (1, 2))


@dataclass
class Loopback:
    """Ways that lead here, whatever the backend. `faults`: why there is none, by backend."""

    faults: dict[str, str] = field(default_factory=dict)
    error: str = ""
    finds: int = 0
    is_closed: bool = False

    def find(self, services: Sequence[Service]) -> Mapping[Key, CheckPath]:
        self.finds += 1
        if self.error:
            raise DataplaneError(self.error)
        return {
            (s.vip, str(b)): CheckPath(LOOPBACK, fault=self.faults.get(str(b), ""))
            for s in services
            for b in s.backends
        }

    def concerned(self, changes: Changes) -> bool:
        return False

    def close(self) -> None:
        self.is_closed = True


class Server:
    """Accepts connections on a port of its own, or refuses them."""

    def __init__(self) -> None:
        self.port = 0
        self._server: asyncio.Server | None = None

    async def up(self) -> None:
        self._server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def down(self) -> None:
        assert self._server
        self._server.close()
        await self._server.wait_closed()


@dataclass
class Told:
    """What the checker has told; `refuse` so many times it is not heard."""

    all: list[Conditions] = field(default_factory=list)
    refuse: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def record(self, conditions: Conditions) -> None:
        if self.refuse:
            self.refuse -= 1
            raise DataplaneError("the kernel refused")
        self.all.append(conditions)
        self.changed.set()

    def down(self) -> set[str]:
        return {name for name, each in self.now(WEB).items() if each.down}

    def now(self, vip: Vip) -> Mapping[str, Condition]:
        return self.all[-1].get(vip, {}) if self.all else {}

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


def service(server: Server, *backends: Backend, slow_start_s: int = 0) -> Service:
    check = HealthCheck.parse(f"tcp interval=100ms rise=2 fall=2 port={server.port}")
    return Service(WEB, backends=backends or (A,), options=Options(health=check, slow_start_s=slow_start_s))


@asynccontextmanager
async def checking(
    reported: Told, *services: Service, paths: Loopback | None = None, previous: Mapping[Key, SavedHealth] | None = None
) -> AsyncIterator[Checker]:
    checker = Checker(reported.record, paths or Loopback(), previous)
    checker.watch(services)
    running = asyncio.create_task(checker.run())
    try:
        yield checker
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def test_a_backend_that_stops_answering_is_down_and_one_that_answers_again_is_up() -> None:
    async def run() -> None:
        reported, server = Told(), Server()
        await server.up()
        async with checking(reported, service(server)):
            await reported.until(lambda: str(A) in reported.now(WEB))
            assert not reported.down()
            await server.down()
            await reported.until(lambda: reported.down() == {str(A)})
            assert reported.now(WEB)[str(A)].why == "connection refused"
            await server.up()
            await reported.until(lambda: not reported.down())
        await server.down()

    asyncio.run(run())


def test_a_slow_start_is_told_step_by_step() -> None:
    async def run() -> list[int]:
        reported, server = Told(), Server()
        await server.up()
        was_down = {(WEB, str(A)): SavedHealth("nat tcp", Condition(down=True, why="it was"))}
        async with checking(reported, service(server, A, B, slow_start_s=2), previous=was_down):
            await reported.until(lambda: reported.now(WEB).get(str(A), Condition(down=True)).share < 100)
            await reported.until(lambda: reported.now(WEB)[str(A)].share == 100)
        await server.down()
        shares = [each[WEB][str(A)].share for each in reported.all if not each[WEB][str(A)].down]
        return list(dict.fromkeys(shares))

    assert asyncio.run(run()) == [33, 66, 100]


def test_what_changes_together_is_told_together() -> None:
    async def run() -> list[Conditions]:
        reported, server = Told(), Server()
        await server.up()
        port = server.port
        await server.down()
        server.port = port
        many = [Backend.parse(f"10.0.0.{n}:80") for n in range(10, 60)]
        async with checking(reported, service(server, *many)):
            await reported.until(lambda: len(reported.down()) == len(many))
        return reported.all

    assert len(asyncio.run(run())) < 10


def test_conditions_that_could_not_be_put_in_force_are_told_again() -> None:
    async def run() -> None:
        reported, server = Told(refuse=1), Server()
        await server.up()
        async with checking(reported, service(server)):
            await reported.until(lambda: str(A) in reported.now(WEB))
        await server.down()

    asyncio.run(run())


def test_backends_that_go_are_checked_no_longer_and_those_that_stay_stay_known() -> None:
    async def run() -> None:
        reported, server = Told(), Server()
        await server.up()
        both = service(server, A, B)
        async with checking(reported, both) as checker:
            await reported.until(lambda: len(reported.now(WEB)) == 2)
            since = reported.now(WEB)[str(A)]
            checker.watch([replace(both, backends=(A,))])
            await reported.until(lambda: len(reported.now(WEB)) == 1)
            assert reported.now(WEB)[str(A)] == since
            checker.watch([replace(both, options=Options())])
            await reported.until(lambda: reported.all[-1] == {})
            assert len([task for task in asyncio.all_tasks() if "Checker._check" in repr(task.get_coro())]) == 0
        await server.down()

    asyncio.run(run())


def test_a_backend_without_a_way_is_not_down_but_said_not_to_be_checked() -> None:
    async def run() -> Mapping[str, Condition]:
        reported, server = Told(), Server()
        await server.up()
        paths = Loopback(faults={str(A): "no route"})
        async with checking(reported, service(server, A, B), paths=paths):
            await reported.until(lambda: str(B) in reported.now(WEB))
        await server.down()
        return reported.now(WEB)

    found = asyncio.run(run())
    assert found[str(A)] == Condition(why="not checked: no route")
    assert (found[str(B)].down, found[str(B)].why) == (False, "")


def test_ways_that_cannot_be_found_are_looked_for_again() -> None:
    async def run() -> None:
        reported, server, paths = Told(), Server(), Loopback(error="netlink: no")
        await server.up()
        async with checking(reported, service(server), paths=paths):
            await reported.until(lambda: bool(reported.all))
            assert reported.now(WEB) == {str(A): Condition(why="not checked: netlink: no")}
            paths.error = ""
            await reported.until(
                lambda: reported.now(WEB).get(str(A)) not in (None, Condition(why="not checked: netlink: no"))
            )
        assert paths.is_closed
        await server.down()

    asyncio.run(run())


def test_a_backend_that_was_down_stays_down_while_there_is_no_way_to_it() -> None:
    async def run() -> Condition:
        reported, server, paths = Told(), Server(), Loopback()
        await server.up()
        port = server.port
        await server.down()
        server.port = port
        async with checking(reported, service(server), paths=paths) as checker:
            await reported.until(lambda: reported.down() == {str(A)})
            paths.faults[str(A)] = "no route"
            checker.update_paths()
            await reported.until(lambda: reported.now(WEB)[str(A)].why == "not checked: no route")
            assert reported.down() == {str(A)}
            paths.faults.clear()
            await server.up()
            checker.update_paths()
            await reported.until(lambda: not reported.down())
        await server.down()
        return reported.now(WEB)[str(A)]

    assert asyncio.run(run()).why == ""


def test_a_search_for_ways_that_is_repeated_is_for_what_is_wanted_by_then() -> None:
    async def run() -> set[str]:
        reported, server, paths = Told(), Server(), Loopback(error="netlink: no")
        await server.up()
        async with checking(reported, service(server, A), paths=paths) as checker:
            await reported.until(lambda: bool(reported.all))
            paths.error = ""
            checker.watch([service(server, B)])
            await reported.until(lambda: reported.now(WEB).keys() == {str(B)})
            finds = paths.finds
            while paths.finds == finds:
                await asyncio.sleep(0.01)
            await reported.until(lambda: reported.now(WEB).keys() == {str(B)})
            watched = {name for _, name in checker.remembered}
        await server.down()
        return watched

    assert asyncio.run(run()) == {str(B)}


# From one process to the next


def test_what_one_process_remembers_is_in_force_in_the_next_before_its_first_check() -> None:
    async def run() -> list[Conditions]:
        reported, server = Told(), Server()
        await server.up()
        await server.down()
        async with checking(reported, service(server)) as checker:
            await reported.until(lambda: reported.down() == {str(A)})
            left = dict(checker.remembered)
        before, reported = reported.all[-1], Told()
        async with checking(reported, service(server), previous=left) as checker:
            while checker.checks_done < 2:
                assert checker.conditions in ({}, before)  # at first nobody is watched
                await asyncio.sleep(0)
            assert checker.conditions == before
        return reported.all

    assert asyncio.run(run()) == []  # nothing new


def test_a_slow_start_goes_on_from_where_the_last_process_was() -> None:
    async def run() -> list[int]:
        reported, server = Told(), Server()
        await server.up()
        half_way = Ramp(asyncio.get_running_loop().time() - 1, length_s=2, steps=4)
        starting = SavedHealth(words_of(service(server)), Condition(share=60, since=7), half_way)
        async with checking(reported, service(server), previous={(WEB, str(A)): starting}):
            await reported.until(lambda: str(A) in reported.now(WEB) and reported.now(WEB)[str(A)].share == 100)
        await server.down()
        return [each[WEB][str(A)].share for each in reported.all]

    shares = asyncio.run(run())
    assert shares == sorted(shares)
    assert set(shares) <= {60, 80, 100}


def test_what_is_too_old_to_hold_is_decided_by_one_check() -> None:
    async def run(age_s: float) -> int:
        reported, server = Told(), Server()
        await server.up()
        was_down = SavedHealth(words_of(service(server)), Condition(down=True, why="it was", since=7), age_s=age_s)
        async with checking(reported, service(server), previous={(WEB, str(A)): was_down}) as checker:
            await reported.until(lambda: str(A) in reported.now(WEB) and not reported.down())
            done = checker.checks_done
        await server.down()
        return done

    assert asyncio.run(run(1e6)) == 1
    assert asyncio.run(run(1)) >= 2  # as `rise` has it


def test_only_services_with_a_check_are_watched() -> None:
    async def run() -> int:
        reported, paths = Told(), Loopback()
        plain = Service(Vip.parse("10.0.0.2:80"), backends=(A,))
        async with checking(reported, plain, paths=paths) as checker:
            while not paths.finds:
                await asyncio.sleep(0)
        assert reported.all == []
        return checker.checks_done

    assert asyncio.run(run()) == 0
