"""The daemon's reconciliation, with its real balancer thread, over a kernel and a network in memory; and which backends
changes of the host's network concern."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from lb.control.balancer import Balancer
from lb.daemon import reconcile
from lb.daemon.reconcile import ReconcileTask
from lb.errors import DataplaneError
from lb.host.events import Changes
from lb.model.forwarding import InstalledNextHop, NextHop
from lb.model.state import Backend, Interface, Mode, OwnAddress, Service
from lb.model.vip import Address, Vip
from lb.runtime.balancer_thread import BalancerThread
from lb.store.store import Store
from lb.tests.fakes.memory import Fuse, MemoryDataplane, MemoryNetwork

WEB = Vip.parse("10.0.0.1:80")
A, B = (Backend.parse(f"10.0.0.1{n}:80") for n in (1, 2))
ETH0 = Interface("eth0")


@dataclass
class Told:
    """What the host tells, as a test puts it in."""

    queue: asyncio.Queue[Changes] = field(default_factory=asyncio.Queue)

    async def next(self, timeout_s: float) -> Changes:
        try:
            return await asyncio.wait_for(self.queue.get(), timeout_s)
        except TimeoutError:
            return Changes()


@dataclass
class Bed:
    path: Path
    fuse: Fuse = field(default_factory=Fuse)

    def __post_init__(self) -> None:
        self.dataplane = MemoryDataplane(self.fuse)
        self.network = MemoryNetwork({"eth0": ["10.0.0.254/24"], "eth1": ["10.0.1.254/24"]}, ["10.0.0.250"], self.fuse)
        self.told = Told()

    @contextmanager
    def open(self) -> Iterator[Balancer]:
        with Store.open(self.path, write=True) as store:
            store.load()
            yield Balancer(store, self.dataplane, self.network)

    @contextmanager
    def serving(self, mode: Mode = Mode.NAT) -> Iterator[Balancer]:
        with self.open() as balancer:
            balancer.attach([ETH0], [Service(WEB, mode, (A, B), ring_size=251)])
            yield balancer

    @asynccontextmanager
    async def running(self, period_s: float) -> AsyncIterator[BalancerThread]:
        async with BalancerThread.open(self.serving) as thread:
            listen: Callable[[], AbstractContextManager[Told]] = lambda: nullcontext(self.told)  # noqa: E731
            running = asyncio.create_task(ReconcileTask(listen, period_s).run(thread))
            try:
                yield thread
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)


@pytest.fixture
def bed(tmp_path: Path) -> Bed:
    return Bed(tmp_path / "state.db")


def lead_elsewhere(network: MemoryNetwork, **otherwise: Any) -> None:
    """All next hops are other ones from now on."""
    was = network._next_hop

    def next_hop(address: Address) -> NextHop:
        return replace(was(address), **otherwise)

    network._next_hop = next_hop  # type: ignore[method-assign]


# The balancer


def test_where_nothing_has_changed_nothing_is_written(bed: Bed) -> None:
    with bed.serving() as balancer:
        before = bed.fuse.writes, bed.dataplane.generation
        report = balancer.repairs.reconcile()
        assert (bed.fuse.writes, bed.dataplane.generation) == before
    assert (report.notes, report.warnings, report.attached) == ((), (), ())


def test_where_nothing_is_attached_nothing_is_asked_for(bed: Bed) -> None:
    with bed.open() as balancer:
        balancer.add_service(Service(WEB, Mode.NAT, (A,), ring_size=251))
        assert balancer.repairs.reconcile().notes == ()
    assert (bed.fuse.writes, bed.dataplane.loaded) == (0, False)


def test_programs_that_a_lost_store_has_left_are_not_taken_off(bed: Bed) -> None:
    with bed.serving():
        pass
    bed.path.unlink()
    with bed.open() as balancer:
        balancer.repairs.reconcile()
    assert set(bed.dataplane.attachments()) == {"eth0"}


def test_all_that_has_changed_is_found_and_repaired(bed: Bed) -> None:
    with bed.serving() as balancer:
        generation = bed.dataplane.generation
        bed.dataplane.detach("eth0")
        bed.network.remove_address("eth0", WEB.address)
        bed.dataplane.published.clear()
        bed.dataplane.rings[WEB].words[3] = 0
        assert balancer.repairs.reconcile().notes == (
            "eth0: XDP program was missing: reattached",
            "lookups: changed by another process",
            "10.0.0.1: was missing on eth0: added again",
            "vip 10.0.0.1:80/tcp: slots were modified: repaired",
        )
        assert bed.dataplane.generation == generation
        assert balancer.repairs.reconcile().notes == ()
    assert set(bed.dataplane.attachments()) == {"eth0"}


def test_a_change_that_was_cut_short_is_finished(bed: Bed) -> None:
    with bed.serving() as balancer:
        bed.dataplane.generation = 0
        bed.dataplane.remove(WEB)
        assert "did not match the store" in balancer.repairs.reconcile().notes[0]
        assert bed.dataplane.vips() == {WEB}


def test_a_repair_that_the_kernel_refuses_is_made_by_the_next(bed: Bed) -> None:
    with bed.serving() as balancer:
        bed.dataplane.rings[WEB].words[3] = 0
        bed.fuse.fail_after(1)
        with pytest.raises(DataplaneError):
            balancer.repairs.reconcile()
        assert "did not match the store" in balancer.repairs.reconcile().notes[0]
        assert balancer.repairs.reconcile().notes == ()


def test_a_backend_of_direct_routing_that_is_behind_a_gateway_now_keeps_its_entry(bed: Bed) -> None:
    with bed.serving(Mode.DR) as balancer:
        before = dict(bed.dataplane.rings[WEB].hops)
        lead_elsewhere(bed.network, on_link=False)
        report = balancer.repairs.follow({A.address})
        assert report.warnings[0].startswith("backend 10.0.0.11:80: mode dr needs a backend on a directly connected")
        assert (report.notes, bed.dataplane.rings[WEB].hops) == ((), before)


def test_the_interface_that_a_way_leads_through_now_is_attached_for_nat_replies(bed: Bed) -> None:
    with bed.serving() as balancer:
        lead_elsewhere(bed.network, interface="eth1", ifindex=2)
        report = balancer.repairs.follow({A.address, B.address})
        assert "eth1: also attached: nat replies of 10.0.0.11 and 10.0.0.12 arrive there" in report.notes
        assert set(bed.dataplane.attachments()) == {"eth0", "eth1"}
        assert balancer.state.interface("eth1")


# The task


def drifts(thread: BalancerThread) -> list[dict[str, Any]]:
    texts = (event.text.decode() for event in thread.events._kept)
    return [json.loads(text.split("data: ")[1]) for text in texts if "event: drift\n" in text]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def test_what_has_changed_is_repaired_at_the_next_look_and_told(bed: Bed) -> None:
    async def run() -> list[dict[str, Any]]:
        async with bed.running(period_s=0.05) as thread:
            await thread.call(lambda _: bed.dataplane.rings[WEB].words.__setitem__(3, 0))
            await until(lambda: drifts(thread))
            assert await thread.call(lambda balancer: balancer.repairs.reconcile().notes) == ()
            return drifts(thread)

    with capture_logs() as said:
        (drift,) = asyncio.run(run())
    sentence = "vip 10.0.0.1:80/tcp: slots were modified: repaired"
    assert (drift["mended"], drift["unmended"], drift["summary"]) == ([sentence], [], sentence)
    assert [line["what"] for line in said if line["event"] == "drift"] == [sentence]


def test_what_cannot_be_repaired_is_told_once_and_again_when_it_comes_back(bed: Bed) -> None:
    async def run() -> list[dict[str, Any]]:
        async with bed.running(period_s=0.02) as thread:
            for times in (1, 2):
                await thread.call(lambda _: taken(bed))
                await until(lambda times=times: len(drifts(thread)) == 2 * times - 1)  # type: ignore[misc]
                await looks(bed, 3)
                assert len(drifts(thread)) == 2 * times - 1
                bed.dataplane.foreign.clear()
                await until(lambda times=times: len(drifts(thread)) == 2 * times)  # type: ignore[misc]
                await looks(bed, 2)
            return drifts(thread)

    with capture_logs() as said:
        found = asyncio.run(run())
    refusal = "eth0: another XDP program is attached (id 7)"
    assert [each["unmended"] for each in found] == [[refusal], [], [refusal], []]
    assert [line["event"] for line in said].count(refusal) == 2


def taken(bed: Bed) -> None:
    bed.dataplane.detach("eth0")
    bed.dataplane.foreign.add("eth0")


async def looks(bed: Bed, count: int) -> None:
    """So many more times at the host's next hops, which are looked at last."""
    goal = bed.network.queries + count
    await until(lambda: bed.network.queries >= goal)


