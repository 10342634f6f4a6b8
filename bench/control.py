"""The control plane on real kernel maps: how long changes take, and what the state takes up.

In come numbers of services and of backends in each; out go, for each pair, the seconds that applying a whole lb.toml
takes, the latencies of single changes and how many of them a second makes, and the memory of maps and process; and how
many health checks a second one core does; and how long commands take to start (bench.starts). Calls go to the
library's Balancer, and to a daemon's socket, with its store on disk and its maps in a network namespace made for it.
The same machines stand behind all services; the network answers for them at once, being permanent neighbours.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from itertools import count
from pathlib import Path
from statistics import median, quantiles

import click

from bench import report
from bench.line import known
from bench.report import BenchError, Result
from bench.starts import measure_starts
from lb.client.client import Client
from lb.client.connect import daemon_listens
from lb.control.balancer import Balancer
from lb.control.open import open_balancer
from lb.formats import config
from lb.health.checker import Checker
from lb.model.conditions import Conditions
from lb.model.health_check import HealthCheck
from lb.model.options import Options
from lb.model.state import Backend, Interface, Service, XdpMode
from lb.model.vip import Vip
from lb.paths import Paths
from netns_tests.bed.topology import PREFIX, XDP_LB, Host, wait_until
from xdp import libbpf
from xdp.pins import Pins

SCALES = ((10, 20), (100, 100), (1000, 100))
MAX_BACKENDS = 250
CHECK_SECONDS = 10.0
MACHINES = [str(ip_address("10.98.0.2") + number) for number in range(MAX_BACKENDS + 1)]  # the last is the one added
LB_ADDRESS = "10.98.0.1/16"
FIRST_VIP = ip_address("10.96.0.1")

CHECKED_PREFIX = "10.97.0.0/16"
FIRST_CHECKED = ip_address("10.97.0.1")
NGINX = """\
user root;
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  server {{ listen 80 backlog=8192; location / {{ return 200; }} }}
}}
"""

_numbers = count()


@dataclass(frozen=True)
class Scale:
    services: int
    backends: int

    def __str__(self) -> str:
        return f"services={self.services} backends={self.backends}"

    @classmethod
    def parse(cls, text: str) -> Scale:
        match = re.fullmatch(r"(\d+)x(\d+)", text)
        scale = cls(*map(int, match.groups())) if match else None
        if scale is None or not scale.services or not 1 < scale.backends <= MAX_BACKENDS:
            raise click.BadParameter(f"{text}: not SERVICESxBACKENDS, with 2 to {MAX_BACKENDS} backends.")
        return scale

    @property
    def vips(self) -> list[Vip]:
        return [Vip(FIRST_VIP + number, 80) for number in range(self.services)]

    @property
    def toml(self) -> str:
        """The file that asks for all of them."""
        backends = ", ".join(f'"{address}"' for address in MACHINES[: self.backends])
        return "".join(f'[[service]]\nvip = "{vip}"\nbackends = [{backends}]\n' for vip in self.vips)


@contextmanager
def namespace() -> Iterator[Host]:
    """One host whose link leads to all machines."""
    host = Host(f"{PREFIX}-{os.getpid()}-control{next(_numbers)}", "lb")
    try:
        host.create()
        host.run(["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "machines"])
        for name in ("eth0", "machines"):
            host.run(["ip", "link", "set", name, "up"])
        host.run(["ip", "address", "add", LB_ADDRESS, "dev", "eth0"])
        known(host, "eth0", MACHINES, "02:00:00:00:00:11")
        yield host
    finally:
        host.close()


@contextmanager
def attached(host: Host, directory: Path) -> Iterator[tuple[Balancer, Paths]]:
    """A balancer that serves on the host, one service so far; this thread is in the host's namespace meanwhile."""
    paths = Paths(directory / "state", directory / "run", host.name)
    with host.entered(), open_balancer(paths) as balancer:
        first = Service(Vip(FIRST_VIP - 1, 80), backends=(Backend.parse(MACHINES[0]),))
        balancer.attach([Interface("eth0", XdpMode.NATIVE)], [first], own_addresses=False)
        try:
            yield balancer, paths
        finally:
            balancer.detach()


def measure(scale: Scale, changes: int) -> Iterator[Result]:
    """Everything about one number of services and backends. Raises BenchError, LbError."""
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}-{os.getpid()}-control-") as name, namespace() as host:
        directory = Path(name)
        with attached(host, directory) as (balancer, paths):
            yield Result("control", f"path=library {scale} metric=apply", apply(balancer, scale, directory), "s")
            yield from measure_changes(balancer, scale, changes)
            yield Result("control", f"path=library {scale} metric=maps", memory_of_maps(paths), "bytes")
            yield Result("control", f"path=library {scale} metric=rss", resident(), "bytes")


