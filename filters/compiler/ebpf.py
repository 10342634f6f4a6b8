"""eBPF: instructions, an assembler with labels, the wire form, and text like the verifier's log.

Enters: calls of the functions below, one an instruction. Leaves: what BPF_PROG_LOAD takes (RFC 9669; kernel:
Documentation/bpf/standardization/instruction-set.rst), or a listing.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

from filters.errors import TooLong

LD, LDX, ST, STX, ALU, JMP, JMP32, ALU64 = range(8)
W, H, B, DW = 0x00, 0x08, 0x10, 0x18
IMM, MEM, ATOMIC = 0x00, 0x60, 0xC0
ADD, SUB, MUL, DIV, OR, AND, LSH, RSH, NEG, MOD, XOR, MOV = range(0x00, 0xC0, 0x10)
END = 0xD0
JA, JEQ, JGT, JGE, JSET, JNE, CALL, EXIT, JLT, JLE = 0x00, 0x10, 0x20, 0x30, 0x40, 0x50, 0x80, 0x90, 0xA0, 0xB0
REGISTER, TO_BIG_ENDIAN = 0x08, 0x08
FETCH = 0x01  # of an atomic operation: the register gets the old value
COMPARE_EXCHANGE = 0xF0 | FETCH

# Helpers, by the numbers of <linux/bpf.h>.
MAP_LOOKUP_ELEM, KTIME_GET_NS, GET_PRANDOM_U32, GET_SMP_PROCESSOR_ID, SKB_LOAD_BYTES = 1, 5, 7, 8, 26
TAIL_CALL, PROBE_READ_KERNEL = 12, 113
KTIME_GET_BOOT_NS, KTIME_GET_COARSE_NS = 125, 160
XDP_GET_BUFF_LEN, XDP_LOAD_BYTES = 188, 189
HELPERS = {
    MAP_LOOKUP_ELEM: "bpf_map_lookup_elem",
    KTIME_GET_NS: "bpf_ktime_get_ns",
    GET_PRANDOM_U32: "bpf_get_prandom_u32",
    GET_SMP_PROCESSOR_ID: "bpf_get_smp_processor_id",
    TAIL_CALL: "bpf_tail_call",
    SKB_LOAD_BYTES: "bpf_skb_load_bytes",
    KTIME_GET_BOOT_NS: "bpf_ktime_get_boot_ns",
    KTIME_GET_COARSE_NS: "bpf_ktime_get_coarse_ns",
    PROBE_READ_KERNEL: "bpf_probe_read_kernel",
    XDP_GET_BUFF_LEN: "bpf_xdp_get_buff_len",
    XDP_LOAD_BYTES: "bpf_xdp_load_bytes",
}

PSEUDO_KERNEL_FUNCTION = 2  # the source register of a call whose immediate is an id in the kernel's BTF
PSEUDO_MAP_FD = 1  # the source register of a 64-bit immediate that is a map's file descriptor

_SIZE_CODES = {1: B, 2: H, 4: W, 8: DW}
_SIZE_NAMES = {B: "u8", H: "u16", W: "u32", DW: "u64"}
_OPERATORS = {ADD: "+=", SUB: "-=", MUL: "*=", DIV: "/=", OR: "|=", AND: "&=", LSH: "<<=", RSH: ">>=", MOD: "%="}
_OPERATORS |= {XOR: "^=", MOV: "="}
_COMPARISONS = {JEQ: "==", JNE: "!=", JGT: ">", JGE: ">=", JLT: "<", JLE: "<=", JSET: "&"}


class Reg(IntEnum):
    """r0: result; r1 to r5: arguments, lost in calls; r6 to r9: kept; r10: the frame, 512 bytes below it."""

    R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10 = range(11)


R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10 = Reg


@dataclass(frozen=True, slots=True)
class Instruction:
    """One 8-byte slot of struct bpf_insn; `imm` is signed 32 bits, a jump's `off` counts from the next slot."""

    code: int
    dst: int = 0
    src: int = 0
    off: int = 0
    imm: int = 0

    @property
    def cls(self) -> int:
        return self.code & 0x07

    @property
    def operation(self) -> int:
        return self.code & 0xF0

    @property
    def is_wide(self) -> bool:
        """Whether this is the first slot of a 64-bit immediate."""
        return self.code == LD | DW | IMM


