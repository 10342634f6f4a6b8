"""`xdp-dump` beside the balancer and beside XDP programs of others: what comes to them, and what leaves them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether
from scapy.utils import RawPcapNgReader, RawPcapReader

from filters.capture.traced import BEFORE
from filters.compiler.ebpf import R0, Assembler
from filters.compiler.hook import XDP
from filters.programs.program import KernelContext, Pass, load
from filters.tests.packets import FRAMES
from netns_tests.bed.dump import XDP_DUMP, Dump
from netns_tests.bed.servers import start_http
from netns_tests.bed.topology import Bed, wait_until
from netns_tests.bed.traffic import addresses, curl
from xdp.errors import NotPermitted
from xdp.link import hold_at_xdp
from xdp.object import LB_OBJECT, BpfObject
from xdp.pins import Pins
from xdp.stages import Stages
from xdp.tracing import target

OPENINGS = "tcp[tcpflags] & tcp-syn != 0"


@pytest.fixture(scope="module")
def balanced() -> Iterator[Bed]:
    """A service in mode nat; eth0 is where its clients are, eth1 where its backends are."""
    with Bed(backends=2) as made:
        for backend in made.backends:
            start_http(made, backend, [80])
        made.xdp_lb("attach", "eth0", "--vip", vip(made), "--backends", ",".join(addresses(made.backends, "ipv4")))
        yield made


def vip(bed: Bed) -> str:
    return f"{bed.vip4}:80"


def ask(bed: Bed) -> None:
    assert curl(bed.client, f"http://{vip(bed)}") in ("b1", "b2")


@contextmanager
def dumping(bed: Bed, *words: str) -> Iterator[Dump]:
    dump = Dump(bed.lb, XDP_DUMP, words, env=os.environ | {"XDP_LB_RUN_DIR": str(bed.directory / "run")})
    try:
        yield dump
    finally:
        if dump.process.poll() is None:
            dump.process.kill()
        dump.process.communicate()


def captured(dump: Dump, packets: int) -> tuple[str, str]:
    """What it has said once it has captured so many."""
    wait_until(lambda: told_on_request(dump) >= packets, f"{packets} packets captured")
    status, out, errors = dump.end()
    assert status == 0, errors
    return out, errors


def told_on_request(dump: Dump) -> int:
    dump.process.send_signal(signal.SIGUSR1)
    assert dump.process.stderr
    found = re.search(r"(\d+) packets? captured,", dump.process.stderr.readline())
    return int(found[1]) if found else 0


def objects(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


@contextmanager
def stages(bed: Bed) -> Iterator[Stages]:
    """Of the balancer at work."""
    generation = Pins(bed.directory / "run", bed.lb.name).current()
    with BpfObject.open(LB_OBJECT) as obj:
        obj.adopt(str(generation))
        yield Stages(obj)


def test_what_comes_to_the_balancer_is_what_clients_have_sent(balanced: Bed, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    sent = balanced.client.popen(
        ["tcpdump", "-i", "eth0", "-Q", "out", "-U", "-Z", "root", "-w", str(theirs), "tcp port 80"],
        stderr=subprocess.PIPE,
    )
    assert sent.stderr
    sent.stderr.readline()
    with dumping(balanced, "-i", "eth0", "--at", "xdp", "-w", str(ours), "tcp port 80") as dump:
        ask(balanced)
        captured(dump, 6)
    wait_until(lambda: theirs.stat().st_size >= ours.stat().st_size, "tcpdump's file")
    sent.send_signal(signal.SIGINT)
    sent.communicate()
    with RawPcapReader(str(ours)) as found, RawPcapReader(str(theirs)) as expected:
        assert [data for data, _ in found] == [data for data, _ in expected]


def test_without_a_place_packets_are_seen_before_the_balancer(balanced: Bed) -> None:
    with dumping(balanced, "-i", "eth0", "-Q", "in", "--json", OPENINGS) as dump:
        ask(balanced)
        out, _ = captured(dump, 1)
    (seen,) = objects(out)
    assert (seen["at"], seen["ip"]["destination"], "verdict" in seen) == ("xdp", balanced.vip4, False)


def test_what_leaves_the_balancer_has_its_verdict_and_reason(balanced: Bed) -> None:
    with dumping(balanced, "-i", "eth0", "-i", "eth1", "--at", "xdp-exit", "--json", OPENINGS) as dump:
        ask(balanced)
        out, _ = captured(dump, 2)
    request, reply = objects(out)
    outcome = ("interface", "verdict", "reason", "egress")
    assert [request[key] for key in outcome] == ["eth0", "XDP_REDIRECT", "forwarded", "eth1"]
    assert [reply[key] for key in outcome] == ["eth1", "XDP_REDIRECT", "forwarded", "eth0"]
    assert request["ip"]["destination"] in addresses(balanced.backends, "ipv4")
    assert (reply["ip"]["source"], reply["tcp"]["flags"]) == (balanced.vip4, ["syn", "ack"])


def test_verdicts_are_the_comments_of_a_file(balanced: Bed, tmp_path: Path) -> None:
    file = tmp_path / "exit.pcapng"
    with dumping(balanced, "-i", "eth0", "--at", "xdp-exit", "-w", str(file), f"{OPENINGS} or tcp port 81") as dump:
        ask(balanced)
        with balanced.client.entered(), socket.socket() as nobody, pytest.raises(ConnectionRefusedError):
            nobody.connect((balanced.lb.ipv4, 81))
        captured(dump, 2)
    reader: Any
    with RawPcapNgReader(str(file)) as reader:
        found = [(meta.ifname, meta.direction, meta.comments) for _, meta in reader]
    assert found == [(b"eth0", 1, [b"XDP_REDIRECT forwarded"]), (b"eth0", 1, [b"XDP_PASS pass_not_a_service"])]


def test_dropped_packet_is_seen_with_the_reason(balanced: Bed) -> None:
    mac = balanced.lb.run(["cat", "/sys/class/net/eth0/address"]).stdout.strip()
    martian = Ether(src="02:00:00:00:00:07", dst=mac) / IP(src="127.0.0.1", dst=balanced.vip4, ttl=7) / TCP(dport=80)
    with dumping(balanced, "-i", "eth0", "--at", "xdp-exit", "--json", "ip[8] = 7") as dump:
        with balanced.client.entered(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
            sender.bind(("eth0", 0))
            sender.send(bytes(martian))
        out, _ = captured(dump, 1)
    (seen,) = objects(out)
    assert (seen["verdict"], seen["reason"], seen["ip"]["ttl"]) == ("XDP_DROP", "drop_martian_source", 7)


def test_killed_capture_stops_no_packet_and_the_next_one_clears_up(balanced: Bed, tmp_path: Path) -> None:
    words = ("-i", "eth0", "--at", "xdp-exit", "-w", str(tmp_path / "exit"))
    with dumping(balanced, *words) as dump:
        ask(balanced)
        dump.end(signal.SIGKILL)
    for _ in range(3):
        ask(balanced)
    with dumping(balanced, *words) as dump:
        ask(balanced)
        captured(dump, 6)
    ask(balanced)
    with stages(balanced) as left:
        assert (left.occupied(), left.records_verdicts) == ({}, False)


def test_places_in_the_path_can_run_out(balanced: Bed, tmp_path: Path, can_trace: bool) -> None:
    if can_trace:
        pytest.skip("captures take no place where programs can be traced")
    with stages(balanced) as taken, load("passing", XDP, passing()) as program:
        for place in taken.exits:
            taken.set(place, program.fd)
        try:
            done = balanced.lb.run(
                [str(XDP_DUMP), "-i", "eth0", "--at", "xdp-exit"],
                check=False,
                env=os.environ | {"XDP_LB_RUN_DIR": str(balanced.directory / "run")},
            )
        finally:
            for place in taken.exits:
                taken.clear(place)
    words = "xdp-dump: all places behind the balancer are in use: see `xdp-lb stage list`\n"
    assert (done.returncode, done.stderr) == (1, words)


def passing() -> Any:
    asm = Assembler()
    KernelContext().emit(asm, XDP)
    Pass().emit(asm, XDP)
    return asm.assemble()


# Programs of others


@pytest.fixture(scope="module")
def can_trace() -> bool:
    """Whether this kernel lets anybody trace programs: some, hardened, refuse it."""
    with BpfObject.open(LB_OBJECT) as obj:
        obj.load()
        asm = Assembler()
        asm.mov(R0, 0)
        asm.exit()
        try:
            with target(obj.program("xdp_lb").id) as traced, load("probe", BEFORE, asm.assemble(), traced):
                return True
        except NotPermitted:
            return False


@pytest.fixture
def lone(balanced: Bed) -> Iterator[str]:
    """An interface of the balancer's host without a program; its peer is `lone-peer`."""
    with balanced.lb.netlink() as ip:
        ip.link("add", ifname="lone", kind="veth", peer={"ifname": "lone-peer"})
        for end in ("lone", "lone-peer"):
            ip.link("set", ifname=end, state="up")
    yield "lone"
    with balanced.lb.netlink() as ip:
        ip.link("del", ifname="lone")


