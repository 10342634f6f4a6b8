"""The commands over a dataplane and a network in memory: words in, lines, JSON and status out."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from lb.cli import drain
from lb.cli.main import cli
from lb.cli.progress import progress
from lb.control.balancer import Balancer
from lb.errors import Busy, DataplaneError
from lb.model.forwarding import OpenConnections
from lb.model.state import Interface
from lb.model.vip import Vip
from lb.tests.fakes.host import RING, WEB, Host, Opening
from lb.tests.fakes.memory import MemoryDataplane


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "default" / "state.db")


@pytest.fixture
def serving(host: Host) -> Host:
    """A host that balances its own address over two backends."""
    host.lines("attach", "eth0", "--backends", "10.0.0.11,10.0.0.12", *RING)
    return host


def test_attach_with_backends_alone_serves_the_own_address_and_says_so(host: Host) -> None:
    assert host.lines("attach", "eth0", "--backends", "10.0.0.11,10.0.0.12", *RING) == [
        "eth0: attached, native XDP",
        "10.0.0.1:80/tcp: added: nat, 2 backends, ring 251",
        "  10.0.0.1:80/tcp is eth0's own address",
    ]
    assert host.names() == ["10.0.0.11:80", "10.0.0.12:80"]


def test_the_own_address_is_of_the_family_of_the_backends(host: Host) -> None:
    host.lines("attach", "eth0", "--backends", "[2001:db8::11]:8080")
    assert [s["vip"] for s in host.json("vip", "list")] == ["[2001:db8::1]:80/tcp"]


def test_backends_may_be_repeated_and_separated_by_commas(host: Host) -> None:
    words = ("--backends", "10.0.0.11, 10.0.0.12:81@3", "--backends", "10.0.0.13")
    host.lines("vip", "add", WEB, *words)
    assert [(b["backend"], b["weight"]) for b in host.json("backend", "list")] == [
        ("10.0.0.11:80", 1),
        ("10.0.0.12:81", 3),
        ("10.0.0.13:80", 1),
    ]


VIP_ADDRESS_COMMANDS = [
    ("attach", "eth0", "--vip", "10.0.0.100:80", "--backends", "10.0.0.11"),
    ("vip", "add", "10.0.0.100:80", "--backends", "10.0.0.11"),
]


@pytest.mark.parametrize("words", VIP_ADDRESS_COMMANDS)
def test_a_vip_that_nobody_owns_is_put_on_the_interface_unless_told(serving: Host, words: tuple[str, ...]) -> None:
    serving.lines(*words, "--dry-run")
    assert owner(serving) is None
    serving.lines(*words, "--no-vip-address")
    assert owner(serving) is None
    serving.lines("vip", "remove", "10.0.0.100:80")
    assert "  10.0.0.100: added to eth0" in serving.lines(*words)
    assert owner(serving) == "eth0"


def owner(host: Host) -> str | None:
    return host.network.owner(ip_address("10.0.0.100"))


def test_attach_alone_restores_what_is_stored(serving: Host) -> None:
    serving.dataplane.forget()
    assert serving.lines("attach", "eth0") == [
        "eth0: attached, native XDP",
        "  serving 1 service, 2 backends",
    ]
    assert serving.json("status")["services"][0]["vip"] == WEB


def test_detach_keeps_what_is_stored(serving: Host) -> None:
    assert serving.lines("detach")[0] == "eth0: detached"
    assert serving.names() == ["10.0.0.11:80", "10.0.0.12:80"]


def test_a_dry_run_of_detach_detaches_nothing(serving: Host) -> None:
    serving.dataplane.opened[Vip.parse(WEB), "10.0.0.11:80"] = OpenConnections(40)
    assert serving.lines("detach", "--dry-run") == ["dry run: eth0: detached", "  ends 40 open connections"]
    assert serving.json("status")["interfaces"][0]["attached"]


def test_a_backend_is_added_with_what_it_costs(serving: Host) -> None:
    (line,) = serving.lines("backend", "add", WEB, "10.0.0.13")
    start = "10.0.0.1:80/tcp: backend 10.0.0.13:80 added: "
    assert line.startswith(start)
    assert "of 251 slots move (minimum " in line


def test_several_backends_are_added_at_once(serving: Host) -> None:
    (line,) = serving.lines("backend", "add", WEB, "10.0.0.13", "10.0.0.14@2")
    assert line.startswith("10.0.0.1:80/tcp: backends 10.0.0.13:80, 10.0.0.14:80 (weight 2) added: ")


def test_of_several_backends_none_is_added_if_one_cannot_be(serving: Host) -> None:
    assert "10.9.0.1" in serving.error("backend", "add", WEB, "10.0.0.13", "10.9.0.1")
    assert serving.names() == ["10.0.0.11:80", "10.0.0.12:80"]


def test_a_dry_run_changes_nothing(serving: Host) -> None:
    (line,) = serving.lines("backend", "add", WEB, "10.0.0.13", "--dry-run")
    assert line.startswith("dry run: 10.0.0.1:80/tcp: backend 10.0.0.13:80 added: ")
    assert serving.names() == ["10.0.0.11:80", "10.0.0.12:80"]


def test_a_backend_drains_and_its_weight_ends_the_drain(serving: Host) -> None:
    (drained,) = serving.lines("backend", "drain", WEB, "10.0.0.11")
    assert drained.startswith("10.0.0.1:80/tcp: backend 10.0.0.11:80 draining: ")
    assert [b["draining"] for b in serving.json("backend", "list", WEB)] == [True, False]
    (weighed,) = serving.lines("backend", "weight", WEB, "10.0.0.11", "3")
    assert weighed.startswith("10.0.0.1:80/tcp: backend 10.0.0.11:80 weight 1 -> 3, active again: ")


@pytest.mark.parametrize("words", [("10.0.0.11", "10.0.0.12"), ("10.0.0.11,10.0.0.12",)])
def test_several_backends_are_drained_undrained_weighed_and_removed_at_once(
    serving: Host, words: tuple[str, ...]
) -> None:
    def backends() -> list[tuple[int, bool]]:
        return [(b["weight"], b["draining"]) for b in serving.json("backend", "list")]

    (line,) = serving.lines("backend", "drain", WEB, *words)
    assert "backend 10.0.0.11:80 draining, backend 10.0.0.12:80 draining" in line
    assert backends() == [(1, True), (1, True)]
    serving.lines("backend", "undrain", WEB, *words)
    assert backends() == [(1, False), (1, False)]
    serving.lines("backend", "weight", WEB, *words, "3")
    assert backends() == [(3, False), (3, False)]
    serving.lines("backend", "remove", WEB, *words)
    assert backends() == []


@pytest.mark.parametrize("verb", ["drain", "undrain", "weight", "remove"])
def test_of_several_backends_none_is_changed_if_one_is_unknown(serving: Host, verb: str) -> None:
    before = serving.state()
    weight = ["2"] if verb == "weight" else []
    error = serving.error("backend", verb, WEB, "10.0.0.11", "10.0.0.99", *weight)
    assert error == "xdp-lb: backend 10.0.0.99:80: not in service 10.0.0.1:80/tcp"
    assert serving.state() == before


def test_drain_waits_until_the_backend_is_idle(serving: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "QUIET_S", 0.0)
    lines = serving.lines("backend", "drain", WEB, "10.0.0.11", "10.0.0.12", "--wait")
    assert lines[1:] == ["10.0.0.1:80/tcp: backend 10.0.0.11:80 idle", "10.0.0.1:80/tcp: backend 10.0.0.12:80 idle"]


def test_a_backend_is_removed(serving: Host) -> None:
    serving.lines("backend", "remove", WEB, "10.0.0.11")
    assert serving.names() == ["10.0.0.12:80"]


def test_a_service_is_removed(serving: Host) -> None:
    assert serving.lines("vip", "remove", WEB) == ["10.0.0.1:80/tcp: removed, ends no open connections"]
    assert serving.json("vip", "list") == []


def test_a_change_in_json(serving: Host) -> None:
    report = serving.json("backend", "drain", WEB, "10.0.0.11", "--dry-run")
    assert report.keys() == {"dry_run", "changes", "ending", "attached", "detached", "notes", "warnings"}
    assert report["dry_run"] is True
    assert [(c["vip"], c["change"], c["plan"]["slots"]) for c in report["changes"]] == [(WEB, "change", 251)]


@pytest.mark.parametrize("dry_run", [["--dry-run"], []])
def test_a_removed_backend_names_the_connections_that_end(serving: Host, dry_run: list[str]) -> None:
    serving.dataplane.opened[Vip.parse(WEB), "10.0.0.11:80"] = OpenConnections(40)
    (line,) = serving.lines("backend", "remove", WEB, "10.0.0.11", *dry_run)
    assert line.endswith("), ends 40 open connections")


def test_a_drained_backend_ends_its_connections_once_it_is_removed(serving: Host) -> None:
    serving.dataplane.opened[Vip.parse(WEB), "10.0.0.11:80"] = OpenConnections(5)
    assert "ends" not in serving.lines("backend", "drain", WEB, "10.0.0.11")[0]
    report = serving.json("backend", "remove", WEB, "10.0.0.11", "--dry-run")
    assert report["ending"] == report["changes"][0]["ending"] == {"connections": 5, "estimated": False}
    assert report["changes"][0]["plan"]["moved"] == 0


def test_status_in_json(serving: Host) -> None:
    status = serving.json("status")
    assert status["loaded"] is True
    assert status["interfaces"] == [{"name": "eth0", "xdp_mode": "native", "attached": True, "program_id": 1}]
    assert [b["backend"] for b in status["services"][0]["backends"]] == serving.names()


def test_status_of_one_service(serving: Host) -> None:
    serving.lines("vip", "add", "10.0.0.1:81", "--backends", "10.0.0.11:81", *RING)
    assert serving.lines("status", "10.0.0.1:81")[0] == "10.0.0.1:81/tcp: nat, 1 backend, ring 251"
    assert [s["vip"] for s in serving.json("status", "10.0.0.1:81")["services"]] == ["10.0.0.1:81/tcp"]
    error = "xdp-lb: vip 10.0.0.1:82/tcp: no such service: see xdp-lb vip list"
    assert serving.error("status", "10.0.0.1:82") == serving.error("backend", "list", "10.0.0.1:82") == error


def test_status_of_what_is_down(serving: Host) -> None:
    serving.lines("vip", "add", "10.0.0.1:81", "--backends", "10.0.0.11:81", *RING)
    assert serving.lines("status", "--down") == ["2 services: nothing is down"]
    serving.lines("backend", "drain", "10.0.0.1:81", "10.0.0.11")
    fault = "10.0.0.1:81/tcp: nat, 1 backend, ring 251, 251 slots in transition, no backend takes new connections"
    assert serving.lines("status", "--down") == [fault]
    assert [s["vip"] for s in serving.json("status", "--down")["services"]] == ["10.0.0.1:81/tcp"]


def test_backend_list_has_the_state_that_status_has(serving: Host) -> None:
    serving.lines("backend", "drain", WEB, "10.0.0.11")
    assert [line.split()[-1] for line in serving.lines("backend", "list")] == ["STATE", "draining", "active"]
    listed, (service,) = serving.json("backend", "list"), serving.json("status")["services"]
    for one, other in zip(listed, service["backends"], strict=True):
        assert one.items() <= (other | {"vip": WEB}).items()
        assert one["state"] == other["state"]


def test_status_for_people(serving: Host) -> None:
    assert [line for line in serving.lines("status") if line] == [
        "INTERFACE  XDP     PROGRAM",
        "eth0       native        1",
        "10.0.0.1:80/tcp: nat, 2 backends, ring 251",
        "  BACKEND       WEIGHT  STATE     OPEN  CONNS  PACKETS  BYTES  REPLIES  BYTES",
        "  10.0.0.11:80       1  active       0      0        0      0        0      0",
        "  10.0.0.12:80       1  active       0      0        0      0        0      0",
        "  total                              0      0        0      0        0      0",
    ]


EVERY_OPTION = (
    ("--affinity", "300", "affinity_s", 300),
    ("--allow", "10.0.0.0/8, 192.0.2.7", "sources", ["10.0.0.0/8", "192.0.2.7/32"]),
    ("--syn-limit", "1000", "syn_limit", 1000),
    ("--syn-limit-of-source", "20", "syn_limit_of_source", 20),
    ("--mss", "1416", "mss", 1416),
    ("--echo", None, "echo", True),
    ("--tunnel-source", "198.18.0.0/16", "tunnel_sources", ["198.18.0.0/16"]),
    ("--gue-port", "6081", "gue_port", 6081),
    ("--outer-checksum", None, "outer_checksum", True),
    ("--second-chance", None, "second_chance", True),
    ("--health", "http /healthz interval=1s", "health", "http /healthz interval=1s"),
    ("--slow-start", "30", "slow_start_s", 30),
    ("--fail-closed", None, "fail_closed", True),
    ("--no-vip-address", None, "vip_address", False),
)
OPTION_WORDS = tuple(word for name, value, *_ in EVERY_OPTION for word in (name, value) if word is not None)
OPTION_VALUES = {key: value for *_, key, value in EVERY_OPTION}
TUNNEL = "10.0.0.100:443/tcp"


@pytest.mark.parametrize(
    "words",
    [
        ("attach", "eth0", "--vip", TUNNEL, "--backends", "10.0.0.11", "--mode", "gue"),
        ("vip", "add", TUNNEL, "--backends", "10.0.0.11", "--mode", "gue"),
    ],
)
def test_a_service_is_made_with_every_option(host: Host, words: tuple[str, ...]) -> None:
    host.lines(*words, *OPTION_WORDS)
    (service,) = host.json("vip", "list")
    assert (service["mode"], service["options"]) == ("gue", OPTION_VALUES)


@pytest.mark.parametrize("mode", ["nat", "dr", "ipip", "gue"])
def test_a_service_is_made_in_each_mode(host: Host, mode: str) -> None:
    host.lines("vip", "add", TUNNEL, "--backends", "10.0.0.11", "--mode", mode)
    assert [service["mode"] for service in host.json("vip", "list")] == [mode]


def options_of(host: Host, vip: str = WEB) -> Any:
    return next(service["options"] for service in host.json("vip", "list") if service["vip"] == vip)


def test_only_the_options_that_are_named_change(serving: Host) -> None:
    assert serving.lines("vip", "set", WEB, "--mss", "1416", "--echo") == [
        "10.0.0.1:80/tcp: mss off -> 1416, echo off -> on: no slot moves"
    ]
    assert serving.lines("vip", "set", WEB, "--syn-limit", "1000") == [
        "10.0.0.1:80/tcp: syn limit off -> 1000/s: no slot moves"
    ]
    options = options_of(serving)
    assert (options["mss"], options["echo"], options["syn_limit"]) == (1416, True, 1000)


def test_every_option_is_switched_off_again(host: Host) -> None:
    host.lines("vip", "add", TUNNEL, "--mode", "gue")
    plain = options_of(host, TUNNEL)
    host.lines("vip", "set", TUNNEL, *OPTION_WORDS)
    assert options_of(host, TUNNEL) == OPTION_VALUES
    numbers = ("--affinity", "--syn-limit", "--syn-limit-of-source", "--mss", "--slow-start")
    off = [*(word for option in numbers for word in (option, "0")), "--health", "off"]
    switches = ("--no-echo", "--no-outer-checksum", "--no-second-chance", "--no-fail-closed", "--vip-address")
    host.lines("vip", "set", TUNNEL, *off, *switches, "--allow", "any", "--tunnel-source", "own", "--gue-port", "6080")
    assert options_of(host, TUNNEL) == plain


def test_a_dry_run_of_set_changes_nothing(serving: Host) -> None:
    (line,) = serving.lines("vip", "set", WEB, "--mss", "1416", "--dry-run")
    assert line == "dry run: 10.0.0.1:80/tcp: mss off -> 1416: no slot moves"
    assert options_of(serving)["mss"] == 0


def test_a_set_has_its_own_backends_and_sources(serving: Host) -> None:
    near = "10.0.0.1:80/tcp@near"
    serving.lines("vip", "add", near, "--source", "10.7.0.0/16", "--backends", "10.0.0.21", *RING)
    assert serving.lines("vip", "list") == [
        "VIP                   MODE  BACKENDS  RING  FLOW TIMEOUT",
        "10.0.0.1:80/tcp       nat          2   251        3600 s",
        "10.0.0.1:80/tcp@near  nat          1   251        3600 s",
        "  sources 10.7.0.0/16",
    ]
    serving.lines("vip", "set", near, "--source", "10.7.0.0/16,10.8.0.0/16")
    assert options_of(serving, near)["sources"] == ["10.7.0.0/16", "10.8.0.0/16"]
    assert serving.error("vip", "remove", WEB) == f"xdp-lb: vip {WEB}: has the member set {near}: remove it first"


def test_a_backend_of_a_range_of_ports_has_the_port_of_the_client(host: Host) -> None:
    host.lines("vip", "add", "10.0.0.100:8000-8999", "--mode", "dr", "--backends", "10.0.0.11", *RING)
    host.lines("backend", "add", "10.0.0.100:8000-8999", "10.0.0.12")
    host.lines("backend", "weight", "10.0.0.100:8000-8999", "10.0.0.12", "2")
    assert host.names() == ["10.0.0.11:0", "10.0.0.12:0"]


QUIC = "10.0.0.1:443/udp"


def test_what_names_a_backend_is_given_changed_and_taken_away(host: Host) -> None:
    host.lines("vip", "add", QUIC, *RING)
    host.lines("backend", "add", QUIC, "10.0.0.11", "--server-id", "0:0A1B", "--server-id", "1:00c4d2")
    assert host.json("backend", "list")[0]["server_ids"] == ["0:0a1b", "1:00c4d2"]
    assert host.lines("backend", "server-id", QUIC, "10.0.0.11", "0:0a1b")[0] == (
        "10.0.0.1:443/udp: backend 10.0.0.11:443 server id 0:0a1b 1:00c4d2 -> 0:0a1b"
    )
    host.lines("backend", "server-id", QUIC, "10.0.0.11", "none")
    assert host.json("backend", "list")[0]["server_ids"] == []


CONFIG = """
[[service]]
vip = "10.0.0.1:80/tcp"
ring_size = 251
backends = ["10.0.0.12:80@2", "10.0.0.13:80"]

