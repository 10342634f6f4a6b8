"""Browsers: names that DNS has rebound, pages of other origins, forwarded sockets, and sessions of the page itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from lb.api import sessions as module
from lb.api.access import Role
from lb.api.origin import host_name
from lb.api.sessions import Sessions
from lb.cli.main import cli
from lb.client.client import Client
from lb.client.connect import HostConnector
from lb.tests.fakes.daemon import Running, serving
from lb.tests.fakes.host import RING, Host
from lb.tests.fakes.tls import Certificate, Remote, serving_tcp

BACKEND = "/v1/services/10.0.0.1:80/backends/10.0.0.11"
BROWSER = {"Host": "localhost:8080", "Sec-Fetch-Site": "same-origin", "Origin": "http://localhost:8080"}


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    directory = tmp_path_factory.mktemp("origin")
    host = Host(directory / "default" / "state.db")
    host.lines("attach", "eth0", "--backends", "10.0.0.11,10.0.0.12", *RING)
    with serving_tcp(host, directory, Certificate(directory), allowed_hosts=("lb.example.com",)) as made:
        yield made


@contextmanager
def local(running: Running) -> Iterator[httpx.Client]:
    transport = httpx.HTTPTransport(uds=str(running.settings.socket))
    with httpx.Client(transport=transport, base_url="http://xdp-lb") as client:
        yield client


@pytest.fixture
def near(remote: Remote) -> Iterator[httpx.Client]:
    with local(remote.running) as client:
        yield client


@pytest.fixture
def far(remote: Remote) -> Iterator[httpx.Client]:
    with remote.http(remote.tokens[Role.WRITE]) as client:
        yield client


def weight(near: httpx.Client) -> int:
    return int(near.get("/v1/services/10.0.0.1:80/backends").json()[0]["weight"])


def refused(answer: httpx.Response, status: int) -> str:
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    return str(answer.json()["detail"])


# The name it is called by


@pytest.mark.parametrize(
    "name", ["evil.example", "evil.example:8080", "10.0.0.1", "[2001:db8::1]:80", "localhost.evil", ""]
)
def test_a_name_that_is_not_the_daemons_is_misdirected(near: httpx.Client, far: httpx.Client, name: str) -> None:
    """As after DNS rebinding, where the browser takes the request for one of the same origin."""
    for http in (near, far):
        for method, path in (("GET", "/v1/services"), ("GET", "/"), ("PATCH", BACKEND)):
            detail = refused(http.request(method, path, headers={"Host": name}), 421)
            assert detail.startswith(
                f"host {host_name(name) or '(empty)'}: not a name of this daemon: start it with --allow-host"
            )


@pytest.mark.parametrize(
    "name", ["localhost", "LOCALHOST:8080", "localhost.", "127.0.0.1:1", "lb.example.com", "LB.example.com:8443"]
)
def test_its_own_names_are_taken_with_any_port(near: httpx.Client, far: httpx.Client, name: str) -> None:
    for http in (near, far):
        assert http.get("/v1/services", headers={"Host": name}).status_code == 200


def test_http_1_0_needs_no_name(remote: Remote) -> None:
    asked = [
        "curl",
        "-s0",
        "-H",
        "Host:",
        "--unix-socket",
        str(remote.running.settings.socket),
        "http://xdp-lb/healthz",
    ]
    assert subprocess.run(asked, capture_output=True, text=True, check=True).stdout == '{"status":"ok"}'


# The page that sends it


@pytest.mark.parametrize(
    "sent",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},  # another port of localhost
        {"Origin": "http://evil.example"},
        {"Origin": "http://localhost:3000"},
        {"Origin": "null"},
    ],
)
def test_a_request_of_another_page_is_refused_whoever_it_is_of(
    near: httpx.Client, far: httpx.Client, remote: Remote, sent: dict[str, str]
) -> None:
    before = weight(near)
    session = opened(near, remote)
    for http, more in ((near, {}), (near, session), (far, {})):
        headers = {"Host": "localhost:8080", **more, **sent}
        assert refused(http.patch(BACKEND, json={"weight": 77}, headers=headers), 403).startswith("cross-site request")
        assert refused(http.get("/v1/status", headers=headers), 403).startswith("cross-site request")
        assert http.get("/", headers=headers).status_code == 200  # followed a link
    assert weight(near) == before


def test_what_is_rejected_is_counted_and_rarely_logged(near: httpx.Client, remote: Remote) -> None:
    for _ in range(5):
        near.get("/v1/status", headers={"Host": "evil.example"})
    metrics = near.get("/metrics").text
    (count,) = (
        line.split()[1] for line in metrics.splitlines() if line.startswith('xdp_lb_api_rejected_total{reason="host"')
    )
    assert float(count) >= 5
    lines = [line for line in remote.running.said if line["event"] == "rejected" and line["reason"] == "host"]
    assert 1 <= len(lines) < float(count)


# Sessions


def opened(near: httpx.Client, remote: Remote) -> dict[str, str]:
    """Authorization of a new session."""
    with Client.unix(remote.running.settings.socket) as client:
        code = client.web_code()
    answer = near.post("/v1/sessions", json={"code": code}, headers=BROWSER)
    assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
    return {"Authorization": f"Bearer {answer.json()['token']}"}


def test_a_browser_has_none_of_the_sockets_authority_but_that_of_its_session(
    near: httpx.Client, remote: Remote
) -> None:
    for path in ("/v1/services", "/v1/whoami", "/metrics"):
        assert "see xdp-lb web" in refused(near.get(path, headers=BROWSER), 401)
    assert near.patch(BACKEND, json={"weight": 7}, headers=BROWSER).status_code == 401
    headers = BROWSER | opened(near, remote)
    assert near.get("/v1/whoami", headers=headers).json()["who"].startswith("web page of uid 0")
    assert near.patch(BACKEND, json={"weight": 7}, headers=headers).status_code == 200
    assert weight(near) == 7


def test_a_code_opens_one_session(near: httpx.Client, remote: Remote) -> None:
    code = near.post("/v1/session-codes").json()["code"]
    first, second, wrong = (
        near.post("/v1/sessions", json={"code": each}, headers=BROWSER) for each in (code, code, "no")
    )
    assert first.status_code == 200
    assert refused(second, 401) == refused(wrong, 401) == "code expired or used: run xdp-lb web again"


def test_a_code_is_given_to_programs_on_the_host_alone(near: httpx.Client, far: httpx.Client, remote: Remote) -> None:
    headers = BROWSER | opened(near, remote)
    for answer in (far.post("/v1/session-codes"), near.post("/v1/session-codes", headers=headers)):
        assert refused(answer, 403) == "session codes are only given on the balancer's host: run xdp-lb web there"


def test_codes_and_sessions_end() -> None:
    sessions = Sessions()
    assert sessions.open(sessions.offer("me", 0.0), module.OFFERED_S) is None
    secret = sessions.open(sessions.offer("me", 0.0), 1.0)
    assert secret
    assert sessions.who(secret, module.OPEN_S) == "me"
    assert sessions.who(secret, module.OPEN_S + 1) is None


def test_many_codes_take_up_little() -> None:
    sessions = Sessions()
    codes = [sessions.offer("me", 0.0) for _ in range(module.LARGEST + 1)]
    assert (sessions.open(codes[0], 1.0), bool(sessions.open(codes[1], 1.0))) == (None, True)


def test_the_command_prints_the_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lb.cli.commands.serve.Paths.here", lambda: type("P", (), {"socket": tmp_path / "api.sock"}))

    def run() -> Any:
        return CliRunner().invoke(cli, ["web", "--url", "http://localhost:1/"], obj=HostConnector())

    assert run().stderr == "xdp-lb: daemon: not running: start xdp-lb serve\n"
    with serving(Host(tmp_path / "state.db"), tmp_path):
        assert run().stdout.startswith("http://localhost:1/#code=")


# Forwarded sockets

FORWARDER = """
import socket, sys, threading
listening = socket.create_server(("127.0.0.1", 0))
print(listening.getsockname()[1], flush=True)
def copy(source, sink):
    while data := source.recv(65536):
        sink.sendall(data)
    sink.shutdown(socket.SHUT_WR)
while True:
    near, _ = listening.accept()
    far = socket.socket(socket.AF_UNIX)
    far.connect(sys.argv[1])
    for ends in ((near, far), (far, near)):
        threading.Thread(target=copy, args=ends, daemon=True).start()
"""


@contextmanager
def forwarding(path: Path, program: str) -> Iterator[str]:
    """By a program of that name."""
    command = [sys.executable, "-c", f"open('/proc/self/comm', 'w').write({program!r})\n{FORWARDER}", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        process.kill()


@pytest.mark.parametrize(("program", "status"), [("sshd", 401), ("sshd-session", 401), ("socat", 200)])
def test_who_comes_by_an_ssh_server_needs_a_token_whatever_the_program(
    remote: Remote, program: str, status: int
) -> None:
    with forwarding(remote.running.settings.socket, program) as url, httpx.Client(base_url=url) as http:
        assert http.get("/v1/status").status_code == status
        headers = {"Authorization": f"Bearer {remote.tokens[Role.READ]}"}
        assert http.get("/v1/status", headers=headers).status_code == 200