@contextmanager
def served(host: Host, directory: Path) -> Iterator[tuple[Client, int]]:
    """A client of a daemon that serves on the host, one service so far, and the daemon's process."""
    paths = Paths(directory / "state", directory / "run", host.name)
    places = {"XDP_LB_STATE_DIR": str(paths.state_dir), "XDP_LB_RUN_DIR": str(paths.run_dir)}
    with (directory / "serve.log").open("w") as log:
        daemon = host.popen([str(XDP_LB), "serve"], env=os.environ | places, stderr=log)
    try:
        wait_until(lambda: daemon.poll() is not None or daemon_listens(paths.socket), "the daemon", timeout_s=30)
        with Client.unix(paths.socket) as client:
            first = Service(Vip(FIRST_VIP - 1, 80), backends=(Backend.parse(MACHINES[0]),))
            client.attach([Interface("eth0", XdpMode.NATIVE)], [first], own_addresses=False)
            try:
                yield client, daemon.pid
            finally:
                client.detach()
    finally:
        daemon.terminate()
        daemon.wait()


def measure_api(scale: Scale, changes: int) -> Iterator[Result]:
    """The same changes through the daemon's socket, by one client after the other's answer."""
    with (
        tempfile.TemporaryDirectory(prefix=f"{PREFIX}-{os.getpid()}-control-") as name,
        namespace() as host,
        served(host, Path(name)) as (client, pid),
    ):
        yield Result("control", f"path=api {scale} metric=apply", apply(client, scale, Path(name)), "s")
        yield from measure_changes(client, scale, changes, path="api")
        yield Result("control", f"path=api {scale} metric=rss", resident(pid), "bytes")


def apply(balancer: Balancer | Client, scale: Scale, directory: Path) -> float:
    """Seconds from the file to the kernel holding all of it."""
    file = directory / "lb.toml"
    file.write_text(scale.toml)
    start = time.perf_counter()
    balancer.apply(config.read(file).services, own_addresses=False, prune=True)
    seconds = time.perf_counter() - start
    check(balancer, scale.services, scale.services * scale.backends)
    return seconds


def check(balancer: Balancer | Client, services: int, backends: int) -> None:
    """What the kernel holds, each backend resolved."""
    status = balancer.status()
    resolved = sum(backend.resolved for service in status.services for backend in service.backends)
    if (len(status.services), resolved) != (services, backends):
        raise BenchError(
            f"control: {len(status.services)} services and {resolved} backends instead of {services} and {backends}"
        )


