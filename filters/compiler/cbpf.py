"""Classic BPF: its instructions, the kernel's rules for them, their text and their meaning.

Enters: instructions, as libpcap or `tcpdump -ddd` gives them. Leaves: the same, checked as the kernel's
bpf_check_classic does (net/core/filter.c), or printed as `tcpdump -d` does.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from filters.errors import InvalidFilter

# <linux/bpf_common.h>: class, then for loads size and mode, for arithmetic and jumps operation and source.
LD, LDX, ST, STX, ALU, JMP, RET, MISC = range(8)
W, H, B = 0x00, 0x08, 0x10
IMM, ABS, IND, MEM, LEN, MSH = 0x00, 0x20, 0x40, 0x60, 0x80, 0xA0
ADD, SUB, MUL, DIV, OR, AND, LSH, RSH, NEG, MOD, XOR = range(0x00, 0xB0, 0x10)
JA, JEQ, JGT, JGE, JSET = range(0x00, 0x50, 0x10)
K, X, A = 0x00, 0x08, 0x10
TAX, TXA = 0x00, 0x80

SIZES = {W: 4, H: 2, B: 1}
OPERATIONS = {ADD: "add", SUB: "sub", MUL: "mul", DIV: "div", OR: "or", AND: "and", LSH: "lsh", RSH: "rsh"}
OPERATIONS |= {NEG: "neg", MOD: "mod", XOR: "xor"}
CONDITIONS = {JEQ: "jeq", JGT: "jgt", JGE: "jge", JSET: "jset"}

# <linux/filter.h>: absolute offsets that do not mean the packet.
AD_OFF, NET_OFF, LL_OFF = 0xFFFFF000, 0xFFF00000, 0xFFE00000
PROTOCOL, PKTTYPE, IFINDEX, NLATTR, NLATTR_NEST, MARK, QUEUE, HATYPE = range(0, 32, 4)
RXHASH, CPU, ALU_XOR_X, VLAN_TAG, VLAN_TAG_PRESENT, PAY_OFFSET, RANDOM, VLAN_TPID = range(32, 64, 4)
# As libpcap prints them.
ANCILLARY = {PROTOCOL: "proto", PKTTYPE: "type", IFINDEX: "ifidx", NLATTR: "nla", NLATTR_NEST: "nlan", MARK: "mark"}
ANCILLARY |= {QUEUE: "queue", HATYPE: "hatype", RXHASH: "rxhash", CPU: "cpu", ALU_XOR_X: "xor_x", VLAN_TAG: "vlan_tci"}
ANCILLARY |= {VLAN_TAG_PRESENT: "vlanp", PAY_OFFSET: "poff", RANDOM: "random", VLAN_TPID: "vlan_tpid"}

INSTRUCTION_SIZE = 8
MAX_INSTRUCTIONS = 4096  # BPF_MAXINSNS
MEMORY_WORDS = 16  # BPF_MEMWORDS
WORD = 0xFFFFFFFF

_LOADS = {mode | size for mode in (ABS, IND) for size in (W, H, B)}
_VALID = (
    {LD | load for load in _LOADS}
    | {LD | IMM, LD | MEM, LD | W | LEN, LDX | IMM, LDX | MEM, LDX | W | LEN, LDX | B | MSH, ST, STX}
    | {ALU | operation | source for operation in OPERATIONS if operation != NEG for source in (K, X)}
    | {ALU | NEG, JMP | JA, RET | K, RET | A, MISC | TAX, MISC | TXA}
    | {JMP | condition | source for condition in CONDITIONS for source in (K, X)}
)


@dataclass(frozen=True, slots=True)
class Instruction:
    """struct sock_filter. `jt` and `jf` count from the next instruction; `k` is an unsigned 32-bit word."""

    code: int
    jt: int = 0
    jf: int = 0
    k: int = 0

    @property
    def cls(self) -> int:
        return self.code & 0x07

    @property
    def size(self) -> int:
        """Bytes that a load reads."""
        return SIZES[self.code & 0x18]

    @property
    def mode(self) -> int:
        return self.code & 0xE0

    @property
    def operation(self) -> int:
        return self.code & 0xF0

    @property
    def uses_x(self) -> bool:
        """Of arithmetic and jumps: whether the operand is X rather than k."""
        return bool(self.code & X)

    @property
    def is_branch(self) -> bool:
        return self.cls == JMP and self.operation != JA

    @property
    def ancillary(self) -> int | None:
        """The SKF_AD_ value that an absolute load asks for, None where it reads the packet."""
        if self.cls != LD or self.mode != ABS or self.k - AD_OFF not in ANCILLARY:
            return None
        return self.k - AD_OFF


def decode(raw: bytes) -> tuple[Instruction, ...]:
    """From the memory of an array of struct sock_filter, in the host's byte order."""
    return tuple(Instruction(*fields) for fields in struct.iter_unpack("=HBBI", raw))


def encode(instructions: Sequence[Instruction]) -> bytes:
    return b"".join(struct.pack("=HBBI", i.code, i.jt, i.jf, i.k) for i in instructions)


# The kernel's rules