def test_a_change_of_the_host_is_followed_at_once(bed: Bed) -> None:
    async def run() -> list[dict[str, Any]]:
        async with bed.running(period_s=1000) as thread:
            await looks(bed, 1)
            lead_elsewhere(bed.network, dst_mac=b"\x02\0\0\0\0\x78")
            bed.told.queue.put_nowait(Changes(neighbours={(1, A.address.packed): None}))
            await until(lambda: drifts(thread))
            await thread.call(lambda _: bed.dataplane.detach("eth0"))
            bed.told.queue.put_nowait(Changes(links={9}))
            await until(lambda: len(drifts(thread)) == 2)
            return drifts(thread)

    assert [each["summary"] for each in asyncio.run(run())] == [
        "backend 10.0.0.11: next hop is now 02:00:00:00:00:78 on eth0",
        "eth0: XDP program was missing: reattached",
    ]


def test_addresses_are_announced_when_their_link_comes_up(bed: Bed) -> None:
    async def run() -> None:
        async with bed.running(period_s=1000):
            await looks(bed, 1)
            for name in ("eth1", "eth0"):
                bed.network.announced.clear()
                bed.told.queue.put_nowait(Changes(links={9}, up={name}))
                await until(bed.told.queue.empty)
            await until(lambda: bed.network.announced)

    asyncio.run(run())
    assert bed.network.announced == [OwnAddress("eth0", WEB.address)]


