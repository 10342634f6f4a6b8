"""The test bed itself: who reaches whom, who answers, and that nothing of it remains."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pyroute2 import netns

from netns_tests.bed.servers import REPOSITORY, big_file, start_http, start_udp_echo
from netns_tests.bed.topology import Bed, Host, remaining_namespaces

pytestmark = pytest.mark.usefixtures("console_script")

MakeBed = Callable[..., Bed]
LAYOUTS = [{"one_arm": one_arm, "router": router} for one_arm in (True, False) for router in (True, False)]


def reaches(source: Host, target: Host) -> bool:
    return source.pings(target.ipv4) and source.pings(target.ipv6)


def http_load(bed: Bed, url: str, *options: str) -> dict[str, object]:
    command = [sys.executable, "-m", "netns_tests.bed.load", url, *options]
    report: dict[str, object] = json.loads(bed.client.run(command, cwd=REPOSITORY).stdout)
    return report


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_balancer_reaches_the_client_and_every_backend(bed: MakeBed, layout: dict[str, bool]) -> None:
    b = bed(backends=2, **layout)
    assert all(reaches(b.lb, host) for host in (b.client, *b.backends))


def test_two_arms_let_nothing_pass_the_balancer_by_accident(bed: MakeBed) -> None:
    b = bed(backends=1)
    assert not b.client.pings(b.backends[0].ipv4, timeout_s=0.3)
    assert not b.client.pings(b.backends[0].ipv6, timeout_s=0.3)


@pytest.mark.parametrize("layout", [{"forward": True}, {"router": True}], ids=str)
def test_client_reaches_backends_of_the_other_network_through_the_gateway(
    bed: MakeBed, layout: dict[str, bool]
) -> None:
    b = bed(backends=1, **layout)
    assert reaches(b.client, b.backends[0])


def test_backend_added_later_is_reached_at_once(bed: MakeBed) -> None:
    b = bed(backends=1, one_arm=True)
    assert reaches(b.client, b.add_backend())
    assert [backend.label for backend in b.backends] == ["b1", "b2"]


def test_vip_on_a_loopback_is_not_answered_on_the_wire(bed: MakeBed) -> None:
    b = bed(backends=1, one_arm=True)
    b.own_vip(b.backends[0])
    assert b.backends[0].pings(b.vip4)
    assert b.backends[0].pings(b.vip6)
    assert not b.client.pings(b.vip4, timeout_s=0.3)
    assert not b.client.pings(b.vip6, timeout_s=0.3)


def test_no_veth_leaves_checksums_to_a_device(bed: MakeBed) -> None:
    b = bed(backends=1, one_arm=True)
    offloads = b.lb.run(["ethtool", "-k", "eth0"]).stdout.splitlines()
    assert "tx-checksumming: off" in offloads
    port_offloads = b.switch.run(["ethtool", "-k", "lb-eth0"]).stdout.splitlines()
    assert "tx-checksumming: off" in port_offloads
    assert "generic-receive-offload: on" in port_offloads


def test_second_bed_beside_the_first_is_another_world(bed: MakeBed) -> None:
    first, second = bed(backends=2, one_arm=True), bed(backends=1, one_arm=True)
    assert reaches(first.client, first.backends[1])
    assert reaches(second.client, second.backends[0])
    assert not second.client.pings(first.backends[1].ipv4, timeout_s=0.3)


def test_closed_bed_leaves_no_namespace_process_or_file() -> None:
    others = remaining_namespaces()
    with Bed(backends=1) as b:
        server = start_http(b, b.backends[0])
        # A grandchild that outlives its parent and heeds no SIGTERM.
        b.lb.run(["sh", "-c", "trap '' TERM; sleep 600 &"], capture_output=False)
        pids = [pid for ns, pids in netns.ns_pids().items() if ns.startswith(b.name) for pid in pids]
    assert len(pids) >= 3
    assert server.returncode is not None
    assert not any(running(pid) for pid in pids)
    assert remaining_namespaces() == others
    assert not b.directory.exists()


def test_bed_is_removed_when_the_test_in_it_is_interrupted() -> None:
    others = remaining_namespaces()
    with pytest.raises(KeyboardInterrupt), Bed(backends=1):
        raise KeyboardInterrupt
    assert remaining_namespaces() == others


def test_bed_of_a_killed_process_is_swept_by_the_next(bed: MakeBed) -> None:
    script = (
        "import signal\nfrom netns_tests.bed.topology import Bed\n"
        "with Bed(backends=1) as b: print(b.directory, flush=True); signal.pause()"
    )
    owner = subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    with owner:
        assert owner.stdout is not None
        directory = Path(owner.stdout.readline().strip())
        name = directory.name.rpartition("-")[0]
        bed(backends=0)
        assert any(ns.startswith(name) for ns in netns.listnetns()), "swept while its owner lives"
        assert directory.exists()
        owner.send_signal(signal.SIGKILL)
    bed(backends=0)
    assert not any(ns.startswith(name) for ns in netns.listnetns())
    assert not directory.exists()


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_http_load_counts_requests_by_backend(bed: MakeBed, family: str) -> None:
    b = bed(backends=1, one_arm=True)
    start_http(b, b.backends[0], ports=[80, 8080])
    address = b.backends[0].ipv4 if family == "ipv4" else f"[{b.backends[0].ipv6}]"
    report = http_load(b, f"http://{address}:8080/", "--requests", "100", "--connections", "10")
    del report["seconds"], report["peak_connections"]
    assert report == {"requests": 100, "failed": 0, "reasons": {}, "backends": {"b1": 100}}


def test_load_holds_two_thousand_connections_open_at_once(bed: MakeBed) -> None:
    b = bed(backends=1, one_arm=True)
    start_http(b, b.backends[0])
    url = f"http://{b.backends[0].ipv4}/"
    report = http_load(b, url, "--requests", "2000", "--connections", "2000", "--keepalive")
    assert (report["failed"], report["peak_connections"]) == (0, 2000)


def test_load_names_the_reason_of_each_failure(bed: MakeBed) -> None:
    b = bed(backends=1, one_arm=True)
    refused = http_load(b, f"http://{b.backends[0].ipv4}/", "--requests", "3")
    assert (refused["failed"], refused["reasons"]) == (3, {"ECONNREFUSED": 3})
    start_http(b, b.backends[0])
    missing = http_load(b, f"http://{b.backends[0].ipv4}/none", "--requests", "3")
    assert missing["reasons"] == {"status 404": 3}


def test_interrupted_load_still_prints_its_report(bed: MakeBed) -> None:
    b = bed(backends=1, one_arm=True)
    start_http(b, b.backends[0])
    command = [sys.executable, "-m", "netns_tests.bed.load", f"http://{b.backends[0].ipv4}/"]
    load = b.client.popen([*command, "--report-every", "0.1"], cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert load.stdout is not None
    assert json.loads(load.stdout.readline())["failed"] == 0
    load.send_signal(signal.SIGINT)
    *_, last = load.stdout.read().splitlines()
    assert json.loads(last)["backends"]["b1"] > 0
    assert load.wait() == 0


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_udp_echo_answers_from_the_address_it_was_asked_at(bed: MakeBed, family: str) -> None:
    b = bed(backends=1, one_arm=True)
    backend = b.backends[0]
    start_udp_echo(backend, 5353)
    b.own_vip(backend)
    # The VIP is not answered on the wire: the client is told the way, as a balancer would.
    vip, via = (b.vip4, backend.ipv4) if family == "ipv4" else (b.vip6, backend.ipv6)
    with b.client.netlink() as ip:
        ip.route("add", dst=f"{vip}/{32 if family == 'ipv4' else 128}", gateway=via)
    report = http_load(
        b,
        f"udp://[{vip}]:5353" if family == "ipv6" else f"udp://{vip}:5353",
        "--requests",
        "50",
        "--connections",
        "10",
        "--timeout",
        "2",
    )
    assert (report["failed"], report["backends"]) == (0, {"b1": 50})


def test_big_file_arrives_whole(bed: MakeBed) -> None:
    b = bed(backends=1, one_arm=True)
    start_http(b, b.backends[0])
    target = b.directory / "downloaded"
    b.client.run(["curl", "-sSf", "-o", str(target), f"http://{b.backends[0].ipv4}/big"])
    assert hashlib.sha256(target.read_bytes()).hexdigest() == big_file().sha256


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