[[service]]
vip = "10.0.0.1:53/udp"
ring_size = 251
backends = ["10.0.0.11:53"]
"""


SERVICE = '[[service]]\nvip = "10.0.0.1:80"\nring_size = 251\nbackends = [{}]\n'


def test_apply_prints_the_difference_and_makes_it(serving: Host, tmp_path: Path) -> None:
    file = tmp_path / "lb.toml"
    file.write_text(CONFIG)
    planned = serving.lines("apply", "-f", str(file), "--dry-run")
    moves = planned.pop(2)
    assert moves.startswith("~ service 10.0.0.1:80/tcp: ")
    assert "of 251 slots move" in moves
    assert planned == [
        "+ service 10.0.0.1:53/udp: nat, 1 backend, ring 251",
        "  + backend 10.0.0.11:53",
        "  - backend 10.0.0.11:80",
        "  ~ backend 10.0.0.12:80 (weight 1 -> 2)",
        "  + backend 10.0.0.13:80",
        "dry run: 1 service added, 1 service changed, ends no open connections",
    ]
    done = serving.lines("apply", "-f", str(file))
    assert done.pop(2) == moves
    assert done == [*planned[:-1], "1 service added, 1 service changed, ends no open connections"]
    assert serving.lines("apply", "-f", str(file)) == ["nothing to change"]


def test_apply_of_an_empty_file_removes_nothing_unless_told_to_prune(serving: Host, tmp_path: Path) -> None:
    file = tmp_path / "lb.toml"
    file.write_text("")
    lost = "would remove 1 of 1 service (10.0.0.1:80/tcp): use --prune (API: prune=true) to remove them"
    assert serving.error("apply", "-f", str(file)) == f"xdp-lb: {lost}"
    dry = serving.run("apply", "-f", str(file), "--dry-run")
    assert (dry.exit_code, dry.stderr) == (0, f"xdp-lb: warning: {lost}\n")
    assert dry.stdout.splitlines()[0].startswith("- service 10.0.0.1:80/tcp: ends ")
    assert dry.stdout.splitlines()[1].startswith("dry run: 1 service removed, ends ")
    assert serving.names() == ["10.0.0.11:80", "10.0.0.12:80"]
    assert serving.lines("apply", "-f", str(file), "--prune")[-1].startswith("1 service removed, ends ")
    assert serving.names() == []


def test_apply_keeps_a_drain_and_a_weight_that_the_file_does_not_give(serving: Host, tmp_path: Path) -> None:
    file = tmp_path / "lb.toml"
    file.write_text(SERVICE.format('"10.0.0.11", "10.0.0.12"'))
    serving.lines("backend", "weight", WEB, "10.0.0.12", "3")
    serving.lines("backend", "drain", WEB, "10.0.0.11")
    assert serving.lines("apply", "-f", str(file)) == [
        "nothing to change",
        "  10.0.0.1:80/tcp: backend 10.0.0.11:80: draining kept: drain is not in the file",
        "  10.0.0.1:80/tcp: backend 10.0.0.12:80: weight 3 kept: weight is not in the file",
    ]
    file.write_text(SERVICE.format('{address = "10.0.0.11", drain = false}, "10.0.0.12@1"'))
    assert serving.lines("apply", "-f", str(file))[1:3] == [
        "  ~ backend 10.0.0.11:80 (active again)",
        "  ~ backend 10.0.0.12:80 (weight 3 -> 1)",
    ]


def test_what_the_command_line_made_is_what_the_file_says(serving: Host, tmp_path: Path) -> None:
    """Backends without a port get that of the VIP, here and there."""
    file = tmp_path / "lb.toml"
    file.write_text('[[service]]\nvip = "10.0.0.1:80"\nring_size = 251\nbackends = ["10.0.0.11", "10.0.0.12"]')
    assert serving.lines("apply", "-f", str(file)) == ["nothing to change"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("attach", "eth9", "--backends", "10.0.0.11"), "interface eth9: does not exist"),
        (
            ("attach", "eth2", "--backends", "10.0.0.11"),
            "interface eth2: has no IPv4 address for a VIP: give --vip",
        ),
        (("attach", "eth9"), "interface eth9: does not exist"),
        (
            ("vip", "add", WEB),
            "vip 10.0.0.1:80/tcp: already exists",
        ),
        (
            ("vip", "add", "10.0.0.2:80", "--backends", "2001:db8::11"),
            "backend [2001:db8::11]:80: mode nat needs an IPv4 backend for 10.0.0.2:80/tcp",
        ),
        (("vip", "remove", "10.0.0.2:80"), "vip 10.0.0.2:80/tcp: no such service: see xdp-lb vip list"),
        (
            ("backend", "list", "10.0.0.2:80"),
            "vip 10.0.0.2:80/tcp: no such service: see xdp-lb vip list",
        ),
        (
            ("backend", "remove", WEB, "10.0.0.19"),
            "backend 10.0.0.19:80: not in service 10.0.0.1:80/tcp",
        ),
        (
            ("backend", "add", WEB, "10.0.0.11"),
            "backend 10.0.0.11:80: already in service 10.0.0.1:80/tcp",
        ),
        (
            ("backend", "add", WEB, "10.0.0.13", "--server-id", "0:aa"),
            "backend 10.0.0.13:80: server id 0:aa: needs a UDP service",
        ),
        (
            ("backend", "server-id", WEB, "10.0.0.11", "9:aa"),
            "server id 9:aa: not CONFIG:HEX: 0 to 6, a colon, 1 to 15 bytes in hex",
        ),
        (("vip", "set", WEB, "--second-chance"), "10.0.0.1:80/tcp: second chance: needs mode gue"),
        (
            ("vip", "set", WEB, "--affinity", "60"),
            "vip 10.0.0.1:80/tcp: affinity cannot be changed on an existing service: remove it first",
        ),
        (("vip", "set", "10.0.0.2:80", "--echo"), "vip 10.0.0.2:80/tcp: no such service: see xdp-lb vip list"),
        (
            ("vip", "add", "10.0.0.1:80@near"),
            "10.0.0.1:80/tcp@near: sources: missing: a member set requires source prefixes",
        ),
        (
            ("vip", "add", "10.0.0.2:80@near", "--source", "10.7.0.0/16"),
            "vip 10.0.0.2:80/tcp@near: member set of 10.0.0.2:80/tcp, which does not exist",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_status_1(serving: Host, words: tuple[str, ...], message: str) -> None:
    assert serving.error(*words) == f"xdp-lb: {message}"
    assert serving.names() == ["10.0.0.11:80", "10.0.0.12:80"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("vip", "add", "10.0.0.300:80"),
            "address 10.0.0.300: not an IPv4 or IPv6 address",
        ),
        (
            ("vip", "add", "10.0.0.2"),
            "vip 10.0.0.2: a port is missing: write 10.0.0.2:80/tcp (port 0: any)",
        ),
        (
            ("vip", "add", "10.0.0.2:80/icmp"),
            "protocol icmp: unknown: use tcp or udp",
        ),
        (
            ("vip", "add", "10.0.0.2:80", "--ring-size", "250"),
            "ring size 250: out of range 251 to 131071",
        ),
        (
            ("vip", "add", "10.0.0.2:80", "--flow-timeout", "0"),
            "10.0.0.2:80/tcp: flow timeout 0 s: out of range 1 s to 7 days",
        ),
        (
            ("backend", "weight", WEB, "10.0.0.11", "65536"),
            "backend 10.0.0.11:80: weight 65536: out of range 0 to 65535",
        ),
        (
            ("backend", "weight", WEB, "10.0.0.11", "-1"),
            "backend 10.0.0.11:80: weight -1: out of range 0 to 65535",
        ),
        (("vip", "set", WEB, "--mss", "87"), "mss 87: out of range 88 to 65495"),
        (("vip", "set", WEB, "--allow", "10.0.0.1/8"), "prefix 10.0.0.1/8: has host bits set: write 10.0.0.0/8"),
        (
            ("backend", "add", WEB, "10.0.0.13:http"),
            "backend 10.0.0.13:http: port http: not a number from 0 to 65535",
        ),
    ],
)
def test_words_that_are_malformed_are_one_line_and_exit_status_2(
    serving: Host, words: tuple[str, ...], message: str
) -> None:
    assert serving.error(*words, status=2) == f"xdp-lb: {message}"
    assert serving.names() == ["10.0.0.11:80", "10.0.0.12:80"]


def test_attach_with_nothing_to_serve_is_an_error(host: Host) -> None:
    assert host.error("attach", "eth0").startswith("xdp-lb: attach: no services: ")


def test_a_foreign_program_is_named(host: Host) -> None:
    host.dataplane.foreign.add("eth0")
    words = ("attach", "eth0", "--backends", "10.0.0.11")
    assert host.error(*words).startswith("xdp-lb: eth0: another XDP program is attached")
    assert host.json("vip", "list") == []


def test_a_file_that_is_not_there_is_named(host: Host) -> None:
    assert host.error("apply", "-f", "missing.toml") == ("xdp-lb: missing.toml: No such file or directory")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (Busy("another xdp-lb is at work"), "another xdp-lb is at work"),
        (DataplaneError("the kernel refused"), "the kernel refused"),
        (
            PermissionError(errno.EPERM, "Operation not permitted"),
            "not permitted: run as root (CAP_NET_ADMIN and CAP_BPF)",
        ),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x.db"), "x.db: No space left on device"),
        (OSError("odd"), "operating system: odd"),
        (
            KeyError("one\ntwo"),
            "internal error: KeyError: 'one\\ntwo' (set XDP_LB_TRACEBACK=1 for a traceback)",
        ),
        (
            ValueError("one\ntwo"),
            "internal error: ValueError: one two (set XDP_LB_TRACEBACK=1 for a traceback)",
        ),
    ],
)
def test_each_error_is_one_line(error: Exception, line: str) -> None:
    assert failing(error).stderr == f"xdp-lb: {line}\n"
    assert failing(error).exit_code == 1


def failing(error: BaseException, **environment: str) -> Result:
    def opener(*, write: bool) -> AbstractContextManager[Balancer]:
        raise error

    return CliRunner().invoke(cli, ["status"], obj=Opening(opener), env=environment)


def test_a_traceback_is_shown_only_on_request() -> None:
    error = ValueError("odd")
    assert failing(error, XDP_LB_TRACEBACK="1").exception is error


def test_ctrl_c_is_quiet() -> None:
    result = failing(KeyboardInterrupt())
    assert (result.exit_code, result.output) == (130, "")


@pytest.mark.parametrize(
    "words",
    [
        ("attach",),
        ("attach", "eth0", "--mode", "dr"),
        ("attach", "eth0", "--vip", WEB),
        ("attach", "eth0", "--echo"),
        ("attach", "eth0", "--allow", "10.0.0.0/8"),
        ("attach", "eth0", "--backends", "10.0.0.11", "--source", "10.7.0.0/16"),
        ("vip", "add", "10.0.0.2:80", "--source", "10.7.0.0/16"),
        ("vip", "add", "10.0.0.1:80@near", "--allow", "10.7.0.0/16"),
        ("vip", "set", WEB),
        ("vip", "set", WEB, "--mss", "small"),
        ("vip", "set", WEB, "--mode", "dr"),
        ("backend", "add", WEB, "10.0.0.13", "10.0.0.14", "--server-id", "0:aa"),
        ("backend", "server-id", WEB, "10.0.0.11"),
        ("attach", "eth0", "--xdp-mode", "fast"),
        ("vip", "add", WEB, "--mode", "maglev"),
        ("backend", "add", WEB),
        ("backend", "weight", WEB, "10.0.0.11", "heavy"),
        ("apply",),
        ("backend", "drain", WEB, "10.0.0.11", "--wait", "soon"),
        ("backend", "drain", WEB, "10.0.0.11", "--wait", "--dry-run"),
        ("backend", "undrain", WEB),
        ("nonsense",),
    ],
)
def test_wrong_usage_is_exit_status_2(host: Host, words: tuple[str, ...]) -> None:
    result = host.run(*words)
    assert result.exit_code == 2
    assert "Error: " in result.stderr


def test_warnings_go_to_standard_error(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    attach = MemoryDataplane.attach

    def with_warning(*arguments: Any) -> Any:
        attachment = attach(*arguments)
        return type(attachment)(attachment.interface, "generic", 1, "eth0: the driver has no native XDP")

    monkeypatch.setattr(MemoryDataplane, "attach", with_warning)
    result = host.run("attach", "eth0", "--backends", "10.0.0.11", "--json")
    assert result.stderr == "xdp-lb: warning: eth0: the driver has no native XDP\n"
    assert json.loads(result.stdout)["warnings"] == ["eth0: the driver has no native XDP"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown_while_restoring(host: Host, patience_s: float, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a terminal gets on standard error while `host` is attached again."""
    terminal = Terminal()
    monkeypatch.setattr("lb.cli.progress.PATIENCE_S", patience_s)
    monkeypatch.setattr(sys, "stderr", terminal)
    with host.open(write=True) as balancer, progress(balancer):
        balancer.attach([Interface("eth0")])
    return terminal.getvalue()


