"""What the benchmarks print, and that what they time is what they say. No test asserts a time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from bench.dataplane import IN_ORDER, MAIN_SCENARIOS, OTHER_SCENARIOS, SERVICE_PORT, SHUFFLED, Scenario, loaded, timed
from bench.report import BenchError

ROOT = Path(__file__).parents[2]
SCENARIOS = MAIN_SCENARIOS + OTHER_SCENARIOS
REQUESTS = [scenario for scenario in SCENARIOS if scenario.packet != "syn"]
NAT, DR = MAIN_SCENARIOS
FLOWS = 64
TINY = ("--flows", "1", "--flows", str(FLOWS), "--repeat", "100", "--rounds", "2")
VIP = NAT.addresses.vip


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def case_of(scenario: Scenario) -> str:
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
    ]
    assert [figure["case"] for figure in json.loads(tiny_run.stdout)] == expected


def test_the_table_on_stderr_has_a_row_for_each_figure(tiny_run: subprocess.CompletedProcess[str]) -> None:
    for figure in json.loads(tiny_run.stdout):
        assert f" {figure['case']} " in tiny_run.stderr


def test_a_case_is_made_of_pairs() -> None:
    reply = Scenario("nat", 4, "ack", direction="reply", refresh=True)
    assert NAT.case(65536) == "mode=nat family=4 packet=ack flows=65536 transition=0"
    assert reply.case(1) == "mode=nat family=4 packet=ack flows=1 transition=0 direction=reply refresh=1"


@pytest.mark.parametrize("scenario", REQUESTS, ids=case_of)
def test_every_timed_packet_of_a_known_flow_is_forwarded(scenario: Scenario) -> None:
    with loaded(scenario, 2 * FLOWS) as rig:
        rig.open(FLOWS)
        rig.settle(FLOWS)
        before = rig.counts()
        rig.compare(repeat=3 * FLOWS, rounds=2)
        counted = rig.counts() - before
        way = counted.replies if scenario.direction == "reply" else counted.requests
        assert (way, counted.requests + counted.replies, counted.connections) == (6 * FLOWS, 6 * FLOWS, 0)
        assert rig.refused() == {}


@pytest.mark.parametrize("mode", ["nat", "dr"])
def test_every_timed_syn_opens_a_connection(mode: str) -> None:
    with loaded(Scenario(mode, 4, "syn"), FLOWS) as rig:
        rig.overflow()
        before = rig.counts()
        rig.compare(repeat=3 * FLOWS, rounds=2)
        counted = rig.counts() - before
        assert (counted.requests, counted.connections) == (6 * FLOWS, 6 * FLOWS)


def test_the_floor_forwards_nothing() -> None:
    with loaded(NAT, 2 * FLOWS) as rig:
        rig.open(FLOWS)
        rig.settle(FLOWS)
        before = rig.counts()
        rig.run("request_floor", FLOWS)
        rig.run("reply_floor", FLOWS)
        assert rig.counts() == before


def test_dead_backends_fail_the_benchmark_instead_of_being_timed() -> None:
    with loaded(DR, 2 * FLOWS) as rig:
        rig.settle(FLOWS)
        for member in rig.obj.map("members").view():
            member.flags = 0
        with pytest.raises(BenchError, match="DROP_NO_BACKEND"):
            timed(rig, FLOWS, repeat=10, rounds=1)


@pytest.mark.parametrize("order", [IN_ORDER, SHUFFLED])
def test_every_flow_is_visited_once_before_any_is_visited_again(order: Sequence[int]) -> None:
    with loaded(NAT, 2 * FLOWS) as rig:
        rig.aim("A", FLOWS, (order[0], order[1]))
        packets = [rig.run("request_floor", 1).data for _ in range(2 * FLOWS)]
        assert len(set(packets[:FLOWS])) == FLOWS
        assert packets[FLOWS:] == packets[:FLOWS]


def test_a_packet_is_the_template_with_the_address_and_port_of_its_client() -> None:
    with loaded(NAT, 2 * FLOWS) as rig:
        rig.aim("A", 1, IN_ORDER)
        expected = Ether(NAT.frame("A"))
        expected[TCP].sport = 1024
        assert rig.run("request_floor", 1).data == bytes(expected)


def test_the_packet_is_written_anew_after_nat_has_rewritten_it() -> None:
    with loaded(NAT, 2 * FLOWS) as rig:
        rig.open(FLOWS)
        rig.aim("A", FLOWS, SHUFFLED)
        once = [rig.run("request", 1).data for _ in range(FLOWS)]
        assert rig.run("request", FLOWS).data == once[-1]


def test_replies_go_to_the_clients_that_asked_in_the_order_in_which_they_asked() -> None:
    with loaded(NAT, 2 * FLOWS) as rig:
        rig.open(FLOWS)
        rig.settle(FLOWS)
        asked = [IP(rig.run("request_floor", 1).data[14:]) for _ in range(FLOWS)]
        replies = [IP(rig.run("reply", 1).data[14:]) for _ in range(FLOWS)]
        assert [(r.dst, r[TCP].dport) for r in replies] == [(a.src, a[TCP].sport) for a in asked]
        assert {(r.src, r[TCP].sport) for r in replies} == {(VIP, SERVICE_PORT)}


def test_a_number_of_flows_that_is_no_power_of_two_is_a_usage_error() -> None:
    refused = bench("dataplane", "--flows", "3")
    assert refused.returncode == 2
    assert "3 is not a power of two." in refused.stderr


def test_an_unknown_benchmark_is_a_usage_error() -> None:
    refused = bench("speed")
    assert refused.returncode == 2
    assert "No such command 'speed'" in refused.stderr
