"""Commands, and programs, through the daemon: what they say is what they would say without it."""

from __future__ import annotations

import inspect
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner

from lb.cli.main import cli
from lb.client.balancer import RemoteBalancer
from lb.client.client import Client
from lb.client.connect import daemon_listens
from lb.control.balancer import Balancer
from lb.errors import AlreadyExists, Conflict, DaemonError, DataplaneError, InvalidInput, NotFound
from lb.model.forwarding import OpenConnections
from lb.model.state import Backend, Service
from lb.model.vip import Vip
from lb.tests.fakes.daemon import Running, serving, through
from lb.tests.fakes.host import RING, WEB, Host
from lb.tests.fakes.memory import MemoryDataplane

FILE = """
[[service]]
vip = "10.0.0.1:80/tcp"
ring_size = 251
backends = ["10.0.0.11", {address = "10.0.0.14", weight = 2, drain = true}]
[[service]]
vip = "10.0.0.50:443/udp"
mode = "dr"
ring_size = 251
affinity = 60
sources = ["192.0.2.0/24"]
backends = [{address = "10.0.0.12", server_ids = ["0:0a1b"]}]
"""

# One after the other, on one host.
COMMANDS: list[tuple[str, ...]] = [
    ("status",),
    ("vip", "list"),
    ("backend", "list"),
    ("attach", "eth0"),
    ("attach", "nothing0", "--backends", "10.0.0.11"),
    ("attach", "eth2", "--backends", "10.0.0.11"),
    ("attach", "eth0", "--backends", "10.0.0.11,10.0.0.12", *RING, "--dry-run"),
    ("attach", "eth0", "--backends", "10.0.0.11,10.0.0.12", *RING),
    ("attach", "eth0", "eth1", "--xdp-mode", "generic", "--json"),
    ("attach", "eth0", "--backends", "10.0.0.13", *RING),
    ("vip", "add", "10.0.0.100:80", "--backends", "10.0.0.11,10.1.0.12", *RING),
    ("vip", "add", "10.0.0.100:80", "--backends", "10.0.0.11"),
    ("vip", "add", "10.0.0.100:80@near", "--source", "192.0.2.0/24", "--backends", "10.0.0.21", *RING, "--json"),
    ("vip", "add", "10.0.0.101:80", "--mode", "dr", "--backends", "10.0.0.11:81"),
    ("vip", "add", "10.0.0.101:53/udp", "--backends", "172.16.0.1"),
    ("vip", "add", "[2001:db8::50]:443", "--backends", "[2001:db8::11]:8443@3", *RING, "--no-vip-address"),
    ("vip", "add", "10.0.1.0/24:8000-8999", "--mode", "dr", "--backends", "10.0.0.11", *RING, "--echo"),
    ("vip", "add", "10.0.1.0/24:8000-8999", "--mode", "dr", "--backends", "10.0.0.11", *RING),
    ("vip", "set", WEB, "--mss", "1400", "--echo", "--syn-limit", "10"),
    ("vip", "set", WEB, "--mss", "1400"),
    ("vip", "set", WEB, "--mss", "3"),
    ("vip", "set", WEB, "--affinity", "60"),
    ("vip", "set", "10.0.0.77:80", "--echo"),
    ("vip", "list"),
    ("vip", "list", "--json"),
    ("backend", "add", WEB, "10.0.0.13@3", "--dry-run"),
    ("backend", "add", WEB, "10.0.0.13@3", "--json"),
    ("backend", "add", WEB, "10.0.0.13"),
    ("backend", "add", WEB, "10.0.0.1"),
    ("backend", "drain", WEB, "10.0.0.11"),
    ("backend", "drain", WEB, "10.0.0.99"),
    ("backend", "drain", WEB, "10.0.0.12", "10.0.0.99"),
    ("backend", "undrain", WEB, "10.0.0.11", "10.0.0.12"),
    ("backend", "weight", WEB, "10.0.0.11", "10.0.0.12", "2"),
    ("backend", "remove", WEB, "10.0.0.11", "10.0.0.99"),
    ("backend", "remove", WEB, "10.0.0.11", "10.0.0.12", "10.0.0.11", "--dry-run"),
    ("backend", "weight", WEB, "10.0.0.11", "5"),
    ("backend", "weight", WEB, "10.0.0.11", "-1"),
    ("backend", "weight", WEB, "10.0.0.11", "5"),
    ("backend", "server-id", WEB, "10.0.0.11", "0:0a"),
    ("backend", "remove", WEB, "10.0.0.13", "--dry-run", "--json"),
    ("backend", "remove", WEB, "10.0.0.13"),
    ("backend", "list"),
    ("backend", "list", WEB, "--json"),
    ("status",),
    ("status", "--json"),
    ("vip", "remove", "10.0.0.100:80"),
    ("vip", "remove", "10.0.0.100:80@near"),
    ("apply", "-f", "FILE", "--dry-run"),
    ("apply", "-f", "FILE"),
    ("apply", "-f", "FILE", "--json"),
    ("backend", "server-id", "10.0.0.50:443/udp", "10.0.0.12", "none"),
    ("detach", "eth7"),
    ("detach", "eth1", "--dry-run"),
    ("detach", "--json"),
    ("vip", "remove", WEB),
    ("status",),
]


