"""What the real command refuses, in a bed: one line that names the thing and the way out, and nothing half-done.

Each refusal goes through `refusal()`, which compares all that a command could have touched before and after: what is
stored, what is served, addresses, programs on interfaces, neighbours kept, pins.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lb.control.open import open_balancer
from lb.paths import Paths
from lb.store.lock import writer_lock
from lb.store.schema import SCHEMA_VERSION
from netns_tests.bed.topology import XDP_LB, Bed
from xdp import attach as xdp_attach
from xdp.object import LB_OBJECT, BpfObject

VIP = "10.99.1.100:80"
FREE = "10.99.1.101:80"
SMALL = ("--ring-size", "251")


@pytest.fixture(scope="module")
def attached() -> Iterator[Bed]:
    """VIP is served by b1 and b2; 10.99.9.0/24 lies behind a gateway, 10.99.8.0/24 is unreachable."""
    with Bed(backends=2, router=True) as bed:
        assert bed.router
        with bed.lb.netlink() as ip:
            ip.route("add", dst="10.99.9.0/24", gateway=bed.router.ipv4)
            ip.route("add", dst="10.99.8.0/24", type="unreachable")
        bed.xdp_lb("attach", "eth0", "--vip", VIP, "--backends", "10.99.2.11,10.99.2.12", *SMALL)
        yield bed


@pytest.fixture
def spare(attached: Bed, tmp_path: Path) -> Path:
    """A state directory of its own, whose store a test may spoil; its file is `store_in()`."""
    folder = tmp_path / "state"
    (folder / attached.lb.name).mkdir(parents=True)
    return folder


def store_in(bed: Bed, state_dir: Path) -> Path:
    return state_dir / bed.lb.name / "state.db"


def command(
    bed: Bed, *words: str, under: Sequence[str] = (), state_dir: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """xdp-lb on the balancer, `under` another command; another state directory than the bed's has its own pins."""
    base = state_dir or bed.directory
    places = {"XDP_LB_STATE_DIR": str(state_dir or base / "state"), "XDP_LB_RUN_DIR": str(base / "run")}
    return bed.lb.run([*under, str(XDP_LB), *words], check=False, env=os.environ | places)


def in_force(bed: Bed) -> dict[str, Any]:
    """All that a command can change, but for counters of packets."""
    paths = Paths(bed.directory / "state", bed.directory / "run", bed.lb.name)
    with bed.lb.entered(), open_balancer(paths, write=False) as balancer:
        status = balancer.status()
    return {
        "status": replace(status, drops={}, passes={}),
        "dataplane": sorted(str(path) for path in (bed.directory / "run").rglob("*")),
        "addresses": json.loads(bed.lb.run(["ip", "-json", "address"]).stdout),
        "programs": programs(bed),
        "neighbours": kept_neighbours(bed),
    }


def kept_neighbours(bed: Bed) -> set[str]:
    """Those that the kernel resolves for us; a gateway's may stay as long as any backend is served."""
    assert bed.router
    lines = bed.lb.run(["ip", "neigh"]).stdout.splitlines()
    return {line.split()[0] for line in lines if "managed" in line} - {bed.router.ipv4}


def programs(bed: Bed) -> dict[str, dict[str, Any]]:
    """Interface -> the XDP program that it runs, in the words of iproute2."""
    links = json.loads(bed.lb.run(["ip", "-json", "link"]).stdout)
    return {link["ifname"]: link["xdp"] for link in links if "xdp" in link}


def refusal(bed: Bed, *words: str, status: int = 1, **options: Any) -> str:
    """The one line on stderr of a command that is refused, without its `xdp-lb: `."""
    before = in_force(bed)
    done = command(bed, *words, **options)
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert in_force(bed) == before
    first, *others = done.stderr.splitlines()
    assert others == []
    assert first.startswith("xdp-lb: ")
    return first.removeprefix("xdp-lb: ")


ADD = ("vip", "add", FREE, "--backends")