def refusal(bed: Bed, *words: str) -> str:
    done = bed.lb.run([str(XDP_DUMP), *words], check=False)
    assert (done.returncode, done.stdout) == (1, "")
    return str(done.stderr)


def test_behind_no_program_there_is_nothing(balanced: Bed, lone: str) -> None:
    words = f"xdp-dump: {lone}: no XDP program attached: --at xdp-exit requires one\n"
    assert refusal(balanced, "-i", lone, "--at", "xdp-exit") == words


@pytest.mark.parametrize("place", ["xdp", "xdp-exit"])
def test_program_without_types_is_named(balanced: Bed, lone: str, place: str) -> None:
    with load("someones", XDP, passing()) as program:
        with balanced.lb.entered():
            held = hold_at_xdp(socket.if_nametoindex(lone), program.fd)
        with held:
            said = refusal(balanced, "-i", lone, "--at", place)
        why = f"program {program.id} (someones): has no BTF: cannot be traced"
    assert said == f"xdp-dump: {lone}: another XDP program is attached: {why}\n"


@pytest.mark.parametrize("place", ["xdp", "xdp-exit"])
def test_program_with_types_is_traced_where_the_kernel_lets_it_be(
    balanced: Bed, lone: str, place: str, can_trace: bool
) -> None:
    with BpfObject.open(LB_OBJECT) as obj:
        obj.load()
        with balanced.lb.entered():
            held = hold_at_xdp(socket.if_nametoindex(lone), obj.program("xdp_lb").fd)
        with held:
            if not can_trace:
                why = "this kernel does not support tracing it (fentry)"
                words = f"xdp-dump: {lone}: another XDP program is attached: {why}\n"
                assert refusal(balanced, "-i", lone, "--at", place) == words
                return
            with dumping(balanced, "-i", lone, "--at", place, "--json", "udp port 53") as dump:
                with balanced.lb.entered(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
                    sender.bind((f"{lone}-peer", 0))
                    sender.send(FRAMES["udp"])
                out, _ = captured(dump, 1)
    (seen,) = objects(out)
    assert (seen["at"], seen["captured"]) == (place, len(FRAMES["udp"]))
    assert seen.get("verdict") == ("XDP_PASS" if place == "xdp-exit" else None)
