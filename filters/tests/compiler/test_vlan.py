"""A tag beside the frame is seen as if it were in it: against the kernel's classic BPF on the frame with its tag."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.compiler import cbpf
from filters.compiler.cbpf import Instruction
from filters.compiler.ebpf import R1, R2, R3, Assembler
from filters.compiler.emit import CONTEXT
from filters.compiler.expr import compile_expression
from filters.compiler.hook import TC_IN
from filters.compiler.translate import translate
from filters.programs.program import LoadedProgram, Reject, ReturnLength, Rule, assemble, load
from filters.selftest.frames import frames
from filters.selftest.oracle import on_any_socket, oracle
from filters.selftest.selftest import is_runnable, load_bare
from filters.tests.corpus import EXPRESSIONS
from filters.tests.packets import FRAMES
from filters.tests.strategies import FUZZ, programs

SKB_VLAN_PUSH = 18
TAGGED = [f for f in FRAMES.values() if f[12:14] in (b"\x81\x00", b"\x88\xa8") and len(f) >= 18]
"""Their inner frames are what a program is given; the tag it puts beside them first."""


def load_behind_a_tag(instructions: tuple[Instruction, ...], tag: bytes) -> LoadedProgram:
    """bpf_skb_vlan_push() puts a tag beside the frame, as a network card does; then the filter."""
    asm = Assembler()
    asm.mov(CONTEXT, R1)
    asm.mov(R2, int.from_bytes(tag[:2], "little"))
    asm.mov(R3, int.from_bytes(tag[2:], "big"))
    asm.call(SKB_VLAN_PUSH)
    asm.mov(R1, CONTEXT)
    rule = Rule(translate(instructions, TC_IN), [ReturnLength()])
    return load("filter", TC_IN, (*asm.instructions, *assemble(TC_IN, [rule], Reject())))


def disagreements(instructions: tuple[Instruction, ...], samples: list[bytes]) -> list[str]:
    """Frames with a tag, in which the program that sees it beside them answers otherwise."""
    found = []
    with oracle(instructions) as classic:
        for tag in sorted({frame[12:16] for frame in samples}):
            with load_behind_a_tag(instructions, tag) as program:
                for frame in samples:
                    untagged = frame[:12] + frame[16:]
                    if frame[12:16] == tag and is_runnable(untagged, TC_IN):
                        actual = min(program.test_run(untagged).verdict, len(frame))
                        found += [frame.hex()] if actual != classic.accepted(frame) else []
    return found


def test_filter_that_asks_for_the_out_of_band_tag_sees_it() -> None:
    for question, answer in ((cbpf.VLAN_TAG_PRESENT, 1), (cbpf.VLAN_TAG, 0x2064), (cbpf.VLAN_TPID, 0x88A8)):
        asks = (Instruction(cbpf.LD | cbpf.ABS, k=cbpf.AD_OFF + question), Instruction(cbpf.RET | cbpf.A))
        with load_behind_a_tag(asks, bytes.fromhex("88a82064")) as program:
            assert program.test_run(FRAMES["udp"]).verdict == answer


def test_frame_without_a_tag_is_left_as_it_is() -> None:
    instructions = compile_expression("udp port 53 and len = 82")
    with load_bare(instructions, TC_IN) as program:
        assert program.test_run(FRAMES["udp"]).verdict > 0


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expression_means_the_same_with_an_out_of_band_tag(expression: str) -> None:
    instructions = on_any_socket(compile_expression(expression), TC_IN)
    made = [f[:12] + tag + f[16:] for f in frames(instructions, 12) if len(f) > 32 for tag in (TAGGED[0][12:16],)]
    assert disagreements(instructions, TAGGED + made) == []


@pytest.mark.parametrize(
    "expression",
    [
        "ether[12:4] = 0x81000064",
        "ether[10:4] = 0x00028100",
        "ether[12:2] > 0x8500",
        "ether[12:2] > 0x8000",
        "ether[12:2] > 1500 and not ether[12:2] >= 0x8101",
        "ether[13:2] = 0",
        "ether[13] = 0 and ether[15] = 100",
        "ether[14:4] = 0x00640800",
        "ether[15:2] = 0x6408",
        "ether[16:2] = 0x0800",
        "ether[0:4] = 0x02000000 and len > 50",
        "ether[ether[5] + 3:2] = 0",
        "ether[ether[15]] = 100",
    ],
)
def test_every_byte_around_the_tag_is_where_it_was_on_the_wire(expression: str) -> None:
    assert disagreements(compile_expression(expression), TAGGED) == []


@pytest.mark.parametrize(
    ("offset", "size", "found"),
    [(8, 4, True), (9, 4, False), (11, 2, False), (12, 2, False), (15, 1, False), (16, 2, True)],
)
def test_load_through_x_of_a_byte_of_the_tag_rejects(offset: int, size: int, found: bool) -> None:
    """X is the first byte of the source address, which is 2."""
    instructions = compile_expression(f"ether[ether[6] - 2 + {offset}:{size}] >= 0")
    with load_behind_a_tag(instructions, TAGGED[0][12:16]) as program:
        assert (program.test_run(FRAMES["udp"]).verdict > 0) == found


def without_index(i: Instruction) -> Instruction:
    """Through X a byte of the tag is out of reach, so such loads read at a fixed place here."""
    if i.cls == cbpf.LD and i.mode == cbpf.IND:
        return replace(i, code=i.code & ~cbpf.IND | cbpf.ABS, k=i.k & 0x3F)
    return i


@FUZZ
@given(program=programs(), seed=st.integers(0, 1000))
def test_any_valid_program_means_the_same_with_an_out_of_band_tag(program: tuple[Instruction, ...], seed: int) -> None:
    direct = tuple(without_index(i) for i in program)
    made = [frame[:12] + TAGGED[seed % 2][12:16] + frame[16:] for frame in frames(direct, 8, seed) if len(frame) > 38]
    assert disagreements(direct, made) == [], cbpf.disassemble(direct)
