"""Translated programs, run in the kernel, answer as classic BPF does: for expressions, and for raw instructions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.compiler import cbpf
from filters.compiler.cbpf import Instruction
from filters.compiler.ebpf import R1, Assembler, Label
from filters.compiler.emit import CONTEXT, Exits, HelperEmitter
from filters.compiler.expr import compile_expression
from filters.compiler.hook import HOOKS, TC_IN, XDP, XDP_FRAGS, Hook
from filters.compiler.translate import translate
from filters.errors import ExpressionError
from filters.programs.program import LoadedProgram, Reject, ReturnLength, load
from filters.selftest.frames import frames
from filters.selftest.oracle import KernelFilter, on_any_socket, oracle
from filters.selftest.selftest import accepted, is_runnable, load_bare, selftest
from filters.tests.corpus import EXPRESSIONS
from filters.tests.libpcap import bpf_filter
from filters.tests.packets import FRAMES
from filters.tests.strategies import FUZZ, programs

SHIFT_BY_X = "ip[2:2] << ip[8] > 5"


@pytest.mark.parametrize("hook", HOOKS.values(), ids=str)
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expression_answers_as_classic_bpf_for_every_packet(expression: str, hook: Hook) -> None:
    instructions = answerable(compile_expression(expression), hook)
    extra = [frame for frame in FRAMES.values() if is_runnable(frame, hook)]
    assert selftest(instructions, hook, extra, count=24) == []


def answerable(instructions: tuple[Instruction, ...], hook: Hook) -> tuple[Instruction, ...]:
    """What cannot be answered at a hook has a test of its own."""
    known = all(i.ancillary is None or i.ancillary in hook.ancillary for i in instructions)
    return instructions if known else on_any_socket(instructions, hook)


@pytest.mark.parametrize("expression", [e for e in EXPRESSIONS if "protochain" not in e and e != SHIFT_BY_X])
def test_libpcap_accepts_the_same_of_every_packet(expression: str) -> None:
    instructions = on_any_socket(compile_expression(expression), XDP)
    with KernelFilter(instructions) as kernel:
        assert {name: min(bpf_filter(instructions, frame), len(frame)) for name, frame in FRAMES.items()} == {
            name: kernel.accepted(frame) for name, frame in FRAMES.items()
        }


def test_shift_by_more_than_31_bits_is_what_the_kernel_makes_of_it_and_not_libpcap() -> None:
    instructions = compile_expression(SHIFT_BY_X)
    frame = FRAMES["tcp syn"]
    shift = frame[14 + 8]
    with KernelFilter(instructions) as kernel, load_bare(instructions, XDP) as program:
        assert shift >= 32
        assert bpf_filter(instructions, frame) == 0
        assert kernel.accepted(frame) == accepted(program, frame) == len(frame)


@pytest.mark.parametrize("expression", [e for e in EXPRESSIONS if "protochain" in e])
def test_libpcap_follows_the_same_headers_as_the_unrolled_loop(expression: str) -> None:
    instructions = compile_expression(expression)
    with oracle(instructions) as interpreted:
        assert {name: min(bpf_filter(instructions, frame), len(frame)) for name, frame in FRAMES.items()} == {
            name: interpreted.accepted(frame) for name, frame in FRAMES.items()
        }


# Expressions put together at random

PRIMITIVES = st.sampled_from([e for e in EXPRESSIONS if not e.startswith(("vlan", "mpls", "pppoes", "geneve", "llc"))])
FRAME_SAMPLES = st.lists(st.sampled_from(list(FRAMES.values())), min_size=1, max_size=8)


def joined(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.builds("({}) {} ({})".format, parts, st.sampled_from(["and", "or", "and not", "or not"]), parts)


@FUZZ
@given(
    expression=st.recursive(PRIMITIVES.filter(lambda e: "protochain" not in e), joined, max_leaves=6),
    hook=st.sampled_from([XDP, XDP_FRAGS, TC_IN]),
    samples=FRAME_SAMPLES,
    cut=st.integers(0, 80),
)
def test_expressions_put_together_answer_as_classic_bpf(
    expression: str, hook: Hook, samples: list[bytes], cut: int
) -> None:
    try:
        instructions = on_any_socket(compile_expression(expression), hook)
    except ExpressionError:  # contradictions, such as `arp and not arp`
        return
    shorter = [frame[: max(14, len(frame) - cut)] for frame in samples]
    runnable = [frame for frame in (*samples, *shorter) if is_runnable(frame, hook)]
    assert selftest(instructions, hook, runnable, count=8) == []


# Instructions put together at random


@FUZZ
@given(program=programs(), hook=st.sampled_from([XDP, XDP_FRAGS, TC_IN]), seed=st.integers(0, 1000))
def test_any_valid_program_answers_as_the_kernel(program: tuple[Instruction, ...], hook: Hook, seed: int) -> None:
    cbpf.check(program)
    samples = [frame for frame in frames(program, 12, seed) if is_runnable(frame, hook)]
    assert selftest(program, hook, samples, count=0) == [], cbpf.disassemble(program)


# Packets that are not linear


def load_with_helpers(instructions: tuple[Instruction, ...], hook: Hook) -> LoadedProgram:
    """Only the part that reads by bpf_xdp_load_bytes or bpf_skb_load_bytes, for linear frames too."""
    assert hook.load_bytes is not None
    asm, exits = Assembler(), Exits(Label(), Label(), Label())
    asm.mov(CONTEXT, R1)
    HelperEmitter(translate(instructions, hook).graph, hook, hook.load_bytes, asm, exits).emit()
    asm.place(exits.accept)
    ReturnLength().emit(asm, hook)
    asm.place(exits.reject)
    Reject().emit(asm, hook)
    return load("filter", hook, asm.assemble())


@pytest.mark.parametrize("hook", [XDP_FRAGS, TC_IN], ids=str)
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_part_for_packets_that_are_not_linear_answers_alike(expression: str, hook: Hook) -> None:
    instructions = on_any_socket(compile_expression(expression), hook)
    samples = [f for f in (*FRAMES.values(), *frames(instructions, 24)) if is_runnable(f, hook)]
    with load_with_helpers(instructions, hook) as program, oracle(instructions) as classic:
        assert [accepted(program, f) for f in samples] == [classic.accepted(f) for f in samples]


@FUZZ
@given(program=programs(), hook=st.sampled_from([XDP_FRAGS, TC_IN]), seed=st.integers(0, 1000))
def test_part_for_packets_that_are_not_linear_answers_as_the_kernel(
    program: tuple[Instruction, ...], hook: Hook, seed: int
) -> None:
    samples = [frame for frame in frames(program, 12, seed) if is_runnable(frame, hook)]
    with load_with_helpers(program, hook) as translated, KernelFilter(program) as classic:
        assert [accepted(translated, f) for f in samples] == [classic.accepted(f) for f in samples]


LONG_FRAME = FRAMES["large udp"][:42] + bytes(n * 7 & 0xFF for n in range(9000))


@pytest.mark.parametrize(
    "expression",
    [
        "ether[4000] = 210",
        "ether[4000] = 211",
        "udp[5000:4] != 0 and len = 9042",
        "udp port 53 and ether[9041] = 0x11",
        "udp port 53 and ether[9041] != 0x11",
        "ether[9042] = 0",
        "ether[3519:4] != 0",
        "ether[len - 100] != 0",
    ],
)
def test_bytes_in_the_fragments_of_a_frame_are_found(expression: str) -> None:
    instructions = compile_expression(expression)
    with load_bare(instructions, XDP_FRAGS) as program, KernelFilter(instructions) as classic:
        assert accepted(program, LONG_FRAME) == classic.accepted(LONG_FRAME)
