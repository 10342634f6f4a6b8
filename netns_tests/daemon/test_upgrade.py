"""From one version of the program to another and back, refused or killed on the way, by hand and by the daemon: always
under load, without a failed request, an ended connection or a packet that is not counted."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest

from lb.client.client import Client
from lb.client.connect import daemon_listens
from lb.model.state import Backend
from lb.model.vip import Vip
from netns_tests.bed.commands import Server, serving
from netns_tests.bed.servers import start_http
from netns_tests.bed.topology import Bed, wait_until
from netns_tests.bed.traffic import HttpConnection, RunningLoad, connections, go_on, loading
from netns_tests.bed.versions import ALIKE, GROWN, REFUSED, XDP_LB, Version

NAT, DIRECT = "10.99.1.100:80", "10.99.1.100:8080"
SERVICES = f"""
[[service]]
vip = "{NAT}"
ring_size = 1021
backends = ["10.99.2.11", "10.99.2.12"]
[[service]]
vip = "{DIRECT}"
mode = "dr"
ring_size = 1021
backends = ["10.99.2.11", "10.99.2.12"]
"""
UNDER = ("setpriv", "--bounding-set=-all,+net_admin,+bpf,+perfmon", "--inh-caps=-all")
SUCCESSION = ("first", "alike", "grown", "first", "grown", "alike")
DEATHS = int(os.environ.get("SOAK_DEATHS", "4"))
SOAK = "SOAK_DEATHS" in os.environ
KILLED_AT = (("load", 1), ("relay", 1), ("use", 2), ("put_in_force", 1), ("attach", 2), ("end_relay", 1))


@dataclass
class Life:
    """A balancer, and the versions of xdp-lb that work on it."""

    bed: Bed
    versions: dict[str, Version]
    servers: dict[str, Server]  # of those that run more than a few commands

    def environment(self, version: str) -> dict[str, str]:
        places = {"XDP_LB_STATE_DIR": self.bed.directory / "state", "XDP_LB_RUN_DIR": self.bed.directory / "run"}
        found = {name: str(path) for name, path in places.items()}
        return os.environ | found | self.versions[version].environment

    def run(self, version: str, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        with serving(self.servers.get(version)):
            return self.start(version, *words, check=check)

    def start(self, version: str, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """As a user does it: another PYTHONPATH takes another interpreter."""
        return self.bed.lb.run([str(XDP_LB), *words], check=check, env=self.environment(version))

    def kill(self, version: str, function: str, nth: int, *words: str) -> None:
        command = self.versions[version].signalled(signal.SIGKILL, [(function, nth)], *words)
        done = self.bed.lb.run(command, check=False, env=self.environment(version))
        assert done.returncode == -signal.SIGKILL, (function, nth, done)

    @contextlib.contextmanager
    def stopping(self, version: str, at: Sequence[str], *words: str) -> Iterator[Iterator[None]]:
        """The command stops as it calls the first of these functions, and goes on to the next one with each step."""
        command = self.versions[version].signalled(signal.SIGSTOP, [(function, 1) for function in at], *words)
        process = self.bed.lb.popen(command, env=self.environment(version))

        def steps() -> Iterator[None]:
            for _ in at:
                os.waitid(os.P_PID, process.pid, os.WSTOPPED)
                yield
                process.send_signal(signal.SIGCONT)
            assert process.wait(timeout=20) == 0

        try:
            yield steps()
        finally:
            process.kill()
            process.wait()

    def status(self, version: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run(version, "status", "--json").stdout)
        return found

    def programs(self, version: str) -> set[int]:
        return {each["program_id"] for each in self.status(version)["interfaces"]}

    def counted(self, version: str) -> dict[str, int]:
        """VIP -> connections."""
        return {each["vip"]: each["connections"] for each in self.status(version)["services"]}

    @property
    def pins(self) -> Path:
        return self.bed.directory / "run" / "bpf"

    @property
    def socket(self) -> Path:
        return self.bed.directory / "run" / self.bed.lb.name / "api.sock"

    @property
    def log(self) -> str:
        return (self.bed.directory / "serve.log").read_text()

    def serve(self, version: str) -> subprocess.Popen[str]:
        """A daemon that is ready, with the capabilities that the unit gives it."""
        with (self.bed.directory / "serve.log").open("w") as log:
            command = [*UNDER, str(XDP_LB), "serve"]
            process = self.bed.lb.popen(command, env=self.environment(version), stderr=log)
        wait_until(lambda: process.poll() is not None or self.is_ready(), "the daemon ready", timeout_s=30)
        assert process.poll() is None, self.log
        return process

    def is_ready(self) -> bool:
        if not daemon_listens(self.socket):
            return False
        with contextlib.suppress(httpx.TransportError):
            return self.ask("/readyz").status_code == 200
        return False

    def ask(self, path: str) -> httpx.Response:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(self.socket)), base_url="http://xdp-lb") as client:
            return client.get(path)


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    folder = tmp_path_factory.mktemp("versions")
    patches = {"first": {}, "alike": ALIKE, "grown": GROWN, "refused": REFUSED}
    numbers = {"first": "0.1.0", "alike": "0.1.1", "grown": "0.2.0", "refused": "0.3.0"}
    versions = {name: Version.install(folder / name, numbers[name], each) for name, each in patches.items()}
    with Bed(backends=4, router=True) as bed, contextlib.ExitStack() as closing:
        bed.client.sysctl("net.ipv4.tcp_max_tw_buckets", 0)  # a port is free at once
        for backend in bed.backends:
            bed.own_vip(backend)
            start_http(bed, backend, [80, 8080])
        servers = {name: Server(os.environ | versions[name].environment) for name in ("first", "grown")}
        for server in servers.values():
            closing.callback(server.close)
        made = Life(bed, versions, servers)
        path = bed.directory / "lb.toml"
        path.write_text(SERVICES)
        made.run("first", "apply", "-f", str(path))
        made.run("first", "attach", "eth0")
        for vip in (NAT, DIRECT):  # half of the slots are in transition from here on, and flows are recorded
            made.run("first", "backend", "add", vip, "10.99.2.13")
        yield made


@dataclass
class Traffic:
    """What clients do meanwhile, and what the balancer has counted before."""

    life: Life
    loads: dict[str, list[RunningLoad]]
    held: list[HttpConnection]
    labels: list[str]
    counted: dict[str, int]
    extra: dict[str, int]

    def check(self, requests: int = 30) -> None:
        """It goes on, and what is connected is where it was."""
        go_on(requests, *self.running)
        assert [connection.ask() for connection in self.held] == self.labels

    @property
    def running(self) -> list[RunningLoad]:
        return [each for loads in self.loads.values() for each in loads]

    def end(self) -> dict[str, int]:
        """Nothing has failed; VIP -> how many connections clients have opened."""
        opened = dict(self.extra)
        for vip, (short, long) in self.loads.items():
            for report in (short.stop(), long.stop()):
                assert (report.failed, report.reasons) == (0, {}), vip
            opened[vip] += short.report.requests + long.report.peak_connections
        return opened


@contextlib.contextmanager
def traffic(life: Life, version: str) -> Iterator[Traffic]:
    """Short and long connections to both services; at the end, none has failed, and each has been counted once."""
    bed, counted = life.bed, life.counted(version)
    with contextlib.ExitStack() as stack:
        loads = {
            vip: [
                stack.enter_context(loading(bed, f"http://{vip}/", connections=5, pause=0.05)),
                stack.enter_context(loading(bed, f"http://{vip}/", connections=20, pause=0.2, keepalive=True)),
            ]
            for vip in (NAT, DIRECT)
        }
        address = NAT.partition(":")[0]
        held = [*stack.enter_context(connections(bed, address, 80, count=15))]
        held += stack.enter_context(connections(bed, address, 8080, count=15))
        named = {f"{vip}/tcp": each for vip, each in loads.items()}
        labels = [connection.ask() for connection in held]
        yield Traffic(life, named, held, labels, counted, dict.fromkeys(named, 15))


def assert_all_counted(life: Life, version: str, during: Traffic) -> None:
    """A SYN that a client sends again may count again."""
    opened = during.end()
    for vip, counted in life.counted(version).items():
        assert opened[vip] <= counted - during.counted[vip] <= 1.01 * opened[vip] + 2, vip


def test_versions_take_over_from_one_another_under_load_and_back(life: Life) -> None:
    in_force = "first"
    with traffic(life, "first") as during:
        for version, number in (("alike", "0.1.0"), ("grown", "0.1.1"), ("first", "0.2.0"), ("grown", "0.1.0")):
            before = life.programs(in_force)
            told = f": the running program is of xdp-lb {number}, not the installed version: "
            assert told in life.run(version, "status").stdout.splitlines()[0]
            attached = life.start(version, "attach", "eth0").stdout
            assert f"upgraded from xdp-lb {number} to the installed version" in attached
            in_force = version
            assert life.programs(version).isdisjoint(before)
            assert life.status(version)["outdated"] is None
            during.check()
        unchanged = life.programs("grown")
        assert "taken over" not in life.run("grown", "attach", "eth0").stdout
        assert life.programs("grown") == unchanged
        assert_all_counted(life, "grown", during)


@contextlib.contextmanager
def from_ports(bed: Bed, ports: Sequence[int]) -> Iterator[list[HttpConnection]]:
    """Connections, each second one to the other service."""
    address = NAT.partition(":")[0]
    with contextlib.ExitStack() as closing:
        made = (HttpConnection(bed.client, address, (80, 8080)[port % 2], port) for port in ports)
        yield [closing.enter_context(contextlib.closing(each)) for each in made]


def test_connection_is_not_taken_for_an_earlier_one_between_the_same_ports(life: Life) -> None:
    """Opened behind the copying, it is not yet in the new program's tables, where the earlier one still is."""
    ports, others = range(50000, 50040), [*product((NAT, DIRECT), ("10.99.2.12", "10.99.2.13"))]
    life.run("first", "attach", "eth0")
    with from_ports(life.bed, ports) as early:
        assert len({connection.ask(last=True) for connection in early}) == 3
    for vip, backend in others:
        life.run("first", "backend", "drain", vip, backend)
    with (
        life.stopping("grown", ("_take_over", "_catch_up"), "attach", "eth0") as steps,
        ThreadPoolExecutor(40) as threads,
    ):
        next(steps)
        with from_ports(life.bed, ports) as opened:
            next(steps)
            asked = threads.map(HttpConnection.ask, opened)
            time.sleep(0.3)
            next(steps, None)
            assert {*asked} == {"b1"}
    for vip, backend in others:
        life.run("grown", "backend", "weight", vip, backend, "1")


