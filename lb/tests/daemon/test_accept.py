"""Limits on connections and requests: what is beyond them, and that what is within goes on."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from lb.api import in_flight
from lb.api.access import Role
from lb.api.in_flight import InFlight
from lb.client.client import Client
from lb.daemon import accept, listener
from lb.daemon.accept import Admission, Connections, Limits
from lb.errors import DaemonError
from lb.formats.problems import Problem
from lb.runtime.rejections import LOG_S, REASONS, Rejections
from lb.tests.fakes.daemon import Running, serving
from lb.tests.fakes.host import RING, Host
from lb.tests.fakes.tls import Certificate, Remote, serving_tcp

DEADLINE_S = 20.0


@pytest.fixture
def host(tmp_path: Path) -> Host:
    host = Host(tmp_path / "default" / "state.db")
    host.lines("attach", "eth0", "--backends", "10.0.0.11,10.0.0.12", *RING)
    return host


@pytest.fixture
def remote(host: Host, tmp_path: Path) -> Iterator[Remote]:
    with serving_tcp(host, tmp_path, Certificate(tmp_path)) as made:
        yield made


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        threading.Event().wait(0.01)


@contextmanager
def local(running: Running) -> Iterator[httpx.Client]:
    transport = httpx.HTTPTransport(uds=str(running.settings.socket))
    with httpx.Client(transport=transport, base_url="http://xdp-lb") as client:
        yield client


def rejected(running: Running, reason: str) -> int:
    with local(running) as http:
        lines = http.get("/metrics").text.splitlines()
    (line,) = (line for line in lines if line.startswith(f'xdp_lb_api_rejected_total{{reason="{reason}"}}'))
    return int(float(line.split()[1]))


# Connections


def test_a_listener_that_is_full_says_so_and_has_room_again(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "UNIX_LIMITS", Limits(connections=3, of_address=9, reserved=0))
    with serving(host, tmp_path) as daemon, ExitStack() as stack:
        connections = daemon.daemon._listeners[0].server_state.connections
        for _ in range(3):
            held = stack.enter_context(closing(socket.socket(socket.AF_UNIX)))
            held.connect(str(daemon.settings.socket))
        wait_for(lambda: len(connections) == 3, "connected")
        with Client.unix(daemon.settings.socket) as client, pytest.raises(DaemonError, match=r"^daemon: too many conn"):
            client.services()
        stack.close()
        wait_for(lambda: not connections, "gone")
        with Client.unix(daemon.settings.socket) as client:
            assert client.services().value
        assert rejected(daemon, "connections") == 1


def test_an_address_keeps_out_only_itself(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(connections=100, of_address=2, reserved=0)
    limit_tcp(remote, limits, monkeypatch)
    with ExitStack() as stack:
        held = [stack.enter_context(closing(socket.create_connection(remote.address))) for _ in range(3)]
        held[2].settimeout(DEADLINE_S)
        assert held[2].recv(1) == b""  # while the others are in their handshake
        with socket.socket() as other:
            other.bind(("127.0.0.2", 0))
            other.settimeout(DEADLINE_S)
            other.connect(remote.address)
            assert rejected(remote.running, "connections_of_address") == 1
            assert not is_closed(other)
    with remote.http() as http:
        wait_for(lambda: answers(http), "room again")


def limit_tcp(remote: Remote, limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    acceptor: Any = remote.running.daemon._listeners[1].servers[0]
    monkeypatch.setattr(acceptor._connections, "_limits", limits)


def is_closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False


def answers(http: httpx.Client) -> bool:
    try:
        return http.get("/healthz").status_code == 200
    except httpx.HTTPError:
        return False


def test_tcp_leaves_descriptors_to_the_unix_socket(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    none_left = Limits(connections=100, of_address=100, reserved=10**9)
    limit_tcp(remote, none_left, monkeypatch)
    with closing(socket.create_connection(remote.address)) as refused:
        refused.settimeout(DEADLINE_S)
        assert refused.recv(1) == b""
    assert rejected(remote.running, "descriptors") == 1


def test_a_connection_is_counted_once_and_released_once() -> None:
    connections = Connections(Limits(connections=2, of_address=1, reserved=0))
    first = connections.admit("a")
    assert connections.fault(3, "a") == ("connections_of_address", "too many connections of one address or user (1)")
    assert connections.fault(3, "b") is None
    assert connections.fault(3, "") is None  # root
    connections.admit("b")
    assert connections.fault(3, "c") == ("connections", "too many connections (2)")
    first.release()
    first.release()
    assert connections.fault(3, "a") is None
    assert connections.fault(10**9, "a") is not None


def test_accepting_pauses_when_there_is_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accept, "PAUSE_S", 0.01)
    said: list[str] = []
    tries = 0

    async def run() -> None:
        loop, served = asyncio.get_running_loop(), asyncio.Event()
        real = loop.sock_accept

        async def failing(listening: socket.socket) -> tuple[socket.socket, object]:
            nonlocal tries
            tries += 1
            if tries <= 3:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return await real(listening)

        async def serve(sock: socket.socket, peer: object, admission: Admission) -> None:
            sock.close()
            admission.release()
            served.set()

        monkeypatch.setattr(loop, "sock_accept", failing)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            limits = Limits(connections=1, of_address=1, reserved=0)
            acceptor = accept.Acceptor(listening, Connections(limits), serve, Rejections(said.append))
            with socket.create_connection(listening.getsockname()):
                await asyncio.wait_for(served.wait(), DEADLINE_S)
            acceptor.close()
            await acceptor.wait_closed()

    asyncio.run(run())
    assert said == ["descriptors"] * 3


# Requests


def test_event_streams_of_a_token_are_limited(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_flight, "STREAMS_OF_TOKEN", 2)
    monkeypatch.setattr(in_flight, "STREAMS", 3)
    with remote.http(remote.tokens[Role.READ]) as http, local(remote.running) as near, ExitStack() as stack:
        for _ in range(2):
            assert stack.enter_context(http.stream("GET", "/v1/events")).status_code == 200
        refused = http.get("/v1/events")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["detail"].startswith("too many event streams of this token (2)")
        assert http.get("/v1/services").status_code == 200
        assert stack.enter_context(near.stream("GET", "/v1/events")).status_code == 200
        assert near.get("/v1/events").json()["detail"].startswith("too many event streams (3)")
        stack.close()
        wait_for(lambda: opens(http), "room again")
    assert rejected(remote.running, "streams") >= 2


def opens(http: httpx.Client) -> bool:
    with http.stream("GET", "/v1/events") as answer:
        return answer.status_code == 200


def test_requests_of_a_token_are_limited_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_flight, "OF_TOKEN", 2)
    flight = InFlight(Rejections(lambda reason: None))
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(flight.entered("token a", "/v1/status", limited=True))
        with pytest.raises(Problem, match=r"too many requests of this token at a time \(2\)"):
            stack.enter_context(flight.entered("token a", "/v1/status", limited=True))
        stack.enter_context(flight.entered("token b", "/v1/status", limited=True))
        for _ in range(5):
            stack.enter_context(flight.entered("uid 0 (root)", "/v1/status", limited=False))
    with flight.entered("token a", "/v1/status", limited=True):
        pass


# Bodies


@pytest.mark.parametrize("body", [b'{"services":[' + b"{}," * 250_000 + b"{}]}", b"[" + b"[]," * 250_000 + b"[]]"])
def test_a_body_of_too_many_values_is_not_read(remote: Remote, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    with remote.http(remote.tokens[Role.READ]) as http:
        answer = http.post("/v1/plan", content=body, headers=headers)
    assert (answer.status_code, answer.json()["detail"]) == (
        413,
        "request body has more than 200000 values: send fewer at a time",
    )
    assert rejected(remote.running, "body_size") == 1
    with local(remote.running) as near:
        assert near.post("/v1/plan", content=body, headers=headers).status_code == 422


def test_values_in_a_large_body_are_pointed_at_as_in_a_small_one(host: Host, tmp_path: Path) -> None:
    good = {"vip": "10.0.0.1:80", "ring_size": 251, "backends": [{"backend": "10.0.0.11"}]}
    with serving(host, tmp_path) as daemon, local(daemon) as http:
        for number in (0, 2000):
            services = [{**good, "vip": f"10.9.{n // 250}.{n % 250}:80"} for n in range(number)]
            for wrong, field, detail in (
                ({**good, "backends": [{"weight": "x"}]}, "backends/0/weight", "Input should be a valid integer"),
                ({**good, "more": 1}, "more", "Extra inputs are not permitted"),
                (7, "", "Input should be a valid dictionary or instance of ServiceBody"),
            ):
                problem = http.post("/v1/plan", json={"services": [*services, wrong]}).json()
                where = f"/services/{number}" + (f"/{field}" if field else "")
                assert (problem["status"], problem["field"]) == (422, where)
                assert problem["detail"] == f"{where[1:].replace('/', '.')}: {detail}"


# What is said of it


def test_rejections_are_all_counted_and_logged_once_in_a_while() -> None:
    from structlog.testing import capture_logs

    counted: list[str] = []
    now_s = 0.0
    with capture_logs() as said:
        rejections = Rejections(counted.append, clock=lambda: now_s)
        for _ in range(100):
            rejections.add("streams", "too many")
        rejections.add("host", "not a name")
        now_s = LOG_S
        rejections.add("streams", "too many")
    assert counted.count("streams") == 101
    assert [(line["reason"], line.get("not_logged")) for line in said] == [
        ("streams", None),
        ("host", None),
        ("streams", 99),
    ]
    assert set(counted) <= set(REASONS)