def measure_changes(balancer: Balancer | Client, scale: Scale, changes: int, path: str = "library") -> Iterator[Result]:
    """Each change on `changes` services by turns: a backend added, re-weighted, drained and removed."""
    vips = [scale.vips[number * scale.services // changes % scale.services] for number in range(changes)]
    new, old = Backend.parse(MACHINES[-1]), Backend.parse(MACHINES[0])
    steps: dict[str, Callable[[int], object]] = {
        "add": lambda turn: balancer.add_backends(vips[turn], [new]),
        "weight": lambda turn: balancer.set_weight(vips[turn], old, 2 + turn),
        "drain": lambda turn: balancer.drain_backend(vips[turn], new),
        "remove": lambda turn: balancer.remove_backend(vips[turn], new),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(changes):
        for name, step in steps.items():
            start = time.perf_counter()
            step(turn)
            seconds[name].append(time.perf_counter() - start)
    check(balancer, scale.services, scale.services * scale.backends)
    for name, taken in seconds.items():
        for quantile, value in (("p50", median(taken)), ("p99", p99(taken))):
            yield Result("control", f"path={path} {scale} change={name} quantile={quantile}", 1000 * value, "ms")
    together = [value for taken in seconds.values() for value in taken]
    yield Result("control", f"path={path} {scale} quantile=p99", 1000 * p99(together), "ms")
    total = sum(map(sum, seconds.values()))
    yield Result("control", f"path={path} {scale} metric=rate", len(steps) * changes / total, "changes/s")


def p99(values: list[float]) -> float:
    """Never more than the largest."""
    return quantiles(values, n=100, method="inclusive")[-1] if len(values) > 1 else values[0]


def measure_checks(kind: str, checks: int, seconds: float) -> Iterator[Result]:
    """So many backends, each checked once a second by one process, nginx answering beside it on addresses of the same
    host. `core` is what the process took of a core, its half of the loopback's work included."""
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}-{os.getpid()}-checks-") as name, namespace() as host:
        host.run(["ip", "route", "add", "local", CHECKED_PREFIX, "dev", "lo"])
        with host.entered(), answering(host, Path(name)):
            done, took_s = asyncio.run(check_all(checked_services(kind, checks), seconds))
    case = f"path=checks kind={kind} checks={checks}"
    yield Result("control", f"{case} metric=rate", done / seconds, "checks/s")
    yield Result("control", f"{case} metric=core", 100 * took_s / seconds, "%")


def checked_services(kind: str, checks: int) -> list[Service]:
    options = Options(health=HealthCheck.parse(f"{kind} interval=1s"))
    addresses = [Backend(FIRST_CHECKED + number, 80) for number in range(checks)]
    return [
        Service(Vip(FIRST_VIP + number, 80), backends=tuple(some), options=options)
        for number, some in enumerate(batched(addresses, 100))
    ]


def batched(backends: list[Backend], size: int) -> list[list[Backend]]:
    return [backends[start : start + size] for start in range(0, len(backends), size)]


@contextmanager
def answering(host: Host, directory: Path) -> Iterator[None]:
    configuration = directory / "nginx.conf"
    configuration.write_text(NGINX.format(directory=directory))
    server = host.popen(["nginx", "-p", str(directory), "-c", str(configuration), "-e", str(directory / "error.log")])
    try:
        wait_until(lambda: accepts(host), "nginx accepting")
        yield
    finally:
        server.terminate()
        server.wait()


def accepts(host: Host) -> bool:
    with host.entered(), socket.socket() as client:
        return client.connect_ex((str(FIRST_CHECKED), 80)) == 0


async def check_all(services: list[Service], seconds: float) -> tuple[int, float]:
    """Checks done and CPU seconds, once every backend has been checked. Raises BenchError if one was found down."""
    found: list[Conditions] = []

    async def note(conditions: Conditions) -> None:
        found.append(conditions)

    checker = Checker(note)
    checker.watch(services)
    running = asyncio.create_task(checker.run())
    while checker.checks_done < sum(len(service.backends) for service in services):
        await asyncio.sleep(0.1)
    done, took_s = checker.checks_done, time.process_time()
    await asyncio.sleep(seconds)
    result = checker.checks_done - done, time.process_time() - took_s
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    if down := [c.why for each in found for some in each.values() for c in some.values() if c.down]:
        raise BenchError(f"control: {len(down)} checks failed: {down[0]}")
    return result


def measure_commands(runs: int) -> Iterator[Result]:
    with (
        tempfile.TemporaryDirectory(prefix=f"{PREFIX}-{os.getpid()}-starts-") as name,
        namespace() as host,
        attached(host, Path(name)) as (_, paths),  # only changes need the lock that is held here
    ):
        yield from measure_starts(host, paths, runs)


def memory_of_maps(paths: Paths) -> int:
    """What the kernel accounts for all maps, in bytes."""
    generation = Pins(paths.run_dir, paths.netns).current()
    if generation is None:
        raise BenchError("control: nothing is pinned")
    return sum(map(memory_of_map, generation.glob("map_*")))


def memory_of_map(pin: Path) -> int:
    fd = libbpf.get_pinned(os.fsencode(pin))
    try:
        return number_in(Path(f"/proc/self/fdinfo/{fd}"), "memlock")
    finally:
        os.close(fd)


def resident(process: int | None = None) -> int:
    """Of this process or another, in bytes: imports, the state, and the maps' pages it has touched."""
    return 1024 * number_in(Path(f"/proc/{process or 'self'}/status"), "VmRSS")


def number_in(file: Path, key: str) -> int:
    found = re.search(rf"^{key}:\s*(\d+)", file.read_text(), re.MULTILINE)
    if found is None:
        raise BenchError(f"control: {file}: no {key}")
    return int(found[1])


def scales(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> list[Scale]:
    return [Scale.parse(text) for text in values]


@report.command
@click.option(
    "--scale",
    "wanted",
    multiple=True,
    default=[f"{services}x{backends}" for services, backends in SCALES],
    show_default=True,
    metavar="SERVICESxBACKENDS",
    callback=scales,
    help="May be repeated; a process only grows, so the smallest first.",
)
@click.option("--changes", type=click.IntRange(1, 10000), default=50, show_default=True, help="Of each kind.")
@click.option(
    "--checks", type=click.IntRange(1, 20000), default=5000, show_default=True, help="Backends that are checked."
)
@click.option("--starts", type=click.IntRange(1, 1000), default=10, show_default=True, help="Of each command.")
def command(wanted: list[Scale], changes: int, checks: int, starts: int) -> Iterator[Result]:
    """Changes a second, latencies and memory of the control plane, by the size of the state; health checks a second;
    the start of commands."""
    for scale in wanted:
        yield from measure(scale, changes)
        yield from measure_api(scale, changes)
    for kind in ("tcp", "http"):
        yield from measure_checks(kind, checks, CHECK_SECONDS)
    yield from measure_commands(starts)
