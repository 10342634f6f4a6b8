"""The daemon under attack, with 400 descriptors: floods of connections, streams and bodies, rebound names, patterns.

Throughout, /healthz on the Unix socket answers within PATIENCE_S, and in the end every backend is as it was. `make
attack` runs all of it at full size; by default each kind is tried once, at a size that a test run has time for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from lb.api.in_flight import STREAMS_OF_TOKEN
from netns_tests.bed.daemon import SERVE, WEB, certificate_of, end, places, socket_of, start, states
from netns_tests.bed.servers import start_http
from netns_tests.bed.topology import XDP_LB, Bed, wait_until
from netns_tests.bed.traffic import curl

FULL = os.environ.get("ATTACK") == "full"
PATIENCE_S = 1.0 if FULL else 10.0  # a test run has other things to do at the same time
DESCRIPTORS = 400
MEMORY_KB = 2 << 20  # of the daemon, at its largest; 60 MB of {}, once took 5.9 GB

# Connects to an address, or path, so many times, says so, and holds what it has until its input ends. Not as root, but
# with root's group, as of a user who may write to the socket.
FLOOD = """
import encodings.idna, os, resource, socket, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
where, count = sys.argv[1], int(sys.argv[2])
held = []
os.setuid(65534)
for _ in range(count):
    try:
        if where.startswith("/"):
            held.append(socket.socket(socket.AF_UNIX))
            held[-1].connect(where)
        else:
            host, _, port = where.rpartition(":")
            held.append(socket.create_connection((host, int(port)), timeout=10))
    except OSError:
        pass
print(len(held), flush=True)
sys.stdin.read()
"""


@dataclass
class Target:
    """A daemon with TLS, and a token of each role."""

    bed: Bed
    process: subprocess.Popen[str]
    certificate: Path
    tokens: dict[str, str]

    @property
    def address(self) -> str:
        return f"{self.bed.lb.ipv4}:8443"

    def local(self, timeout_s: float = 60.0) -> httpx.Client:
        transport = httpx.HTTPTransport(uds=str(socket_of(self.bed)))
        return httpx.Client(transport=transport, base_url="http://xdp-lb", timeout=timeout_s)

    def remote(self, role: str, *arguments: str, check: bool = True) -> str:
        """curl from the client's namespace; the status."""
        asked = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "--max-time", "60", "--cacert"]
        asked += [str(self.certificate), "-H", f"Authorization: Bearer {self.tokens[role]}", *arguments]
        return self.bed.client.run(asked, check=check).stdout

    def rejected(self, reason: str) -> int:
        with self.local() as http:
            lines = http.get("/metrics").text.splitlines()
        (line,) = (line for line in lines if line.startswith(f'xdp_lb_api_rejected_total{{reason="{reason}"}}'))
        return int(float(line.split()[1]))

    @property
    def peak_kb(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1])


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    with Bed(backends=2, router=True) as bed:
        bed.directory.chmod(0o755)  # what is in it has modes of its own
        for backend in bed.backends:
            start_http(bed, backend, [80])
        bed.xdp_lb(*SERVE)
        tokens = {
            role: bed.xdp_lb("token", "create", role, "--role", role).stdout.strip() for role in ("read", "write")
        }
        certificate, key = certificate_of(bed)
        tls = ("--listen", f"{bed.lb.ipv4}:8443", "--tls-cert", str(certificate), "--tls-key", str(key))
        process = start(bed, *tls, under=("prlimit", f"--nofile={DESCRIPTORS}:{DESCRIPTORS}"))
        yield Target(bed, process, certificate, tokens)
        assert end(process) == 0


@pytest.fixture(autouse=True)
def unharmed(target: Target) -> Iterator[None]:
    """Through each attack and after it."""
    before = states(target.bed)
    with answering(target):
        yield
    assert target.process.poll() is None
    wait_until(lambda: states(target.bed) == before, "every backend as it was", timeout_s=30)
    assert curl(target.bed.client, f"http://{WEB}/") in {"b1", "b2"}
    assert target.peak_kb < MEMORY_KB
    assert "Traceback" not in (target.bed.directory / "serve.log").read_text()


@contextmanager
def answering(target: Target) -> Iterator[None]:
    """/healthz, asked all the while, over a new connection each time."""
    failures: list[str] = []
    began, over = threading.Event(), threading.Event()

    def ask() -> None:
        with target.local(timeout_s=PATIENCE_S) as http:
            while not over.wait(0.05):
                try:
                    http.get("/healthz", headers={"Connection": "close"}).raise_for_status()
                except httpx.HTTPError as error:
                    failures.append(repr(error))
                began.set()

    asking = threading.Thread(target=ask)
    asking.start()
    assert began.wait(PATIENCE_S)
    try:
        yield
    finally:
        over.set()
        asking.join()
    assert failures == []


@contextmanager
def flooded(target: Target, host: str, where: str, count: int) -> Iterator[None]:
    command = [sys.executable, "-c", FLOOD, where, str(count)]
    place = target.bed.client if host == "client" else target.bed.lb
    process = place.popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdin
    try:
        assert process.stdout.readline()
        yield
    finally:
        process.stdin.close()
        process.wait(timeout=20)


# Browsers