def test_very_many_next_hops_are_looked_at_in_turn(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile, "NEXT_HOPS_PER_CHECK", 1)
    asked: list[Address] = []
    next_hops = bed.network.next_hops

    def asking(addresses: Iterable[Address], *, probe: bool = False) -> dict[Address, NextHop]:
        asked.extend(addresses)
        return next_hops(addresses)

    monkeypatch.setattr(bed.network, "next_hops", asking)

    async def run() -> None:
        async with bed.running(period_s=0.01):
            asked.clear()
            await until(lambda: len(asked) == 5)

    asyncio.run(run())
    assert asked[:5] == [A.address, B.address, A.address, B.address, A.address]


# Which backends a change concerns

MAC, OTHER_MAC = b"\x02\0\0\0\0\x01", b"\x02\0\0\0\0\x02"
NEAR = InstalledNextHop(ip_address("10.0.0.11"), 2, MAC)
FAR = InstalledNextHop(ip_address("10.1.0.11"), 2, OTHER_MAC)
UNKNOWN = InstalledNextHop(ip_address("10.2.0.11"), 3, None)
SIX = InstalledNextHop(ip_address("fd00:1::11"), 4, MAC)
WAYS = [NEAR, FAR, UNKNOWN, SIX]
GATEWAY = ip_address("10.0.0.250").packed


@pytest.mark.parametrize(
    ("changes", "concerned"),
    [
        (Changes(), []),
        (Changes(everything=True), WAYS),
        (Changes(links={2}), [NEAR, FAR]),
        (Changes(neighbours={(2, NEAR.address.packed): None}), [NEAR]),
        (Changes(neighbours={(2, GATEWAY): OTHER_MAC}), [FAR]),
        (Changes(neighbours={(2, GATEWAY): b"\x02\0\0\0\0\x03"}), []),
        (Changes(neighbours={(3, GATEWAY): None}), [UNKNOWN]),
        (Changes(neighbours={(4, GATEWAY): None}), []),
        (Changes(prefixes={(32, 16): {10 << 8 | 1}}), [FAR]),
        (Changes(prefixes={(32, 0): {0}}), [NEAR, FAR, UNKNOWN]),
        (Changes(prefixes={(128, 32): {0xFD000001}}), [SIX]),
    ],
)
def test_changes_concern_the_backends_whose_way_may_be_another(
    changes: Changes, concerned: list[InstalledNextHop]
) -> None:
    assert changes.concerned(WAYS) == {way.address for way in concerned}
