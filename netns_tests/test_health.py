"""Health checks of real servers: through the real path of every mode, and what becomes of clients when one dies."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import pytest

from lb.balancer import Balancer, open_balancer
from lb.check_path import FAR, NEAR, RealPath
from lb.checker import Checker
from lb.conditions import Condition, Conditions
from lb.health_check import HealthCheck
from lb.model import Backend, Mode, Service
from lb.neighbours import Network
from lb.options import Options
from lb.paths import Paths
from lb.probes import Target, probe
from lb.vip import Vip
from netns_tests import lanes
from netns_tests.lanes import LANES, Lane
from netns_tests.servers import start_http
from netns_tests.topology import Bed, Host, wait_until
from netns_tests.traffic import connections, curl
from netns_tests.tunnelled import run_on
from netns_tests.tunnels import GUE_PORT
from xdp.netlink import route_socket

every_lane = pytest.mark.parametrize("lane", LANES, ids=lanes.name, indirect=True)
STRICT = ("net.ipv4.conf.all.rp_filter", "net.ipv4.conf.default.rp_filter")


@pytest.fixture
def lane(lanes_bed: Bed, request: pytest.FixtureRequest) -> Lane:
    return Lane(lanes_bed, *request.param)


@contextlib.contextmanager
def paths_to(lane: Lane, *, outer_checksum: bool = False) -> Iterator[Callable[[str, str], str]]:
    """`why(check, label)`: what is wrong with the backend of this label, as a check finds it."""
    vip = Vip.parse(lane.http_service)
    hosts = {f"b{number}": address for number, address in enumerate(lane.backends(lane.bed.backends), start=1)}
    backends = tuple(Backend.parse(address, vip.port) for address in hosts.values())
    options = Options(health=HealthCheck.parse("tcp"), outer_checksum=outer_checksum)
    service = Service(vip, Mode(lane.mode), backends, options=options)
    ways = RealPath(Network(route_socket))
    with lane.bed.lb.entered():
        found = ways.find([service])

        def why(check: str, label: str) -> str:
            parsed, backend = HealthCheck.parse(check), Backend.parse(hosts[label], vip.port)
            way = found[vip, str(backend)]
            target = Target(parsed, str(way.address), parsed.port or vip.port, str(way.source or ""))
            return asyncio.run(probe(target)).why

        try:
            yield why
        finally:
            ways.close()


@every_lane
def test_a_check_reaches_the_very_backend(lane: Lane) -> None:
    with paths_to(lane) as why:
        assert [why("http body=b2", label) for label in ("b1", "b2", "b3")] == [
            "the body does not contain b2",
            "",
            "the body does not contain b2",
        ]


@every_lane
def test_a_check_finds_what_a_backend_has_and_lacks(lane: Lane) -> None:
    with paths_to(lane) as why:
        assert why("tcp", "b1") == ""
        assert why("tcp port=81 timeout=5s", "b1") == "connection refused"
        assert why(f"udp port={lanes.ECHO_PORT} send=x expect='b1 x' timeout=5s", "b1") == ""
        assert why("udp port=81 timeout=5s", "b1") == "connection refused"


@pytest.mark.parametrize("lane", [each for each in LANES if each[0] == "gue"], ids=lanes.name, indirect=True)
def test_the_outer_checksum_is_right_where_a_service_wants_one(lane: Lane) -> None:
    port = "b1-" + lane.bed.backends[0].interfaces[0].name
    words = ["tcpdump", "-i", port, "-nvvl", "-c", "3", f"udp dst port {GUE_PORT}"]
    seen = lane.bed.switch.popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert seen.stdout
    seen.stdout.readline()  # it listens
    with paths_to(lane, outer_checksum=True) as why:
        assert why("http body=b1", "b1") == ""
    said, _ = seen.communicate(timeout=10)
    assert said.count("[udp sum ok]") == 3


def test_checks_leave_nothing_behind(lanes_bed: Bed) -> None:
    before = traces(lanes_bed.lb)
    with paths_to(Lane(lanes_bed, "gue", "ipv4", "ipv6")) as why:
        assert why("tcp", "b1") == ""
        assert NEAR in traces(lanes_bed.lb)
    assert traces(lanes_bed.lb) == before


def test_checks_take_the_place_of_what_a_killed_process_left(lanes_bed: Bed) -> None:
    host = lanes_bed.lb
    host.run(["ip", "link", "add", NEAR, "type", "veth", "peer", "name", FAR])
    with paths_to(Lane(lanes_bed, "dr", "ipv4", "ipv4")) as why:
        assert why("tcp", "b1") == ""
    assert NEAR not in traces(host)


def traces(host: Host) -> str:
    """Interfaces, routes of both families and rules."""
    commands = (["ip", "-br", "link"], ["ip", "route"], ["ip", "-6", "route"], ["ip", "rule"])
    return "".join(host.run(command).stdout for command in commands)


def test_checks_work_under_a_strict_reverse_path_filter(lanes_bed: Bed) -> None:
    for name in STRICT:
        lanes_bed.lb.sysctl(name, 1)
    try:
        with paths_to(Lane(lanes_bed, "ipip", "ipv4", "ipv4")) as why:
            assert why("http body=b1", "b1") == ""
            assert why("udp port=81 timeout=5s", "b1") == "connection refused"
    finally:
        for name in STRICT:
            lanes_bed.lb.sysctl(name, 0)


def test_the_hosts_other_traffic_is_left_alone_by_checks(lanes_bed: Bed) -> None:
    with paths_to(Lane(lanes_bed, "gue", "ipv4", "ipv4")):
        backend = lanes_bed.backends[0]
        assert curl(lanes_bed.lb, f"http://{backend.ipv4}/") == "b1"
        assert lanes_bed.lb.pings(backend.ipv6)


# With the balancer


@contextlib.contextmanager
def checked(bed: Bed, balancer: Balancer) -> Iterator[Callable[[Vip], Mapping[str, Condition]]]:
    """The engine in a thread of its own, in the balancer's namespace; what it has found so far, by VIP."""
    found: list[Conditions] = [{}]
    started = threading.Event()
    stop: list[Callable[[], object]] = []

    async def put_in_force(conditions: Conditions) -> None:
        await asyncio.to_thread(balancer.writer.set_conditions, conditions)
        found.append(conditions)

    async def run() -> None:
        checker = Checker(put_in_force, RealPath(Network(route_socket)))
        checker.watch(balancer.state.services)
        running = asyncio.create_task(checker.run())
        loop = asyncio.get_running_loop()
        stop.append(lambda: loop.call_soon_threadsafe(running.cancel))
        started.set()
        await asyncio.gather(running, return_exceptions=True)

    def enter_and_run() -> None:
        with bed.lb.entered():
            asyncio.run(run())

    thread = threading.Thread(target=enter_and_run)
    thread.start()
    started.wait()
    try:
        yield lambda vip: found[-1].get(vip, {})
    finally:
        stop[0]()
        thread.join()


