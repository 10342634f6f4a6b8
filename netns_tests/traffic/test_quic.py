"""QUIC connections whose client changes its port and address: with server IDs in their connection IDs they stay with
their backend, in every mode and both families. Real servers and clients; all is configured by the command.

Flows are chosen by the hash that the balancer uses, so that each change of the client's end of the connection leads to
another backend where the connection ID does not count.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from lb.hashing import maglev
from lb.hashing.flow_hash import flow_hash, slot_of
from netns_tests.bed.quic import QuicClient, QuicServer, configuration_of, connected_socket
from netns_tests.bed.topology import FRONT, IFA_F_NODAD, Bed, Host
from netns_tests.bed.traffic import FAMILIES, bracketed, service_status
from netns_tests.bed.tunnelled import end_tunnels_on
from xdp.object import LB_OBJECT, BpfObject

PORTS = {"nat": 4433, "dr": 4434, "ipip": 4435, "gue": 4436}
BALANCED = ("b1", "b2", "b3")
SERVER_IDS = {"b1": "0:0a", "b2": "0:0b", "b3": "0:0c", "b4": "0:0d"}
ROTATED = {"b1": "1:0a0a", "b2": "1:0b0b", "b3": "1:0c0c"}
RING_SIZE = 16381
LOST_WITHIN_S = 1.5


@dataclass
class Way:
    """A QUIC service over the first three backends, in one mode and one family."""

    bed: Bed
    seed: int
    mode: str
    family: str
    _ports: Iterator[int] = field(default_factory=lambda: itertools.count(20000))

    @property
    def port(self) -> int:
        return PORTS[self.mode]

    @property
    def address(self) -> str:
        return self.bed.vip4 if self.family == "ipv4" else self.bed.vip6

    @property
    def vip(self) -> str:
        return f"{bracketed(self.address)}:{self.port}/udp"

    @property
    def client_addresses(self) -> tuple[str, str]:
        station = FRONT.ipv4 if self.family == "ipv4" else FRONT.ipv6
        return station(1), station(3)

    def backend(self, label: str) -> str:
        host = next(host for host in self.bed.backends if host.label == label)
        return f"{bracketed(host.ipv4 if self.family == 'ipv4' else host.ipv6)}:{self.port}"

    def command(self, *words: str) -> None:
        self.bed.xdp_lb(*words)

    def serve(self) -> None:
        self.command("vip", "add", self.vip, "--mode", self.mode, "--backends", ",".join(map(self.backend, BALANCED)))
        for label in BALANCED:
            self.name(label, SERVER_IDS[label])

    def name(self, label: str, *server_ids: str) -> None:
        self.command("backend", "server-id", self.vip, self.backend(label), *server_ids)

    def home(self, source: str, port: int, labels: Sequence[str] = BALANCED) -> str:
        """The backend that the ring has for a flow of the client's."""
        words = struct.unpack("=I" if self.family == "ipv4" else "=4I", packed(source))
        slot = slot_of(flow_hash(self.seed, socket.IPPROTO_UDP, socket.htons(port), words), RING_SIZE)
        return labels[maglev.table({self.backend(label): 1 for label in labels}, RING_SIZE)[slot]]

    def socket_at(self, home: str, source: str) -> socket.socket:
        """From a port that no test has had, whose flow is at home there."""
        return self.socket(source, next(port for port in self._ports if self.home(source, port) == home))

    def socket_on_moving_slot(self, home: str, source: str) -> socket.socket:
        """Likewise, and b4 gets the slot when it is added."""
        moving = (port for port in self._ports if self.home(source, port, (*BALANCED, "b4")) == "b4")
        return self.socket(source, next(port for port in moving if self.home(source, port) == home))

    def socket(self, source: str, port: int) -> socket.socket:
        return connected_socket(self.bed.client, (source, port), (self.address, self.port))

    def connect(self, home: str) -> contextlib.closing[QuicClient]:
        """A connection from the client's first address."""
        return contextlib.closing(QuicClient(self.socket_at(home, self.client_addresses[0])))

    def packets(self, label: str) -> int:
        backends = service_status(self.bed, self.vip)["backends"]
        return next(int(b["packets"]) for b in backends if b["backend"] == self.backend(label))


def packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


@pytest.fixture(scope="module")
def seed() -> int:
    with BpfObject.open(LB_OBJECT) as obj:
        obj.load()
        return int(obj.map(".rodata")[0].config.hash_seed)


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    """Four backends that end tunnels and own the VIPs, a client with two addresses of each family."""
    with Bed(backends=4, router=True) as b:
        for backend in b.backends:
            end_tunnels_on(b, backend, "--vip", f"{b.vip4},{b.vip6}", "--setup-vip")
        with b.client.netlink() as ip:
            (index,) = ip.link_lookup(ifname="eth0")
            ip.addr("add", index=index, address=FRONT.ipv4(3), prefixlen=24)
            ip.addr("add", index=index, address=FRONT.ipv6(3), prefixlen=64, flags=IFA_F_NODAD)
        b.xdp_lb("attach", "eth0", "--vip", f"{b.vip4}:80", "--backends", b.backends[0].ipv4)
        yield b