def host_in(directory: Path) -> Host:
    directory.mkdir()
    return Host(directory / "state.db")


def run(host: Host, opener: object, words: tuple[str, ...], file: Path) -> tuple[int, str, str]:
    named = [str(file) if word == "FILE" else word for word in words]
    result = CliRunner().invoke(cli, named, obj=opener)
    return result.exit_code, result.stdout, result.stderr


def test_every_command_says_the_same_with_and_without_the_daemon(tmp_path: Path) -> None:
    plain, served = host_in(tmp_path / "plain"), host_in(tmp_path / "served")
    file = tmp_path / "lb.toml"
    file.write_text(FILE)
    with serving(served, tmp_path) as daemon:
        for words in COMMANDS:
            expected = run(plain, plain, words, file)
            assert run(served, through(served, daemon), words, file) == expected, words
    with plain.open(write=False) as one, served.open(write=False) as other:
        assert one.state == other.state
    assert plain.network.held == served.network.held


def test_the_remote_balancer_has_the_words_of_the_balancer() -> None:
    """All that commands call; conditions and whole services are set by the daemon itself."""
    methods = {name for name, _ in inspect.getmembers(RemoteBalancer, inspect.isfunction) if name[0] != "_"}
    for name in methods:
        assert inspect.signature(getattr(RemoteBalancer, name)) == inspect.signature(getattr(Balancer, name)), name
    assert {"attach", "detach", "apply", "status", "add_service", "set_options", "set_server_ids"} <= methods


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "default" / "state.db")


@pytest.fixture
def daemon(host: Host, tmp_path: Path) -> Iterator[Running]:
    with serving(host, tmp_path) as running:
        yield running


@pytest.fixture
def client(host: Host, daemon: Running) -> Iterator[Client]:
    host_words = ("attach", "eth0", "--backends", "10.0.0.11,10.0.0.12", *RING)
    assert CliRunner().invoke(cli, host_words, obj=through(host, daemon)).exit_code == 0
    with Client.unix(daemon.settings.socket) as made:
        yield made


VIP = Vip.parse(WEB)


def test_a_service_is_read_and_changed_by_its_entity_tag(client: Client) -> None:
    found = client.service(VIP)
    assert [str(b) for b in found.value.backends] == ["10.0.0.11:80", "10.0.0.12:80"]
    client.drain_backend(VIP, found.value.backends[0], etag=found.etag)
    assert client.service(VIP).value.backends[0].draining
    with pytest.raises(Conflict, match="modified since it was read"):
        client.set_weight(VIP, found.value.backends[0], 7, etag=found.etag)
    client.set_weight(VIP, found.value.backends[0], 7, etag=client.service(VIP).etag)
    backend = client.service(VIP).value.backends[0]
    assert (backend.weight, backend.draining) == (7, False)


def test_a_service_that_was_read_can_be_put_back_as_it_is(client: Client) -> None:
    found = client.service(VIP)
    report = client.put_service(found.value)
    assert report.changes == ()
    assert client.service(VIP) == found