def test_rebound_names_and_other_origins_change_nothing(target: Target) -> None:
    names = [{"Host": f"{n}.evil.example:8080"} for n in range(200 if FULL else 5)]
    sites = [{"Host": "localhost:8080", "Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}]
    path = f"/v1/services/{WEB}/backends/10.99.2.11:80"
    with target.local() as http:
        answers = Counter(
            http.request(method, path, headers=headers, json={"weight": 0}).status_code
            for headers in (*names, *sites)
            for method in ("PATCH", "DELETE")
        )
        assert answers == {421: 2 * len(names), 403: 2 * len(sites)}
        script = {"options": {"health": "script /bin/true"}}
        browser = {"Sec-Fetch-Site": "same-origin", "Authorization": f"Bearer {target.tokens['write']}"}
        assert http.patch(f"/v1/services/{WEB}", json=script, headers=browser).status_code == 403
    assert backends_weights(target) == [1, 1]


def backends_weights(target: Target) -> list[int]:
    return [each["weight"] for each in json.loads(target.bed.xdp_lb("backend", "list", "--json").stdout)]


# Floods


@pytest.mark.parametrize("count", [2000, 600] if FULL else [600])
def test_a_flood_of_connections_over_tcp_leaves_the_socket_of_the_host(target: Target, count: int) -> None:
    with flooded(target, "client", target.address, count):
        wait_until(lambda: target.rejected("descriptors") > 0, "the limit reached", timeout_s=30)
        target.bed.xdp_lb("backend", "weight", WEB, "10.99.2.11", "1")
        assert states(target.bed) == ["active", "active"]
    url = f"https://{target.address}/v1/status"
    wait_until(lambda: target.remote("read", url, check=False) == "200", "room again", timeout_s=30)


def test_a_user_who_floods_the_socket_keeps_nobody_else_out(target: Target) -> None:
    with flooded(target, "lb", str(socket_of(target.bed)), 1000):
        wait_until(lambda: target.rejected("connections_of_address") > 0, "the limit reached", timeout_s=30)
        target.bed.xdp_lb("backend", "weight", WEB, "10.99.2.11", "1")
        assert states(target.bed) == ["active", "active"]


def test_a_flood_of_event_streams_is_the_tokens_own(target: Target) -> None:
    url = f"https://{target.address}/v1/events"
    count = STREAMS_OF_TOKEN + (24 if FULL else 4)
    asked = ["curl", "-sN", "--cacert", str(target.certificate), "-H", f"Authorization: Bearer {target.tokens['read']}"]
    streams = [target.bed.client.popen([*asked, url], stdout=subprocess.DEVNULL) for _ in range(count)]
    try:
        wait_until(lambda: target.rejected("streams") >= count - STREAMS_OF_TOKEN, "the limit reached", timeout_s=60)
        assert target.remote("read", f"https://{target.address}/v1/status") == "200"
        assert target.remote("write", "--max-time", "2", url, check=False) == "200"
    finally:
        for stream in streams:
            stream.kill()
            stream.wait()


# Bodies


@pytest.mark.parametrize("item", [b"{},", b"[],", b"0,"])
def test_a_body_of_very_many_values_is_not_read(target: Target, item: bytes) -> None:
    size = 60_000_000 if FULL else 8_000_000
    body = b'{"services":[' + item * (size // len(item)) + item[:-1] + b"]}"
    headers = {"Content-Type": "application/json"}
    with target.local() as http:
        assert http.put("/v1/config", content=in_pieces(body), headers=headers).status_code == 413
        nested = b"[" * 100_000 + b"]" * 100_000
        assert http.put("/v1/config", content=nested, headers=headers).status_code in (400, 422)


def in_pieces(body: bytes, size: int = 1 << 16) -> Iterator[bytes]:
    """httpx takes seconds for a large one: it copies all that is left at each call of send(2)."""
    return (body[at : at + size] for at in range(0, len(body), size))


def test_a_plan_of_very_many_services_blocks_nobody(target: Target) -> None:
    count = 18_000 if FULL else 500
    services = [
        {"vip": f"10.{100 + n // 62500}.{n // 250 % 250}.{n % 250}:80", "ring_size": 251, "mode": "dr"}
        | {"backends": [{"backend": "10.99.2.11"}]}
        for n in range(count)
    ]
    with target.local(timeout_s=120) as http:
        answer = http.post("/v1/plan?own_address=false", json={"services": services})
        assert (answer.status_code, len(answer.json()["changes"])) == (200, count + 1)


# Patterns


def test_patterns_are_linear_or_refused(target: Target) -> None:
    hard = ["(a+)+$", "(a|aa)+$", "(.*)*x", "((a{0,30}){0,30})*b"][: None if FULL else 1]
    with target.local() as http:
        for pattern in hard:
            options = {"health": f"http match='{pattern}' interval=100ms"}
            answer = http.patch(f"/v1/services/{WEB}?dry_run=true", json={"options": options})
            assert answer.status_code in (200, 422)
        refused = http.patch(f"/v1/services/{WEB}", json={"options": {"health": r"http match='(a)\1'"}})
        assert refused.status_code == 422
        assert "RE2" in refused.json()["detail"]


# Descriptors


@pytest.mark.parametrize("limit", range(6, 61, 6 if FULL else 18))
def test_a_command_short_of_descriptors_never_advises_to_detach(target: Target, limit: int) -> None:
    said = limited(target.bed, limit)
    assert "detach" not in said.stderr


def test_nor_does_one_that_works_without_a_daemon() -> None:
    with Bed(backends=2) as bed:
        bed.xdp_lb(*SERVE)
        for limit in range(6, 61, 3 if FULL else 18):
            said = limited(bed, limit)
            assert "detach" not in said.stderr
            assert said.returncode == 0 or "Too many open files" in said.stderr
        assert states(bed) == ["active", "active"]


def limited(bed: Bed, limit: int) -> subprocess.CompletedProcess[str]:
    words = ("prlimit", f"--nofile={limit}", str(XDP_LB), "status")
    return bed.lb.run(words, check=False, env=os.environ | places(bed))