def test_version_that_the_verifier_refuses_leaves_the_old_one_in_force(life: Life) -> None:
    life.run("first", "attach", "eth0")
    with traffic(life, "first") as during:
        before = life.programs("first")
        refused = life.run("refused", "attach", "eth0", check=False)
        assert (refused.returncode, refused.stdout) == (1, "")
        (line,) = refused.stderr.splitlines()
        assert line.startswith(
            "xdp-lb: upgrade to the installed program failed, the running program is kept:"
            " lb.bpf.o: rejected by the kernel: Permission denied: "
        )
        assert "packet" in line.rpartition(":")[2]
        assert life.programs("first") == before
        life.run("refused", "backend", "weight", NAT, "10.99.2.12", "2")
        during.check()
        assert_all_counted(life, "first", during)


def test_daemon_of_a_version_that_is_refused_serves_with_the_old_program_and_says_so(life: Life) -> None:
    life.run("first", "attach", "eth0")
    process = life.serve("refused")
    with Client.unix(life.socket) as client:
        ready = life.ask("/readyz").json()
        assert ready["status"] == "ready"
        assert ready["problem"].startswith("upgrade to the installed program failed")
        assert "xdp_lb_upgrade_refused 1.0" in life.ask("/metrics").text
        client.set_weight(Vip.parse(NAT), Backend.parse("10.99.2.12:80"), 3)
    assert "the running program is of xdp-lb 0.1.0" in life.run("refused", "status").stdout
    assert "upgrade to the installed program failed" in life.log
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0