REFUSED = {
    # interfaces
    "attach eth9": "interface eth9: does not exist",
    "attach eth0 eth9": "interface eth9: does not exist",
    f"attach eth9 --vip {FREE} --backends 10.99.2.11": "interface eth9: does not exist",
    "attach eth9 --backends 10.99.2.11": "interface eth9: does not exist",
    "attach lo --backends fd99:2::11": "interface lo: has no IPv6 address for a VIP: give --vip",
    "detach eth9": "interface eth9: not attached: see xdp-lb status",
    "detach eth1": "interface eth1: nat replies of 10.99.2.11 and 10.99.2.12 arrive there: detach all interfaces or"
    " remove these backends first",
    # VIPs
    f"attach eth0 --vip {VIP} --backends 10.99.2.12": f"vip {VIP}/tcp: already exists with other settings:"
    " change it with xdp-lb backend, or remove it first",
    f"vip add {VIP} --backends 10.99.2.12": f"vip {VIP}/tcp: already exists",
    f"vip remove {FREE}": f"vip {FREE}/tcp: no such service: see xdp-lb vip list",
    # backends
    f"vip add {FREE} --backends fd99:2::11": f"backend [fd99:2::11]:80: mode nat needs an IPv4 backend for {FREE}/tcp",
    "vip add [fd99:1::101]:80 --backends 10.99.2.12 --mode dr": "backend 10.99.2.12:80: mode dr needs an IPv6 backend"
    " for [fd99:1::101]:80/tcp",
    f"backend add {VIP} fd99:2::11": f"backend [fd99:2::11]:80: mode nat needs an IPv4 backend for {VIP}/tcp",
    f"backend add {VIP} 10.99.2.12": f"backend 10.99.2.12:80: already in service {VIP}/tcp",
    f"backend add {FREE} 10.99.2.12": f"vip {FREE}/tcp: no such service: see xdp-lb vip list",
    f"backend remove {VIP} 10.99.2.13": f"backend 10.99.2.13:80: not in service {VIP}/tcp",
    f"backend drain {VIP} 10.99.2.13": f"backend 10.99.2.13:80: not in service {VIP}/tcp",
    f"backend weight {VIP} 10.99.2.13 1": f"backend 10.99.2.13:80: not in service {VIP}/tcp",
    f"backend list {FREE}": f"vip {FREE}/tcp: no such service: see xdp-lb vip list",
    f"vip add {FREE} --backends 10.99.2.12,10.99.2.12": f"backend 10.99.2.12:80: already in service {FREE}/tcp",
    f"vip add {FREE} --backends 10.99.2.12:81 --mode dr": "backend 10.99.2.12:81: mode dr does not translate"
    " ports: leave the port out or use 80",
    f"vip add {FREE} --backends 10.99.1.101": "backend 10.99.1.101:80: is the VIP's own address",
    f"vip add {FREE} --backends 10.99.1.2": "backend 10.99.1.2: is an address of this host: use another host's address",
    f"backend add {VIP} 10.99.2.2": "backend 10.99.2.2: is an address of this host: use another host's address",
    f"vip add {FREE} --backends 10.99.7.11": "backend 10.99.7.11: no route: Network is unreachable: see ip route get"
    " 10.99.7.11",
    f"backend add {VIP} 10.99.8.11": "backend 10.99.8.11: no route: No route to host: see ip route get 10.99.8.11",
    f"vip add {FREE} --backends 10.99.9.11 --mode dr": "backend 10.99.9.11:80: mode dr needs a backend on a directly"
    " connected network, not behind a gateway: use ipip or nat",
    # files
    "apply -f /nowhere/lb.toml": "/nowhere/lb.toml: No such file or directory",
    "apply -f /": "/: Is a directory",
}


@pytest.mark.parametrize("words", REFUSED)
def test_refusal_is_one_line_that_names_the_thing(attached: Bed, words: str) -> None:
    assert refusal(attached, *words.split()) == REFUSED[words]


