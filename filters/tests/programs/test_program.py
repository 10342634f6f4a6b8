"""Rules and their actions in the kernel: verdicts, counters, order, refusals; and what a finished filter looks like."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from filters.compiler import cbpf, ebpf
from filters.compiler.cbpf import Instruction
from filters.compiler.ebpf import R0, R1, Assembler
from filters.compiler.emit import ACCEPTED
from filters.compiler.expr import compile_expression
from filters.compiler.hook import HOOKS, TC_IN, TC_OUT, XDP, XDP_FRAGS, Hook
from filters.compiler.translate import translate
from filters.errors import InvalidFilter, TooLong
from filters.programs.program import (
    Count,
    Counter,
    Drop,
    FilterAction,
    LoadedProgram,
    Pass,
    Rule,
    assemble,
    counters,
    load,
)
from filters.selftest.oracle import KernelFilter
from filters.selftest.selftest import accepted, load_bare
from filters.tests.packets import FRAMES
from xdp.errors import LoadError, NotPermitted

NOBODY = 65534
PASS, DROP = 2, 1


def loaded(
    hook: Hook, *rules: tuple[str, Sequence[FilterAction]], otherwise: FilterAction | None = None
) -> LoadedProgram:
    made = [Rule(translate(compile_expression(expression), hook), actions) for expression, actions in rules]
    return load("rules", hook, assemble(hook, made, otherwise))


def verdict(program: LoadedProgram, frame: str) -> int:
    return program.test_run(FRAMES[frame]).verdict


@pytest.mark.parametrize("hook", HOOKS.values(), ids=str)
def test_packet_is_dropped_or_goes_on_with_the_verdict_of_the_hook(hook: Hook) -> None:
    with loaded(hook, ("udp port 53", [Drop()])) as program:
        assert verdict(program, "udp") == hook.drop_verdict
        assert verdict(program, "tcp syn") == hook.pass_verdict & cbpf.WORD


@pytest.mark.parametrize("hook", HOOKS.values(), ids=str)
def test_first_rule_that_ends_a_packet_decides(hook: Hook) -> None:
    with loaded(hook, ("src net 192.168.0.0/16 and tcp", [Pass()]), ("ip or ip6", [Drop()])) as program:
        passed, dropped = hook.pass_verdict & cbpf.WORD, hook.drop_verdict
        assert [verdict(program, name) for name in ("tcp syn", "udp", "ipv6 tcp", "arp")] == [
            passed,
            dropped,
            dropped,
            passed,
        ]


def test_what_no_rule_ends_goes_to_the_final_action() -> None:
    with loaded(XDP, ("tcp", [Pass()]), otherwise=Drop()) as program:
        assert [verdict(program, name) for name in ("tcp syn", "udp")] == [PASS, DROP]


@pytest.mark.parametrize("hook", HOOKS.values(), ids=str)
def test_rule_that_only_counts_leaves_the_packet_to_the_next(hook: Hook) -> None:
    counted = counters(2)
    with loaded(hook, ("ip", [Count(counted, 0)]), ("udp port 53", [Count(counted, 1), Drop()])) as program:
        assert verdict(program, "udp") == hook.drop_verdict
        assert verdict(program, "tcp syn") == hook.pass_verdict & cbpf.WORD
        assert verdict(program, "arp") == hook.pass_verdict & cbpf.WORD
    both = len(FRAMES["udp"]) + len(FRAMES["tcp syn"])
    assert as_pairs(counted.total(0), counted.total(1)) == [(2, both), (1, len(FRAMES["udp"]))]
    os.close(counted.fd)


def test_bytes_of_a_frame_in_fragments_are_counted() -> None:
    counted = counters(1)
    with loaded(XDP_FRAGS, ("ether[5000] = 0", [Count(counted, 0)])) as program:
        program.test_run(FRAMES["udp"].ljust(9000, b"\0"))
    assert as_pairs(counted.total(0)) == [(1, 9000)]
    os.close(counted.fd)


def as_pairs(*totals: Counter) -> list[tuple[int, int]]:
    return [(total.packets, total.bytes) for total in totals]


def test_custom_action_finds_the_accepted_length_and_the_context() -> None:
    @dataclass(frozen=True)
    class ReturnLengthAndIndex:
        def emit(self, asm: Assembler, hook: Hook) -> None:
            asm.load(R1, ebpf.R6, 12, 4)
            asm.mov(R0, ACCEPTED)
            asm.alu(ebpf.LSH, R0, 8)
            asm.alu(ebpf.OR, R0, R1)
            asm.exit()

    rule = Rule(translate(compile_expression("ip", snaplen=96), XDP), [ReturnLengthAndIndex()])
    with load("rules", XDP, assemble(XDP, [rule])) as program:
        assert program.test_run(FRAMES["udp"], ingress_ifindex=1).verdict == 96 << 8 | 1


@pytest.mark.parametrize(("expression", "expected"), [("", DROP), ("ether[70000] = 0", PASS)])
def test_filter_that_always_says_the_same_is_accepted_by_the_verifier(expression: str, expected: int) -> None:
    with loaded(XDP, (expression, [Drop()])) as program:
        assert verdict(program, "udp") == expected


def test_program_leaves_the_packet_as_it_was() -> None:
    with loaded(XDP, ("udp", [Pass()])) as program:
        assert all(program.test_run(frame).data == frame for frame in FRAMES.values())


# What the kernel is told, and what it refuses


def test_verifier_says_how_much_it_looked_at() -> None:
    with loaded(XDP, ("udp port 53", [Drop()])) as program:
        assert len(program.instructions) <= program.verified_instructions < 100


def test_three_hundred_hosts_fit() -> None:
    hosts = " or ".join(f"host 10.0.{n // 250}.{n % 250}" for n in range(300))
    instructions = compile_expression(hosts, optimise=False)  # of which libpcap takes two seconds
    with load("hosts", XDP, assemble(XDP, [Rule(translate(instructions, XDP), [Drop()])])) as program:
        assert verdict(program, "udp") == PASS
        match = FRAMES["udp"][:30] + bytes([10, 0, 1, 49]) + FRAMES["udp"][34:]
        assert program.test_run(match).verdict == DROP


def test_filter_that_is_too_long_names_the_limit() -> None:
    load_x = Instruction(cbpf.LDX | cbpf.B | cbpf.MSH, k=14)
    load_a = Instruction(cbpf.LD | cbpf.IND, k=14)
    with pytest.raises(TooLong, match=r"eBPF instructions: a jump spans more than 32,767 of them"):
        load_bare([*[load_x, load_a] * 3000, Instruction(cbpf.RET | cbpf.A)], TC_IN)


def test_filter_with_too_many_branches_names_the_limit() -> None:
    hosts = " or ".join(f"ip6 host 2001:db8::{n:x}" for n in range(300))
    with pytest.raises(TooLong, match=r"^filter: exceeds the verifier's limit of 8,192 pending branches: split the"):
        load_bare(compile_expression(hosts, optimise=False), XDP_FRAGS)


def test_program_that_the_verifier_refuses_is_shown_with_the_end_of_its_log() -> None:
    asm = Assembler()
    asm.load(R0, R1, 4000, 4)
    asm.exit()
    with pytest.raises(LoadError) as refusal:
        load("bad", XDP, asm.assemble())
    first, *log = str(refusal.value).split("\n  ")
    assert first == "bad: rejected by the kernel: Permission denied"
    assert log[-1] == "invalid bpf_context access off=4000 size=4"


def test_loading_without_capabilities_says_what_is_needed() -> None:
    program = assemble(XDP, [Rule(translate(compile_expression("ip"), XDP), [Drop()])])
    os.seteuid(NOBODY)
    try:
        with pytest.raises(NotPermitted, match=r"^not permitted to use BPF programs: run as root"):
            load("filter", XDP, program)
        with pytest.raises(NotPermitted, match=r"^not permitted to use BPF programs: run as root"):
            counters(1)
    finally:
        os.seteuid(0)


def test_program_that_classic_bpf_refuses_is_refused() -> None:
    with pytest.raises(InvalidFilter, match=r"^instruction 0: unknown code 0xff$"):
        translate([Instruction(0xFF), Instruction(cbpf.RET)], XDP)


def test_closing_gives_every_descriptor_back() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        loaded(XDP, ("ip", [Drop()])).close()
    assert len(os.listdir("/proc/self/fd")) == before


# What hooks tell


def asks(what: int) -> tuple[Instruction, ...]:
    return Instruction(cbpf.LD | cbpf.ABS, k=cbpf.AD_OFF + what), Instruction(cbpf.RET | cbpf.A)


@pytest.mark.parametrize(
    ("hook", "what", "answer"),
    [
        (XDP, cbpf.PROTOCOL, 0x0800),
        (TC_IN, cbpf.PROTOCOL, 0x0800),
        (TC_IN, cbpf.IFINDEX, 1),
        (TC_OUT, cbpf.PKTTYPE, 4),
        (XDP, cbpf.VLAN_TAG_PRESENT, 0),
        (TC_IN, cbpf.VLAN_TAG_PRESENT, 0),
        (TC_IN, cbpf.MARK, 0),
        (TC_IN, cbpf.QUEUE, 0),
    ],
)
def test_questions_about_a_packet_are_answered(hook: Hook, what: int, answer: int) -> None:
    with load_bare(asks(what), hook) as program:
        assert program.test_run(FRAMES["udp"]).verdict == answer


def test_interface_at_xdp_is_the_one_the_packet_came_in_on() -> None:
    with load_bare(asks(cbpf.IFINDEX), XDP) as program:
        assert program.test_run(FRAMES["udp"], ingress_ifindex=1).verdict == 1


@pytest.mark.parametrize("hook", HOOKS.values(), ids=str)
def test_random_numbers_are_below_their_bound_and_differ(hook: Hook) -> None:
    modulo = Instruction(cbpf.ALU | cbpf.MOD, k=1000)
    with load_bare((asks(cbpf.RANDOM)[0], modulo, asks(0)[1]), hook) as program:
        drawn = {program.test_run(FRAMES["udp"]).verdict for _ in range(50)}
    assert len(drawn) > 1
    assert max(drawn) < 1000


@pytest.mark.parametrize("hook", HOOKS.values(), ids=str)
def test_cpu_is_the_one_the_program_runs_on(hook: Hook) -> None:
    allowed = os.sched_getaffinity(0)
    with load_bare(asks(cbpf.CPU), hook) as program:
        for cpu in allowed:
            os.sched_setaffinity(0, {cpu})
            assert program.test_run(FRAMES["udp"]).verdict == cpu
    os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize("hook", HOOKS.values(), ids=str)
def test_values_survive_a_question_that_calls_the_kernel(hook: Hook) -> None:
    """X, M[] and the pointer behind X: the packet is read through X before and after."""
    program = (
        Instruction(cbpf.LDX | cbpf.B | cbpf.MSH, k=14),
        Instruction(cbpf.LD | cbpf.H | cbpf.IND, k=14),
        Instruction(cbpf.ST, k=7),
        Instruction(cbpf.LD | cbpf.ABS, k=cbpf.AD_OFF + cbpf.RANDOM),
        Instruction(cbpf.LD | cbpf.H | cbpf.IND, k=16),
        Instruction(cbpf.LDX | cbpf.MEM, k=7),
        Instruction(cbpf.ALU | cbpf.ADD | cbpf.X),
        Instruction(cbpf.RET | cbpf.A),
    )
    with load_bare(program, hook) as loaded_program:
        assert loaded_program.test_run(FRAMES["udp"]).verdict == 40000 + 53


@pytest.mark.parametrize("hook", HOOKS.values(), ids=str)
def test_accumulator_survives_a_length_that_goes_into_x(hook: Hook) -> None:
    program = (
        Instruction(cbpf.LD | cbpf.B | cbpf.ABS, k=14),
        Instruction(cbpf.LDX | cbpf.LEN),
        Instruction(cbpf.ALU | cbpf.ADD | cbpf.X),
        Instruction(cbpf.RET | cbpf.A),
    )
    with load_bare(program, hook) as loaded_program:
        assert loaded_program.test_run(FRAMES["udp"]).verdict == 0x45 + len(FRAMES["udp"])


@pytest.mark.parametrize("hook", HOOKS.values(), ids=str)
def test_length_goes_into_x_where_nothing_is_in_the_accumulator(hook: Hook) -> None:
    program = (
        Instruction(cbpf.LDX | cbpf.LEN),
        Instruction(cbpf.MISC | cbpf.TXA),
        Instruction(cbpf.RET | cbpf.A),
    )
    with load_bare(program, hook) as loaded_program:
        assert loaded_program.test_run(FRAMES["udp"]).verdict == len(FRAMES["udp"])


@pytest.mark.parametrize("offset", [1 << 29, 0x7FFFFFFF, 0x80000000, 0xFFFFFFF0])
@pytest.mark.parametrize("hook", HOOKS.values(), ids=str)
def test_offset_from_x_may_be_larger_than_what_the_verifier_adds_to_a_pointer(hook: Hook, offset: int) -> None:
    """The sum wraps around: here to 14 less than the length of the frame."""
    program = (
        Instruction(cbpf.LD | cbpf.LEN),
        Instruction(cbpf.ALU | cbpf.SUB, k=14 + offset & cbpf.WORD),
        Instruction(cbpf.MISC | cbpf.TAX),
        Instruction(cbpf.LD | cbpf.B | cbpf.IND, k=offset),
        Instruction(cbpf.ALU | cbpf.ADD, k=1),
        Instruction(cbpf.RET | cbpf.A),
    )
    frame = FRAMES["udp"]
    with load_bare(program, hook) as loaded_program:
        assert loaded_program.test_run(frame).verdict == frame[-14] + 1


@pytest.mark.parametrize("hook", [XDP_FRAGS, TC_IN], ids=str)
def test_large_offset_from_a_register_that_the_verifier_knows_by_another_is_accepted(hook: Hook) -> None:
    program = (
        Instruction(cbpf.LDX | cbpf.LEN),
        Instruction(cbpf.LD | cbpf.B | cbpf.IND, k=0x80000000),
        Instruction(cbpf.RET | cbpf.A),
    )
    with load_bare(program, hook) as loaded_program:
        assert loaded_program.test_run(FRAMES["udp"]).verdict == 0


def test_question_for_xor_is_arithmetic() -> None:
    xor = Instruction(cbpf.LD | cbpf.ABS, k=cbpf.AD_OFF + cbpf.ALU_XOR_X)
    program = (
        Instruction(cbpf.LD | cbpf.IMM, k=12),
        Instruction(cbpf.LDX | cbpf.IMM, k=10),
        xor,
        Instruction(cbpf.RET | cbpf.A),
    )
    with load_bare(program, XDP) as translated, KernelFilter(program) as classic:
        assert accepted(translated, FRAMES["udp"]) == classic.accepted(FRAMES["udp"]) == 6


# The code itself


def test_translated_filter_reads_as_one_would_write_it() -> None:
    code = assemble(XDP, [Rule(translate(compile_expression("ip and tcp dst port 80"), XDP), [Drop()])])
    assert ebpf.disassemble(code).splitlines() == [
        "0: (bf) r6 = r1",
        "1: (61) r7 = *(u32 *)(r6 +0)",
        "2: (61) r8 = *(u32 *)(r6 +4)",
        "3: (bf) r1 = r7",
        "4: (07) r1 += 24",
        "5: (2d) if r1 > r8 goto pc+19",
        "6: (69) r0 = *(u16 *)(r7 +12)",
        "7: (56) if w0 != 0x8 goto pc+17",
        "8: (71) r0 = *(u8 *)(r7 +23)",
        "9: (56) if w0 != 0x6 goto pc+15",
        "10: (69) r0 = *(u16 *)(r7 +20)",
        "11: (46) if w0 & 0xff1f goto pc+13",
        "12: (71) r9 = *(u8 *)(r7 +14)",
        "13: (54) w9 &= 15",
        "14: (64) w9 <<= 2",
        "15: (bc) w5 = w9",
        "16: (0f) r5 += r7",
        "17: (bf) r1 = r5",
        "18: (07) r1 += 18",
        "19: (2d) if r1 > r8 goto pc+5",
        "20: (69) r0 = *(u16 *)(r5 +16)",
        "21: (56) if w0 != 0x5000 goto pc+3",
        "22: (b4) w9 = 262144",
        "23: (b4) w0 = 1",
        "24: (95) exit",
        "25: (b4) w0 = 2",
        "26: (95) exit",
    ]


def test_packet_that_is_too_short_is_rejected_before_any_helper_is_called() -> None:
    code = assemble(TC_IN, [Rule(translate(asks_for_a_byte(), TC_IN), [Drop()])])
    text = ebpf.disassemble(code)
    beyond = text[text.index(": (61) r0 = *(u32 *)(r6 +0)") - 2 :].splitlines()[:3]
    assert [line.partition(": ")[2] for line in beyond] == [
        "(61) r0 = *(u32 *)(r6 +0)",
        "(1f) r8 -= r7",
        "(3d) if r8 >= r0 goto pc-5",
    ]


def asks_for_a_byte() -> tuple[Instruction, ...]:
    return Instruction(cbpf.LD | cbpf.B | cbpf.ABS, k=20), Instruction(cbpf.RET | cbpf.A)
