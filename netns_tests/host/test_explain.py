"""`xdp-lb explain` on a balancer at work: what it says is what real packets meet, and nothing of it stays behind."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import TCP
from scapy.layers.l2 import Ether
from scapy.utils import wrpcap

from filters.compiler.hook import XDP
from filters.programs.program import Drop, assemble, load
from lb.explain.explainer import Explainer, open_explainer
from lb.explain.packet import ACK, RST, SYN, Flow
from lb.explain.reasons import REASON_TEXTS, Explanation
from lb.model.vip import parse_address
from lb.paths import Paths
from netns_tests.bed.servers import start_http
from netns_tests.bed.topology import XDP_LB, Bed, Host
from netns_tests.bed.traffic import HttpConnection, addresses, bracketed
from netns_tests.oracle import packets
from netns_tests.oracle.packets import frame, ip4
from netns_tests.oracle.program import FLOW_TABLES
from netns_tests.oracle.table import on_one_cpu
from xdp.object import LB_OBJECT, BpfObject
from xdp.pins import Pins
from xdp.stages import Stages

PORTS = {"nat": 80, "dr": 81, "ipip": 82, "gue": 83}
REFUSING, EMPTY, LIMITED, UNKNOWN = 90, 91, 92, 99
CLIENT_PORTS = {"ipv4": range(41000, 41008), "ipv6": range(41100, 41108)}
TCP_NUMBER = 6
both_families = pytest.mark.parametrize("family", ["ipv4", "ipv6"])


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    """A service of each mode over two of three backends; one that refuses the client, one with nobody, one limited."""
    with Bed(backends=3) as b:
        for backend in b.backends:
            start_http(b, backend)
        b.xdp_lb("attach", "eth0", "eth1", "--vip", f"{b.vip4}:80", "--backends", backends(b, "ipv4", 2))
        b.xdp_lb("vip", "add", f"[{b.vip6}]:80", "--backends", backends(b, "ipv6", 2))
        for mode in ("dr", "ipip", "gue"):
            b.xdp_lb("vip", "add", f"{b.vip4}:{PORTS[mode]}", "--mode", mode, "--backends", backends(b, "ipv4", 2))
        one = ("--mode", "dr", "--backends", b.backends[0].ipv4)
        b.xdp_lb("vip", "add", f"{b.vip4}:{REFUSING}", "--allow", "192.0.2.0/24", *one)
        b.xdp_lb("vip", "add", f"{b.vip4}:{EMPTY}", "--mode", "dr", "--backends", f"{b.backends[0].ipv4}@0")
        b.xdp_lb("vip", "add", f"{b.vip4}:{LIMITED}", "--syn-limit", "1", *one)
        yield b


@pytest.fixture
def explainer(bed: Bed) -> Iterator[Explainer]:
    paths = Paths(bed.directory / "state", bed.directory / "run", bed.lb.name)
    with bed.lb.entered(), open_explainer(paths) as explainer:
        yield explainer


@pytest.fixture
def loaded(bed: Bed) -> Iterator[BpfObject]:
    """The maps and programs in force."""
    with BpfObject.open(LB_OBJECT) as obj:
        obj.adopt(str(Pins(bed.directory / "run", bed.lb.name).current()))
        yield obj


def backends(bed: Bed, family: str, count: int) -> str:
    return ",".join(addresses(bed.backends, family)[:count])


def vip_of(bed: Bed, family: str = "ipv4") -> str:
    return bed.vip4 if family == "ipv4" else bed.vip6


def explained(bed: Bed, *words: str) -> dict[str, Any]:
    """By the command: the one packet."""
    (document,) = json.loads(bed.xdp_lb("explain", *words, "--json").stdout)
    return dict(document)


def flow_from(bed: Bed, source_port: int, port: int, family: str = "ipv4") -> Flow:
    client = parse_address(addresses([bed.client], family)[0])
    return Flow(TCP_NUMBER, client, source_port, parse_address(vip_of(bed, family)), port)


def flows(obj: BpfObject) -> dict[str, dict[bytes, bytes]]:
    return {name: {bytes(key): bytes(value) for key, value in obj.map(name).items()} for name in FLOW_TABLES}


def asked_from(host: Host, source_port: int, address: str) -> str:
    """The backend that answers a connection from this port."""
    connection = http.client.HTTPConnection(address, 80, timeout=5, source_address=("", source_port))
    with host.entered(), contextlib.closing(connection):
        connection.request("GET", "/")
        return str(connection.getresponse().headers["X-Backend"])


# Where it goes


@both_families
def test_backend_that_is_named_is_the_one_that_a_real_connection_reaches(
    bed: Bed, explainer: Explainer, family: str
) -> None:
    names = {
        f"{bracketed(address)}:80": b.label
        for b, address in zip(bed.backends, addresses(bed.backends, family), strict=True)
    }
    ports = CLIENT_PORTS[family]
    named = [explainer.flow(flow_from(bed, port, 80, family), SYN) for port in ports]
    reached = [asked_from(bed.client, port, vip_of(bed, family)) for port in ports]
    assert [names[str(e.member)] for e in named] == reached
    assert len(set(reached)) == 2


@pytest.mark.parametrize("mode", PORTS)
def test_command_tells_service_slot_member_and_bytes_of_each_mode(bed: Bed, mode: str) -> None:
    client, vip = f"{bed.client.ipv4}:40000", f"{bed.vip4}:{PORTS[mode]}"
    found = explained(bed, "tcp", client, vip, "--syn")
    backend = found["member"]["backend"].split(":")[0]
    assert (found["action"], found["reason"], found["egress"]) == ("redirect", "forwarded", "eth1")
    assert found["service"] == {"vip": f"{vip}/tcp", "mode": mode, "found_by": "exact address, exact port"}
    assert (found["source"], found["slot"]["current"]) == ("ring_current", found["member"]["backend"])
    assert (found["disagreement"], found["ended_by"]) == (None, [])
    assert backend in [b.ipv4 for b in bed.backends[:2]]
    ends = {"nat": f"{bed.lb.interfaces[1].ipv4} > {backend}", "dr": f"{bed.client.ipv4} > {bed.vip4}"}
    assert ends.get(mode, ends["nat"]) in found["out"]["headers"][1]
    assert bytes.fromhex(found["out"]["hex"])[:6].hex(":") == found["member"]["mac"]
    inner = [f"IPv4 {bed.client.ipv4} > {bed.vip4}, ttl 63, TCP 40000 > {PORTS[mode]} [S]"]
    assert found["out"]["headers"][2:] == (inner if mode in ("ipip", "gue") else [])


def test_flow_in_transition_is_told_from_ring_previous_and_flow_table(
    bed: Bed, explainer: Explainer, loaded: BpfObject
) -> None:
    vip, added = f"{bed.vip4}:{PORTS['dr']}", bed.backends[2].ipv4
    bed.xdp_lb("backend", "add", vip, added)
    try:
        moved = next(
            e for n in range(1000) if (e := explainer.flow(flow_from(bed, 30000 + n, PORTS["dr"]), SYN)).slot_members[1]
        )
        assert moved.packet
        current, previous = moved.slot_members
        assert (source_of(moved), str(moved.member)) == ("ring_current", current)
        older = explainer.flow(moved.packet.flow, ACK)
        assert (source_of(older), str(older.member)) == ("ring_previous", previous)
        ingress = bed.lb.interfaces[0].name
        loaded.program("xdp_lb").test_run(older.frame, ingress_ifindex=index_of(bed, ingress))
        recorded = flows(loaded)
        again = explainer.flow(moved.packet.flow, SYN)
        assert (source_of(again), str(again.member)) == ("flow_table", previous)
        assert flows(loaded) == recorded
    finally:
        bed.xdp_lb("backend", "remove", vip, added)


def source_of(explanation: Explanation) -> str:
    assert explanation.disagreement is None
    return str(explanation.choice.source)


def index_of(bed: Bed, interface: str) -> int:
    with bed.lb.netlink() as ip:
        (index,) = ip.link_lookup(ifname=interface)
    return int(index)


@both_families
def test_open_connection_is_found_in_the_nat_table_and_not_disturbed_by_a_reset(
    bed: Bed, explainer: Explainer, loaded: BpfObject, family: str
) -> None:
    with contextlib.closing(HttpConnection(bed.client, vip_of(bed, family))) as connection:
        backend = connection.ask()
        before = flows(loaded)
        found = explainer.flow(flow_from(bed, connection.port, 80, family), RST | ACK)
        assert (source_of(found), found.outcome.reason, found.notes) == ("nat_table", "forwarded", ())
        assert without_times(flows(loaded)) == without_times(before)
        assert connection.ask() == backend


def without_times(found: dict[str, dict[bytes, bytes]]) -> dict[str, dict[bytes, bytes]]:
    """The kernel may acknowledge late: what is seen last is the first word of each entry."""
    return {name: {key: value[8:] for key, value in entries.items()} for name, entries in found.items()}


def test_reply_of_a_backend_names_the_request_it_belongs_to(bed: Bed, explainer: Explainer, loaded: BpfObject) -> None:
    with contextlib.closing(HttpConnection(bed.client, bed.vip4)) as connection:
        backend = next(b for b in bed.backends if b.label == connection.ask())
        port = next(v.port for k, v in loaded.map("nat_flows4").items() if k.source_port == connection.port)
        own = parse_address(bed.lb.interfaces[1].ipv4)
        found = explainer.flow(Flow(TCP_NUMBER, parse_address(backend.ipv4), 80, own, port), ACK)
        assert source_of(found) == "nat_reply"
        assert str(found.choice.request) == f"TCP {bed.client.ipv4}:{connection.port} > {bed.vip4}:80"
        assert str(found.member) == f"{backend.ipv4}:80"
        assert found.outcome.egress
        assert (found.interface, found.outcome.egress[1]) == ("eth1", "eth0")


# What it leaves


@pytest.mark.parametrize("flags", ["--syn", "--flags=A"])
def test_nothing_stays_in_the_tables_or_in_the_path(bed: Bed, loaded: BpfObject, flags: str) -> None:
    before = flows(loaded)
    for mode in PORTS:
        assert (
            explained(bed, "tcp", f"{bed.client.ipv4}:45678", f"{bed.vip4}:{PORTS[mode]}", flags)["reason"]
            == "forwarded"
        )
    assert flows(loaded) == before
    assert Stages(loaded).occupied() == {}
    assert loaded.variable("control").stages == 0


def test_reason_is_that_of_the_packet_while_others_come_through(bed: Bed, explainer: Explainer) -> None:
    command = (
        f"import socket\ns = socket.socket(type=socket.SOCK_DGRAM)\nwhile True: s.sendto(b'x', ('{bed.vip4}', {EMPTY}))"
    )
    flood = bed.client.popen([sys.executable, "-c", command], stderr=subprocess.DEVNULL)
    try:
        reasons = [explainer.flow(flow_from(bed, n, EMPTY), SYN).outcome.reason for n in range(1, 300)]
        forwarded = [explainer.flow(flow_from(bed, n, PORTS["gue"]), SYN).outcome.reason for n in range(1, 300)]
        assert flood.poll() is None
    finally:
        flood.kill()
        flood.wait()
    assert set(reasons) == {"drop_no_backend"}
    assert set(forwarded) == {"forwarded"}


# Why not


def test_drop_comes_with_what_to_do_about_it(bed: Bed) -> None:
    found = explained(bed, "tcp", f"{bed.client.ipv4}:40000", f"{bed.vip4}:{REFUSING}", "--syn")
    assert (found["action"], found["reason"]) == ("drop", "drop_source_not_allowed")
    assert "--allow" in found["fix"]
    allowed = explained(bed, "tcp", "192.0.2.7:40000", f"{bed.vip4}:{REFUSING}", "--syn")
    assert (allowed["reason"], allowed["disagreement"]) == ("forwarded", None)


def test_limit_is_told_when_it_is_reached(bed: Bed, explainer: Explainer) -> None:
    reasons = [explainer.flow(flow_from(bed, 40000, LIMITED), SYN).outcome.reason for _ in range(3)]
    assert reasons[-1] == "drop_syn_limit"


@pytest.mark.parametrize("action", ["drop", "limit 1/d"])
def test_rule_of_the_filter_is_named(bed: Bed, action: str) -> None:
    words = ("tcp", f"{bed.client.ipv4}:42000", f"{bed.vip4}:80", "--syn")
    bed.xdp_lb("filter", "add", "eth0", "count", "tcp")
    bed.xdp_lb("filter", "add", "eth0", *action.split(), "tcp src port 42000")
    try:
        found = [explained(bed, *words) for _ in range(7)][-1]
        assert (found["action"], found["reason"]) == ("drop", None)
        (stage,) = found["ended_by"]
        assert (stage["place"], stage["rule"]) == ("filter", f"rule 2: {action} tcp src port 42000")
        other = explained(bed, "tcp", f"{bed.client.ipv4}:42001", f"{bed.vip4}:80", "--syn")
        assert (other["reason"], other["ended_by"]) == ("forwarded", [])
    finally:
        bed.xdp_lb("filter", "flush", "eth0")


def test_stage_behind_the_verdict_that_drops_is_named(bed: Bed, loaded: BpfObject) -> None:
    stages = Stages(loaded)
    with load("drops_all", XDP, assemble(XDP, [], Drop())) as program:
        stages.set(stages.exits[0], program.fd)
        try:
            found = explained(bed, "tcp", f"{bed.client.ipv4}:42000", f"{bed.vip4}:80", "--syn")
        finally:
            stages.clear(stages.exits[0])
        expected = [("behind", "drops_all", program.id)]
    assert found["action"] == "drop"
    assert [(s["place"], s["program"], s["program_id"]) for s in found["ended_by"]] == expected


def test_program_that_does_what_the_maps_do_not_say_is_shown(bed: Bed, explainer: Explainer, loaded: BpfObject) -> None:
    """The entry of a VIP is changed behind the back of the CPUs, which keep copies of it."""
    flow, table = flow_from(bed, 40000, PORTS["ipip"]), loaded.map("services4")
    with on_one_cpu():
        honest = explainer.flow(flow, SYN)
        keys = {key.port: (key, value) for key, value in table.items()}
        key, number = keys[PORTS["ipip"]]
        table[key] = keys[EMPTY][1]
        try:
            found = explainer.flow(flow, SYN)
        finally:
            table[key] = number
    assert honest.disagreement is None
    assert found.disagreement
    assert "according to the maps it is none" in found.disagreement


def test_every_reason_has_words(loaded: BpfObject) -> None:
    names = {name.lower() for name in loaded.types.enum("reason")}
    assert set(REASON_TEXTS) == {n for n in names if not n.startswith(("noted_", "go_on", "reason_count"))}


# Packets from elsewhere


def segment(bed: Bed, source_port: int) -> bytes:
    tcp = TCP(sport=source_port, dport=PORTS["gue"], flags="S")
    return frame(ip4(bed.client.ipv4, bed.vip4), tcp)


def test_packets_of_a_file_are_told_one_by_one_or_the_nth_alone(bed: Bed, tmp_path: Path) -> None:
    file = tmp_path / "in.pcap"
    cut = Ether(segment(bed, 6))
    cut.wirelen = 1000
    wrpcap(str(file), [Ether(packets.tcp4()), Ether(segment(bed, 5)), cut])
    every = json.loads(bed.xdp_lb("explain", "--pcap", str(file), "--json").stdout)
    assert [e["reason"] for e in every] == ["pass_not_a_service", "forwarded", "forwarded"]
    second = explained(bed, "--pcap", str(file), "-n", "2")
    assert second == every[1]
    assert [e["notes"] for e in every[1:]] == [
        [],
        ["only 54 of 1000 bytes were captured: the result is for the truncated packet"],
    ]
    assert second["packet"]["hex"] == segment(bed, 5).hex()
    assert "no packet 4: the file has 3\n" in bed.xdp_lb("explain", "--pcap", str(file), "-n", "4", check=False).stderr


@pytest.mark.parametrize("between", ["", " ", ":"])
def test_hexadecimal_digits_are_the_frame(bed: Bed, between: str) -> None:
    found = explained(bed, "--hex", segment(bed, 5).hex(between) if between else segment(bed, 5).hex(), "--in", "eth1")
    assert (found["interface"], found["reason"], found["egress"]) == ("eth1", "forwarded", "eth1")
    assert found["packet"]["hex"] == segment(bed, 5).hex()


def test_lines_for_people_tell_the_same(bed: Bed) -> None:
    said = bed.xdp_lb("explain", "tcp", f"{bed.client.ipv4}:40000", f"{bed.vip4}:{PORTS['gue']}", "--syn").stdout
    labels = dict(re.findall(r"^(\S+(?: \S+)?) {2,}(.*)$", said, re.MULTILINE))
    assert labels["verdict"] == "forwarded: out on eth1"
    assert labels["service"] == f"{bed.vip4}:{PORTS['gue']}/tcp, exact address, exact port, mode gue"
    assert re.fullmatch(r"10\.99\.2\.1[12]:83, from the ring \(current\)", labels["member"])
    assert "BUG" not in labels


BAD = {
    "tcp 192.0.2.1 10.99.1.100:80": "192.0.2.1: a port is missing",
    "icmp 192.0.2.1:5 10.99.1.100": "192.0.2.1:5: icmp has no ports",
    "tcp 192.0.2.1:5 [fd99::1]:80": "192.0.2.1 and fd99::1: different address families",
    "tcp 192.0.2:5 10.99.1.100:80": "address 192.0.2: not an IPv4 or IPv6 address",
    "tcp 192.0.2.1:70000 10.99.1.100:80": "192.0.2.1:70000: port 70000: not a number from 0 to 65535",
    "tcp 192.0.2.1:5 10.99.1.100:80 --flags SX": "flags SX: X: not one of F S R P A U E W",
    "tcp 192.0.2.1:5 10.99.1.100:80 --in lo": "interface lo: not attached: xdp-lb is attached to eth0, eth1",
    "--hex 0g": "hex: not pairs of hexadecimal digits: 0g",
    "--hex 0102": "packet of 2 bytes: out of range 14 to 3456, including the Ethernet header",
    "--pcap nowhere.pcap": "nowhere.pcap: No such file or directory",
    "--pcap /dev/null": "/dev/null: truncated dump file; tried to read 4 file header bytes, only got 0",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line(bed: Bed, words: str) -> None:
    done = bed.xdp_lb("explain", *words.split(), check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"xdp-lb: {BAD[words]}\n")


@pytest.mark.parametrize(
    "words",
    [
        "",
        "tcp 192.0.2.1:5",
        "udp 192.0.2.1:5 192.0.2.2:5 --syn",
        "--hex 00 -n 2",
        "--hex 00 --pcap x",
        "tcp a b --syn --flags S",
    ],
)
def test_words_that_do_not_go_together_are_usage(bed: Bed, words: str) -> None:
    assert bed.xdp_lb("explain", *words.split(), check=False).returncode == 2


def test_where_nothing_is_loaded_it_says_how_to(bed: Bed) -> None:
    done = bed.xdp_lb("explain", "udp", "192.0.2.1:5", "192.0.2.2:5", check=False, on=bed.client)
    assert (done.returncode, done.stderr) == (1, "xdp-lb: no program loaded: run xdp-lb attach IFACE\n")


def test_ordinary_user_is_told_what_is_missing(bed: Bed) -> None:
    places = {f"XDP_LB_{name}_DIR": str(bed.directory / name.lower()) for name in ("STATE", "RUN")}
    nobody = (
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "--inh-caps=+dac_read_search",
        "--ambient-caps=+dac_read_search",
    )
    command = [*nobody, str(XDP_LB), "explain", "udp", "192.0.2.1:5", "192.0.2.2:5"]
    done = bed.lb.run(command, check=False, env=os.environ | places)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"xdp-lb: not permitted.*: run as root.*\n", done.stderr)
