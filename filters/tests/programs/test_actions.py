"""Conditions and actions of a firewall in the kernel: sets, deadlines, limits, sections, tail calls."""

from __future__ import annotations

import ctypes
import os
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from filters.compiler import cbpf
from filters.compiler.ebpf import R0, Assembler, Label, disassemble
from filters.compiler.expr import compile_expression
from filters.compiler.hook import HOOKS, TC_IN, XDP, XDP_FRAGS, Hook
from filters.compiler.translate import translate
from filters.programs.actions import Answer, Bucket, GoOn, In, Limit, Until, assemble_by_interface, buckets
from filters.programs.program import Condition, Count, Drop, FilterAction, LoadedProgram, Rule, assemble, counters, load
from filters.programs.sets import Tries, read_prefixes
from filters.tests.packets import CLIENT, CLIENT6, FRAMES, HOST, HOST6
from xdp import libbpf
from xdp.maps import Map

PASS, DROP = 2, 1
NS = 1_000_000_000
_PROG_ARRAY = 3


def rule(
    hook: Hook, actions: Sequence[FilterAction], conditions: Sequence[Condition] = (), expression: str = ""
) -> Rule:
    return Rule(translate(compile_expression(expression), hook), actions, conditions)


def loaded(hook: Hook, *rules: Rule, otherwise: FilterAction | None = None) -> LoadedProgram:
    return load("rules", hook, assemble(hook, rules, otherwise))


@pytest.fixture
def resources() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def a_set(resources: ExitStack, tmp_path: Path, *prefixes: str) -> Tries:
    (tmp_path / "set").write_text("\n".join(prefixes))
    tries = Tries.create()
    resources.callback(tries.close)
    tries.add(read_prefixes(tmp_path / "set"))
    return tries


# Sets

IPV4 = {"tcp syn", "udp", "tcp with ip options", "vlan", "qinq", "802.1ad", "later fragment"}
IPV6 = {"ipv6 tcp", "ipv6 extension headers", "vlan ipv6"}
NEITHER = {"arp", "lldp", "spanning tree", "mpls", "ethernet header alone", "tcp with ip options, cut to 15"}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=str)
@pytest.mark.parametrize(
    ("prefixes", "side", "found"),
    [
        (("192.168.0.0/16",), "src", IPV4),
        (("192.168.0.0/16",), "dst", set()),
        ((HOST,), "dst", IPV4),
        (("10.1.2.0/25", "2001:db8::/64"), "dst", IPV4 | IPV6),
        ((CLIENT6,), "src", IPV6),
        ((HOST6,), "src", set()),
        (("0.0.0.0/0",), "src", IPV4),
        (("::/0",), "dst", IPV6),
        (("192.168.7.8", "192.168.7.10/31", "10.1.2.3", "2001:db8:9::8"), "src", set()),
        ((), "src", set()),
    ],
)
def test_packets_with_an_address_in_the_set_are_found(
    resources: ExitStack, tmp_path: Path, hook: Hook, prefixes: tuple[str, ...], side: str, found: set[str]
) -> None:
    tries = a_set(resources, tmp_path, *prefixes)
    with loaded(hook, rule(hook, [Drop()], [In(tries, side)])) as program:
        runnable = [name for name in sorted(IPV4 | IPV6 | NEITHER) if not hook.is_tc or "cut" not in name]
        runnable = [name for name in runnable if not hook.is_tc or name != "ethernet header alone"]
        dropped = {name for name in runnable if program.test_run(FRAMES[name]).verdict == hook.drop_verdict}
    assert dropped == found


def test_set_follows_what_its_tries_hold(resources: ExitStack, tmp_path: Path) -> None:
    tries = a_set(resources, tmp_path, "10.0.0.0/8")
    with loaded(XDP, rule(XDP, [Drop()], [In(tries, "src")])) as program:
        assert program.test_run(FRAMES["udp"]).verdict == PASS
        (tmp_path / "more").write_text(CLIENT)
        tries.add(read_prefixes(tmp_path / "more"))
        assert program.test_run(FRAMES["udp"]).verdict == DROP
        tries.remove(read_prefixes(tmp_path / "more"))
        assert program.test_run(FRAMES["udp"]).verdict == PASS


def test_expression_and_set_have_to_hold_both(resources: ExitStack, tmp_path: Path) -> None:
    tries = a_set(resources, tmp_path, CLIENT, CLIENT6)
    with loaded(XDP_FRAGS, rule(XDP_FRAGS, [Drop()], [In(tries, "src")], "udp port 53")) as program:
        dropped = [n for n in ("udp", "tcp syn", "ipv6 udp", "arp") if program.test_run(FRAMES[n]).verdict == DROP]
    assert dropped == ["udp", "ipv6 udp"]


# Deadlines


@pytest.mark.parametrize("hook", HOOKS.values(), ids=str)
def test_rule_ends_at_its_deadline(hook: Hook) -> None:
    now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    for deadline, verdict in ((now + 3600 * NS, hook.drop_verdict), (now, hook.pass_verdict & cbpf.WORD)):
        with loaded(hook, rule(hook, [Drop()], [Until(deadline)])) as program:
            assert program.test_run(FRAMES["udp"]).verdict == verdict