@pytest.fixture(scope="module")
def servers(bed: Bed) -> dict[str, QuicServer]:
    return {host.label: start_server(bed, host) for host in bed.backends}


def start_server(bed: Bed, host: Host) -> QuicServer:
    addresses = [bed.vip4, bed.vip6, host.ipv4, host.ipv6]
    return QuicServer(host, SERVER_IDS[host.label], list(PORTS.values()), addresses)


@pytest.fixture(scope="module", params=list(itertools.product(PORTS, FAMILIES)), ids="-".join)
def way(bed: Bed, seed: int, servers: dict[str, QuicServer], request: pytest.FixtureRequest) -> Iterator[Way]:
    made = Way(bed, seed, *request.param)
    made.serve()
    yield made
    made.command("vip", "remove", made.vip)


@pytest.fixture
def way_to_change(way: Way) -> Iterator[Way]:
    """The ring of the service may change: the next test has a new one, without a history."""
    yield way
    way.command("vip", "remove", way.vip)
    way.serve()


def test_connection_stays_when_the_clients_port_and_then_its_address_changes(way: Way) -> None:
    first, second = way.client_addresses
    with way.connect(home="b1") as client:
        assert client.ask("before") == "b1 before"
        client.rebind(way.socket_at("b2", first))
        assert client.ask("from another port") == "b1 from another port"
        client.migrate(way.socket_at("b3", second))
        assert client.ask("from another address") == "b1 from another address"
        client.migrate(way.socket_at("b2", first))
        assert client.ask("back") == "b1 back"


def test_without_server_ids_the_connection_is_lost_until_they_are_given(way: Way) -> None:
    with way.connect(home="b1") as client:
        way.name("b1", "none")
        assert client.ask("before") == "b1 before"
        strangers_before = way.packets("b2")
        client.migrate(way.socket_at("b2", way.client_addresses[1]))
        with pytest.raises(TimeoutError):
            client.ask("lost", timeout_s=LOST_WITHIN_S)
        assert way.packets("b2") > strangers_before
        way.name("b1", SERVER_IDS["b1"])
        assert client.hear() == "b1 lost"


def test_connection_moves_to_a_port_that_another_connection_of_the_client_had(way: Way) -> None:
    """As ports of a NAT in front of the clients do."""
    with way.connect(home="b1") as client, contextlib.closing(way.socket_at("b2", way.client_addresses[1])) as local:
        source, port, *_ = local.getsockname()
        with contextlib.closing(QuicClient(local)) as other:
            assert other.ask("mine") == "b2 mine"
        client.migrate(way.socket(source, port))
        assert client.ask("mine now") == "b1 mine now"


def test_new_connections_are_balanced_by_their_flows(way: Way) -> None:
    source = way.client_addresses[0]
    answered = Counter[tuple[str, str]]()
    for port in range(50000, 50012):
        with contextlib.closing(QuicClient(way.socket(source, port))) as client:
            answered[way.home(source, port), client.ask("who?")] += 1
    assert set(answered) == {(label, f"{label} who?") for label in BALANCED}


def test_connections_of_two_configurations_stay_side_by_side(way: Way, servers: dict[str, QuicServer]) -> None:
    with contextlib.ExitStack() as closing:
        for label in ROTATED:
            closing.callback(servers[label].take_server_id, SERVER_IDS[label])
        old = closing.enter_context(way.connect(home="b1"))
        for label, server_id in ROTATED.items():
            way.name(label, SERVER_IDS[label], server_id)
            servers[label].take_server_id(server_id)
        new = closing.enter_context(way.connect(home="b1"))
        assert [configuration_of(client.connection_id) for client in (old, new)] == [0, 1]
        for client, question in itertools.product((old, new), ("one", "two")):
            client.migrate(way.socket_at("b2" if question == "one" else "b3", way.client_addresses[1]))
            assert client.ask(question) == f"b1 {question}"


def test_connection_stays_when_a_backend_is_added_and_its_own_is_drained(way_to_change: Way) -> None:
    way = way_to_change
    with way.connect(home="b1") as client:
        assert client.ask("before") == "b1 before"
        way.command("backend", "add", way.vip, way.backend("b4"), "--server-id", SERVER_IDS["b4"])
        assert client.ask("added") == "b1 added"
        client.migrate(way.socket_on_moving_slot("b2", way.client_addresses[1]))
        assert client.ask("migrated") == "b1 migrated"
        way.command("backend", "drain", way.vip, way.backend("b1"))
        client.migrate(way.socket_on_moving_slot("b3", way.client_addresses[0]))
        assert client.ask("drained") == "b1 drained"
