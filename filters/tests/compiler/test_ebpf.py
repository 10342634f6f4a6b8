"""The assembler: wire form, labels, what is left out; and the text."""

from __future__ import annotations

import pytest

from filters.compiler import ebpf
from filters.compiler.ebpf import R0, R1, R2, R3, R6, R7, R10, Assembler, Instruction, Label
from filters.errors import TooLong


def test_wire_form_is_that_of_struct_bpf_insn() -> None:
    asm = Assembler()
    asm.mov(R0, 2, bits=32)
    asm.load(R7, R6, 80, 4)
    asm.store(R10, -16, R7, 8)
    asm.load_map(R1, 5)
    asm.exit()
    assert ebpf.encode(asm.assemble()).hex(" ", 8) == (
        "b400000002000000 6167500000000000 7b7af0ff00000000 1811000005000000 0000000000000000 9500000000000000"
    )


def test_jumps_lead_to_their_labels_in_both_directions() -> None:
    asm, start, end = Assembler(), Label(), Label()
    asm.place(start)
    asm.jump_if(ebpf.JEQ, R1, R2, end)
    asm.jump(start)
    asm.place(end)
    asm.exit()
    assert [i.off for i in asm.assemble()] == [1, -2, 0]


def test_what_is_never_reached_is_left_out() -> None:
    asm, end = Assembler(), Label()
    asm.jump_if(ebpf.JSET, R1, 4, end, bits=32)
    asm.exit()
    asm.mov(R0, R3)
    asm.load_map(R1, 5)
    asm.place(end)
    asm.exit()
    assert ebpf.disassemble(asm.assemble()) == "0: (46) if w1 & 0x4 goto pc+1\n1: (95) exit\n2: (95) exit"


def test_jump_over_more_than_16_bits_is_too_long() -> None:
    asm, end = Assembler(), Label()
    asm.jump_if(ebpf.JEQ, R1, 0, end)
    for _ in range(0x8000):
        asm.mov(R0, 0)
    asm.place(end)
    asm.exit()
    with pytest.raises(TooLong, match=r"^32770 eBPF instructions: a jump spans more than 32,767 of them"):
        asm.assemble()


def test_word_above_the_signed_range_is_wrapped() -> None:
    asm = Assembler()
    asm.alu(ebpf.AND, R0, 0xFFFFFF00, bits=32)
    assert asm.instructions == [Instruction(ebpf.ALU | ebpf.AND, R0, imm=-256)]


def test_text_is_like_the_verifiers() -> None:
    asm, end = Assembler(), Label()
    asm.mov(R6, R1)
    asm.load(R0, R7, 12, 2)
    asm.from_big_endian(R0, 2)
    asm.alu(ebpf.ADD, R1, -5, bits=32)
    asm.alu(ebpf.SUB, R1, R2)
    asm.negate(R0)
    asm.store_immediate(R10, -4, 7, 4)
    asm.store(R0, 8, R1, 8)
    asm.load_map(R1, 9)
    asm.call(ebpf.SKB_LOAD_BYTES)
    asm.call(12345)
    asm.call_kernel(54321)
    asm.jump_if(ebpf.JGT, R1, R7, end)
    asm.jump_if(ebpf.JNE, R0, 0x800, end, bits=32)
    asm.jump(end)
    asm.place(end)
    asm.exit()
    assert ebpf.disassemble(asm.assemble()).splitlines() == [
        "0: (bf) r6 = r1",
        "1: (69) r0 = *(u16 *)(r7 +12)",
        "2: (dc) r0 = be16 r0",
        "3: (04) w1 += -5",
        "4: (1f) r1 -= r2",
        "5: (84) w0 = -w0",
        "6: (62) *(u32 *)(r10 -4) = 7",
        "7: (7b) *(u64 *)(r0 +8) = r1",
        "8: (18) r1 = map[fd:9]",
        "10: (85) call bpf_skb_load_bytes#26",
        "11: (85) call helper#12345",
        "12: (85) call kernel-function#54321",
        "13: (2d) if r1 > r7 goto pc+2",
        "14: (56) if w0 != 0x800 goto pc+1",
        "15: (05) goto pc+0",
        "16: (95) exit",
    ]