MALFORMED = {
    "vip add 10.99.1.101 --backends 10.99.2.12": "vip 10.99.1.101: a port is missing: write 10.99.1.101:80/tcp (port 0:"
    " any)",
    "vip add 10.99.1.300:80 --backends 10.99.2.12": "address 10.99.1.300: not an IPv4 or IPv6 address",
    "vip add [fd99:1::101:80 --backends fd99:2::11": "address [fd99:1::101:80: not an IPv4 or IPv6 address",
    "vip add 10.99.1.101:65536 --backends 10.99.2.12": "vip 10.99.1.101:65536: port 65536: not a number from"
    " 0 to 65535",
    "vip add 10.99.1.101:http --backends 10.99.2.12": "vip 10.99.1.101:http: port http: not a number from 0 to 65535",
    f"vip add {FREE}/sctp --backends 10.99.2.12": "protocol sctp: unknown: use tcp or udp",
    "vip add 127.0.0.1:80 --backends 10.99.2.12": "vip 127.0.0.1:80/tcp: not a unicast address",
    "vip add 224.0.0.1:80 --backends 10.99.2.12": "vip 224.0.0.1:80/tcp: not a unicast address",
    "vip add [::]:80 --backends fd99:2::11": "vip [::]:80/tcp: not a unicast address",
    f"vip add {FREE} --backends 10.99.2.12,,": "address (empty): not an IPv4 or IPv6 address",
    f"vip add {FREE} --backends 10.99.2.12@65536": "backend 10.99.2.12:80: weight 65536: out of range 0 to 65535",
    f"vip add {FREE} --backends 10.99.2.12@-1": "backend 10.99.2.12@-1: weight -1: not a number from 0 to 65535",
    f"vip add {FREE} --backends 10.99.2.12@": "backend 10.99.2.12@: weight (empty): not a number from 0 to 65535",
    f"backend weight {VIP} 10.99.2.11 65536": "backend 10.99.2.11:80: weight 65536: out of range 0 to 65535",
    f"backend weight {VIP} 10.99.2.11 -1": "backend 10.99.2.11:80: weight -1: out of range 0 to 65535",
    f"vip add {FREE} --backends 10.99.2.12 --ring-size 101": "ring size 101: out of range 251 to 131071",
    f"vip add {FREE} --backends 10.99.2.12 --ring-size 252": "ring size 252: not a prime: the nearest are 251 and 257",
    f"vip add {FREE} --backends 10.99.2.12 --flow-timeout 0": f"{FREE}/tcp: flow timeout 0 s: out of range 1 s to"
    " 7 days",
}


@pytest.mark.parametrize("words", MALFORMED)
def test_word_that_is_no_such_value_is_one_line_and_ends_with_two(attached: Bed, words: str) -> None:
    assert refusal(attached, *words.split(), status=2) == MALFORMED[words]


def test_more_backends_than_the_ring_is_for_are_refused(attached: Bed) -> None:
    many = ",".join(f"10.99.2.{n}" for n in range(11, 37))
    assert refusal(attached, *ADD, many, *SMALL) == (
        f"{FREE}/tcp: ring size 251: too small for 26 backends: at least 10 slots each"
    )


MISUSED = {
    "nonsense": "No such command 'nonsense'.",
    "attach": "Missing argument 'IFACE...'.",
    f"attach eth0 --vip {FREE}": "--vip, --mode and other service options require --backends.",
    f"vip add {FREE} --mode tunnel": "Invalid value for '--mode': 'tunnel' is not one of 'nat', 'dr', 'ipip', 'gue'.",
    f"vip add {FREE} --ring-size small": "Invalid value for '--ring-size': 'small' is not a valid integer.",
    f"backend weight {VIP} 10.99.2.11 much": "Invalid value for 'WEIGHT': 'much' is not a valid integer.",
    "apply": "Missing option '-f' / '--file'.",
}