def encode(instructions: Sequence[Instruction]) -> bytes:
    return b"".join(struct.pack("=BBhi", i.code, i.dst | i.src << 4, i.off, i.imm) for i in instructions)


class Label:
    """A place in a program, known once Assembler.place() has been called with it."""


@dataclass
class Assembler:
    """Instructions in order; jumps name labels, which assemble() turns into offsets.

    An operand is a Reg or an int; an int is taken as a 32-bit word, signed or not.
    """

    instructions: list[Instruction] = field(default_factory=list)
    _places: dict[Label, int] = field(default_factory=dict)
    _jumps: dict[int, Label] = field(default_factory=dict)

    def emit(self, instruction: Instruction) -> None:
        self.instructions.append(instruction)

    def place(self, label: Label) -> None:
        self._places[label] = len(self.instructions)

    def alu(self, operation: int, dst: Reg, operand: Reg | int, *, bits: int = 64) -> None:
        code = (ALU64 if bits == 64 else ALU) | operation
        if isinstance(operand, Reg):
            self.emit(Instruction(code | REGISTER, dst, operand))
        else:
            self.emit(Instruction(code, dst, imm=_signed(operand)))

    def mov(self, dst: Reg, operand: Reg | int, *, bits: int = 64) -> None:
        """With 32 bits the upper half becomes zero."""
        self.alu(MOV, dst, operand, bits=bits)

    def negate(self, dst: Reg) -> None:
        self.emit(Instruction(ALU | NEG, dst))

    def from_big_endian(self, dst: Reg, size: int) -> None:
        """To the host's byte order, of a value of so many bytes."""
        self.emit(Instruction(ALU | END | TO_BIG_ENDIAN, dst, imm=size * 8))

    def load(self, dst: Reg, base: Reg, offset: int, size: int) -> None:
        self.emit(Instruction(LDX | MEM | _SIZE_CODES[size], dst, base, offset))

    def store(self, base: Reg, offset: int, src: Reg, size: int) -> None:
        self.emit(Instruction(STX | MEM | _SIZE_CODES[size], base, src, offset))

    def store_immediate(self, base: Reg, offset: int, value: int, size: int) -> None:
        self.emit(Instruction(ST | MEM | _SIZE_CODES[size], base, 0, offset, _signed(value)))

    def fetch_add(self, base: Reg, offset: int, src: Reg) -> None:
        """Adds src to a 64-bit word, which src gets as it was before, in one atomic step."""
        self.emit(Instruction(STX | ATOMIC | DW, base, src, offset, ADD | FETCH))

    def compare_exchange(self, base: Reg, offset: int, src: Reg) -> None:
        """Where a 64-bit word is r0, it becomes src, in one atomic step; r0 gets it as it was before."""
        self.emit(Instruction(STX | ATOMIC | DW, base, src, offset, COMPARE_EXCHANGE))

    def load_word(self, dst: Reg, value: int) -> None:
        """An unsigned 64-bit value, two slots."""
        self.emit(Instruction(LD | DW | IMM, dst, imm=_signed(value & 0xFFFFFFFF)))
        self.emit(Instruction(0, imm=_signed(value >> 32)))

    def load_map(self, dst: Reg, fd: int) -> None:
        """The address of a map, two slots."""
        self.emit(Instruction(LD | DW | IMM, dst, PSEUDO_MAP_FD, imm=fd))
        self.emit(Instruction(0))

    def call(self, helper: int) -> None:
        self.emit(Instruction(JMP | CALL, imm=helper))

    def call_kernel(self, function: int) -> None:
        """A function of the kernel that is no helper, by its id in the kernel's BTF."""
        self.emit(Instruction(JMP | CALL, src=PSEUDO_KERNEL_FUNCTION, imm=function))

    def exit(self) -> None:
        self.emit(Instruction(JMP | EXIT))

    def jump(self, label: Label) -> None:
        self._jumps[len(self.instructions)] = label
        self.emit(Instruction(JMP | JA))

    def jump_if(self, comparison: int, dst: Reg, operand: Reg | int, label: Label, *, bits: int = 64) -> None:
        code = (JMP if bits == 64 else JMP32) | comparison
        self._jumps[len(self.instructions)] = label
        if isinstance(operand, Reg):
            self.emit(Instruction(code | REGISTER, dst, operand))
        else:
            self.emit(Instruction(code, dst, imm=_signed(operand)))

    def assemble(self) -> tuple[Instruction, ...]:
        """The program, jumps resolved, without what is never reached: the verifier refuses that.

        Raises TooLong where a jump leads further than its 16 bits.
        """
        kept = sorted(self._reached())
        positions = {number: position for position, number in enumerate(kept)}
        return tuple(self._resolved(number, positions) for number in kept)

    def _reached(self) -> set[int]:
        reached: set[int] = set()
        waiting = [0]
        while waiting:
            number = waiting.pop()
            while number not in reached:
                reached.add(number)
                i = self.instructions[number]
                if number in self._jumps:
                    waiting.append(self._places[self._jumps[number]])
                if i.code in (JMP | EXIT, JMP | JA):
                    break
                number += 1
        return reached

    def _resolved(self, number: int, positions: dict[int, int]) -> Instruction:
        if number not in self._jumps:
            return self.instructions[number]
        distance = positions[self._places[self._jumps[number]]] - positions[number] - 1
        if not -0x8000 <= distance <= 0x7FFF:
            raise TooLong(
                f"{len(positions)} eBPF instructions: a jump spans more than 32,767 of them: split the filter"
            )
        return replace(self.instructions[number], off=distance)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 == 1 else word


