"""The control-flow graph that the passes of translate.py work on.

Enters: checked classic instructions. Leaves: blocks of operations, named for what they do, each block with one
terminator; jumps lead forward only. Registers of classic BPF are variables: "A", "X", and "M0" to "M15".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from filters.compiler import cbpf
from filters.compiler.cbpf import Instruction
from filters.errors import InvalidFilter

A, X = "A", "X"
Variable = str

BEYOND = 0x10000  # no load reaches so far: offsets of xdp and of the verifier's packet pointers have 16 bits
LOOP_ROUNDS = 41  # of a loop, so that `protochain` follows 40 extension headers


# Operations


@dataclass(frozen=True, slots=True)
class LoadPacket:
    """A = the bytes at `offset`, big-endian. Indexed: at `header` + (X + `offset`), the sum in 32 bits, and a sum of
    65,536 or more is beyond every packet. `out_of_band_tag`: four bytes
    nearer if that is behind a VLAN tag (vlan.py)."""

    size: int
    offset: int
    indexed: bool = False
    header: int = 0
    out_of_band_tag: bool = False


@dataclass(frozen=True, slots=True)
class LoadHeaderLength:
    """X = 4 * (the byte at `offset` & 0xf): the length of an IPv4 header."""

    offset: int


@dataclass(frozen=True, slots=True)
class LoadLength:
    """A or X = the length of the packet."""

    to: Variable


@dataclass(frozen=True, slots=True)
class LoadAncillary:
    """A = what SKF_AD_... says of the packet."""

    what: int


@dataclass(frozen=True, slots=True)
class Set:
    """A or X = a constant."""

    to: Variable
    value: int


@dataclass(frozen=True, slots=True)
class Copy:
    """TAX, TXA, and both directions of M[]."""

    to: Variable
    source: Variable


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """A = A `operation` operand, in 32 bits; `operation` is one of cbpf's, the operand a variable or a constant."""

    operation: int
    operand: Variable | int


@dataclass(frozen=True, slots=True)
class Negate:
    """A = -A."""


Operation = LoadPacket | LoadHeaderLength | LoadLength | LoadAncillary | Set | Copy | Arithmetic | Negate


# Terminators


@dataclass(frozen=True, slots=True)
class Jump:
    target: int


@dataclass(frozen=True, slots=True)
class Branch:
    """Unsigned: A == operand, A > operand, A >= operand, or A & operand."""

    condition: int
    operand: Variable | int
    yes: int
    no: int


@dataclass(frozen=True, slots=True)
class Return:
    """The accepted length: a constant, or A."""

    value: Variable | int


Terminator = Jump | Branch | Return


@dataclass(frozen=True, slots=True)
class Block:
    operations: tuple[Operation, ...]
    end: Terminator

    @property
    def successors(self) -> tuple[int, ...]:
        match self.end:
            case Jump(target):
                return (target,)
            case Branch(_, _, yes, no):
                return (yes, no)
        return ()

    @property
    def rejects(self) -> bool:
        return self == REJECT


REJECT = Block((), Return(0))

Graph = dict[int, Block]
"""Blocks by number; ascending numbers are an order in which every jump leads forward. The first one is the entry."""


def reads(operation: Operation) -> tuple[Variable, ...]:
    match operation:
        case LoadPacket(indexed=True):
            return (X,)
        case Copy(_, source):
            return (source,)
        case Arithmetic(_, operand):
            return (A, operand) if isinstance(operand, str) else (A,)
        case Negate():
            return (A,)
    return ()


def writes(operation: Operation) -> Variable:
    match operation:
        case LoadHeaderLength():
            return X
        case LoadLength(to) | Set(to, _) | Copy(to, _):
            return to
    return A


def end_reads(end: Terminator) -> tuple[Variable, ...]:
    match end:
        case Branch(_, operand, _, _):
            return (A, operand) if isinstance(operand, str) else (A,)
        case Return(str(variable)):
            return (variable,)
    return ()


def predecessors(graph: Graph) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {number: [] for number in graph}
    for number, block in graph.items():
        for successor in block.successors:
            found[successor].append(number)
    return found


# Loops


def unroll(
    instructions: Sequence[Instruction], rounds: int = LOOP_ROUNDS, *, accept_longer: bool = True
) -> tuple[Instruction, ...]:
    """The same program without jumps back: each loop written out `rounds` times.

    What a packet that needs more would be answered is unknown: `accept_longer` says whether the filter accepts it.
    libpcap makes loops for `protochain` only, one for each, and none inside another.
    """
    unrolled = tuple(instructions)
    longer = max((i.k for i in unrolled if i.code == cbpf.RET | cbpf.K), default=0) if accept_longer else 0
    while (loop := _first_loop(unrolled)) is not None:
        unrolled = (*_without_loop(unrolled, *loop, rounds), Instruction(cbpf.RET | cbpf.K, k=longer))
    return unrolled


def has_loops(instructions: Sequence[Instruction]) -> bool:
    return any(map(_is_jump_back, instructions))


