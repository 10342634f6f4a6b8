"""The promise, on the loaded program: an open connection stays on its backend as long as that one lives.

Hypothesis makes up services, clients and an operator; every change goes through KernelDataplane into the maps of the
program, and where a packet went is read from the frame that left. Clients open connections, send, fall silent and end
them, while backends are added, drained, weighted, killed and revived, and transitions run out. One clock, the test's,
serves the program and the control plane.

A connection is open as long as it sends within a timeout less `refresh_ns`, by which the time of its entry may be late:
TCP within the service's flow timeout, UDP within udp_timeout where that is shorter. In mode nat a connection that has
only been opened has nat_opening_timeout. Where a client has affinity, all that it has open is on one backend, and
affinity_s is the timeout.

With a second chance the promise holds for flows that hop between two balancers which know nothing of each other: a
packet reaches the backend that has the connection, or one that is told its name. It holds for one change in the life of
a connection: there are but two backends that a slot knows.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from ipaddress import ip_address
from itertools import product
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lb.dataplane import clock
from lb.dataplane.dataplane import KernelDataplane
from lb.model.forwarding import NextHop
from lb.model.options import Options
from lb.model.state import Backend, Mode, Service
from lb.model.vip import Address, Protocol, Vip
from netns_tests.oracle import packets
from netns_tests.oracle.model import SECOND_NS, Settings
from netns_tests.oracle.packets import LB4, LB6, LB_MAC, VIP4, VIP6, tcp4, tcp6, udp4, udp6
from netns_tests.oracle.program import LoadedProgram, loaded_program
from netns_tests.oracle.wire import IP_HEADER_SIZE
from xdp.pins import Pins

FUZZ = "FUZZ_PACKETS" in os.environ
SEQUENCES = math.ceil(int(os.environ.get("FUZZ_PACKETS", 20_000)) / 100)
STEPS = 50  # of a sequence

SETTINGS = Settings(nat_port_count=1 << 12)
RING_SIZE = 251
START_NS = 100_000 * SECOND_NS
UDP_HEADER_SIZE = 8
LOOPBACK = 1  # what a test run comes in on

BACKENDS = range(1, 7)
CLIENTS = range(8)
FLOWS_OF_A_CLIENT = 2  # where it has affinity
AFFINITY_S = 60
PORTS = {
    (Mode.NAT, False): 80,
    (Mode.DR, False): 443,
    (Mode.IPIP, False): 8080,
    (Mode.NAT, True): 9443,
    (Mode.DR, True): 8443,
}
SECOND_CHANCE_PORT = 8888
VIPS = {4: VIP4, 6: VIP6}
SOURCES = {4: ip_address(LB4), 6: ip_address(LB6)}
CLIENT_ADDRESSES = {4: ip_address("192.0.2.32"), 6: ip_address("2001:db8:1::32")}
FIRST_BACKENDS = {4: ip_address("198.51.100.10"), 6: ip_address("2001:db8:3::10")}
DESTINATIONS = {4: slice(30, 34), 6: slice(38, 54)}  # of the IP header, in a frame
TCP_FRAMES: dict[int, Callable[..., bytes]] = {4: tcp4, 6: tcp6}
UDP_FRAMES: dict[int, Callable[..., bytes]] = {4: udp4, 6: udp6}


@dataclass(frozen=True)
class Kind:
    """Of service: there is one of each."""

    mode: Mode
    affinity: bool
    family: int
    protocol: Protocol

    @property
    def vip(self) -> Vip:
        port = PORTS.get((self.mode, self.affinity), SECOND_CHANCE_PORT)
        return Vip(ip_address(VIPS[self.family]), port, self.protocol)

    @property
    def options(self) -> Options:
        return Options(affinity_s=AFFINITY_S * self.affinity, second_chance=self.mode is Mode.GUE)

    def address(self, backend: int) -> Address:
        return FIRST_BACKENDS[self.family] + backend

    def backend(self, number: int) -> Backend:
        return Backend(self.address(number))

    @cache  # noqa: B019 (there are twenty-two)
    def frame(self, client: int, flags: str) -> bytes:
        """A client's packet; `flags` are TCP's."""
        source = str(CLIENT_ADDRESSES[self.family] + self.household(client))
        ends = {"src": source, "sport": 40000 + client, "dport": self.vip.port}
        if self.protocol is Protocol.UDP:
            return UDP_FRAMES[self.family](**ends)
        return TCP_FRAMES[self.family](flags=flags, **ends)

    def household(self, client: int) -> int:
        """Clients of one address: with affinity they go together."""
        return client // FLOWS_OF_A_CLIENT if self.affinity else client

    def receiver(self, frame: bytes) -> int:
        """The backend that gets a frame that left: by its address in mode nat, else by its MAC address."""
        if self.mode is not Mode.NAT:
            return frame[5]
        return int(ip_address(frame[DESTINATIONS[self.family]])) - int(FIRST_BACKENDS[self.family])


KINDS = [Kind(*of, family, protocol) for of, family, protocol in product(PORTS, (4, 6), Protocol)]


def mac(backend: int) -> bytes:
    return bytes([2, 0, 0, 0, 0, backend])


def next_hops(kind: Kind) -> dict[Address, NextHop]:
    """To every backend there may be, each with a MAC address of its own."""
    source, own_mac = SOURCES[kind.family], bytes.fromhex(LB_MAC.replace(":", ""))
    return {kind.address(n): NextHop("lo", LOOPBACK, source, own_mac, mac(n), True) for n in BACKENDS}


class World:
    """The program, and a control plane on its maps."""

    def __init__(self, program: LoadedProgram, pins: Pins) -> None:
        self._program, self._pins = program, pins
        self.now_ns = START_NS
        self._services: dict[Kind, Service] = {}
        self.start_process()

    def start_process(self) -> None:
        """The control plane knows only what it finds in the maps."""
        self._dataplane = KernelDataplane(self._pins)
        self._dataplane.programs.use(self._program.bpf)

    def clear(self) -> None:
        for vip in list(self._dataplane.vips()):
            self._dataplane.remove(vip)
        self._services.clear()
        self._program.forget()
        self.wait(START_NS - self.now_ns)

    def wait(self, duration_ns: int) -> None:
        self.now_ns += duration_ns
        self._program.set_clock(self.now_ns)

    def put(self, kind: Kind, service: Service) -> None:
        self._services[kind] = service
        self._dataplane.put(service, next_hops(kind))
        self._dataplane.publish(list(self._services.values()))

    def send(self, kind: Kind, client: int, flags: str) -> int | None:
        """The backend that a client's packet reaches."""
        outcome = self._program.run(kind.frame(client, flags), LOOPBACK)
        return kind.receiver(outcome.frame) if outcome.reason == "FORWARDED" else None

    def forward(self, kind: Kind, client: int, flags: str) -> bytes:
        """The frame that leaves with a client's packet, which has somewhere to go."""
        outcome = self._program.run(kind.frame(client, flags), LOOPBACK)
        assert outcome.reason == "FORWARDED"
        return outcome.frame