def check(instructions: Sequence[Instruction], limit: int = MAX_INSTRUCTIONS) -> None:
    """Raises InvalidFilter where bpf_check_classic returns EINVAL. Jumps wider than the kernel's 8 bits may pass."""
    count = len(instructions)
    if not 0 < count <= limit:
        raise InvalidFilter(f"{count} instructions: the kernel accepts 1 to {limit}")
    for number, instruction in enumerate(instructions):
        fault = _fault(instruction, count - number - 1)
        if fault:
            raise InvalidFilter(f"instruction {number}: {fault}")
    if instructions[-1].cls != RET:
        raise InvalidFilter(f"instruction {count - 1}: last instruction is not a return")
    _check_memory(instructions)


def _fault(i: Instruction, following: int) -> str | None:
    """What is wrong with an instruction that has so many behind it."""
    if i.code not in _VALID:
        return f"unknown code {i.code:#x}"
    if i.cls == ALU and not i.uses_x:
        return _arithmetic_fault(i)
    if i.cls in (ST, STX) or (i.cls in (LD, LDX) and i.mode == MEM):
        return None if i.k < MEMORY_WORDS else f"M[{i.k}] does not exist"
    if i.cls == JMP:
        furthest = max(i.jt, i.jf) if i.is_branch else i.k
        return None if furthest < following else "jumps beyond the end"
    if i.cls == LD and i.mode == ABS and i.k >= AD_OFF and i.ancillary is None:
        return f"unknown ancillary offset {i.k - AD_OFF}"
    return None


def _arithmetic_fault(i: Instruction) -> str | None:
    if i.operation in (DIV, MOD) and i.k == 0:
        return "division by zero"
    if i.operation in (LSH, RSH) and i.k >= 32:
        return f"shift by {i.k} bits"
    return None


def _check_memory(instructions: Sequence[Instruction]) -> None:
    """Every M[] word is written on each path that reads it; for the kernel one goes on behind a return
    (check_load_and_stores)."""
    everything = (1 << MEMORY_WORDS) - 1
    written = [everything] * len(instructions)
    now = 0
    for number, i in enumerate(instructions):
        now &= written[number]
        if i.cls in (ST, STX):
            now |= 1 << i.k
        elif i.cls in (LD, LDX) and i.mode == MEM and not now >> i.k & 1:
            raise InvalidFilter(f"instruction {number}: reads M[{i.k}] before it is written")
        elif i.cls == JMP:
            for target in targets(i, number):
                written[target] &= now
            now = everything


def targets(i: Instruction, number: int) -> tuple[int, ...]:
    """Where a jump may lead; libpcap writes jumps back as negative words."""
    if i.cls == RET:
        return ()
    if i.is_branch:
        return number + 1 + i.jt, number + 1 + i.jf
    if i.cls == JMP:
        return (number + 1 + _signed(i.k),)
    return (number + 1,)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


# The text of tcpdump -d, -dd and -ddd


def disassemble(instructions: Sequence[Instruction]) -> str:
    """As `tcpdump -d`: one instruction a line, jump targets absolute."""
    return "\n".join(text(i, number) for number, i in enumerate(instructions))


def c_array(instructions: Sequence[Instruction]) -> str:
    """As `tcpdump -dd`: initialisers of an array in C."""
    return "\n".join(f"{{ {i.code:#x}, {i.jt}, {i.jf}, 0x{i.k:08x} }}," for i in instructions)


def decimal(instructions: Sequence[Instruction]) -> str:
    """As `tcpdump -ddd`: the count, then code, jt, jf, k."""
    lines = [f"{i.code} {i.jt} {i.jf} {i.k}" for i in instructions]
    return "\n".join([str(len(lines)), *lines])


def text(i: Instruction, number: int) -> str:
    name, operand = _words(i, number)
    line = f"({number:03d}) {name:<8} {operand}"
    if not i.is_branch:
        return line
    return f"({number:03d}) {name:<8} {operand:<16} jt {number + 1 + i.jt}\tjf {number + 1 + i.jf}"


def _words(i: Instruction, number: int) -> tuple[str, str]:
    if i.code not in _VALID or i.code == LDX | W | LEN:  # which tcpdump does not know either
        return "unimp", f"{i.code:#x}"
    if i.cls in (LD, LDX):
        suffix = {H: "h", B: "b"}.get(i.code & 0x18, "")
        return ("ld" if i.cls == LD else "ldx") + suffix, _load_operand(i)
    if i.cls in (ST, STX):
        return "st" if i.cls == ST else "stx", f"M[{_signed(i.k)}]"
    if i.cls == ALU:
        return OPERATIONS[i.operation], _arithmetic_operand(i)
    if i.cls == RET:
        return "ret", "" if i.code & A else f"#{_signed(i.k)}"
    if i.cls == MISC:
        return "txa" if i.code & TXA else "tax", ""
    if i.operation == JA:
        return "ja", str(_signed((number + 1 + i.k) & WORD))
    return CONDITIONS[i.operation], "x" if i.uses_x else f"#{i.k:#x}"


def _load_operand(i: Instruction) -> str:
    k = _signed(i.k)
    if i.ancillary is not None:
        return f"[{ANCILLARY[i.ancillary]}]"
    return {
        IMM: f"#{i.k:#x}",
        ABS: f"[{k}]",
        IND: f"[x + {k}]",
        MEM: f"M[{k}]",
        LEN: "#pktlen",
        MSH: f"4*([{k}]&0xf)",
    }[i.mode]


def _arithmetic_operand(i: Instruction) -> str:
    if i.operation == NEG:
        return ""
    if i.uses_x:
        return "x"
    return f"#{i.k:#x}" if i.operation in (AND, OR, XOR) else f"#{_signed(i.k)}"