def _first_loop(instructions: Sequence[Instruction]) -> tuple[int, int] | None:
    """The first and the last instruction of the first loop, which may jump back in several places."""
    jumps = list(_jumps_back(instructions))
    if not jumps:
        return None
    start = jumps[0][1]
    end = max(number for number, to in jumps if to == start)
    if start < 0 or any(to != start and (number < end or to <= end) for number, to in jumps):
        raise InvalidFilter(f"instruction {jumps[0][0]}: backward jump that is not a simple loop")
    return start, end


def _jumps_back(instructions: Sequence[Instruction]) -> Iterator[tuple[int, int]]:
    """The place and the target of each."""
    for number, i in enumerate(instructions):
        if _is_jump_back(i):
            yield number, cbpf.targets(i, number)[0]


def _without_loop(instructions: tuple[Instruction, ...], start: int, end: int, rounds: int) -> tuple[Instruction, ...]:
    body = list(enumerate(instructions[start : end + 1], start))
    growth = len(body) * (rounds - 1)
    head = [_stretched(i, n, end, growth) for n, i in enumerate(instructions[:start])]
    going_on = [
        _next_round(i, n, end) if _is_jump_back(i) else _stretched(i, n, end, left * len(body))
        for left in range(rounds - 1, 0, -1)
        for n, i in body
    ]
    # What would go round once more finds the return that unroll() puts behind everything.
    last = [replace(i, k=len(instructions) - n - 1) if _is_jump_back(i) else i for n, i in body]
    return (*head, *going_on, *last, *instructions[end + 1 :])


def _is_jump_back(i: Instruction) -> bool:
    return i.code == cbpf.JMP | cbpf.JA and bool(i.k >> 31)


def _next_round(i: Instruction, number: int, end: int) -> Instruction:
    return replace(i, k=end - number)


def _stretched(i: Instruction, number: int, end: int, growth: int) -> Instruction:
    """Its jumps over the end of the loop lead `growth` further."""
    if i.cls != cbpf.JMP:
        return i
    further = [growth if target > end else 0 for target in cbpf.targets(i, number)]
    if not i.is_branch:
        return replace(i, k=i.k + further[0])
    return replace(i, jt=i.jt + further[0], jf=i.jf + further[1])


# From instructions to blocks


def control_flow(instructions: Sequence[Instruction], header: int) -> Graph:
    """Cuts a program into blocks, numbered by their first instruction. `header`: where the network header begins."""
    starts = _block_starts(instructions)
    ends = [*starts[1:], len(instructions)]
    return {start: _block(instructions, start, end, header) for start, end in zip(starts, ends, strict=True)}


def _block_starts(instructions: Sequence[Instruction]) -> list[int]:
    starts = {0}
    for number, i in enumerate(instructions):
        if i.cls in (cbpf.JMP, cbpf.RET):
            starts.update(cbpf.targets(i, number), {number + 1})
    return sorted(starts - {len(instructions)})


def _block(instructions: Sequence[Instruction], start: int, end: int, header: int) -> Block:
    last = instructions[end - 1]
    if last.cls not in (cbpf.JMP, cbpf.RET):
        return Block(tuple(_operations(instructions[start:end], header)), Jump(end))
    return Block(tuple(_operations(instructions[start : end - 1], header)), _terminator(last, end - 1))


def _operations(instructions: Sequence[Instruction], header: int) -> Iterator[Operation]:
    return (_operation(i, header) for i in instructions)


def _terminator(i: Instruction, number: int) -> Terminator:
    if i.cls == cbpf.RET:
        return Return(A if i.code & cbpf.A else i.k)
    if not i.is_branch:
        return Jump(*cbpf.targets(i, number))
    return Branch(i.operation, X if i.uses_x else i.k, *cbpf.targets(i, number))


def _operation(i: Instruction, header: int) -> Operation:
    if i.cls in (cbpf.LD, cbpf.LDX):
        return _load(i, header)
    if i.cls in (cbpf.ST, cbpf.STX):
        return Copy(f"M{i.k}", A if i.cls == cbpf.ST else X)
    if i.cls == cbpf.MISC:
        return Copy(A, X) if i.code & cbpf.TXA else Copy(X, A)
    if i.operation == cbpf.NEG:
        return Negate()
    return Arithmetic(i.operation, X if i.uses_x else i.k)


def _load(i: Instruction, header: int) -> Operation:
    to = A if i.cls == cbpf.LD else X
    match i.mode:
        case cbpf.IMM:
            return Set(to, i.k)
        case cbpf.MEM:
            return Copy(to, f"M{i.k}")
        case cbpf.LEN:
            return LoadLength(to)
        case cbpf.MSH:
            return LoadHeaderLength(sum(_place(i.k, header)))
        case cbpf.IND:
            start, offset = _place(i.k, header)
            return LoadPacket(i.size, offset, indexed=True, header=start)
    if i.ancillary == cbpf.ALU_XOR_X:
        return Arithmetic(cbpf.XOR, X)
    if i.ancillary is not None:
        return LoadAncillary(i.ancillary)
    return LoadPacket(i.size, sum(_place(i.k, header)))


def _place(k: int, header: int) -> tuple[int, int]:
    """Where k counts from, and k from there: SKF_NET_OFF from the network header, SKF_LL_OFF from the frame's start."""
    for origin, start in ((cbpf.NET_OFF, header), (cbpf.LL_OFF, 0)):
        if origin <= k < origin + BEYOND:
            return start, k - origin
    return 0, k
