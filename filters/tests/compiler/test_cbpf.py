"""Classic instructions: the kernel's rules, libpcap's text, the wire form."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.compiler import cbpf
from filters.compiler.cbpf import Instruction
from filters.errors import InvalidFilter
from filters.selftest.oracle import KernelFilter
from filters.tests.libpcap import bpf_image
from filters.tests.strategies import FUZZ, programs

ACCEPT = Instruction(cbpf.RET | cbpf.K, k=1)
LOAD_MEMORY = Instruction(cbpf.LD | cbpf.MEM, k=3)
STORE_MEMORY = Instruction(cbpf.ST, k=3)


def kernel_refuses(instructions: tuple[Instruction, ...]) -> bool:
    try:
        KernelFilter(instructions).close()
    except InvalidFilter:
        return True
    return False


def we_refuse(instructions: tuple[Instruction, ...]) -> bool:
    try:
        cbpf.check(instructions)
    except InvalidFilter:
        return True
    return False


@pytest.mark.parametrize("k", [0, 1, 31, 32, 16, cbpf.AD_OFF, cbpf.AD_OFF + 64, cbpf.WORD])
def test_every_code_is_valid_where_the_kernel_says_so(k: int) -> None:
    candidates = [(Instruction(code, 0, 0, k), ACCEPT) for code in range(0x200)]
    assert [hex(c[0].code) for c in candidates if we_refuse(c) != kernel_refuses(c)] == []


@FUZZ
@given(
    program=programs(),
    place=st.integers(0, 100),
    change=st.builds(
        Instruction,
        st.integers(0, 0xFF),
        st.integers(0, 20),
        st.integers(0, 20),
        st.one_of(st.integers(0, 40), st.integers(0, cbpf.WORD)),
    ),
)
def test_program_with_one_instruction_changed_is_valid_where_the_kernel_says_so(
    program: tuple[Instruction, ...], place: int, change: Instruction
) -> None:
    changed = list(program)
    changed[place % len(changed)] = change
    assert we_refuse(tuple(changed)) == kernel_refuses(tuple(changed)), cbpf.disassemble(changed)


@pytest.mark.parametrize(
    ("instructions", "fault"),
    [
        ((), "0 instructions: the kernel accepts 1 to 4096"),
        ((ACCEPT,) * 4097, "4097 instructions: the kernel accepts 1 to 4096"),
        ((STORE_MEMORY,), "instruction 0: last instruction is not a return"),
        ((LOAD_MEMORY, ACCEPT), "instruction 0: reads M[3] before it is written"),
        ((Instruction(cbpf.ST, k=16), ACCEPT), "instruction 0: M[16] does not exist"),
        ((Instruction(cbpf.ALU | cbpf.DIV), ACCEPT), "instruction 0: division by zero"),
        ((Instruction(cbpf.ALU | cbpf.LSH, k=32), ACCEPT), "instruction 0: shift by 32 bits"),
        ((Instruction(cbpf.JMP | cbpf.JA, k=1), ACCEPT), "instruction 0: jumps beyond the end"),
        ((Instruction(0x42), ACCEPT), "instruction 0: unknown code 0x42"),
        ((Instruction(cbpf.LD | cbpf.ABS, k=cbpf.WORD), ACCEPT), "instruction 0: unknown ancillary offset 4095"),
    ],
)
def test_fault_is_named(instructions: tuple[Instruction, ...], fault: str) -> None:
    with pytest.raises(InvalidFilter) as refusal:
        cbpf.check(instructions)
    assert str(refusal.value) == fault


def test_memory_word_must_be_written_on_every_way_to_where_it_is_read() -> None:
    branch = Instruction(cbpf.JMP | cbpf.JEQ, 0, 1, 5)
    one_way = (branch, STORE_MEMORY, LOAD_MEMORY, ACCEPT)
    assert we_refuse(one_way)
    assert kernel_refuses(one_way)
    cbpf.check((STORE_MEMORY, *one_way))


def test_what_stands_behind_a_return_is_looked_at_as_if_it_were_reached() -> None:
    unreachable = (ACCEPT, LOAD_MEMORY, ACCEPT)
    assert we_refuse(unreachable)
    assert kernel_refuses(unreachable)
    cbpf.check((STORE_MEMORY, *unreachable))
    assert not kernel_refuses((STORE_MEMORY, *unreachable))


def test_text_of_every_code_is_libpcaps() -> None:
    offsets = [0, 20, cbpf.NET_OFF, cbpf.LL_OFF, *range(cbpf.AD_OFF, cbpf.AD_OFF + 68, 4)]
    for i in (Instruction(code, 1, 2, k) for code in range(0x100) for k in offsets):
        assert cbpf.text(i, 3) == bpf_image(i, 3)


@given(program=programs())
def test_wire_form_is_read_back(program: tuple[Instruction, ...]) -> None:
    assert cbpf.decode(cbpf.encode(program)) == program
