"""The promise at scale: very many connections, a hundred backends, one change after the other, and nothing strays.

The connections live in scale.bpf.c, which has the balancer's program inlined and its maps; KernelDataplane changes
them. Each round an operator changes something, the clients of a killed backend and a tenth of all others start anew,
and a third say something; now and then no change comes for so long that transitions end. By default 200,000
connections and 20 changes; `make scale` sets SCALE_CONNECTIONS and SCALE_CHANGES to a million and 50.

An entry of the flow table counts until it has timed out, also where its connection has ended. It is decisive where the
next packet of its flow would go elsewhere without it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from lb.dataplane import clock
from lb.dataplane.allocation import Sizes
from lb.dataplane.dataplane import KernelDataplane
from lb.model.forwarding import NextHop
from lb.model.state import DEFAULT_FLOW_TIMEOUT_S as FLOW_TIMEOUT_S
from lb.model.state import Backend, Mode, Service
from lb.model.vip import Address, Vip
from netns_tests.oracle.model import SECOND_NS
from netns_tests.oracle.packets import LB4, LB_MAC, VIP4, tcp4
from xdp.object import BpfObject
from xdp.pins import Pins

OBJECT = Path(__file__).with_name("scale.bpf.o")

CONNECTIONS = int(os.environ.get("SCALE_CONNECTIONS", 200_000))
CHANGES = int(os.environ.get("SCALE_CHANGES", 20))
BACKENDS, SPARE_BACKENDS = 100, 20
RING_SIZE = 65537
VIP = Vip.parse(f"{VIP4}:80/tcp")
LOOPBACK = 1  # what a test run comes in on
FIRST_BACKEND = ip_address("198.18.0.0")
SYN, ACK, FIN = 0x02, 0x10, 0x11

LIFETIME = 10  # rounds that a connection lasts
PATIENCE = 3  # rounds between two packets of a connection
QUIET_EVERY = 8  # rounds
ROUND_S = 60

# The most there were at once, as parts of the connections. JET (CoNEXT'21) needs about a tenth.
DECISIVE_SHARE = 1 / 8
ENTRIES_SHARE = 1 / 4


class Crowd:
    """The connections, all to one service."""

    def __init__(self, bpf: BpfObject) -> None:
        self._bpf, self._frame = bpf, tcp4()
        self._walk = bpf.variable("walk")
        self._control = bpf.variable("control")
        self._walk.flow_timeout_s = FLOW_TIMEOUT_S
        self.now_ns = 100_000 * SECOND_NS
        self.wait(0)

    def wait(self, seconds: int) -> None:
        self.now_ns += seconds * SECOND_NS
        self._control.test_clock_ns = self.now_ns

    def send(self, tcp_flags: int, share: int = 1, first: int = 0, only_on: int = 0) -> None:
        """One packet of every share-th connection, or of those on one backend; a SYN opens it anew."""
        self._walk.tcp_flags = tcp_flags
        self._walk.share, self._walk.first, self._walk.only_on, self._walk.next = share, first, only_on, 0
        self._bpf.program("take_turn").test_run(self._frame, repeat=CONNECTIONS)

    def strayed(self) -> int:
        """Packets so far that did not reach their connection's backend."""
        return int(self._walk.strayed)

    def entries(self) -> tuple[int, int]:
        """In the flow table: of flows that have not timed out, and of these the ones that decide anything."""
        self._bpf.program("count_entries").test_run(self._frame)
        return int(self._walk.entries), int(self._walk.decisive)


def backend(number: int) -> Backend:
    return Backend(FIRST_BACKEND + number)


def number_of(backend: Backend) -> int:
    return int(backend.address) - int(FIRST_BACKEND)


def next_hops() -> dict[Address, NextHop]:
    """Each backend has a MAC address that ends in its number."""
    own_mac = bytes.fromhex(LB_MAC.replace(":", ""))
    return {
        backend(n).address: NextHop(
            "lo", LOOPBACK, ip_address(LB4), own_mac, b"\x02\0\0\0" + n.to_bytes(2, "big"), True
        )
        for n in range(1, 1 + BACKENDS + SPARE_BACKENDS)
    }