def test_the_whole_configuration_has_an_entity_tag_too(client: Client) -> None:
    before = client.services()
    client.apply(before.value, etag=before.etag)
    client.add_backends(VIP, [Backend.parse("10.0.0.13", 80)])
    with pytest.raises(Conflict):
        client.apply(before.value, etag=before.etag)
    assert client.services().etag != before.etag


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda c: c.service(Vip.parse("10.0.0.9:80")), NotFound),
        (lambda c: c.add_service(Service(VIP)), AlreadyExists),
        (lambda c: c.remove_backend(VIP, Backend.parse("10.0.0.99:80")), NotFound),
        (lambda c: c.set_options(VIP, {"mss": 3}), InvalidInput),
        (lambda c: c.detach(["eth5"]), NotFound),
    ],
)
def test_errors_are_those_of_the_balancer(client: Client, change: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        change(client)  # type: ignore[operator]


def test_a_kernel_that_refuses_is_heard_of_and_the_old_state_stays(client: Client, host: Host) -> None:
    before = client.services()
    host.dataplane.fuse.fail_after(2)
    with pytest.raises(DataplaneError, match="the fuse has blown"):
        client.add_backends(VIP, [Backend.parse("10.0.0.13", 80)])
    assert client.services() == before


def test_what_others_have_set_meanwhile_stays(client: Client, host: Host) -> None:
    """`vip set` of one option, while somebody else sets another."""
    remote = RemoteBalancer(client, host.network)
    options = remote.state.service(VIP).options
    client.set_options(VIP, {"syn_limit": 5})
    remote.set_options(VIP, type(options)(mss=1400))
    now = client.service(VIP).value.options
    assert (now.mss, now.syn_limit) == (1400, 5)


def test_changes_are_told_to_listeners_and_told_again_to_late_ones(client: Client) -> None:
    client.add_backends(VIP, [Backend.parse("10.0.0.13", 80)])
    seen = client.events(after="nothing-0")
    first = [next(seen) for _ in range(4)]
    assert [event.kind for event in first] == ["missed", "attach", "change", "change"]
    assert first[-1].document["summary"].startswith(f"{WEB}: backend 10.0.0.13:80 added")
    assert first[-1].document["plan"]["slots"] == 251
    again = client.events(after=first[2].id)
    assert next(again) == first[3]
    client.remove_backend(VIP, Backend.parse("10.0.0.13", 80))
    assert next(seen).id == next(again).id


def test_the_connections_that_end_are_what_the_daemon_has_counted(client: Client, host: Host) -> None:
    host.dataplane.opened[VIP, "10.0.0.11:80"] = OpenConnections(7, estimated=True)
    assert client.status().services[0].backends[0].open == OpenConnections(7, estimated=True)
    report = client.remove_backend(VIP, Backend.parse("10.0.0.11", 80), dry_run=True)
    assert report.ending == report.changes[0].ending == OpenConnections(7, estimated=True)


def test_dry_runs_are_told_to_nobody(client: Client, daemon: Running) -> None:
    before = client.services()
    report = client.drain_backend(VIP, Backend.parse("10.0.0.11", 80), dry_run=True)
    assert report.dry_run
    assert report.changes[0].plan
    assert client.services() == before
    assert len(list_of_kept(client)) == 2  # attached, and the first service


def list_of_kept(client: Client) -> list[str]:
    kinds = []
    for event in client.events(after="nothing-0"):
        kinds.append(event.kind)
        if len(kinds) == 3:
            break
    return kinds[1:]


def test_the_end_of_the_daemon_ends_the_events(client: Client, daemon: Running) -> None:
    seen = client.events(after="nothing-0")
    next(seen)
    daemon.stop()
    assert [event.kind for event in seen] == ["attach", "change"]


def test_a_socket_without_a_daemon_is_none(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    assert not daemon_listens(path)
    with closing(socket.socket(socket.AF_UNIX)) as left:
        left.bind(str(path))
    assert path.exists()
    assert not daemon_listens(path)
    path.unlink()
    path.write_text("")
    assert not daemon_listens(path)


@pytest.mark.filterwarnings("ignore:.*<socket:pytest.PytestUnraisableExceptionWarning")  # httpcore's, not connected
def test_a_daemon_that_is_gone_is_one_line(daemon: Running) -> None:
    with Client.unix(daemon.settings.socket) as client:
        client.services()
        daemon.stop()
        with pytest.raises(DaemonError, match="no response"):
            client.services()


def test_an_answer_of_something_else_is_one_line(tmp_path: Path) -> None:
    with closing(socket.socket(socket.AF_UNIX)) as listening:
        listening.bind(str(tmp_path / "other.sock"))
        listening.listen()

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(10000)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

        thread = threading.Thread(target=answer)
        thread.start()
        with (
            Client.unix(tmp_path / "other.sock") as client,
            pytest.raises(DaemonError, match="check that its version is the same"),
        ):
            client.status()
        thread.join()


def test_memory_has_what_the_daemon_says_it_has(client: Client, host: Host) -> None:
    dataplane: MemoryDataplane = host.dataplane
    assert {str(vip) for vip in dataplane.vips()} == {str(s) for s in client.services().value}
    assert [s.service for s in client.status().services] == list(client.services().value)
    assert client.stats()["services"][0]["backends"][0]["backend"] == "10.0.0.11:80"