def test_a_packet_past_the_deadline_goes_to_the_next_rule() -> None:
    with loaded(XDP, rule(XDP, [Answer(7)], [Until(1)]), rule(XDP, [Answer(8)], [Until(1 << 62)])) as program:
        assert program.test_run(FRAMES["udp"]).verdict == 8


# Limits


class Limited:
    """A program that limits, its bucket and what it has dropped."""

    def __init__(self, resources: ExitStack, hook: Hook, interval_ns: int, burst_ns: int) -> None:
        self.buckets, self.counters = buckets(4), counters(1)
        resources.callback(os.close, self.buckets.fd)
        resources.callback(os.close, self.counters.fd)
        limit = Limit(self.buckets, 2, interval_ns, burst_ns, Count(self.counters, 0))
        self.program = resources.enter_context(loaded(hook, rule(hook, [limit])))
        self.dropped_verdict = hook.drop_verdict

    def drops(self) -> bool:
        return self.program.test_run(FRAMES["udp"]).verdict == self.dropped_verdict

    @property
    def dropped(self) -> int:
        return int(self.counters.total(0).packets)


@pytest.mark.parametrize("hook", HOOKS.values(), ids=str)
def test_as_many_packets_go_on_as_the_burst_has(resources: ExitStack, hook: Hook) -> None:
    limited = Limited(resources, hook, 3600 * NS, 5 * 3600 * NS)
    assert [limited.drops() for _ in range(8)] == [False] * 5 + [True] * 3
    assert limited.dropped == 3


def test_packets_go_on_again_when_time_has_passed(resources: ExitStack) -> None:
    """The bucket is set back, as if it were later."""
    limited = Limited(resources, XDP, 10 * NS, 50 * NS)
    assert [limited.drops() for _ in range(6)] == [False] * 5 + [True]
    due = limited.buckets[2].due_ns
    limited.buckets[2] = Bucket(due_ns=due - 21 * NS)
    assert [limited.drops() for _ in range(3)] == [False, False, True]


def test_a_long_silence_saves_no_more_than_the_burst(resources: ExitStack) -> None:
    limited = Limited(resources, XDP, 3600 * NS, 2 * 3600 * NS)
    limited.buckets[2] = Bucket(due_ns=1)
    assert [limited.drops() for _ in range(4)] == [False, False, True, True]


def test_all_cpus_share_one_bucket(resources: ExitStack) -> None:
    """A packet that loses at the bucket four times in a row is dropped before it is empty: hardly any."""
    limited = Limited(resources, XDP, 3600 * NS, 1000 * 3600 * NS)
    run = limited.program.test_run
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda _: run(FRAMES["udp"], repeat=5000), range(2)))
    assert 9000 <= limited.dropped < 9100


# Several interfaces, several programs


def test_each_interface_has_rules_of_its_own() -> None:
    loopback = socket.if_nametoindex("lo")
    for hook in (XDP, TC_IN):
        sections = {loopback + 1000: [rule(hook, [Answer(5)])], loopback: [rule(hook, [Answer(7)], expression="udp")]}
        with load("rules", hook, assemble_by_interface(hook, sections, Answer(9))) as program:
            assert [program.test_run(FRAMES[name]).verdict for name in ("udp", "arp")] == [7, 9]


def test_frame_in_fragments_goes_through_the_section_too() -> None:
    sections = {socket.if_nametoindex("lo"): [rule(XDP_FRAGS, [Answer(7)], expression="ether[5000] = 0")]}
    with load("rules", XDP_FRAGS, assemble_by_interface(XDP_FRAGS, sections, Answer(9))) as program:
        assert program.test_run(FRAMES["udp"].ljust(9000, b"\0")).verdict == 7


@pytest.fixture
def places(resources: ExitStack) -> Map:
    made = Map("places", libbpf.map_create(_PROG_ARRAY, b"places", 4, 4, 4, None), ctypes.c_uint32, ctypes.c_uint32)
    resources.callback(os.close, made.fd)
    return made


def test_packet_goes_on_to_the_first_place_that_is_taken(resources: ExitStack, places: Map) -> None:
    with loaded(XDP, otherwise=GoOn(places, (1, 2, 3))) as program:
        assert program.test_run(FRAMES["udp"]).verdict == PASS
        for place in (0, 3, 2):
            places[place] = resources.enter_context(loaded(XDP, otherwise=Answer(10 + place))).fd
        assert program.test_run(FRAMES["udp"]).verdict == 12


# Their text


def test_instructions_of_limits_and_deadlines_are_listed() -> None:
    asm = Assembler()
    Until(0x1_8000_0001).emit(asm, XDP, (end := Label()))
    asm.compare_exchange(R0, 8, R0)
    asm.place(end)
    asm.exit()
    lines = disassemble(asm.assemble()).splitlines()
    assert lines[0].endswith("call bpf_ktime_get_boot_ns#125")
    assert lines[1].endswith("r1 = 0x180000001")
    assert lines[3].endswith("r0 = atomic64_cmpxchg((u64 *)(r0 +8), r0, r0)")
