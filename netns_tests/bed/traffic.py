"""Real traffic through the balancer: what the clients of a bed ask, and what became of it.

What enters is a host of the bed and a URL; what leaves is the label of the backend that answered, or
a `Report` over many answers. Loads run in a process of their own, single connections in this one,
their sockets opened in the host's namespace.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from netns_tests.bed.load import Report
from netns_tests.bed.servers import REPOSITORY
from netns_tests.bed.topology import Bed, Host, wait_until

FAMILIES = ("ipv4", "ipv6")
MODES = ("nat", "dr")

# The modes have the same VIPs, so the ports tell them apart.
HTTP_PORTS = {"nat": 80, "dr": 8080}
ECHO_PORTS = {"nat": 5353, "dr": 5354}


@dataclass(frozen=True)
class Way:
    """How packets reach the backends: a mode and a family, with the two services that use them."""

    bed: Bed
    mode: str
    family: str

    @property
    def vip(self) -> str:
        return self.bed.vip4 if self.family == "ipv4" else self.bed.vip6

    @property
    def http_service(self) -> str:
        return f"{bracketed(self.vip)}:{self.http_port}/tcp"

    @property
    def echo_service(self) -> str:
        return f"{bracketed(self.vip)}:{self.echo_port}/udp"

    @property
    def http_port(self) -> int:
        return HTTP_PORTS[self.mode]

    @property
    def echo_port(self) -> int:
        return ECHO_PORTS[self.mode]

    @property
    def http_url(self) -> str:
        return f"http://{bracketed(self.vip)}:{self.http_port}"

    @property
    def echo_url(self) -> str:
        return f"udp://{bracketed(self.vip)}:{self.echo_port}"

    def services(self, backends: Sequence[Host]) -> list[str]:
        """Both, as `apply` takes them."""
        served = addresses(backends, self.family)
        return [service_toml(vip, self.mode, served) for vip in (self.http_service, self.echo_service)]


def every_service(bed: Bed, backends: Sequence[Host]) -> list[str]:
    """HTTP and the echo in both modes and both families, as `apply` takes them."""
    ways = (Way(bed, mode, family) for mode, family in product(MODES, FAMILIES))
    return [service for way in ways for service in way.services(backends)]


def bracketed(address: str) -> str:
    """As URLs and VIPs write it: IPv6 in brackets."""
    return f"[{address}]" if ":" in address else address


def addresses(hosts: Sequence[Host], family: str) -> list[str]:
    return [host.ipv4 if family == "ipv4" else host.ipv6 for host in hosts]


def backend_list(bed: Bed, family: str) -> str:
    """All backends, as `--backends` takes them."""
    return ",".join(addresses(bed.backends, family))


def service_toml(vip: str, mode: str, backends: Sequence[str]) -> str:
    """A service as `xdp-lb apply` reads it, whatever was done to its backends; `vip` is written ADDR:PORT/PROTO."""
    given = ", ".join(f"{{address = {json.dumps(backend)}, weight = 1, drain = false}}" for backend in backends)
    return f"[[service]]\nvip = {json.dumps(vip)}\nmode = {json.dumps(mode)}\nbackends = [{given}]\n"


def apply(bed: Bed, *services: str) -> None:
    """Make `services` (see `service_toml`) all that is served."""
    path = bed.directory / "lb.toml"
    path.write_text("\n".join(services))
    bed.xdp_lb("apply", "--prune", "-f", str(path))


def status(bed: Bed) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(bed.xdp_lb("status", "--json").stdout)
    return document


def service_status(bed: Bed, vip: str) -> dict[str, Any]:
    """The part of `status` about one service, its VIP written ADDR:PORT/PROTO."""
    (found,) = [service for service in status(bed)["services"] if service["vip"] == vip]
    return dict(found)


def curl(host: Host, url: str) -> str:
    """The body of one answer, without the end of its line."""
    return host.run(["curl", "-sSf", "--max-time", "5", url]).stdout.strip()


def _load_command(url: str, options: dict[str, object]) -> list[str]:
    """`connections=5, keepalive=True` are `--connections 5 --keepalive`."""
    words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "netns_tests.bed.load", url, *words]


def load(host: Host, url: str, **options: object) -> Report:
    """One run of netns_tests.bed.load, to its end."""
    return Report.parse(host.run(_load_command(url, options), cwd=REPOSITORY).stdout)


class RunningLoad:
    """A run of netns_tests.bed.load that goes on meanwhile; `report` is at most 0.1 s old."""

    def __init__(self, process: subprocess.Popen[str], reports: Path) -> None:
        self._process = process
        self._reports = reports

    @property
    def report(self) -> Report:
        *_, last = [Report(), *map(Report.parse, self._reports.read_text().split("\n")[-2:-1])]
        return last

    def stop(self) -> Report:
        """Let the requests under way finish; the report of the whole run."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(timeout=30)
        return self.report