def test_program_whose_pins_are_gone_is_for_its_own_version_alone(life: Life) -> None:
    life.run("first", "attach", "eth0")
    with traffic(life, "first") as during:
        for folder in life.pins.iterdir():
            if folder.is_dir():
                shutil.rmtree(folder)
        refused = life.run("grown", "attach", "eth0", check=False)
        assert (refused.returncode, refused.stdout) == (1, "")
        (line,) = refused.stderr.splitlines()
        assert line.startswith("xdp-lb: eth0: the attached program has lost its pins and is not of this version (")
        assert line.endswith("): run ip link set dev eth0 xdp off")
        during.check()
        life.run("first", "attach", "eth0")
        during.check()
        assert_all_counted(life, "first", during)


@pytest.mark.parametrize(("function", "nth"), KILLED_AT if SOAK else KILLED_AT[1::2])
def test_killed_upgrade_serves_on_and_the_next_command_finishes_it(life: Life, function: str, nth: int) -> None:
    """From whichever of both versions is in force to the other."""
    to = "first" if life.status("grown")["outdated"] is None else "grown"
    life.run("first" if to == "grown" else "grown", "attach", "eth0")
    with traffic(life, to) as during:
        life.kill(to, function, nth, "attach", "eth0")
        during.check()
        life.run(to, "attach", "eth0")
        assert life.status(to)["outdated"] is None
        during.check()
        during.end()


def test_daemon_dies_is_upgraded_and_changes_backends_under_load(life: Life) -> None:
    """SOAK_DEATHS times, spread over six versions, with ten changes of backends each time."""
    choose = random.Random(1)
    with traffic(life, "first") as during:
        for number in range(DEATHS):
            process = life.serve(SUCCESSION[number * len(SUCCESSION) // DEATHS])
            with Client.unix(life.socket) as client:
                for _ in range(10):
                    change(client, choose, during)
                assert client.status().outdated == ""
            process.send_signal(choose.choice((signal.SIGKILL, signal.SIGTERM)))
            process.wait(timeout=20)
            during.check(requests=1)
        during.end()


def change(client: Client, choose: random.Random, during: Traffic) -> None:
    """Of one backend. The first always has new connections; the last comes and goes, and is empty when it goes."""
    vip = Vip.parse(choose.choice((NAT, DIRECT)))
    backend, guest = (Backend.parse(f"10.99.2.1{last}:{vip.port}") for last in (choose.choice("23"), 4))
    what = choose.choices(("weigh", "drain", "guest"), (4, 3, 3))[0]
    if what == "weigh":
        client.set_weight(vip, backend, choose.randint(1, 9))
    elif what == "drain":
        client.drain_backend(vip, backend)
    elif not any(str(each) == str(guest) for each in client.service(vip).value.backends):
        client.add_backends(vip, [guest])
    else:
        client.drain_backend(vip, guest)
        during.check(requests=15)
        client.remove_backend(vip, guest)