@dataclass
class Connection:
    backend: int
    sent_ns: int
    answered: bool = False  # its client has sent more than the first packet


ConnectionName = tuple[Kind, int]  # a service and a client: one connection at a time


class OpenConnectionsStay(RuleBasedStateMachine):
    """`open` holds every connection that has the promise."""

    world: World

    def __init__(self) -> None:
        super().__init__()
        self.world.clear()
        self.services: dict[Kind, Service] = {}
        self.open: dict[ConnectionName, Connection] = {}

    def kind(self, index: int) -> Kind:
        return list(self.services)[index % len(self.services)]

    def backend(self, kind: Kind, index: int) -> Backend:
        backends = self.services[kind].backends
        return backends[index % len(backends)]

    @initialize(
        kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=2, unique=True),
        backends=st.sets(st.sampled_from(BACKENDS), min_size=1, max_size=4),
        flow_timeout_s=st.sampled_from([100, 3600]),
    )
    def serve(self, kinds: list[Kind], backends: set[int], flow_timeout_s: int) -> None:
        for kind in kinds:
            members = tuple(map(kind.backend, backends))
            self._put(kind, Service(kind.vip, kind.mode, members, RING_SIZE, flow_timeout_s, kind.options))

    # Clients

    @rule(service=st.integers(0, 1), client=st.sampled_from(CLIENTS))
    def connect(self, service: int, client: int) -> None:
        self._connect(self.kind(service), client)

    @rule(service=st.integers(0, 1))
    def connect_all(self, service: int) -> None:
        for client in CLIENTS:
            self._connect(self.kind(service), client)

    @rule(service=st.integers(0, 1), client=st.sampled_from(CLIENTS))
    def send(self, service: int, client: int) -> None:
        """Of an open connection, or out of the blue."""
        name = self.kind(service), client
        if name in self.open:
            self._go_on(name)
        else:
            self.world.send(*name, "A")

    @precondition(lambda self: self.open)
    @rule(index=st.integers(0, 15), flags=st.sampled_from(["FA", "R", "RA"]))
    def end(self, index: int, flags: str) -> None:
        name = list(self.open)[index % len(self.open)]
        self._go_on(name, flags)
        del self.open[name]

    @precondition(lambda self: self.open)
    @rule(seconds=st.sampled_from([1, 50, 61, 99, 101, 121, 3599, 3601]), silent=st.sets(st.sampled_from(CLIENTS)))
    def wait(self, seconds: int, silent: set[int]) -> None:
        """Silent clients lose the promise in the end; the others send just in time not to."""
        until = self.world.now_ns + seconds * SECOND_NS
        while due := self._due_before(until, silent):
            self._wait_until(self._deadline_ns(due))
            self._go_on(due)
        self._wait_until(until)
        self._keep_promises(name for name in self.open if self._deadline_ns(name) >= self.world.now_ns)

    @rule(silent=st.sets(st.sampled_from(CLIENTS), min_size=1))
    def time_out(self, silent: set[int]) -> None:
        """Transitions end, and with them what is known of silent clients, who then come back."""
        self.wait(max(service.flow_timeout_s for service in self.services.values()) + 1, silent)
        for kind in self.services:
            self._put(kind, self.services[kind])
            for client in silent:
                self._connect(kind, client)

    # The operator

    @rule(service=st.integers(0, 1), number=st.sampled_from(BACKENDS), weight=st.sampled_from([1, 1, 1, 0, 5]))
    def add(self, service: int, number: int, weight: int) -> None:
        """For the first time, or again after its death."""
        kind = self.kind(service)
        if all(b.address != kind.address(number) for b in self.services[kind].backends):
            self._put(kind, self.services[kind].with_backend(replace(kind.backend(number), weight=weight)))

    @rule(service=st.integers(0, 1), index=st.integers(0, 5), draining=st.booleans())
    def drain(self, service: int, index: int, draining: bool) -> None:
        self._change(self.kind(service), index, lambda old: replace(old, draining=draining))

    @rule(service=st.integers(0, 1), index=st.integers(0, 5), weight=st.sampled_from([0, 1, 2, 9]))
    def weight(self, service: int, index: int, weight: int) -> None:
        self._change(self.kind(service), index, lambda old: replace(old, weight=weight))

    @rule(service=st.integers(0, 1), index=st.integers(0, 5))
    def kill(self, service: int, index: int) -> None:
        kind = self.kind(service)
        if self.services[kind].backends:
            self._put(kind, self.services[kind].without_backend(self.backend(kind, index)))

    @rule(
        service=st.integers(0, 1),
        weights=st.dictionaries(st.sampled_from(BACKENDS), st.integers(0, 3)),
        draining=st.sets(st.sampled_from(BACKENDS)),
    )
    def apply(self, service: int, weights: dict[int, int], draining: set[int]) -> None:
        """Many changes at once."""
        kind = self.kind(service)
        backends = tuple(Backend(kind.address(n), 0, weight, n in draining) for n, weight in weights.items())
        self._put(kind, replace(self.services[kind], backends=backends))

    @rule()
    def start_process(self) -> None:
        self.world.start_process()

    def teardown(self) -> None:
        for name in self.open:
            self._go_on(name)

    # What is done

    def _connect(self, kind: Kind, client: int) -> None:
        name = kind, client
        if name not in self.open and (reached := self.world.send(kind, client, "S")) is not None:
            assert self._homes(kind, kind.household(client)) <= {reached}, (
                f"{name} is not where its client's others are"
            )
            self.open[name] = Connection(reached, self.world.now_ns)

    def _homes(self, kind: Kind, household: int) -> set[int]:
        """The backends of what a client has open."""
        names = (name for name in self.open if name[0] == kind and kind.household(name[1]) == household)
        return {self.open[name].backend for name in names}

    def _go_on(self, name: ConnectionName, flags: str = "A") -> None:
        connection = self.open[name]
        assert self.world.send(*name, flags) == connection.backend, f"{name} is not on {connection.backend} any more"
        connection.sent_ns, connection.answered = self.world.now_ns, True

    def _wait_until(self, time_ns: int) -> None:
        self.world.wait(time_ns - self.world.now_ns)

    def _due_before(self, until: int, silent: set[int]) -> ConnectionName | None:
        talking = [name for name in self.open if name[1] not in silent]
        first = min(talking, key=self._deadline_ns, default=None)
        return first if first and self._deadline_ns(first) < until else None

    def _deadline_ns(self, name: ConnectionName) -> int:
        """The last moment for the next packet."""
        timeout_s = self._timeout_s(name[0], self.open[name])
        return self.open[name].sent_ns + timeout_s * SECOND_NS - SETTINGS.refresh_ns

    def _timeout_s(self, kind: Kind, connection: Connection) -> int:
        timeout_s = self.services[kind].flow_timeout_s
        if kind.affinity:
            return min(timeout_s, AFFINITY_S)
        if kind.protocol is Protocol.UDP:
            return min(timeout_s, SETTINGS.udp_timeout_s)
        if kind.mode is Mode.NAT and not connection.answered:
            return min(timeout_s, SETTINGS.nat_opening_timeout_s)
        return timeout_s

    def _keep_promises(self, names: Iterable[ConnectionName]) -> None:
        self.open = {name: self.open[name] for name in names}

    def _change(self, kind: Kind, index: int, change: Callable[[Backend], Backend]) -> None:
        service = self.services[kind]
        if service.backends:
            self._put(kind, service.changing_backend(self.backend(kind, index), change))

    def _put(self, kind: Kind, service: Service) -> None:
        self.world.put(kind, service)
        self.services[kind] = service
        living = {backend.address for backend in service.backends}
        self._keep_promises(
            name
            for name, connection in self.open.items()
            if name[0] != kind or kind.address(connection.backend) in living
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    run_dir: Path = tmp_path_factory.mktemp("run")
    with loaded_program(SETTINGS) as program, pytest.MonkeyPatch.context() as patch:
        world = World(program, Pins(run_dir, "promise"))
        patch.setattr(clock, "now_ns", lambda: world.now_ns)
        yield world


@pytest.fixture(scope="module")
def two_worlds(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[World]]:
    """With one clock, in effect: they wait together."""
    run_dir: Path = tmp_path_factory.mktemp("run")
    with loaded_program(SETTINGS) as program:
        yield [world, World(program, Pins(run_dir, "promise"))]


def test_open_connection_stays_on_its_backend_while_that_lives(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenConnectionsStay, "world", world, raising=False)
    run_state_machine_as_test(
        OpenConnectionsStay,
        settings=settings(
            max_examples=SEQUENCES,
            stateful_step_count=STEPS,
            derandomize=not FUZZ,
            # Making a failure smaller takes minutes.
            phases=[Phase.generate, Phase.shrink] if FUZZ else [Phase.generate],
            database=None,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


# Two balancers


HOPPERS = range(64)  # clients whose packets come in at either balancer
ROUNDS = 40 if FUZZ else 8


class Tier:
    """Two balancers with the same services and a common seed, and backends that hand on what they do not know."""

    def __init__(self, balancers: list[World], kind: Kind, random: Random) -> None:
        self._balancers, self.kind, self._random = balancers, kind, random
        self._owners: dict[int, int] = {}  # client -> the backend that has its connection
        self.handed_on = 0

    def put(self, service: Service) -> None:
        for balancer in self._balancers:
            balancer.put(self.kind, service)

    def wait(self, seconds: int) -> None:
        for balancer in self._balancers:
            balancer.wait(seconds * SECOND_NS)

    def open(self, clients: Iterable[int]) -> None:
        for client in clients:
            self._owners[client] = self._reached(self._either(), client, "S")[0]

    def speak(self, clients: Iterable[int], flags: str = "A") -> None:
        """Asserts that each packet gets to its connection."""
        for client in clients:
            self._speak(self._either(), client, flags)

    def speak_everywhere(self, clients: Iterable[int]) -> None:
        for client, balancer in product(clients, self._balancers):
            self._speak(balancer, client, "A")

    def _either(self) -> World:
        return self._random.choice(self._balancers)

    def _speak(self, balancer: World, client: int, flags: str) -> None:
        first, other = self._reached(balancer, client, flags)
        assert self._owners[client] in (first, other), f"client {client}: not at {self._owners[client]}"
        self.handed_on += first != self._owners[client]

    def _reached(self, balancer: World, client: int, flags: str) -> tuple[int, int | None]:
        """The backend that gets a packet, and the one that it is told of."""
        frame = balancer.forward(self.kind, client, flags)
        data = frame[packets.ETHERNET_HEADER_SIZE + IP_HEADER_SIZE[self.kind.family] + UDP_HEADER_SIZE :]
        return self.kind.receiver(frame), self._named(data) if data[0] else None

    def _named(self, gue: bytes) -> int:
        size = 4 if self.kind.family == 4 else 16
        assert gue[4:8] == b"X2" + bytes([self.kind.family, 0])
        return int(ip_address(gue[8 : 8 + size])) - int(FIRST_BACKENDS[self.kind.family])


def go_through_an_addition(tier: Tier, service: Service, random: Random) -> None:
    """Connections are opened before and after it. What a balancer sees while it lasts, it sends right later too."""
    tier.open(HOPPERS[::2])
    tier.put(service)
    tier.open(HOPPERS[1::2])
    for _ in range(4):
        tier.speak(random.sample(HOPPERS, len(HOPPERS)))
        tier.wait(service.flow_timeout_s // 5)
    tier.speak_everywhere(HOPPERS)
    tier.wait(service.flow_timeout_s // 2)
    tier.put(service)
    tier.speak_everywhere(HOPPERS)
    tier.speak(HOPPERS, "FA")
    tier.wait(service.flow_timeout_s + 1)


@pytest.mark.parametrize("family", [4, 6])
def test_flows_that_hop_between_two_balancers_find_their_backend_while_backends_are_added(
    two_worlds: list[World], family: int
) -> None:
    random, kind = Random(time.time_ns() if FUZZ else family), Kind(Mode.GUE, False, family, Protocol.TCP)
    tier = Tier(two_worlds, kind, random)
    for turn in range(ROUNDS):
        for world in two_worlds:
            world.clear()
        first = random.sample(BACKENDS, 1 + turn % 5)
        added = random.choice([number for number in BACKENDS if number not in first])
        service = Service(kind.vip, kind.mode, tuple(map(kind.backend, first)), RING_SIZE, 100, kind.options)
        tier.put(service)
        go_through_an_addition(tier, service.with_backend(kind.backend(added)), random)
    assert tier.handed_on > ROUNDS