class Operator:
    """Changes one thing at a time, at random but always the same."""

    def __init__(self, dataplane: KernelDataplane) -> None:
        self._dataplane, self._random, self._hops = dataplane, random.Random(1), next_hops()
        self._service = Service(VIP, Mode.DR, tuple(map(backend, range(1, 1 + BACKENDS))), RING_SIZE)
        self._put(self._service)

    def change(self) -> int | None:
        """The backend that was killed, if one was."""
        doing = self._random.choice(["add", "add", "kill", "drain", "weight"])
        absent = self._absent()
        if doing == "add" and absent:
            self._put(self._service.with_backend(backend(self._random.choice(absent))))
            return None
        chosen = self._random.choice(self._service.backends)
        if doing == "kill":
            self._put(self._service.without_backend(chosen))
            return number_of(chosen)
        self._put(self._service.changing_backend(chosen, self._drained if doing == "drain" else self._weighted))
        return None

    def _absent(self) -> list[int]:
        present = {number_of(b) for b in self._service.backends}
        return [number for number in range(1, 1 + BACKENDS + SPARE_BACKENDS) if number not in present]

    def _drained(self, old: Backend) -> Backend:
        return replace(old, draining=True)

    def _weighted(self, old: Backend) -> Backend:
        return replace(old, weight=self._random.choice([weight for weight in (1, 2, 3) if weight != old.weight]))

    def _put(self, service: Service) -> None:
        self._service = service
        self._dataplane.put(service, self._hops)
        self._dataplane.publish([service])


def go_through_a_change(crowd: Crowd, operator: Operator, turn: int) -> None:
    killed = operator.change()
    if killed:
        crowd.send(SYN, only_on=killed)
    crowd.send(FIN, LIFETIME, turn % LIFETIME)
    crowd.send(SYN, LIFETIME, turn % LIFETIME)
    crowd.send(ACK, PATIENCE, turn % PATIENCE)
    crowd.wait(ROUND_S)


def go_through_a_quiet_time(crowd: Crowd) -> None:
    """So long that the next change ends the transitions; every connection speaks just in time."""
    crowd.send(ACK)
    crowd.wait(FLOW_TIMEOUT_S - 2)
    crowd.send(ACK)
    crowd.wait(2)


@pytest.fixture
def bpf() -> Iterator[BpfObject]:
    with BpfObject.open(OBJECT) as bpf:
        bpf.configure("config", test_clock=1, recorded_syns_per_s=1 << 31)
        for name, entries in Sizes.of([Service(VIP, Mode.DR, ring_size=RING_SIZE)]).by_map().items():
            bpf.resize(name, entries)
        bpf.resize("flows4", 2 * CONNECTIONS)  # so that none is evicted
        bpf.resize("connections", CONNECTIONS)
        bpf.load("take_turn", "count_entries")
        yield bpf


@pytest.fixture
def crowd(bpf: BpfObject, monkeypatch: pytest.MonkeyPatch) -> Crowd:
    crowd = Crowd(bpf)
    monkeypatch.setattr(clock, "now_ns", lambda: crowd.now_ns)
    return crowd


@pytest.fixture
def dataplane(bpf: BpfObject, tmp_path: Path) -> KernelDataplane:
    """On the maps of the driver, without pins."""
    dataplane = KernelDataplane(Pins(tmp_path, "scale"))
    dataplane.programs.use(bpf)
    return dataplane


def test_no_connection_of_a_living_backend_strays(
    crowd: Crowd, dataplane: KernelDataplane, capsys: pytest.CaptureFixture[str]
) -> None:
    operator = Operator(dataplane)
    crowd.send(SYN)
    most_entries = most_decisive = 0
    for turn in range(CHANGES):
        go_through_a_change(crowd, operator, turn)
        assert crowd.strayed() == 0, f"after change {turn}"
        entries, decisive = crowd.entries()
        most_entries, most_decisive = max(most_entries, entries), max(most_decisive, decisive)
        if turn % QUIET_EVERY == QUIET_EVERY - 1:
            go_through_a_quiet_time(crowd)
    crowd.send(ACK)
    assert crowd.strayed() == 0
    assert not any(dataplane.statistics().reasons.values())
    with capsys.disabled():
        print(f"\n{CONNECTIONS} connections, {CHANGES} changes: {most_entries} entries, {most_decisive} decisive")
    assert most_decisive <= CONNECTIONS * DECISIVE_SHARE
    assert most_entries <= CONNECTIONS * ENTRIES_SHARE