@pytest.mark.parametrize("words", MISUSED)
def test_misuse_shows_the_usage_and_ends_with_two(attached: Bed, words: str) -> None:
    before = in_force(attached)
    done = command(attached, *words.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[0].startswith("Usage: xdp-lb ")
    assert done.stderr.splitlines()[-1] == f"Error: {MISUSED[words]}"
    assert in_force(attached) == before


HEAD = "[[service]]\nvip = '10.99.1.101:80'\n"
BAD_FILES = {
    "[[service]": "not valid TOML: .*line 1.*",
    "[[services]]\nvip = '10.99.1.101:80'": "services: unknown key: known keys are service",
    "[service]\nvip = '10.99.1.101:80'": r"service: not a list of tables: write \[\[service\]\]",
    "[[service]]\nmode = 'nat'": "service: vip: missing",
    "[[service]]\nvip = 80": "service: vip: expected a string, got a whole number",
    f"{HEAD}mode = 'tunnel'": "service 10.99.1.101:80/tcp: mode tunnel: unknown: .*",
    f"{HEAD}ring_size = 252": "service 10.99.1.101:80/tcp: ring size 252: not a prime.*",
    f"{HEAD}backends = ['fd99:2::11']": r"service .*: backend \[fd99:2::11\]:80: mode nat .*",
    f"{HEAD}backends = ['10.99.2.12@70000']": "service .*: weight 70000: out of range .*",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_error_in_a_file_names_file_service_and_key(attached: Bed, tmp_path: Path, text: str) -> None:
    path = tmp_path / "lb.toml"
    path.write_text(text)
    line = refusal(attached, "apply", "-f", str(path))
    assert re.fullmatch(f"{re.escape(str(path))}: {BAD_FILES[text]}", line), line


def test_file_cannot_change_the_mode_of_what_is_served(attached: Bed, tmp_path: Path) -> None:
    path = tmp_path / "lb.toml"
    path.write_text(f"[[service]]\nvip = '{VIP}'\nmode = 'dr'")
    line = refusal(attached, "apply", "-f", str(path))
    assert line == f"vip {VIP}/tcp: mode cannot be changed on an existing service: remove it first"


def test_removing_the_last_backend_leaves_a_service_that_drops_by_name(attached: Bed) -> None:
    attached.xdp_lb(*ADD, "10.99.2.11", *SMALL)
    attached.xdp_lb("backend", "remove", FREE, "10.99.2.11")
    assert attached.client.run(["curl", "-s", "--max-time", "0.3", f"http://{FREE}/"], check=False).returncode == 28
    document = json.loads(attached.xdp_lb("status", "--json").stdout)
    assert document["drops"]["drop_no_backend"] > 0
    attached.xdp_lb("vip", "remove", FREE)


# Permission

CAPABILITIES = {
    "-all": "not permitted: run as root (CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF missing)",
    "-net_admin": "not permitted: run as root (CAP_NET_ADMIN missing)",
    "-sys_admin,-bpf": "not permitted: run as root (CAP_BPF missing)",
    "-sys_admin,-perfmon": "not permitted: run as root (CAP_PERFMON missing)",
}
CHANGES = ["attach eth0", "detach", f"backend drain {VIP} 10.99.2.11"]


@pytest.mark.parametrize("missing", CAPABILITIES)
@pytest.mark.parametrize("words", CHANGES)
def test_change_without_capabilities_is_refused_before_anything_is_written(
    attached: Bed, words: str, missing: str
) -> None:
    under = ["setpriv", f"--bounding-set={missing}", "--inh-caps=-all"]
    assert refusal(attached, *words.split(), under=under) == CAPABILITIES[missing]


# Reading is all that this user can do beside: the interpreter may lie where only root looks.
AS_NOBODY = (
    "setpriv",
    "--reuid=65534",
    "--regid=65534",
    "--clear-groups",
    "--inh-caps=+dac_read_search",
    "--ambient-caps=+dac_read_search",
)


@pytest.mark.parametrize("words", CHANGES)
def test_change_by_an_ordinary_user_is_refused(attached: Bed, words: str) -> None:
    assert refusal(attached, *words.split(), under=AS_NOBODY) == CAPABILITIES["-all"]


def test_status_for_an_ordinary_user_says_what_is_needed(attached: Bed) -> None:
    line = refusal(attached, "status", under=AS_NOBODY)
    assert line == "not permitted to use BPF programs: run as root (CAP_BPF and CAP_NET_ADMIN)"


# Two at once


def lock_of(bed: Bed) -> Path:
    return bed.directory / "state" / bed.lb.name / "lock"


def test_second_command_waits_and_then_says_who_is_in_its_way(attached: Bed) -> None:
    with writer_lock(lock_of(attached), attached.lb.name):
        done = command(attached, "backend", "drain", VIP, "10.99.2.11")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        rf"xdp-lb: another xdp-lb \(pid {os.getpid()}, .*\) is changing network namespace {attached.lb.name}:"
        r" try again when it has ended\n",
        done.stderr,
    )


def test_status_does_not_wait_for_a_change(attached: Bed) -> None:
    with writer_lock(lock_of(attached), attached.lb.name):
        assert command(attached, "status").returncode == 0


def test_commands_started_together_all_succeed_one_after_the_other(attached: Bed) -> None:
    places = {"XDP_LB_STATE_DIR": str(attached.directory / "state"), "XDP_LB_RUN_DIR": str(attached.directory / "run")}
    started = [
        attached.lb.popen([str(XDP_LB), "vip", "add", f"10.99.1.{n}:80", *SMALL], env=os.environ | places)
        for n in range(110, 115)
    ]
    assert [process.wait(timeout=30) for process in started] == [0] * 5
    vips = {service["address"] for service in json.loads(attached.xdp_lb("vip", "list", "--json").stdout)}
    assert vips == {"10.99.1.100", *(f"10.99.1.{n}" for n in range(110, 115))}
    for n in range(110, 115):
        attached.xdp_lb("vip", "remove", f"10.99.1.{n}:80")


# The store


def spoil_with_garbage(store: Path) -> None:
    store.write_text("no SQLite " * 1000)


def spoil_with_a_directory(store: Path) -> None:
    store.mkdir()


def spoil_with_a_newer_version(store: Path) -> None:
    with contextlib.closing(sqlite3.connect(store)) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")


SPOILT = {
    spoil_with_garbage: "not an xdp-lb store: move the file away",
    spoil_with_a_directory: "Is a directory: move it away, or set XDP_LB_STATE_DIR",
    spoil_with_a_newer_version: f"created by a newer xdp-lb (schema {SCHEMA_VERSION + 1}, supported:"
    f" {SCHEMA_VERSION}): upgrade xdp-lb",
}


@pytest.mark.parametrize("spoil", SPOILT)
@pytest.mark.parametrize("words", ["status", f"vip add {FREE}", "detach"])
def test_store_that_cannot_be_read_is_named(attached: Bed, spare: Path, spoil: Any, words: str) -> None:
    store = store_in(attached, spare)
    spoil(store)
    assert refusal(attached, *words.split(), state_dir=spare) == f"store {store}: {SPOILT[spoil]}"


def filled(bed: Bed, state_dir: Path) -> Path:
    done = command(bed, *ADD, "10.99.2.11", *SMALL, state_dir=state_dir)
    assert done.returncode == 0, done.stderr
    return store_in(bed, state_dir)


def test_store_that_is_cut_off_is_called_damaged(attached: Bed, spare: Path) -> None:
    store = filled(attached, spare)
    os.truncate(store, store.stat().st_size // 2)
    assert refusal(attached, "status", state_dir=spare) == (
        f"store {store}: damaged: move the file away and run xdp-lb apply -f lb.toml"
    )


def test_store_with_a_value_that_makes_no_sense_is_called_damaged(attached: Bed, spare: Path) -> None:
    store = filled(attached, spare)
    with contextlib.closing(sqlite3.connect(store)) as connection:
        connection.execute("UPDATE service SET ring_size = 252")
        connection.commit()
    assert refusal(attached, "status", state_dir=spare) == (
        f"store {store}: holds an invalid value (ring size 252: not a prime: the nearest are 251 and 257): damaged:"
        " move the file away and run xdp-lb apply -f lb.toml"
    )


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, 1 MB in size."""
    path = tmp_path / "mounted"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], check=True)
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_store_on_a_read_only_file_system_is_read_but_not_changed(attached: Bed, mounted: Path) -> None:
    store = filled(attached, mounted)
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    assert command(attached, "vip", "list", state_dir=mounted).returncode == 0
    assert refusal(attached, "vip", "remove", FREE, state_dir=mounted) == (
        f"store {store.with_name('lock')}: Read-only file system: run as root, or set XDP_LB_STATE_DIR"
    )


def test_full_disk_leaves_the_old_state(attached: Bed, mounted: Path) -> None:
    store = filled(attached, mounted)
    with contextlib.suppress(OSError), (mounted / "rest").open("wb", buffering=0) as rest:
        while rest.write(bytes(4096)):
            pass
    many = ",".join(f"10.99.2.{n}" for n in range(11, 200))
    line = refusal(attached, "vip", "add", "10.99.1.102:80", "--backends", many, state_dir=mounted)
    assert line == f"store {store}: the disk is full: free some space and repeat the command"
    listed = json.loads(command(attached, "vip", "list", "--json", state_dir=mounted).stdout)
    assert [service["vip"] for service in listed] == [f"{FREE}/tcp"]


def test_state_directory_that_is_a_file_is_named(attached: Bed, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert refusal(attached, "vip", "add", FREE, state_dir=file / "state") == (
        f"store {file}/state: Not a directory: move it away, or set XDP_LB_STATE_DIR"
    )


# What others, or a crash, have left in the kernel


@pytest.mark.parametrize(("mode", "word"), [("native", "xdp"), ("generic", "xdpgeneric")])
def test_program_of_someone_else_stays_and_is_named(attached: Bed, mode: str, word: str) -> None:
    attached.xdp_lb("detach")
    with BpfObject.open(LB_OBJECT) as other, attached.lb.netlink() as ip:
        other.load()
        theirs = other.program("xdp_lb")
        (index,) = ip.link_lookup(ifname="eth1")
        with attached.lb.entered():
            xdp_attach.attach(index, theirs.fd, theirs.id, mode)
        line = refusal(attached, "attach", "eth0")
        with attached.lb.entered():
            xdp_attach.detach(index)
    assert line == (
        f"eth1: another XDP program is attached (id {theirs.id}, name xdp_lb): detach it first:"
        f" ip link set dev eth1 {word} off"
    )
    attached.xdp_lb("attach", "eth0")


def pins_of(bed: Bed) -> Path:
    return bed.directory / "run" / "bpf" / bed.lb.name


def test_generation_that_a_crash_left_is_cleared_away_by_the_next_attach(attached: Bed) -> None:
    leftover = pins_of(attached) / "77"
    leftover.mkdir()
    (leftover / "map_members").symlink_to("nowhere")
    assert command(attached, "status").returncode == 0
    attached.xdp_lb("attach", "eth0")
    assert not leftover.exists()


def test_pins_of_another_version_are_refused_until_they_are_detached(attached: Bed) -> None:
    before = in_force(attached)
    pin = (pins_of(attached) / "current").resolve() / "map_members"
    pin.unlink()
    message = (
        f"the loaded programs are of another version of xdp-lb (pin {pin}: No such file or directory):"
        " run xdp-lb detach, then xdp-lb attach IFACE"
    )
    for words in (["status"], ["attach", "eth0"], ["backend", "drain", VIP, "10.99.2.11"], ["vip", "add", FREE]):
        done = command(attached, *words)
        assert (done.returncode, done.stdout, done.stderr) == (1, "", f"xdp-lb: {message}\n")
    attached.xdp_lb("detach")
    assert programs(attached) == {}
    attached.xdp_lb("attach", "eth0")
    assert in_force(attached)["status"].services == before["status"].services


def test_state_directory_lost_under_a_running_balancer_is_no_traceback(attached: Bed, spare: Path) -> None:
    places = {"XDP_LB_STATE_DIR": str(spare), "XDP_LB_RUN_DIR": str(attached.directory / "run")}
    done = attached.lb.run([str(XDP_LB), "status"], check=False, env=os.environ | places)
    assert (done.returncode, done.stderr) == (0, "")
