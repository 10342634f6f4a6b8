"""The control plane on real kernel maps: how long changes take, and what the state takes up.

In come numbers of services and of backends in each; out go, for each pair, the seconds that applying a whole lb.toml
takes, the latencies of single changes and how many of them a second makes, and the memory of maps and process. All
calls go to the library's Balancer, with its store on disk and its maps in a network namespace made for it. The same
machines stand behind all services; the network answers for them at once, being permanent neighbours.
"""

from __future__ import annotations

import os
import re
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
from lb import config
from lb.balancer import Balancer, open_balancer
from lb.model import Backend, Interface, Service, XdpMode
from lb.paths import Paths
from lb.vip import Vip
from netns_tests.topology import PREFIX, Host
from xdp import libbpf
from xdp.pins import Pins

SCALES = ((10, 20), (100, 100), (1000, 100))
MOST_BACKENDS = 250
MACHINES = [str(ip_address("10.98.0.2") + number) for number in range(MOST_BACKENDS + 1)]  # the last is the one added
LB_ADDRESS = "10.98.0.1/16"
FIRST_VIP = ip_address("10.96.0.1")

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
        if scale is None or not scale.services or not 1 < scale.backends <= MOST_BACKENDS:
            raise click.BadParameter(f"{text}: not SERVICESxBACKENDS, with 2 to {MOST_BACKENDS} backends.")
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


def apply(balancer: Balancer, scale: Scale, directory: Path) -> float:
    """Seconds from the file to the kernel holding all of it."""
    file = directory / "lb.toml"
    file.write_text(scale.toml)
    start = time.perf_counter()
    balancer.apply(config.read(file), own_addresses=False)
    seconds = time.perf_counter() - start
    check(balancer, scale.services, scale.services * scale.backends)
    return seconds


def check(balancer: Balancer, services: int, backends: int) -> None:
    """What the kernel holds, each backend resolved."""
    status = balancer.status()
    resolved = sum(backend.resolved for service in status.services for backend in service.backends)
    if (len(status.services), resolved) != (services, backends):
        raise BenchError(
            f"control: {len(status.services)} services and {resolved} backends instead of {services} and {backends}"
        )


def measure_changes(balancer: Balancer, scale: Scale, changes: int) -> Iterator[Result]:
    """Each change on `changes` services by turns: a backend added, re-weighted, drained and removed."""
    vips = [scale.vips[number * scale.services // changes % scale.services] for number in range(changes)]
    new, old = Backend.parse(MACHINES[-1]), Backend.parse(MACHINES[0])
    steps: dict[str, Callable[[int], object]] = {
        "add": lambda turn: balancer.add_backend(vips[turn], new),
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
            yield Result("control", f"path=library {scale} change={name} quantile={quantile}", 1000 * value, "ms")
    total = sum(map(sum, seconds.values()))
    yield Result("control", f"path=library {scale} metric=rate", len(steps) * changes / total, "changes/s")


def p99(values: list[float]) -> float:
    """Never more than the largest."""
    return quantiles(values, n=100, method="inclusive")[-1] if len(values) > 1 else values[0]


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


def resident() -> int:
    """Of this process, in bytes: the library's imports, the state, and the maps' pages it has touched."""
    return 1024 * number_in(Path("/proc/self/status"), "VmRSS")


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
def command(wanted: list[Scale], changes: int) -> Iterator[Result]:
    """Changes a second, latencies and memory of the control plane, by the size of the state."""
    for scale in wanted:
        yield from measure(scale, changes)
