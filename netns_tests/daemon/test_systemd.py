"""The unit that is shipped, under a real systemd: what its sandbox leaves the daemon is enough for all that it does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial

import pytest

from netns_tests.bed.daemon import THREE
from netns_tests.bed.machine import UNIT, Machine
from netns_tests.bed.servers import start_http
from netns_tests.bed.topology import Bed, wait_until
from netns_tests.bed.traffic import curl

pytestmark = pytest.mark.usefixtures("console_script")

NET_RAW = 1 << 13
WEB, DIRECT = "10.99.1.100:80", "10.99.1.100:8080"
SOCKET = "/run/xdp-lb/default/api.sock"
DROP_IN = f"{UNIT}.d/test.conf"


@pytest.fixture(scope="module")
def bed(nothing_is_left_behind: None) -> Iterator[Bed]:
    with Bed(backends=2, router=True) as made:
        for backend in made.backends:
            made.own_vip(backend)
            start_http(made, backend, [80, 8080])
        yield made


@pytest.fixture(scope="module")
def machine(bed: Bed) -> Iterator[Machine]:
    """The service is installed as the README says, and serves WEB."""
    root = bed.directory / "machine"
    root.mkdir()
    with Machine(bed.lb, root) as made:
        made.write(UNIT, made.xdp_lb("serve", "--print-unit").stdout)
        made.run("systemctl", "enable", "--now", "xdp-lb")
        made.xdp_lb("attach", "eth0", "--vip", WEB, "--backends", "10.99.2.11,10.99.2.12", "--ring-size", "251")
        yield made


@pytest.fixture
def drop_in(machine: Machine) -> Iterator[Machine]:
    """For a test that overrides a part of the unit; it is taken back."""
    yield machine
    machine.run("rm", "--force", DROP_IN)
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", "xdp-lb")


def override(machine: Machine, *lines: str) -> None:
    machine.write(DROP_IN, "\n".join(("[Service]", *lines, "")))
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", "xdp-lb")


def ask(machine: Machine, path: str) -> str:
    """The daemon, without the command's start."""
    return machine.run("curl", "-sS", "--unix-socket", SOCKET, f"http://xdp-lb{path}").stdout


def program_ids(status: str) -> set[int]:
    return {each["program_id"] for each in json.loads(status)["interfaces"] if each["attached"]}


def states(machine: Machine, vip: str) -> list[str]:
    services = json.loads(ask(machine, "/v1/status"))["services"]
    (service,) = (each for each in services if each["vip"] == f"{vip}/tcp")
    return [backend["state"] for backend in service["backends"]]


def test_service_is_ready_with_four_capabilities_and_commands_find_it(bed: Bed, machine: Machine) -> None:
    assert machine.property("ActiveState") == "active"
    assert "ready" in machine.journal()
    (held,) = machine.run("sed", "-n", "s/^CapEff:\t//p", f"/proc/{machine.property('MainPID')}/status").stdout.split()
    assert int(held, 16) == THREE | NET_RAW
    assert "not announced" not in machine.journal()
    (attached,) = json.loads(machine.xdp_lb("audit", "--json").stdout)
    assert (attached["address"], attached["who"]) == ("unix", "uid 0 (root)")
    assert curl(bed.client, f"http://{WEB}/") in {"b1", "b2"}


def test_sandbox_is_as_tight_as_it_was(machine: Machine) -> None:
    """The least exposed of systemd's own services have 1 to 2 of 10, those without any sandbox 9.6."""
    machine.run("systemd-analyze", "security", "--threshold=27", "--no-pager", "xdp-lb")


def test_program_stays_attached_through_restart_stop_and_start(bed: Bed, machine: Machine) -> None:
    before = program_ids(ask(machine, "/v1/status"))
    machine.run("systemctl", "restart", "xdp-lb")
    assert program_ids(ask(machine, "/v1/status")) == before
    machine.run("systemctl", "stop", "xdp-lb")
    assert curl(bed.client, f"http://{WEB}/") in {"b1", "b2"}
    assert program_ids(machine.xdp_lb("status", "--json").stdout) == before  # told by the command itself
    machine.run("systemctl", "start", "xdp-lb")
    assert program_ids(ask(machine, "/v1/status")) == before


def test_after_a_boot_the_service_puts_in_force_what_is_stored(bed: Bed, machine: Machine) -> None:
    machine.run("systemctl", "stop", "xdp-lb")
    for interface in bed.lb.interfaces:
        machine.run("ip", "link", "set", "dev", interface.name, "xdp", "off")
    machine.run("umount", "/run/xdp-lb/bpf")
    machine.run("rm", "-r", "/run/xdp-lb/bpf")
    machine.run("systemctl", "start", "xdp-lb")
    assert program_ids(ask(machine, "/v1/status"))
    assert curl(bed.client, f"http://{WEB}/") in {"b1", "b2"}