def served(bed: Bed, mode: str, *options: str) -> Vip:
    """A service of a bed of its own, checked ten times a second."""
    vip = Vip.parse(f"{bed.vip4}:80")
    check = "http / interval=100ms timeout=1s rise=2 fall=2"
    words = ("--mode", mode, "--health", check, "--backends", ",".join(b.ipv4 for b in bed.backends))
    bed.xdp_lb("attach", "eth0", "--vip", str(vip), *words, *options)
    return vip


def answering(bed: Bed) -> set[str]:
    with connections(bed, bed.vip4, count=60) as opened:
        return {connection.ask() for connection in opened}


@contextlib.contextmanager
def balancing(bed: Bed) -> Iterator[Balancer]:
    with bed.lb.entered(), open_balancer(Paths(bed.directory / "state", bed.directory / "run", bed.lb.name)) as made:
        made.writer.checks_run = True
        yield made


def test_clients_go_elsewhere_when_a_server_dies_and_come_back_with_it(bed: Callable[..., Bed]) -> None:
    b = bed(backends=2)
    servers = [start_http(b, host) for host in b.backends]
    vip = served(b, "nat", "--slow-start", "2")
    first = f"{b.backends[0].ipv4}:80"
    with balancing(b) as balancer, checked(b, balancer) as found:
        wait_until(lambda: len(found(vip)) == 2, "both checked")
        assert answering(b) == {"b1", "b2"}
        servers[0].terminate()
        servers[0].wait()
        wait_until(lambda: found(vip)[first].down, "b1 found down")
        assert found(vip)[first].why == "connection refused"
        assert answering(b) == {"b2"}
        assert [each.state for each in balancer.status().services[0].backends] == ["down", "active"]
        restart(b, b.backends[0])
        wait_until(lambda: not found(vip)[first].down, "b1 found up")
        assert found(vip)[first].share < 100
        wait_until(lambda: found(vip)[first].share == 100, "b1 at its whole share")
        assert answering(b) == {"b1", "b2"}
        assert balancer.state.service(vip).backend(Backend.parse(first)).weight == 1


def restart(bed: Bed, host: Host) -> None:
    (bed.directory / f"nginx-{host.label}").rename(bed.directory / "earlier")
    start_http(bed, host)


def test_a_broken_tunnel_is_noticed_although_the_server_is_well(bed: Callable[..., Bed]) -> None:
    b = bed(backends=2, router=True)
    for host in b.backends:
        start_http(b, host)
        run_on(b, host, "attach", "eth0", "--vip", b.vip4, "--setup-vip")
    vip = served(b, "ipip")
    second = f"{b.backends[1].ipv4}:80"
    with balancing(b) as balancer, checked(b, balancer) as found:
        wait_until(lambda: len(found(vip)) == 2, "both checked")
        assert not any(each.down for each in found(vip).values())
        run_on(b, b.backends[1], "detach", "eth0")
        assert curl(b.lb, f"http://{b.backends[1].ipv4}/") == "b2"
        wait_until(lambda: found(vip)[second].down, "b2 found down")
        assert found(vip)[second].why.startswith("no answer")
        assert answering(b) == {"b1"}


def test_with_all_servers_down_a_service_fails_closed_if_asked_to(bed: Callable[..., Bed]) -> None:
    b = bed(backends=1)
    vip = served(b, "nat", "--fail-closed")
    with balancing(b) as balancer, checked(b, balancer) as found:
        wait_until(lambda: any(each.down for each in found(vip).values()), "found down")
        before = balancer.status().drops["drop_no_backend"]
        curl_fails(b)
        assert balancer.status().drops["drop_no_backend"] > before
        options = replace(balancer.state.service(vip).options, fail_closed=False)
        balancer.set_options(vip, options)
        start_http(b, b.backends[0])
        assert curl(b.client, f"http://{b.vip4}/") == "b1"


def curl_fails(bed: Bed) -> None:
    done = bed.client.run(["curl", "-s", "--max-time", "1", f"http://{bed.vip4}/"], check=False)
    assert done.returncode != 0