# Text


def disassemble(instructions: Sequence[Instruction]) -> str:
    """One instruction a line, as the verifier's log has them."""
    lines, wide = [], False
    for number, i in enumerate(instructions):
        if not wide:
            lines.append(f"{number}: ({i.code:02x}) {_text(i, instructions, number)}")
        wide = i.is_wide and not wide
    return "\n".join(lines)


def _text(i: Instruction, instructions: Sequence[Instruction], number: int) -> str:
    if i.is_wide:
        high = instructions[number + 1].imm
        value = f"map[fd:{i.imm}]" if i.src == PSEUDO_MAP_FD else hex((high & 0xFFFFFFFF) << 32 | i.imm & 0xFFFFFFFF)
        return f"r{i.dst} = {value}"
    if i.code == STX | ATOMIC | DW and i.imm == COMPARE_EXCHANGE:
        return f"r0 = atomic64_cmpxchg((u64 *)(r{i.dst} {i.off:+d}), r0, r{i.src})"
    if i.code == STX | ATOMIC | DW:
        return f"r{i.src} = atomic64_fetch_add((u64 *)(r{i.dst} {i.off:+d}), r{i.src})"
    if i.cls == LDX:
        return f"r{i.dst} = {_memory(i, i.src)}"
    if i.cls in (ST, STX):
        return f"{_memory(i, i.dst)} = {i.imm if i.cls == ST else f'r{i.src}'}"
    if i.cls in (ALU, ALU64):
        return _arithmetic_text(i)
    return _jump_text(i)


def _memory(i: Instruction, base: int) -> str:
    return f"*({_SIZE_NAMES[i.code & 0x18]} *)(r{base} {i.off:+d})"


def _arithmetic_text(i: Instruction) -> str:
    letter = "w" if i.cls == ALU else "r"
    dst = f"{letter}{i.dst}"
    if i.operation == END:
        return f"r{i.dst} = be{i.imm} r{i.dst}"
    if i.operation == NEG:
        return f"{dst} = -{dst}"
    return f"{dst} {_OPERATORS[i.operation]} {f'{letter}{i.src}' if i.code & REGISTER else i.imm}"


def _jump_text(i: Instruction) -> str:
    if i.operation == CALL and i.src == PSEUDO_KERNEL_FUNCTION:
        return f"call kernel-function#{i.imm}"
    if i.operation == CALL:
        return f"call {HELPERS.get(i.imm, 'helper')}#{i.imm}"
    if i.operation == EXIT:
        return "exit"
    if i.operation == JA:
        return f"goto pc{i.off:+d}"
    letter = "w" if i.cls == JMP32 else "r"
    operand = f"{letter}{i.src}" if i.code & REGISTER else f"{i.imm:#x}"
    return f"if {letter}{i.dst} {_COMPARISONS[i.operation]} {operand} goto pc{i.off:+d}"
