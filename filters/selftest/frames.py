"""Frames that lead a filter down its branches.

Enters: classic instructions. Leaves: frames. A filter is run by a plain interpreter that knows which bytes of the frame
a compared value came from; each frame is followed by those in which one comparison would go the other way, and those
that end at a byte that was read.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from filters.compiler import cbpf
from filters.compiler.cbpf import Instruction
from filters.compiler.graph import BEYOND, LOOP_ROUNDS

SHORTEST, LONGEST = 14, 2048  # an Ethernet header, which BPF_PROG_TEST_RUN wants, and what it takes in any kernel
_TYPICAL = 96
_DESTINATION_OPTIONS = 60
_MOST_ROUNDS = BEYOND // 8  # a frame has no more extension headers: a loop that makes more does not end


@dataclass(frozen=True, slots=True)
class Origin:
    """`size` bytes at `offset`, big-endian, then arithmetic with constants; size 0 is the length of the frame."""

    offset: int
    size: int
    steps: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Value:
    number: int
    origin: Origin | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """One that a frame went through: a value, against a constant or X; `place` and `taken` say which way it went."""

    place: int
    condition: int
    value: Value
    operand: int
    taken: bool


@dataclass
class Trace:
    """What a run did. `reads`: where the bytes ended that it read; `missing`: where those that it did not find end;
    `rounds`: of the loop that made most of them."""

    comparisons: list[Comparison] = field(default_factory=list)
    reads: set[int] = field(default_factory=set)
    missing: int = 0
    accepted: int = 0
    rounds: int = 0

    @property
    def ends(self) -> bool:
        return self.rounds < _MOST_ROUNDS


def frames(instructions: Sequence[Instruction], count: int, seed: int = 0) -> list[bytes]:
    """At most `count` different ones, of 14 to 2,048 bytes; the same for the same seed."""
    source = random.Random(seed)
    waiting = deque([bytes(_TYPICAL), source.randbytes(_TYPICAL)])
    found: dict[bytes, None] = {}
    covered: set[tuple[int, bool]] = set()
    while waiting and len(found) < count:
        frame = waiting.popleft()
        if frame in found:
            continue
        found[frame] = None
        trace = run(instructions, frame)
        covered |= {(c.place, c.taken) for c in trace.comparisons}
        for comparison in reversed(trace.comparisons):
            is_new = (comparison.place, not comparison.taken) not in covered
            for other in _led_otherwise(frame, comparison):
                (waiting.appendleft if is_new else waiting.append)(other)
        if trace.missing:
            waiting.append(_resized(frame, trace.missing, source))
        waiting.extend(_resized(frame, end - short, source) for end in sorted(trace.reads) for short in (1, 0))
    return list(found)


def chains(instructions: Sequence[Instruction]) -> Iterator[bytes]:
    """IPv6 packets with up to as many extension headers as a translated loop follows, in front of each protocol that
    the filter compares with."""
    protocols = sorted({i.k for i in instructions if i.operation == cbpf.JEQ and i.is_branch and i.k <= 0xFF})
    for protocol in protocols:
        for count in (1, 2, 8, LOOP_ROUNDS - 2, LOOP_ROUNDS - 1):
            yield chain(count, protocol)


def chain(count: int, protocol: int) -> bytes:
    """An IPv6 packet with so many empty destination options headers (RFC 8200, section 4.6) in front of a protocol."""
    following = [_DESTINATION_OPTIONS] * count + [protocol]
    options = b"".join(bytes((next_header, 0, 1, 4, 0, 0, 0, 0)) for next_header in following[1:])
    ethernet = bytes(12) + b"\x86\xdd"
    payload = options + bytes(_TYPICAL)
    ip6 = bytes((0x60, 0, 0, 0)) + len(payload).to_bytes(2, "big") + bytes((following[0], 64)) + bytes(32)
    return ethernet + ip6 + payload


def _resized(frame: bytes, size: int, source: random.Random) -> bytes:
    size = min(max(size, SHORTEST), LONGEST)
    return frame[:size] + source.randbytes(size - len(frame[:size]))


def _led_otherwise(frame: bytes, comparison: Comparison) -> Iterator[bytes]:
    """Frames for which it goes the other way."""
    if comparison.value.origin is None:
        return
    for wanted in _otherwise(comparison):
        changed = _with_value(frame, comparison.value.origin, wanted)
        if changed is not None and SHORTEST <= len(changed) <= LONGEST:
            yield changed


def _otherwise(c: Comparison) -> tuple[int, ...]:
    match c.condition, c.taken:
        case cbpf.JEQ, True:
            return c.operand + 1 & cbpf.WORD, c.operand ^ 0x80
        case cbpf.JEQ, False:
            return (c.operand,)
        case (cbpf.JGT, True) | (cbpf.JGE, False):
            return (c.operand,)
        case cbpf.JGT, False:
            return (c.operand + 1 & cbpf.WORD,)
        case cbpf.JGE, True:
            return (c.operand - 1 & cbpf.WORD,)
        case cbpf.JSET, True:
            return (c.value.number & ~c.operand,)
    return c.value.number | c.operand & -c.operand, c.value.number | c.operand


def _with_value(frame: bytes, origin: Origin, wanted: int) -> bytes | None:
    """The frame in which the bytes of origin lead to that value; None if impossible."""
    raw = int.from_bytes(frame[origin.offset : origin.offset + origin.size], "big") if origin.size else len(frame)
    before = [raw]
    for operation, operand in origin.steps:
        before.append(compute(operation, before[-1], operand))
    for (operation, operand), old in zip(reversed(origin.steps), reversed(before[:-1]), strict=True):
        wanted = _undone(operation, operand, wanted, old)
    if origin.size == 0:
        return frame[:wanted].ljust(wanted, b"\0") if wanted <= LONGEST else None
    if wanted >> 8 * origin.size:
        return None
    return frame[: origin.offset] + wanted.to_bytes(origin.size, "big") + frame[origin.offset + origin.size :]


def _undone(operation: int, operand: int, wanted: int, old: int) -> int:
    """An input that leads to `wanted`, if there is one, and is else like the old one."""
    match operation:
        case cbpf.AND:
            return old & ~operand | wanted
        case cbpf.ADD:
            return wanted - operand & cbpf.WORD
        case cbpf.SUB:
            return wanted + operand & cbpf.WORD
        case cbpf.MUL:
            return wanted // operand if operand else wanted
        case cbpf.DIV:
            return wanted * operand & cbpf.WORD
        case cbpf.LSH:
            return wanted >> operand
        case cbpf.RSH:
            return wanted << operand & cbpf.WORD | old & (1 << operand) - 1
        case cbpf.XOR:
            return wanted ^ operand
    return wanted


# The interpreter


class _Rejected(Exception):
    pass


def run(instructions: Sequence[Instruction], frame: bytes) -> Trace:
    """Checked instructions; loads from outside of the frame, of headers and of fields reject, as do endless loops."""
    trace = Trace()
    with suppress(_Rejected):
        trace.accepted = _Run(instructions, frame, trace).result()
    return trace


class _Run:
    def __init__(self, instructions: Sequence[Instruction], frame: bytes, trace: Trace) -> None:
        self.instructions, self.frame, self.trace = instructions, frame, trace
        self.a, self.x = Value(0), Value(0)
        self.memory = [Value(0)] * cbpf.MEMORY_WORDS
        self.rounds = Counter[int]()

    def result(self) -> int:
        number = 0
        while True:
            i = self.instructions[number]
            if i.cls == cbpf.RET:
                return self.a.number if i.code & cbpf.A else i.k
            if i.cls == cbpf.JMP:
                number = self.jump(i, number)
                continue
            self.step(i)
            number += 1

    def jump(self, i: Instruction, number: int) -> int:
        if not i.is_branch:
            target = cbpf.targets(i, number)[0]
            if target <= number:
                self.go_round(target)
            return target
        operand = self.x.number if i.uses_x else i.k
        taken = compare(i.operation, self.a.number, operand)
        self.trace.comparisons.append(Comparison(number, i.operation, self.a, operand, taken))
        return cbpf.targets(i, number)[0 if taken else 1]

    def go_round(self, loop: int) -> None:
        self.rounds[loop] += 1
        self.trace.rounds = max(self.trace.rounds, self.rounds[loop])
        if not self.trace.ends:
            raise _Rejected

    def step(self, i: Instruction) -> None:
        match i.cls:
            case cbpf.LD:
                self.a = self.loaded(i)
            case cbpf.LDX:
                self.x = self.loaded(i)
            case cbpf.ST:
                self.memory[i.k] = self.a
            case cbpf.STX:
                self.memory[i.k] = self.x
            case cbpf.ALU:
                self.a = self.calculated(self.a, i.operation, self.x.number if i.uses_x else i.k)
            case cbpf.MISC if i.code & cbpf.TXA:
                self.a = self.x
            case cbpf.MISC:
                self.x = self.a

    def loaded(self, i: Instruction) -> Value:
        match i.mode:
            case cbpf.IMM:
                return Value(i.k)
            case cbpf.MEM:
                return self.memory[i.k]
            case cbpf.LEN:
                return Value(len(self.frame), Origin(0, 0))
            case cbpf.IND:
                return self.read(self.x.number + i.k & cbpf.WORD, i.size)
            case cbpf.MSH:
                return self.calculated(self.calculated(self.read(i.k, 1), cbpf.AND, 0xF), cbpf.LSH, 2)
        if i.ancillary == cbpf.ALU_XOR_X:
            return self.calculated(self.a, cbpf.XOR, self.x.number)
        return self.read(i.k, i.size)

    def read(self, offset: int, size: int) -> Value:
        if offset + size > len(self.frame):
            self.trace.missing = offset + size
            raise _Rejected
        self.trace.reads.add(offset + size)
        return Value(int.from_bytes(self.frame[offset : offset + size], "big"), Origin(offset, size))

    @staticmethod
    def calculated(value: Value, operation: int, operand: int) -> Value:
        if operation in (cbpf.DIV, cbpf.MOD) and operand == 0:
            raise _Rejected
        origin = value.origin and replace(value.origin, steps=(*value.origin.steps, (operation, operand)))
        return Value(compute(operation, value.number, operand), origin)


def compare(condition: int, a: int, operand: int) -> bool:
    match condition:
        case cbpf.JEQ:
            return a == operand
        case cbpf.JGT:
            return a > operand
        case cbpf.JGE:
            return a >= operand
    return bool(a & operand)


def compute(operation: int, a: int, b: int) -> int:
    """In 32 bits; shifts use the low five bits of b, as in the kernel."""
    match operation:
        case cbpf.ADD:
            result = a + b
        case cbpf.SUB:
            result = a - b
        case cbpf.MUL:
            result = a * b
        case cbpf.DIV:
            result = a // b
        case cbpf.MOD:
            result = a % b
        case cbpf.AND:
            result = a & b
        case cbpf.OR:
            result = a | b
        case cbpf.XOR:
            result = a ^ b
        case cbpf.LSH:
            result = a << (b & 31)
        case cbpf.RSH:
            result = a >> (b & 31)
        case cbpf.NEG:
            result = -a
    return result & cbpf.WORD