def test_what_was_detached_beside_the_service_is_attached_by_it(bed: Bed, machine: Machine) -> None:
    """The last one detached takes the bpffs off, which the daemon itself may not mount."""
    machine.run("systemctl", "stop", "xdp-lb")
    machine.xdp_lb("detach")
    machine.run("systemctl", "start", "xdp-lb")
    machine.xdp_lb("attach", "eth0")
    machine.xdp_lb("detach")
    machine.xdp_lb("attach", "eth0")
    assert curl(bed.client, f"http://{WEB}/") in {"b1", "b2"}


def test_reload_reads_the_configuration_again(drop_in: Machine) -> None:
    service = f'[[service]]\nvip = "{WEB}"\nring_size = 251\nbackends = [{{}}]\n'
    drop_in.write("/etc/lb.toml", service.format('"10.99.2.11"'))
    override(drop_in, "ExecStart=", "ExecStart=/usr/local/bin/xdp-lb serve --config /etc/lb.toml")
    assert states(drop_in, WEB) == ["active"]
    drop_in.write("/etc/lb.toml", service.format('"10.99.2.11", "10.99.2.12"'))
    drop_in.run("systemctl", "reload", "xdp-lb")
    assert states(drop_in, WEB) == ["active", "active"]


def test_daemon_that_hangs_or_dies_is_started_again(bed: Bed, drop_in: Machine) -> None:
    override(drop_in, "WatchdogSec=3")
    for signal, result in (("STOP", "Failed with result 'watchdog'"), ("KILL", "Failed with result 'signal'")):
        before = drop_in.property("MainPID")
        drop_in.run("kill", f"-{signal}", before)
        wait_until(partial(is_another, drop_in, before), f"a daemon after SIG{signal}", timeout_s=60)
        assert result in drop_in.journal()
    assert curl(bed.client, f"http://{WEB}/") in {"b1", "b2"}


def is_another(machine: Machine, pid: str) -> bool:
    return machine.property("ActiveState") == "active" and machine.property("MainPID") != pid


def test_group_of_the_unit_has_the_socket(drop_in: Machine) -> None:
    asked = ("curl", "-sS", "--unix-socket", SOCKET, "http://xdp-lb/v1/whoami")
    as_member = ("setpriv", "--reuid=nobody", "--regid=daemon", "--clear-groups", *asked)
    assert drop_in.run(*as_member, check=False).returncode != 0
    override(drop_in, "Group=daemon")
    assert json.loads(drop_in.run(*as_member).stdout) == {"who": "uid 65534 (nobody)", "role": "write"}


def test_backends_are_checked_by_the_real_path_and_by_scripts(bed: Bed, machine: Machine) -> None:
    check = ("--health", "http interval=0.2s fall=1 rise=1")
    machine.xdp_lb("vip", "add", DIRECT, "--mode", "dr", "--backends", "10.99.2.11,10.99.2.12", *check)
    wait_until(lambda: states(machine, DIRECT) == ["active", "active"], "both up", timeout_s=30)
    bed.backends[1].run(["ip", "address", "del", "10.99.1.100/32", "dev", "lo"])
    wait_until(lambda: states(machine, DIRECT) == ["active", "down"], "no VIP on one", timeout_s=30)
    machine.xdp_lb("vip", "set", DIRECT, "--health", """script /bin/sh -c '[ "$XDP_LB_BACKEND" = 10.99.2.12:8080 ]'""")
    wait_until(lambda: states(machine, DIRECT) == ["down", "active"], "as the script says", timeout_s=30)
    machine.xdp_lb("vip", "remove", DIRECT)


def test_filter_explain_and_metrics_work_beside_it(bed: Bed, machine: Machine) -> None:
    machine.xdp_lb("filter", "add", "eth0", "drop", "tcp dst port 8888")
    machine.write("/etc/bad.txt", "192.0.2.0/24\n")
    machine.xdp_lb("filter", "add", "eth0", "drop", "--set", "/etc/bad.txt", "--for", "10m")
    machine.xdp_lb("filter", "add", "eth0", "limit", "1000/s", "icmp", "--at", "tc-in")
    machine.run("systemctl", "restart", "xdp-lb")
    assert len(json.loads(machine.xdp_lb("filter", "list", "--json").stdout)) == 3
    dropped = machine.xdp_lb("explain", "tcp", "192.0.2.7:40000", WEB, "--syn").stdout
    assert "rule 2" in dropped
    sent_on = machine.xdp_lb("explain", "tcp", f"{bed.client.ipv4}:40000", WEB, "--syn").stdout
    assert "forwarded: out on eth1" in sent_on
    assert "\nxdp_lb_loaded{} 1\n" in ask(machine, "/metrics")
    machine.xdp_lb("filter", "flush", "eth0")
