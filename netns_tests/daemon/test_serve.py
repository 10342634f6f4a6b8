"""The daemon in a network namespace: real traffic through its start, its end and its death, and as little power as it
needs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from netns_tests.bed.daemon import (
    SERVE,
    THREE,
    UNDER,
    WEB,
    WITHOUT_CODE,
    backends,
    certificate_of,
    effective,
    end,
    places,
    socket_of,
    start,
    states,
)
from netns_tests.bed.servers import start_http
from netns_tests.bed.topology import XDP_LB, Bed, wait_until
from netns_tests.bed.traffic import connections, curl, go_on, loading


@pytest.fixture
def bed() -> Iterator[Bed]:
    with Bed(backends=2, router=True) as made:
        for backend in made.backends:
            start_http(made, backend, [80])
        yield made


def test_no_request_fails_while_the_daemon_starts_changes_things_dies_and_is_started_again(bed: Bed) -> None:
    bed.xdp_lb(*SERVE)
    with loading(bed, f"http://{WEB}/") as load, connections(bed, "10.99.1.100", count=10) as held:
        labels = [connection.ask() for connection in held]
        for number in (signal.SIGKILL, signal.SIGTERM):
            process = start(bed)
            bed.xdp_lb("backend", "add", WEB, "10.99.2.11:80@1", check=False)  # is there: refused by the daemon
            bed.xdp_lb("backend", "drain", WEB, "10.99.2.12")
            go_on(20, load)
            assert end(process, number) == (0 if number is signal.SIGTERM else -number)
            assert socket_of(bed).exists() is (number is signal.SIGKILL)
            go_on(20, load)
            bed.xdp_lb("backend", "weight", WEB, "10.99.2.12", "1")  # by the command itself, past a dead socket
            assert [connection.ask() for connection in held] == labels
        report = load.stop()
    assert (report.failed, report.reasons) == (0, {})


def test_commands_go_through_the_daemon_which_has_the_lock(bed: Bed) -> None:
    bed.xdp_lb(*SERVE)
    before = {words: bed.xdp_lb(*words).stdout for words in READING}
    process = start(bed)
    try:
        assert {words: bed.xdp_lb(*words).stdout for words in READING} == before
        added = bed.xdp_lb("backend", "add", WEB, "10.99.2.11:8080")
        assert added.stdout.startswith(f"{WEB}/tcp: backend 10.99.2.11:8080 added: ")
        refused = bed.xdp_lb("backend", "add", WEB, "10.99.2.11:8080", check=False)
        assert refused.stderr == f"xdp-lb: backend 10.99.2.11:8080: already in service {WEB}/tcp\n"
        second = bed.xdp_lb("serve", check=False)
        assert second.returncode == 1
        assert "xdp-lb serve) is changing network namespace" in second.stderr.splitlines()[-1]
        audit = json.loads(bed.xdp_lb("audit", "--json").stdout)
        assert [(e["who"], e["outcome"][:3]) for e in audit] == [("uid 0 (root)", "200"), ("uid 0 (root)", "409")]
    finally:
        assert end(process) == 0
    assert backends(bed) == ["10.99.2.11:80", "10.99.2.11:8080", "10.99.2.12:80"]


READING = [("vip", "list"), ("vip", "list", "--json"), ("backend", "list"), ("status",), ("status", "--json")]


def test_what_is_stored_is_in_force_when_the_daemon_has_started_after_a_boot(bed: Bed) -> None:
    bed.xdp_lb(*SERVE)
    bed.lb.run(["ip", "link", "set", "dev", "eth0", "xdp", "off"])
    process = start(bed)
    assert curl(bed.client, f"http://{WEB}/") in {"b1", "b2"}
    assert end(process) == 0


def test_three_capabilities_are_enough_where_the_bpffs_is_mounted(bed: Bed) -> None:
    mount_point = bed.directory / "run" / "bpf"
    mount_point.mkdir(parents=True)
    subprocess.run(["mount", "-t", "bpf", "-o", "mode=0700", "bpf", str(mount_point)], check=True)
    process = start(bed, under=[*UNDER, *WITHOUT_CODE])
    assert effective(process) == THREE
    bed.xdp_lb(*SERVE)
    assert curl(bed.client, f"http://{WEB}/") in {"b1", "b2"}
    for words in (
        ("backend", "drain", WEB, "10.99.2.12"),
        ("vip", "add", "10.99.1.101:80", "--mode", "dr", "--backends", "10.99.2.11"),
        ("vip", "remove", "10.99.1.101:80"),
        ("status",),
        ("detach",),
        ("attach", "eth0"),
        ("backend", "weight", WEB, "10.99.2.12", "2"),
    ):
        bed.xdp_lb(*words)
    assert curl(bed.client, f"http://{WEB}/") in {"b1", "b2"}
    assert end(process) == 0


def test_without_them_it_does_not_begin(bed: Bed) -> None:
    command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", str(XDP_LB), "serve"]
    refused = bed.lb.run(command, check=False, env=os.environ | places(bed))
    assert refused.returncode == 1
    assert refused.stderr == "xdp-lb: not permitted: run as root (CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF missing)\n"
    assert not socket_of(bed).exists()


def test_a_transition_that_has_had_its_time_ends_by_itself(bed: Bed) -> None:
    bed.xdp_lb(*SERVE)
    bed.xdp_lb(
        "vip", "add", "10.99.1.101:80", "--mode", "dr", "--flow-timeout", "1", "--backends", "10.99.2.11,10.99.2.12"
    )
    bed.xdp_lb("backend", "drain", "10.99.1.101:80", "10.99.2.12")
    assert slots_in_transition(bed, "10.99.1.101:80/tcp") > 0
    process = start(bed)
    wait_until(lambda: slots_in_transition(bed, "10.99.1.101:80/tcp") == 0, "the transition over", timeout_s=20)
    assert end(process) == 0


def slots_in_transition(bed: Bed, vip: str) -> int:
    services = json.loads(bed.xdp_lb("status", "--json").stdout)["services"]
    return next(int(each["slots_in_transition"]) for each in services if each["vip"] == vip)


def test_a_client_in_another_namespace_comes_in_by_tls_and_token(bed: Bed) -> None:
    certificate, key = certificate_of(bed)
    bed.xdp_lb(*SERVE)
    token = bed.xdp_lb("token", "create", "deploy", "--role", "write").stdout.strip()
    listen = ("--listen", f"{bed.lb.ipv4}:8443", "--listen", f"[{bed.lb.ipv6}]:8443")
    process = start(bed, *listen, "--tls-cert", str(certificate), "--tls-key", str(key), "--log-format", "json")
    url = f"https://{bed.lb.ipv4}:8443/v1/services/10.99.1.100:80%2Ftcp/backends/10.99.2.12:80"
    drain = ["curl", "-s", "--max-time", "5", "--cacert", str(certificate), "-X", "PATCH", url]
    drain += ["-H", "Content-Type: application/json", "-d", '{"draining": true}']
    assert json.loads(bed.client.run(drain).stdout)["status"] == 401
    report = json.loads(bed.client.run([*drain, "-H", f"Authorization: Bearer {token}"]).stdout)
    assert report["changes"][0]["after"]["backends"][1]["draining"]
    assert end(process) == 0
    log = (bed.directory / "serve.log").read_text()
    assert [json.loads(line)["event"] for line in log.splitlines()].count("audit") == 1
    assert token not in log
    assert f'"address": "{bed.client.ipv4}"' in bed.xdp_lb("audit", "--json").stdout


def test_a_backend_that_is_down_is_found_and_left_out_by_the_daemon_alone(bed: Bed) -> None:
    bed.xdp_lb(*SERVE)
    bed.xdp_lb("backend", "add", WEB, "10.99.2.11:8080")  # where nobody listens
    process = start(bed, under=[*UNDER, *WITHOUT_CODE])
    said = bed.xdp_lb("vip", "set", WEB, "--health", "http interval=0.2s").stdout
    assert "health checks run only" not in said
    wait_until(lambda: states(bed) == ["active", "down", "active"], "the fault found", timeout_s=20)
    assert {curl(bed.client, f"http://{WEB}/") for _ in range(8)} <= {"b1", "b2"}
    assert "10.99.2.11:8080: down since" in bed.xdp_lb("status").stdout
    assert end(process) == 0
    assert states(bed) == ["active", "down", "active"]  # as it is in force


# A disk that does not take it


@contextmanager
def mounted(*command: str, at: Path) -> Iterator[None]:
    subprocess.run(["mount", *command, str(at)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


def test_a_change_that_cannot_be_stored_is_refused_and_packets_go_on(bed: Bed) -> None:
    """The disk gets full while the daemon runs; there is room again, and it goes on."""
    state = bed.directory / "state"
    state.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=512k", "tmpfs", at=state):
        bed.xdp_lb(*SERVE)
        process = start(bed)
        fill(state / "filler")
        refused = bed.xdp_lb("apply", "--prune", "-f", str(many_services(bed)), check=False)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "the disk is full" in refused.stderr
        assert curl(bed.client, f"http://{WEB}/") in {"b1", "b2"}
        assert backends(bed) == ["10.99.2.11:80", "10.99.2.12:80"]
        (state / "filler").unlink()
        bed.xdp_lb("backend", "drain", WEB, "10.99.2.12")
        assert end(process) == 0


def fill(path: Path) -> None:
    """All that is left of the file system."""
    left = os.statvfs(path.parent)
    with path.open("wb", buffering=0) as file, suppress(OSError):
        os.posix_fallocate(file.fileno(), 0, left.f_bfree * left.f_bsize)
    assert os.statvfs(path.parent).f_bfree == 0


def many_services(bed: Bed) -> Path:
    """More than there is room for."""
    path = bed.directory / "many.toml"
    vips = (f"10.99.1.100:{port}" for port in range(80, 280))
    service = '[[service]]\nvip = "{}"\nring_size = 251\nbackends = ["10.99.2.11"]\n'
    path.write_text("".join(map(service.format, vips)))
    return path


def test_a_disk_that_is_read_only_ends_the_start_with_one_line(bed: Bed) -> None:
    bed.xdp_lb(*SERVE)
    state = bed.directory / "state"
    with mounted("--bind", "-o", "ro", str(state), at=state):
        refused = bed.xdp_lb("serve", check=False)
    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert line.startswith("xdp-lb: store ")
    assert "Read-only file system" in line
    assert curl(bed.client, f"http://{WEB}/") in {"b1", "b2"}


def test_the_kernel_knows_the_switch_that_this_file_flips() -> None:
    """Else the daemon would have run without it, and nobody would know."""
    in_child = "import ctypes, sys; sys.exit(ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) != 0)"
    assert subprocess.run([sys.executable, "-c", in_child], check=False).returncode == 0