def go_on(requests: int, *loads: RunningLoad) -> None:
    """Wait until each has ended so many more requests."""
    goals = [(load, load.report.requests + requests) for load in loads]
    for load, goal in goals:
        wait_until(lambda: load.report.requests >= goal, f"{requests} more requests", timeout_s=30)  # noqa: B023


@contextlib.contextmanager
def loading(bed: Bed, url: str, **options: object) -> Iterator[RunningLoad]:
    """A load from the client, under way when this returns; its pauses leave the CPUs to the rest."""
    reports = bed.directory / f"load-{len(list(bed.directory.glob('load-*')))}"
    command = [*_load_command(url, {"pause": 0.02} | options), "--report-every=0.1"]
    with reports.open("w") as output:
        process = bed.client.popen(command, cwd=REPOSITORY, stdout=output)
    running = RunningLoad(process, reports)
    try:
        go_on(int(str(options.get("connections", 1))), running)
        yield running
    finally:
        process.kill()
        process.wait()


class HttpConnection:
    """One keep-alive connection: it is never opened again, so that its end is seen."""

    def __init__(self, host: Host, address: str, port: int = 80, from_port: int = 0) -> None:
        source = ("", from_port) if from_port else None
        self._connection = http.client.HTTPConnection(address, port, timeout=5, source_address=source)
        with host.entered():
            self._connection.connect()
        self._connection.auto_open = 0
        self.port: int = self._connection.sock.getsockname()[1]

    def ask(self, *, last: bool = False) -> str:
        """The backend that answers. OSError or HTTPException if the connection has ended. The last time, it closes."""
        self._connection.request("GET", "/", headers={"Connection": "close"} if last else {})
        response = self._connection.getresponse()
        response.read()
        return response.headers["X-Backend"]

    def close(self) -> None:
        self._connection.close()


class UdpFlow:
    """One source port towards the UDP echo."""

    def __init__(self, host: Host, address: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with host.entered():
            self._socket = socket.socket(family, socket.SOCK_DGRAM)
        self._socket.settimeout(5)
        self._socket.connect((address, port))
        self.port: int = self._socket.getsockname()[1]

    def ask(self) -> str:
        """The backend that echoes. OSError if none does."""
        self._socket.send(b"?")
        return self._socket.recv(100).decode().split()[0]

    def close(self) -> None:
        self._socket.close()


@contextlib.contextmanager
def connections(bed: Bed, address: str, port: int = 80, count: int = 60) -> Iterator[list[HttpConnection]]:
    """So many keep-alive connections from the client."""
    with contextlib.ExitStack() as closing:
        yield [
            closing.enter_context(contextlib.closing(HttpConnection(bed.client, address, port))) for _ in range(count)
        ]


@contextlib.contextmanager
def deaf(host: Host) -> Iterator[None]:
    """A host that hears no SYN meanwhile."""
    chain = "add table inet deaf; add chain inet deaf in { type filter hook input priority 0; }"
    host.run(["nft", f"{chain}; add rule inet deaf in tcp flags syn drop"])
    try:
        yield
    finally:
        host.run(["nft", "delete table inet deaf"])


@contextlib.contextmanager
def trying(bed: Bed, address: str, port: int = 80, count: int = 40) -> Iterator[None]:
    """So many connections that the client tries to open, as long as it lasts."""
    with contextlib.ExitStack() as closing, bed.client.entered():
        for _ in range(count):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            opened = closing.enter_context(socket.socket(family, socket.SOCK_STREAM))
            opened.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                opened.connect((address, port))
        yield


@contextlib.contextmanager
def udp_flows(bed: Bed, address: str, port: int, count: int = 60) -> Iterator[list[UdpFlow]]:
    """So many source ports of the client."""
    with contextlib.ExitStack() as closing:
        yield [closing.enter_context(contextlib.closing(UdpFlow(bed.client, address, port))) for _ in range(count)]