def test_what_takes_long_shows_how_far_it_is(serving: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "1/1" in shown_while_restoring(serving, 0, monkeypatch)


def test_what_is_quick_shows_no_bar(serving: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown_while_restoring(serving, 60, monkeypatch) == ""


def commands(group: Any = cli, *names: str) -> Iterator[list[str]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *names, name)
        else:
            yield [*names, name]


@pytest.mark.parametrize("command", list(commands()), ids=" ".join)
def test_help_of_each_command_has_examples_and_fits_80_columns(command: list[str]) -> None:
    text = CliRunner().invoke(cli, [*command, "--help"]).stdout
    assert "\n  Examples:\n" in text
    assert max(map(len, text.splitlines())) <= 80


def parameters(command: list[str]) -> list[Any]:
    found: Any = cli
    for name in command:
        found = found.commands[name]
    return list(found.params)


@pytest.mark.parametrize("command", list(commands()), ids=" ".join)
def test_what_is_no_such_word_is_exit_status_2_for_each_command(serving: Host, command: list[str]) -> None:
    named = {parameter.name: parameter for parameter in parameters(command)}
    misused = [["--no-such-option"]]
    if any(parameter.required for parameter in named.values()):
        misused.append([])
    if "vip" in named:
        misused.append(["--vip", "nonsense", "eth0"] if command == ["attach"] else ["nonsense", "10.0.0.11", "1"])
    if "backends" in named and command[0] == "backend":
        misused.append([WEB, "10.0.0.300", "1"])
    before = serving.state()
    for words in misused:
        result = serving.run(*command, *words)
        assert (result.exit_code, result.stdout) == (2, ""), words
        assert "Error: " in result.stderr or result.stderr.startswith("xdp-lb: "), words
    assert serving.state() == before
