"""What the benchmarks print, and that what they time is what they say. No test asserts a time."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from bench import decap, plot
from bench.dataplane import PLOTTED_BACKENDS, measure_backends
from bench.decap import DecapScenario
from bench.report import BenchError, Result
from bench.rig import loaded
from bench.scenarios import BACKEND_MAC, BALANCER_MAC, MAIN_SCENARIOS, OTHER_SCENARIOS, SERVICE_PORT, Scenario
from bench.timing import compare, timed
from bench.traffic import IN_ORDER, SHUFFLED
from lb.hashing.ring import current_member, is_tracked, previous_member
from lb.model.state import DEFAULT_RING_SIZE

ROOT = Path(__file__).parents[2]
SCENARIOS = MAIN_SCENARIOS + OTHER_SCENARIOS
REQUESTS = [scenario for scenario in SCENARIOS if scenario.packet != "syn"]
NAT, DR, IPIP = MAIN_SCENARIOS
DECAP_SCENARIOS = decap.MAIN_SCENARIOS + decap.OTHER_SCENARIOS
FLOWS = 64
TINY = ("--flows", "1", "--flows", str(FLOWS), "--repeat", "100", "--rounds", "2")
VIP = NAT.addresses.vip


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def case_of(scenario: Scenario | DecapScenario) -> str:
    return scenario.case(FLOWS)


@pytest.fixture(scope="module")
def tiny_run() -> subprocess.CompletedProcess[str]:
    return bench("dataplane", "--json", *TINY)


def test_json_is_all_that_stdout_holds(tiny_run: subprocess.CompletedProcess[str]) -> None:
    assert tiny_run.returncode == 0, tiny_run.stderr
    for figure in json.loads(tiny_run.stdout):
        assert list(figure) == ["bench", "case", "value", "unit", "floor", "kernel", "cpu"]
        assert (figure["bench"], figure["unit"]) == ("dataplane", "ns/packet")
        assert isinstance(figure["value"], int | float)
        assert isinstance(figure["floor"], int | float)
        assert figure["kernel"]
        assert figure["cpu"]


def test_the_main_cases_are_measured_with_each_number_of_flows(tiny_run: subprocess.CompletedProcess[str]) -> None:
    expected = [
        *(scenario.case(flows) for scenario in MAIN_SCENARIOS for flows in (1, FLOWS)),
        *(scenario.case(FLOWS) for scenario in OTHER_SCENARIOS),
        *(scenario.case(flows) for scenario in decap.MAIN_SCENARIOS for flows in (1, FLOWS)),
        *(scenario.case(FLOWS) for scenario in decap.OTHER_SCENARIOS),
    ]
    assert [figure["case"] for figure in json.loads(tiny_run.stdout)] == expected


def test_the_table_on_stderr_has_a_row_for_each_figure(tiny_run: subprocess.CompletedProcess[str]) -> None:
    for figure in json.loads(tiny_run.stdout):
        assert f" {figure['case']} " in tiny_run.stderr


def test_a_case_is_made_of_pairs() -> None:
    reply = Scenario("nat", 4, "ack", direction="reply", refresh=True)
    assert NAT.case(65536) == "mode=nat family=4 packet=ack flows=65536 transition=0"
    changed = Scenario("dr", 4, "ack", transition=5, backends=10)
    assert changed.case(1) == "mode=dr family=4 packet=ack flows=1 transition=5 backends=10"
    assert IPIP.case(1 << 20) == "mode=ipip family=4 packet=ack flows=1048576 transition=0"
    chance = Scenario("gue", 4, "ack", transition=1, outer=6, second_chance=True)
    assert chance.case(1) == "mode=gue family=4 packet=ack flows=1 transition=1 outer=6 second_chance=1"
    ended = DecapScenario("ipip", 4, outer=6, destinations=100)
    always = "mode=decap tunnel=ipip family=4 packet=ack flows=1 transition=0"
    assert ended.case(1) == f"{always} outer=6 destinations=100"
    assert reply.case(1) == "mode=nat family=4 packet=ack flows=1 transition=0 direction=reply refresh=1"


@pytest.mark.parametrize("scenario", REQUESTS, ids=case_of)
def test_every_timed_packet_of_a_known_flow_is_forwarded(scenario: Scenario) -> None:
    with loaded(scenario, 2 * FLOWS) as rig:
        rig.open(FLOWS)
        rig.change()
        rig.settle(FLOWS)
        before = rig.counts()
        compare(rig, repeat=3 * FLOWS, rounds=2)
        counted = rig.counts() - before
        way = counted.replies if scenario.direction == "reply" else counted.requests
        assert (way, counted.requests + counted.replies, counted.connections) == (6 * FLOWS, 6 * FLOWS, 0)
        assert rig.refused() == {}


@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if s.packet == "syn"], ids=case_of)
def test_every_timed_syn_opens_a_connection(scenario: Scenario) -> None:
    with loaded(scenario, FLOWS) as rig:
        rig.change()
        rig.overflow()
        before = rig.counts()
        compare(rig, repeat=3 * FLOWS, rounds=2)
        counted = rig.counts() - before
        assert (counted.requests, counted.connections) == (6 * FLOWS, 6 * FLOWS)


@pytest.mark.parametrize("percent", [0, 1, 5, 100])
def test_so_many_slots_are_in_transition(percent: int) -> None:
    with loaded(Scenario("dr", 4, "ack", transition=percent), FLOWS) as rig:
        rig.change()
        words = memoryview(rig.obj.map("rings").bytes()).cast("B").cast("I")[:DEFAULT_RING_SIZE]
        in_transition = sum(is_tracked(word) and previous_member(word) != current_member(word) for word in words)
    assert in_transition == pytest.approx(DEFAULT_RING_SIZE * percent / 100, abs=percent)


@pytest.mark.parametrize("packet", ["ack", "udp"])
def test_every_flow_of_a_slot_in_transition_is_recorded_and_stays_on_the_older_member(packet: str) -> None:
    with loaded(Scenario("dr", 4, packet, transition=100), 2 * FLOWS) as rig:
        rig.settle(FLOWS)
        before = [counter.packets for counter in rig.obj.map("counters").totals()]
        assert len([*rig.obj.map("flows4").items()]) == 0
        rig.change()
        rig.settle(FLOWS)
        rig.run("balanced", 3 * FLOWS)
        after = [counter.packets for counter in rig.obj.map("counters").totals()]
        assert len([*rig.obj.map("flows4").items()]) == FLOWS
    if packet == "ack":
        assert after == [5 * packets for packets in before]


@pytest.mark.parametrize("backends", [1, 1000])
def test_all_backends_get_packets(backends: int) -> None:
    with loaded(Scenario("dr", 4, "ack", backends=backends), 1) as rig:
        rig.settle(1 << 14)
        assert sum(counter.packets > 0 for counter in rig.obj.map("counters").totals()) == backends
        assert rig.refused() == {}


def test_the_floor_forwards_nothing() -> None:
    with loaded(NAT, 2 * FLOWS) as rig:
        rig.open(FLOWS)
        rig.settle(FLOWS)
        before = rig.counts()
        rig.run("balanced_floor", FLOWS)
        rig.turn()
        rig.run("balanced_floor", FLOWS)
        assert rig.counts() == before


def test_dead_backends_fail_the_benchmark_instead_of_being_timed() -> None:
    with loaded(DR, 2 * FLOWS) as rig:
        rig.settle(FLOWS)
        for member in rig.obj.map("members").view():
            member.flags = 0
        with pytest.raises(BenchError, match="DROP_NO_BACKEND"):
            timed(rig, "any", repeat=10, rounds=1)


def test_packets_that_are_in_no_tunnel_fail_the_benchmark() -> None:
    with loaded(IPIP, 2 * FLOWS) as rig:
        rig.settle(FLOWS)
        rig.obj.map("services").view()[0].mode = rig.obj.types.enum("mode")["MODE_DR"]
        with pytest.raises(BenchError, match="'not in a tunnel': 10"):
            timed(rig, "any", repeat=10, rounds=1)


TUNNELS = [scenario for scenario in SCENARIOS if scenario.is_tunnel and not scenario.second_chance]


@pytest.mark.parametrize("scenario", TUNNELS, ids=case_of)
def test_what_is_timed_puts_the_clients_packet_into_the_tunnel(scenario: Scenario) -> None:
    with loaded(scenario, 2 * FLOWS) as rig:
        rig.open(FLOWS)
        rig.aim(scenario.packet, 1, IN_ORDER)
        inner, frame = rig.made(), rig.forwarded()
    overhead = len(frame) - len(inner)
    assert overhead == scenario.overhead
    outer = Ether(frame).payload
    assert outer.version == scenario.backend_family
    assert outer.src.startswith(("172.16.", "2001:2:0:4::"))
    assert same_but_for_ttl(frame[14 + overhead :], inner[14:])
    if scenario.mode == "gue":
        assert outer[UDP].dport == 6080
        assert bool(outer[UDP].chksum) is scenario.outer_checksum


def same_but_for_ttl(one: bytes, other: bytes) -> bool:
    """The balancer counts as a hop."""
    copies = [(IP if packet[0] >> 4 == 4 else IPv6)(packet) for packet in (one, other)]
    for copy, ttl in zip(copies, (63, 64), strict=True):
        field = "ttl" if copy.version == 4 else "hlim"
        assert getattr(copy, field) == ttl
        setattr(copy, field, 0)
        if copy.version == 4:
            copy.chksum = 0
    return bytes(copies[0]) == bytes(copies[1])


def test_the_tunnels_header_is_taken_off_again() -> None:
    with loaded(IPIP, 2 * FLOWS) as rig:
        rig.aim("ack", FLOWS, SHUFFLED)
        assert len(rig.run("balanced", 1000).data) == len(IPIP.frame("ack"))
        assert len(rig.run("balanced_floor", 1000).data) == len(IPIP.frame("ack"))


def test_a_packet_of_a_slot_in_transition_names_the_other_member() -> None:
    scenario = Scenario("gue", 4, "ack", transition=100, second_chance=True)
    with loaded(scenario, 2 * FLOWS) as rig:
        rig.change()
        rig.aim("ack", FLOWS, SHUFFLED)
        frame = Ether(rig.forwarded())
    gue = bytes(frame[UDP].payload)
    assert gue[:8] == bytes([5, 4, 0, 0, 0x58, 0x32, 4, 0])
    older, newer = int(ip_address(frame[IP].dst)), int(ip_address(gue[8:12]))
    assert (newer - older) % scenario.backends == 1
    assert IP(gue[24:]).dst == VIP


@pytest.mark.parametrize("scenario", DECAP_SCENARIOS, ids=case_of)
def test_every_timed_packet_is_taken_out_of_its_tunnel(scenario: DecapScenario) -> None:
    with decap.loaded(scenario) as rig:
        rig.aim(FLOWS)
        before = rig.counts()
        compare(rig, repeat=3 * FLOWS, rounds=2)
        assert rig.counts() - before == 6 * FLOWS
        assert rig.refused() == {}


@pytest.mark.parametrize("scenario", DECAP_SCENARIOS, ids=case_of)
def test_what_leaves_the_tunnel_is_the_packet_of_the_client_whose_turn_it_is(scenario: DecapScenario) -> None:
    with decap.loaded(scenario) as rig:
        rig.aim(FLOWS)
        frames = {rig.run("encapsulated", 1).data for _ in range(FLOWS)}
        rig.aim(1)
        expected = Ether(scenario.inner_frame())
        expected.src, expected.dst, expected[TCP].sport = BALANCER_MAC, BACKEND_MAC, 1024
        assert rig.run("encapsulated", 1).data == bytes(expected)
    assert len(frames) == FLOWS


def test_packets_for_other_destinations_fail_the_benchmark_of_decapsulation() -> None:
    with decap.loaded(DecapScenario("ipip", 4, destinations=2)) as rig:
        rig.aim(FLOWS)
        for key, _ in [*rig.obj.map("destinations4").items()]:
            del rig.obj.map("destinations4")[key]
        with pytest.raises(BenchError, match="PASS_NOT_CONFIGURED"):
            timed(rig, "any", repeat=10, rounds=1)


@pytest.mark.parametrize("order", [IN_ORDER, SHUFFLED])
def test_every_flow_is_visited_once_before_any_is_visited_again(order: Sequence[int]) -> None:
    with loaded(NAT, 2 * FLOWS) as rig:
        rig.aim("ack", FLOWS, (order[0], order[1]))
        packets = [rig.made() for _ in range(2 * FLOWS)]
        assert len(set(packets[:FLOWS])) == FLOWS
        assert packets[FLOWS:] == packets[:FLOWS]


def test_a_packet_is_the_template_with_the_address_and_port_of_its_client() -> None:
    with loaded(NAT, 2 * FLOWS) as rig:
        rig.aim("ack", 1, IN_ORDER)
        expected = Ether(NAT.frame("ack"))
        expected[TCP].sport = 1024
        assert rig.made() == bytes(expected)


def test_the_packet_is_written_anew_after_nat_has_rewritten_it() -> None:
    with loaded(NAT, 2 * FLOWS) as rig:
        rig.open(FLOWS)
        rig.aim("ack", FLOWS, SHUFFLED)
        once = [rig.forwarded() for _ in range(FLOWS)]
        assert rig.run("balanced", FLOWS).data == once[-1]


def test_replies_go_to_the_clients_that_asked_in_the_order_in_which_they_asked() -> None:
    with loaded(NAT, 2 * FLOWS) as rig:
        rig.open(FLOWS)
        rig.settle(FLOWS)
        asked = [IP(rig.made()[14:]) for _ in range(FLOWS)]
        rig.turn()
        replies = [IP(rig.forwarded()[14:]) for _ in range(FLOWS)]
        assert [(r.dst, r[TCP].dport) for r in replies] == [(a.src, a[TCP].sport) for a in asked]
        assert {(r.src, r[TCP].sport) for r in replies} == {(VIP, SERVICE_PORT)}


def test_a_number_of_flows_that_is_no_power_of_two_is_a_usage_error() -> None:
    refused = bench("dataplane", "--flows", "3")
    assert refused.returncode == 2
    assert "3 is not a power of two." in refused.stderr


def test_a_picture_needs_matplotlib_and_says_so_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(BenchError, match="matplotlib is not installed"):
        plot.require()


def test_the_picture_has_a_curve_for_each_mode_and_its_floor(
    tiny_run: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    fields = {field.name for field in dataclasses.fields(Result)}
    by_flows = [
        Result(**{name: value for name, value in figure.items() if name in fields})
        for figure in json.loads(tiny_run.stdout)
    ]
    results = [*measure_backends(flows=1, repeat=10, rounds=1)]
    assert [result.case for result in results] == [
        f"{scenario.case(1)} backends={backends}" for scenario in MAIN_SCENARIOS for backends in PLOTTED_BACKENDS
    ]
    plot.draw(by_flows, results, tmp_path / "cost.svg")
    text = (tmp_path / "cost.svg").read_text()
    assert all(
        f"<!-- {label} -->" in text
        for label in ("mode nat", "its floor (nat)", "mode dr", "its floor (dr)", "mode ipip")
    )


def test_only_cases_that_differ_in_what_a_diagram_varies_are_in_it() -> None:
    same = plot.pairs(DR.case(FLOWS))
    assert plot.is_drawn(same, "flows")
    assert not plot.is_drawn(same | {"transition": "1"}, "flows")
    assert not plot.is_drawn(same | {"refresh": "1"}, "flows")
    assert not plot.is_drawn(same | {"backends": "10"}, "flows")
    assert plot.is_drawn(same | {"backends": "10"}, "backends")


def test_trex_says_in_one_line_how_to_get_it() -> None:
    refused = bench("trex", "--json")
    assert (refused.returncode, refused.stdout) == (1, "")
    (line,) = refused.stderr.strip().splitlines()
    assert "--trex FOLDER" in line


def test_an_unknown_benchmark_is_a_usage_error() -> None:
    refused = bench("speed")
    assert refused.returncode == 2
    assert "No such command 'speed'" in refused.stderr
