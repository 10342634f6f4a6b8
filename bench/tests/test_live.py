"""The benchmarks with traffic: what is said to be sent is sent, and arrives. No test asserts a rate."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from bench import live
from bench.generator import Generator
from bench.line import BACKENDS, CLIENT, LB_FRONT, MACS, VIP, Line
from bench.report import BenchError
from bench.sink import Sink
from bench.traffic import IN_ORDER, Target
from netns_tests.bed.topology import remaining_namespaces

ROOT = Path(__file__).parents[2]
FLOWS = 64
CAPTURED = 32  # a packet socket holds no more of them by default: each takes a page
PORT = 80
VIPS = {4: VIP, 6: "2001:2:0:1::1"}
ETH_P_ALL = 3


@pytest.fixture(scope="module")
def line() -> Iterator[Line]:
    with Line("sink", "tcp", PORT) as made:
        yield made


@pytest.fixture(autouse=True)
def no_namespace_is_left_behind(line: Line) -> Iterator[None]:
    before = remaining_namespaces()
    yield
    assert remaining_namespaces() == before


def test_every_packet_that_the_generator_says_it_sent_comes_to_the_sink(line: Line) -> None:
    command = [sys.executable, "-m", "bench", "generator", "out", "--vip", VIP, "--mac", MACS[LB_FRONT], "--json"]
    with Sink(line.lb, "in", PORT) as sink:
        done = line.client.run([*command, "--seconds", "0.1", "--rate", "20000"], cwd=ROOT)
        sent, lost = json.loads(done.stdout)
        assert sink.packets() > 0
    assert (sent["case"], sent["unit"]) == ("family=4 packet=ack flows=65536", "packets/s")
    assert (lost["case"], lost["unit"]) == ("family=4 packet=ack flows=65536 metric=loss", "%")
    assert abs(lost["value"]) < 1  # the interface also counts what is not the generator's


def test_the_generator_finds_the_next_hop_by_itself(line: Line) -> None:
    command = [sys.executable, "-m", "bench", "generator", "out", "--json", "--seconds", "0.01", "--rate", "1000"]
    with Sink(line.lb, "in", PORT) as sink:
        line.client.run([*command, "--packet", "udp"], cwd=ROOT)
        assert sink.packets() > 0


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["nope"], "interface nope: does not exist"),
        (["lo", "--vip", "198.19.0.1"], "no neighbour there is known"),
    ],
)
def test_the_generator_says_in_one_line_why_it_sends_nothing(line: Line, arguments: list[str], why: str) -> None:
    command = [sys.executable, "-m", "bench", "generator", *arguments]
    refused = line.client.run(command, cwd=ROOT, check=False)
    assert refused.returncode == 1
    (said,) = refused.stderr.strip().splitlines()
    assert why in said


@pytest.mark.parametrize("packets", [1, 5000])
def test_a_number_of_packets_is_sent_exactly(line: Line, packets: int) -> None:
    with Sink(line.lb, "in", PORT) as sink, line.client.entered(), Generator("out") as generator:
        generator.aim(line.target, "ack", FLOWS)
        assert generator.send(packets).packets == packets
        assert sink.packets() == packets


def test_the_rate_is_not_exceeded(line: Line) -> None:
    with line.client.entered(), Generator("out") as generator:
        generator.aim(line.target, "ack", FLOWS)
        start = time.monotonic()
        sent = generator.send_for(0.2, rate=10_000)
        assert sent.packets <= 10_000 * (time.monotonic() - start)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("packet", ["ack", "syn", "udp"])
def test_packets_are_whole_and_each_is_another_clients(line: Line, packet: str, family: int) -> None:
    target = Target(VIPS[family], PORT, MACS[CLIENT], MACS[LB_FRONT])
    frames = sent_frames(line, target, packet)
    for frame in frames:
        assert bytes(rebuilt(frame)) == bytes(frame)
    transport = UDP if packet == "udp" else TCP
    assert {frame[transport].dport for frame in frames} == {PORT}
    assert sorted(frame[transport].sport for frame in frames) == [1024 + number for number in range(CAPTURED)]
    if packet != "udp":
        assert {str(frame[TCP].flags) for frame in frames} == {packet[0].upper()}


def sent_frames(line: Line, target: Target, packet: str) -> list[Packet]:
    """One of each flow, as the other end of the veth sees them."""
    with line.lb.entered():
        listener = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        listener.bind(("in", 0))
    listener.settimeout(5)
    with listener, line.client.entered(), Generator("out") as generator:
        generator.aim(target, packet, CAPTURED, IN_ORDER)
        generator.send(CAPTURED)
        frames: list[Packet] = []
        while len(frames) < CAPTURED:
            frame = Ether(listener.recv(2048))
            if frame.dst == target.destination_mac and (TCP in frame or UDP in frame):
                frames.append(frame)
    return frames


def rebuilt(frame: Packet) -> Packet:
    """The same packet with the checksums that scapy finds for it."""
    copy = frame.copy()
    for layer in (IP, TCP, UDP):
        if layer in copy:
            del copy[layer].chksum
    assert IP in copy or IPv6 in copy
    return Ether(bytes(copy))


def test_the_sink_counts_its_port_only(line: Line) -> None:
    with Sink(line.lb, "in", PORT + 1) as sink, line.client.entered(), Generator("out") as generator:
        generator.aim(line.target, "ack", FLOWS)
        generator.send(FLOWS)
        assert sink.packets() == 0


PATHS = [path for path in live.PACKET_WAYS if path != "sink"]


@pytest.mark.parametrize("packet", live.PACKETS)
@pytest.mark.parametrize("path", PATHS)
def test_all_packets_reach_the_sink_on_every_path(path: str, packet: str) -> None:
    loss, rate = (
        {result.case: result for result in live.measure_packets([path], packet, FLOWS, 0.001, 1)}[case]
        for case in (case_of(path, packet) + " metric=loss", case_of(path, packet))
    )
    assert (loss.value, loss.unit) == (0, "%")
    assert rate.value > 0


def case_of(path: str, packet: str) -> str:
    return f"path={path}" + (" packet=udp" if packet == "udp" else "")


def test_packets_that_no_route_leads_on_are_reported_as_lost() -> None:
    with Line("forward", "tcp", PORT) as made, Sink(made.server, "in", PORT) as sink:
        made.lb.forward(False)
        with made.client.entered(), Generator("out") as generator:
            generator.aim(made.target, "ack", FLOWS)
            flood = live.Flood(generator.send(FLOWS), sink.packets())
    assert (flood.rate, flood.percent_lost) == (0, 100)


@pytest.mark.parametrize("path", live.CONNECTION_WAYS)
def test_connections_are_greeted_by_a_backend_on_every_path(path: str) -> None:
    (result,) = live.measure_connections([path], seconds=0.05, rounds=1)
    assert (result.case, result.unit) == (f"path={path} metric=cps", "connections/s")
    assert result.value > 0


@pytest.mark.parametrize("mode", ["dr", "nat"])
def test_xdp_lb_and_not_the_kernel_forwards_what_is_measured(mode: str) -> None:
    with Line(f"xdp-{mode}", "udp", PORT) as made, Sink(made.server, "in", PORT) as sink:
        with made.client.entered(), Generator("out") as generator:
            generator.aim(made.target, "udp", 1 << 12)
            generator.send(1 << 12)
        assert sink.packets() == 1 << 12
        status = json.loads(made.xdp_lb("status", "--json"))
    (service,) = status["services"]
    assert service["packets"] == 1 << 12
    assert sum(backend["packets"] > 0 for backend in service["backends"]) == len(BACKENDS)


def test_a_tool_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BenchError, match="apt-get install nftables"), Line("nftables", "tcp", PORT):
        pass
