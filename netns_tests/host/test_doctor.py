"""`xdp-lb doctor` on faults that are really there: each is found, and its fix, run as it is printed, mends it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from lb.doctor import collect
from lb.doctor.checks import Finding, Severity, findings
from lb.doctor.facts import Host as HostFacts
from lb.health import path
from lb.paths import Paths
from netns_tests.bed.topology import XDP_LB, Bed, Host, own_prefix
from netns_tests.bed.topology import _attach_pass_program as attach_pass_program

# An interface name with a dot, as VLAN interfaces have.
NEAR, FAR = "near.1", "far"

SOUND = (
    f"ethtool -K {FAR} tx off txvlan off gro on",
    f"sysctl -w net/ipv4/conf/{NEAR}/forwarding=1",
    "sysctl -w net.ipv4.ip_local_port_range='32768 60999'",
)


@dataclass(frozen=True)
class Patient:
    """A host with one veth, both of whose ends are in sight."""

    host: Host
    directory: Path

    def shell(self, command: str) -> None:
        self.host.run(["sh", "-c", command], env=self.environment)

    def doctor(self, *words: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        return self.host.run([*prefix, str(XDP_LB), "doctor", *words], check=False, env=self.environment)

    @property
    def environment(self) -> Mapping[str, str]:
        places = {f"XDP_LB_{name}_DIR": str(self.directory / name.lower()) for name in ("STATE", "RUN")}
        return os.environ | places

    def finding(self, check: str) -> dict[str, Any]:
        """As the command prints it."""
        return finding(self.doctor(NEAR, "--json").stdout, check)

    def finding_here(self, check: str, host: HostFacts) -> Finding:
        """Of the interface, read by this process: without the second that it takes to load the program."""
        with self.host.entered():
            interfaces = collect.read_interfaces(Paths(self.directory, self.directory), [NEAR])
        (found,) = (f for f in findings(host, interfaces) if f.check == check)
        return found


def finding(document: str, check: str) -> dict[str, Any]:
    (found,) = (f for f in json.loads(document) if f["check"] == check)
    return dict(found)


@pytest.fixture(scope="module")
def sound_host(tmp_path_factory: pytest.TempPathFactory) -> HostFacts:
    """This host, as far as it matters for interfaces."""
    nowhere = tmp_path_factory.mktemp("doctor")
    return replace(collect.read_host(Paths(nowhere, nowhere)), loopback_addresses=())


@pytest.fixture
def patient(tmp_path: Path) -> Iterator[Patient]:
    host = Host(f"{own_prefix()}doctor", "patient")
    host.create()
    try:
        with host.netlink() as ip:
            queues = {"num_rx_queues": 2, "num_tx_queues": 2}
            ip.link("add", ifname=NEAR, kind="veth", peer={"ifname": FAR, **queues}, **queues)
        patient = Patient(host, tmp_path)
        for end in (NEAR, FAR):
            patient.shell(f"ip link set dev {end} up && ethtool -L {end} rx 1 tx 1")
        for command in SOUND:
            patient.shell(command)
        yield patient
    finally:
        host.close()


def test_sound_interface_has_nothing_to_mend(patient: Patient) -> None:
    found = json.loads(patient.doctor(NEAR, "--json").stdout)
    assert [f for f in found if f["interface"] and f["status"] != "ok"] == []
    assert {f["interface"] for f in found} == {None, NEAR}


@pytest.mark.parametrize(
    ("check", "fault"),
    [
        ("link", f"ip link set dev {NEAR} down"),
        ("native xdp", f"ethtool -L {FAR} tx 2"),
        ("transmit", f"ethtool -K {FAR} gro off"),
        ("vlan offload", f"ethtool -K {FAR} txvlan on"),
        ("mtu", f"ip link set dev {FAR} mtu 9000"),
        ("forwarding", f"sysctl -w net/ipv4/conf/{NEAR}/forwarding=0"),
        ("rp_filter", f"sysctl -w net/ipv4/conf/{NEAR}/rp_filter=1"),
        ("rp_filter", "sysctl -w net.ipv4.conf.all.rp_filter=1"),
    ],
)
def test_fix_mends_what_is_found(patient: Patient, sound_host: HostFacts, check: str, fault: str) -> None:
    patient.shell(fault)
    found = patient.finding_here(check, sound_host)
    assert found.status is Severity.WARN
    patient.shell(str(found.fix))
    mended = patient.finding_here(check, sound_host)
    assert (mended.status, mended.fix) == (Severity.OK, None)


@pytest.mark.parametrize(
    ("check", "fault"),
    [
        ("checksums", f"ethtool -K {FAR} tx on"),
        ("arp", "ip address add 10.9.9.9/32 dev lo"),
        ("nat ports", "sysctl -w net.ipv4.ip_local_port_range='1024 60999'"),
    ],
)
def test_fix_that_the_command_prints_mends_what_it_found(patient: Patient, check: str, fault: str) -> None:
    patient.shell(fault)
    found = patient.finding(check)
    assert found["status"] == "warn"
    patient.shell(found["fix"])
    mended = patient.finding(check)
    assert (mended["status"], mended["fix"]) == ("ok", None)


@pytest.mark.parametrize("mode", ["ipip", "gue"])
def test_tunnels_want_a_larger_mtu(patient: Patient, mode: str) -> None:
    patient.shell(f"ip address add 10.9.0.1/24 dev {NEAR}")
    patient.shell(f"{XDP_LB} vip add 10.9.0.100:80 --mode {mode} --backends 10.9.0.11")
    found = patient.finding("mtu")
    assert (found["status"], found["value"].endswith(", clients send 1500")) == ("warn", True)
    patient.shell(found["fix"])
    assert patient.finding("mtu")["value"].endswith("1500 inside tunnels")


def test_program_of_someone_else_fails_until_it_is_taken_off(patient: Patient) -> None:
    attach_pass_program(patient.host, NEAR)
    answer = patient.doctor(NEAR, "--json")
    found = finding(answer.stdout, "attached")
    assert (answer.returncode, found["status"]) == (1, "FAIL")
    assert "name pass, native" in found["value"]
    patient.shell(found["fix"])
    assert patient.finding("attached")["status"] == "ok"


@pytest.mark.parametrize(
    ("check", "fault"),
    [("mtu", f"ip link set dev {FAR} mtu 3600"), ("native xdp", f"ethtool -L {FAR} tx 2")],
)
def test_kernel_refuses_native_xdp_where_the_doctor_says_so(
    patient: Patient, sound_host: HostFacts, check: str, fault: str
) -> None:
    patient.shell(fault)
    with pytest.raises(OSError, match=NEAR):
        attach_pass_program(patient.host, NEAR)
    patient.shell(str(patient.finding_here(check, sound_host).fix))
    attach_pass_program(patient.host, NEAR)


def test_without_names_the_ethernet_interfaces_that_are_up_are_looked_at(patient: Patient) -> None:
    """But for those that the daemon makes to check backends through."""
    patient.shell(f"ip link set dev {FAR} down")
    patient.shell(f"ip link add {path.NEAR} up type veth peer name {path.FAR}")
    patient.shell(f"ip link set {path.FAR} up")
    found = json.loads(patient.doctor("--json").stdout)
    assert {f["interface"] for f in found} == {None, NEAR}


def test_missing_capabilities_are_named(patient: Patient) -> None:
    answer = patient.doctor(NEAR, "--json", prefix=("setpriv", "--bounding-set", "-net_admin,-sys_admin,-bpf"))
    assert answer.returncode == 1
    assert finding(answer.stdout, "capabilities")["value"] == "CAP_NET_ADMIN and CAP_BPF missing"
    assert finding(answer.stdout, "program")["status"] == "warn"


def test_damaged_store_fails_and_the_fix_puts_it_aside(patient: Patient) -> None:
    store = patient.directory / "state" / patient.host.name / "state.db"
    store.parent.mkdir(parents=True)
    store.write_text("no database, but long enough to have a header" * 10)
    found = patient.finding("store")
    assert (found["status"], str(store) in found["value"]) == ("FAIL", True)
    patient.shell(found["fix"])
    assert patient.finding("store")["value"] == "0 services"


@pytest.mark.parametrize(
    ("name", "why"), [("eth9", "does not exist: see ip link"), ("lo", "not an Ethernet interface: see ip link")]
)
def test_other_interfaces_are_refused(patient: Patient, name: str, why: str) -> None:
    answer = patient.doctor(name)
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr == f"xdp-lb: interface {name}: {why}\n"


def test_own_program_in_generic_mode_is_found_and_replaced(bed: Callable[..., Bed]) -> None:
    b = bed(backends=1)
    service = ("--vip", f"{b.vip4}:80", "--backends", b.backends[0].ipv4)
    b.xdp_lb("attach", "eth0", "--xdp-mode", "generic", *service)

    def attached() -> dict[str, Any]:
        return finding(b.xdp_lb("doctor", "eth0", "--json", check=False).stdout, "attached")

    slow = attached()
    assert (slow["status"], "generic" in slow["value"]) == ("warn", True)
    for command in slow["fix"].split(" && "):
        b.xdp_lb(*command.split()[1:])
    mended = attached()
    assert (mended["status"], mended["value"].endswith(", native")) == ("ok", True)
    assert finding(b.xdp_lb("doctor", "--json", check=False).stdout, "memory")["value"] == "maps already allocated"
