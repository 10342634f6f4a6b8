"""Health checks of real servers: through the real path of every mode, and what becomes of clients when one dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lb.control.balancer import Balancer
from lb.control.open import open_balancer
from lb.health.checker import Checker, CheckPath
from lb.health.path import FAR, NEAR, NETWORK4, RealPath
from lb.health.probes import Target, probe
from lb.host.events import Changes, HostEvents
from lb.host.neighbours import Network
from lb.model.conditions import Condition, Conditions
from lb.model.health_check import HealthCheck
from lb.model.options import Options
from lb.model.state import Backend, Mode, Service
from lb.model.vip import Vip
from lb.paths import Paths
from netns_tests.bed import lanes
from netns_tests.bed.daemon import THREE, UNDER, WITHOUT_CODE, effective, end, start
from netns_tests.bed.lanes import LANES, Lane
from netns_tests.bed.servers import start_http
from netns_tests.bed.topology import Bed, Host, wait_until
from netns_tests.bed.traffic import connections, curl
from netns_tests.bed.tunnelled import run_on
from netns_tests.oracle.tunnels import GUE_PORT
from xdp import tc
from xdp.netlink import route_socket
from xdp.object import CHECK_OBJECT, BpfObject

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
            backend = Backend.parse(hosts[label], vip.port)
            return answer(HealthCheck.parse(check), found[vip, str(backend)], vip.port)

        try:
            yield why
        finally:
            ways.close()


def answer(check: HealthCheck, way: CheckPath, port: int) -> str:
    """What is wrong, as this check finds it."""
    target = Target(check, str(way.address), check.port or port, str(way.source or ""))
    return asyncio.run(probe(target)).why


@every_lane
def test_a_check_reaches_the_very_backend(lane: Lane) -> None:
    with paths_to(lane) as why:
        assert [why("http body=b2", label) for label in ("b1", "b2", "b3")] == [
            "response body does not contain b2",
            "",
            "response body does not contain b2",
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


def test_a_program_that_a_killed_process_left_at_tc_is_taken_off_and_those_of_others_stay(lanes_bed: Bed) -> None:
    """As it is before Linux 6.6, where no link takes it off."""
    host = lanes_bed.lb
    with BpfObject.open(CHECK_OBJECT) as obj, host.entered():
        obj.load()
        ours, other = obj.program("check_in"), obj.program("check_out")
        for name in ("eth0", "eth1"):
            index = socket.if_nametoindex(name)
            tc.hold(index, ours.fd, ours.id, ours.name, egress=False)
        kept = tc.hold(index, other.fd, other.id, other.name, egress=False)
    assert [filters_on(host, name) for name in ("eth0", "eth1")] == [{"check_in"}, {"check_in", "check_out"}]
    with paths_to(Lane(lanes_bed, "dr", "ipv4", "ipv4")) as why:
        assert why("tcp", "b1") == ""
        assert [filters_on(host, name) for name in ("eth0", "eth1")] == [set(), {"check_out"}]
    with host.entered():
        kept.close()
    assert "clsact" not in host.run(["tc", "qdisc"]).stdout


def test_only_changes_on_the_way_to_a_backend_make_checks_look_for_another(lanes_bed: Bed) -> None:
    lane = Lane(lanes_bed, "ipip", "ipv4", "ipv4")
    backends = tuple(Backend.parse(address, 80) for address in (lane.backends(lanes_bed.backends)[0], "192.0.2.7"))
    service = Service(
        Vip.parse(lane.http_service), Mode.IPIP, backends, options=Options(health=HealthCheck.parse("tcp"))
    )
    ways = RealPath(Network(route_socket))
    with lanes_bed.lb.entered(), contextlib.closing(ways):
        towards, elsewhere = map(socket.if_nametoindex, ("eth1", "eth0"))
        found = ways.find([service])
        assert [bool(way.fault) for way in found.values()] == [False, True]
        no_route = int.from_bytes(socket.inet_aton("192.0.2.0"), "big") >> 8
        for changes, concerned in (
            (Changes(links={towards}), True),
            (Changes(links={elsewhere}), False),
            (Changes(prefixes={(32, 24): {no_route}}), True),  # a way to where there was none
            (Changes(prefixes={(32, 24): {no_route + 1}}), False),
            (Changes(prefixes={(32, 0): {0}}), True),
            (Changes(neighbours={(towards, backends[0].address.packed): None}), False),  # which the kernel looks for
            (Changes(), False),
        ):
            assert ways.concerned(changes) is concerned, changes
    assert not ways.concerned(Changes(everything=True))  # nothing is checked any more


@pytest.mark.parametrize("loss", [f"link del {NEAR}", f"link set {NEAR} down", f"route del {NETWORK4}"])
def test_a_pair_that_somebody_takes_away_is_noticed_and_made_again(lanes_bed: Bed, loss: str) -> None:
    lane = Lane(lanes_bed, "ipip", "ipv4", "ipv4")
    backend, check = Backend.parse(lane.backends(lanes_bed.backends)[0], 80), HealthCheck.parse("tcp")
    service = Service(Vip.parse(lane.http_service), Mode.IPIP, (backend,), options=Options(health=check))
    ways = RealPath(Network(route_socket))

    async def changes_of_it() -> Changes:
        with HostEvents(neighbours=False) as events:
            lanes_bed.lb.run(["ip", *loss.split()])
            return await events.next(5)

    with lanes_bed.lb.entered(), contextlib.closing(ways):
        for _ in range(2):
            (way,) = ways.find([service]).values()
            assert answer(check, way, 80) == ""
            assert ways.concerned(asyncio.run(changes_of_it()))
        assert answer(check, way, 80) != ""
    assert NEAR not in traces(lanes_bed.lb)


def test_changes_without_neighbours_are_of_links_and_routes_alone(lanes_bed: Bed) -> None:
    host = lanes_bed.lb

    async def listen() -> Changes:
        with host.entered():
            events = HostEvents(neighbours=False)
        with events:
            for command in (
                "neigh add 10.99.2.77 lladdr 02:00:00:00:00:77 dev eth1",
                "route add 192.0.2.0/24 dev eth1",
            ):
                await asyncio.to_thread(host.run, ["ip", *command.split()])
            return await events.next(20)

    try:
        changes = asyncio.run(listen())
    finally:
        host.run(["ip", "route", "del", "192.0.2.0/24", "dev", "eth1"])
        host.run(["ip", "neigh", "del", "10.99.2.77", "dev", "eth1"])
    assert (changes.neighbours, changes.everything) == ({}, False)
    assert changes.prefixes == {(32, 24): {int.from_bytes(socket.inet_aton("192.0.2.0"), "big") >> 8}}


def filters_on(host: Host, interface: str) -> set[str]:
    said = host.run(["tc", "filter", "show", "dev", interface, "ingress"]).stdout
    return {name for name in ("check_in", "check_out") if name in said}


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
        made.writer.in_daemon = True
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
        assert found(vip)[second].why.startswith("no response")
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


# With the daemon


@pytest.fixture
def web(bed: Callable[..., Bed]) -> Bed:
    """Three servers, behind a router for answers."""
    made = bed(backends=3, router=True)
    for host in made.backends:
        start_http(made, host)
    return made


def found_of(bed: Bed) -> dict[tuple[str, str], dict[str, Any]]:
    """By VIP and backend."""
    services = json.loads(bed.xdp_lb("status", "--json").stdout)["services"]
    return {(each["vip"], b["backend"]): b for each in services for b in each["backends"]}


def states(bed: Bed) -> list[str]:
    return [each["state"] for each in found_of(bed).values()]


def served_with_a_silent_one(bed: Bed) -> tuple[str, str]:
    """The VIP, and of three backends the one that answers no more, which the daemon knows. A check takes long to find
    that, and so does a client."""
    vip, silent = f"{bed.vip4}:80", bed.backends[2]
    words = ("--backends", ",".join(host.ipv4 for host in bed.backends))
    bed.xdp_lb("attach", "eth0", "--vip", vip, *words, "--health", "tcp interval=200ms timeout=3s fall=1")
    wait_until(lambda: all(each["since"] for each in found_of(bed).values()), "all checked", timeout_s=20)
    assert answering(bed) == {"b1", "b2", "b3"}
    silent.run(["ip", "route", "add", "blackhole", bed.lb.interfaces[-1].ipv4])
    wait_until(lambda: states(bed) == ["active", "active", "down"], "the fault found", timeout_s=30)
    return vip, f"{silent.ipv4}:80"


def packets_for(bed: Bed, backend: str) -> int:
    return next(int(each["packets"]) for (_, name), each in found_of(bed).items() if name == backend)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_backend_that_is_down_gets_no_packet_while_the_daemon_dies_and_starts_again(
    web: Bed, number: signal.Signals
) -> None:
    process = start(web)
    vip, silent = served_with_a_silent_one(web)
    before = found_of(web)[f"{vip}/tcp", silent]
    end(process, number)
    assert answering(web) == {"b1", "b2"}
    process = start(web)
    assert answering(web) == {"b1", "b2"}  # its first check takes three seconds
    after = found_of(web)[f"{vip}/tcp", silent]
    assert [after[key] for key in ("state", "since", "packets")] == ["down", before["since"], before["packets"]]
    web.backends[2].run(["ip", "route", "del", "blackhole", web.lb.interfaces[-1].ipv4])
    wait_until(lambda: states(web) == ["active"] * 3, "it found up again", timeout_s=20)
    assert end(process) == 0


def test_a_backend_that_is_down_stays_so_without_the_daemon_until_somebody_says_otherwise(web: Bed) -> None:
    process = start(web)
    vip, silent = served_with_a_silent_one(web)
    end(process, signal.SIGKILL)
    before = packets_for(web, silent)
    stays = f"{vip}/tcp: {silent} (down) keeps its last health state until xdp-lb serve runs or --health off"
    for words in (("backend", "weight", vip, web.backends[0].ipv4, "3"), ("attach", "eth0")):
        assert stays in web.xdp_lb(*words).stdout
        assert answering(web) == {"b1", "b2"}
    said = web.xdp_lb("status").stdout
    assert f"{silent}: down since " in said
    assert "; not checked since " in said
    assert packets_for(web, silent) == before
    assert "stays" not in web.xdp_lb("vip", "set", vip, "--health", "off").stdout
    assert states(web) == ["active"] * 3
    web.backends[2].run(["ip", "route", "del", "blackhole", web.lb.interfaces[-1].ipv4])
    assert answering(web) == {"b1", "b2", "b3"}


VIPS = {f"10.99.1.{101 + n}": mode for n, mode in enumerate(("dr", "ipip", "gue"))} | {
    f"[fd99:1::{101 + n}]": mode for n, mode in enumerate(("dr", "ipip", "gue"))
}


def test_the_real_path_of_every_mode_is_checked_under_three_capabilities(web: Bed) -> None:
    for host in web.backends[:2]:
        owned = ",".join(vip.strip("[]") for vip in VIPS)
        run_on(web, host, "attach", "eth0", "--vip", owned, "--setup-vip")
    mount_point = web.directory / "run" / "bpf"
    mount_point.mkdir(parents=True)
    subprocess.run(["mount", "-t", "bpf", "-o", "mode=0700", "bpf", str(mount_point)], check=True)
    process = start(web, under=[*UNDER, "--no-new-privs", *WITHOUT_CODE])
    assert effective(process) == THREE
    web.xdp_lb("apply", "--prune", "-f", str(checked_services(web)))
    web.xdp_lb("attach", "eth0")
    wait_until(lambda: all(each["since"] for each in found_of(web).values()), "all checked", timeout_s=20)
    assert states(web) == ["active"] * 12
    run_on(web, web.backends[1], "detach", "eth0")
    wait_until(lambda: states(web).count("down") == 6, "tunnels and VIPs missed", timeout_s=20)
    second = {f"{web.backends[1].ipv4}:80", f"[{web.backends[1].ipv6}]:80"}
    assert {name for (_, name), each in found_of(web).items() if each["state"] == "down"} == second
    assert end(process) == 0


def checked_services(bed: Bed) -> Path:
    path = bed.directory / "checked.toml"
    services = []
    for vip, mode in VIPS.items():
        backends = [f"[{host.ipv6}]" if ":" in vip else host.ipv4 for host in bed.backends[:2]]
        check = "http interval=200ms timeout=1s"
        services.append(
            f'[[service]]\nvip = "{vip}:80"\nmode = "{mode}"\nhealth = "{check}"\nring_size = 251\n'
            f"backends = {json.dumps(backends)}\n"
        )
    path.write_text("".join(services))
    return path


def test_checks_follow_a_route_that_leads_elsewhere(web: Bed) -> None:
    """From the back network to the front one, whose router leads to the backends as well."""
    first, vip = web.backends[0], f"{web.vip4}:80"
    run_on(web, first, "attach", "eth0", "--vip", web.vip4, "--setup-vip")
    process = start(web)
    check = ("--health", "http interval=200ms timeout=1s rise=1 fall=1")
    web.xdp_lb("attach", "eth0", "--vip", vip, "--mode", "ipip", "--backends", first.ipv4, *check)
    wait_until(lambda: all(each["since"] for each in found_of(web).values()), "checked", timeout_s=20)
    assert states(web) == ["active"]
    web.lb.run(["ip", "link", "set", "eth1", "down"])
    wait_until(lambda: states(web) == ["down"] or not_checked(web), "the way lost", timeout_s=20)
    web.lb.run(["ip", "route", "add", first.ipv4, "via", router_on_the_front(web)])
    wait_until(lambda: states(web) == ["active"] and not not_checked(web), "the other way found", timeout_s=20)
    assert end(process) == 0


def not_checked(bed: Bed) -> bool:
    return any(each["why"].startswith("not checked") for each in found_of(bed).values())


def router_on_the_front(bed: Bed) -> str:
    assert bed.router
    return bed.router.interfaces[0].ipv4
