"""From the graph to eBPF: twice, once with direct packet access and once, for what is not linear, with helpers.

Both leave the accepted length in r9 and go to a label. They hold 32-bit values in 64-bit registers, upper halves zero.

             r0      r1 r2    r3 r4   r5        r6       r7    r8        r9     stack
    direct   A       scratch  M[]     data + X  context  data  data_end  X      M[] from -16 down
    helpers  result  arguments, lost in calls   context  A     X                loaded bytes at -8, M[] from -16 down
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from filters.compiler import cbpf, ebpf
from filters.compiler.bounds import Guards, place_guards
from filters.compiler.byte_order import NATIVE, Orders, byte_orders, in_order
from filters.compiler.ebpf import R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10, Assembler, Label, Reg
from filters.compiler.graph import (
    BEYOND,
    A,
    Arithmetic,
    Branch,
    Copy,
    Graph,
    Jump,
    LoadAncillary,
    LoadHeaderLength,
    LoadLength,
    LoadPacket,
    Negate,
    Operation,
    Return,
    Set,
    Terminator,
    Variable,
    X,
    reads,
    writes,
)
from filters.compiler.hook import Field, Helper, Hook
from filters.compiler.passes import liveness, split
from filters.compiler.vlan import TAG, TAG_END, TAG_SIZE

CONTEXT, ACCEPTED = R6, R9

_BUFFER = -8
_FIRST_SLOT = -16
_MEMORY_REGISTERS = (R3, R4)
_MAX_VAR_OFF = 1 << 29  # BPF_MAX_VAR_OFF, <linux/bpf_verifier.h>
_KEPT_A = "kept A"  # in addition to M0 to M15

# The jumps of classic BPF, and what jumps where they do not.
_CONDITIONS = {cbpf.JEQ: ebpf.JEQ, cbpf.JGT: ebpf.JGT, cbpf.JGE: ebpf.JGE, cbpf.JSET: ebpf.JSET}
_OPPOSITES = {cbpf.JEQ: ebpf.JNE, cbpf.JGT: ebpf.JLE, cbpf.JGE: ebpf.JLT}


@dataclass(frozen=True, slots=True)
class Exits:
    """Where a filter goes: `beyond` is for packets that end, as far as direct access sees, before a byte it needs."""

    accept: Label
    reject: Label
    beyond: Label


class Emitter(ABC):
    """What both ways of access have in common."""

    a: Reg
    x: Reg

    def __init__(self, graph: Graph, hook: Hook, orders: Orders, asm: Assembler, exits: Exits) -> None:
        self.graph, self.hook, self.orders, self.asm, self.exits = graph, hook, orders, asm, exits
        self.labels = {number: exits.reject if block.rejects else Label() for number, block in graph.items()}
        self.memory = _stack_slots(graph)

    def emit(self) -> None:
        """Ends by falling through to what follows where the last block accepts: that must be `accept`."""
        self.start()
        written = [number for number, block in self.graph.items() if not block.rejects]
        if not written:
            self.asm.jump(self.exits.reject)
        for number, following in zip_longest(written, written[1:]):
            follower = self.exits.accept if following is None else self.labels[following]
            self.asm.place(self.labels[number])
            self.block(number)
            self.end(self.graph[number].end, self.orders.used(number, len(self.graph[number].operations)), follower)

    def start(self) -> None:
        live = liveness(self.graph)[min(self.graph)]
        for variable, register in ((A, self.a), (X, self.x)):
            if variable in live:
                self.asm.mov(register, 0, bits=32)

    def block(self, number: int) -> None:
        for place, operation in enumerate(self.graph[number].operations):
            self.operation(operation, number, place)

    def operation(self, operation: Operation, block: int, place: int) -> None:
        match operation:
            case LoadPacket():
                self.load_packet(operation, block, self.orders.defined(block, place))
            case LoadHeaderLength(offset):
                self.load_header_length(offset)
            case LoadLength(to):
                self.load_length(self.register(to))
            case LoadAncillary(what):
                self.load_ancillary(what)
            case Set(to, value):
                self.asm.mov(self.register(to), value, bits=32)
            case Copy(to, source):
                self.copy(to, source)
            case Arithmetic():
                self.arithmetic(operation, self.orders.used(block, place))
            case Negate():
                self.asm.negate(self.a)

    @abstractmethod
    def load_packet(self, load: LoadPacket, block: int, order: int) -> None: ...

    @abstractmethod
    def load_header_length(self, offset: int) -> None: ...

    @abstractmethod
    def load_length(self, to: Reg) -> None: ...

    def call(self, helper: int, to: Reg) -> None:
        """A helper that takes at most the context."""
        self.asm.mov(R1, CONTEXT)
        self.asm.call(helper)
        self.asm.mov(to, R0, bits=32)

    def register(self, variable: Variable) -> Reg:
        return self.a if variable == A else self.x

    def index(self, load: LoadPacket, to: Reg) -> None:
        """Where an indexed load reads, from the packet's start."""
        self.asm.mov(to, self.x, bits=32)
        self.asm.alu(ebpf.ADD, to, load.offset, bits=32)
        if load.offset >= _MAX_VAR_OFF:
            self.asm.alu(ebpf.OR, to, 0, bits=32)  # the verifier forgets how far this is from X, which it would refuse
        if load.header:
            self.asm.jump_if(ebpf.JGT, to, BEYOND - 1, self.exits.reject)
            self.asm.alu(ebpf.ADD, to, load.header)
        if load.out_of_band_tag:
            self.step_over_tag(load, to)

    def step_over_tag(self, load: LoadPacket, to: Reg) -> None:
        before = Label()
        self.asm.jump_if(ebpf.JLE, to, TAG - load.size, before)
        self.asm.jump_if(ebpf.JLT, to, TAG_END, self.exits.reject)
        self.asm.alu(ebpf.SUB, to, TAG_SIZE)
        self.asm.place(before)

    def swap(self, size: int, order: int) -> None:
        if size > 1 and order == NATIVE:
            self.asm.from_big_endian(self.a, size)

    def header_length(self) -> None:
        """X = 4 * (X & 0xf)"""
        self.asm.alu(ebpf.AND, self.x, 0xF, bits=32)
        self.asm.alu(ebpf.LSH, self.x, 2, bits=32)

    def load_ancillary(self, what: int) -> None:
        match self.hook.ancillary[what]:
            case Field(offset, big_endian):
                self.asm.load(self.a, CONTEXT, offset, 4)
                if big_endian:
                    self.asm.from_big_endian(self.a, 2)
            case Helper(number):
                self.call(number, self.a)

    def copy(self, to: Variable, source: Variable) -> None:
        target, origin = self.place(to), self.place(source)
        if isinstance(target, Reg) and isinstance(origin, Reg):
            self.asm.mov(target, origin, bits=32)
        elif isinstance(target, Reg):
            self.asm.load(target, R10, origin, 8)
        elif isinstance(origin, Reg):
            self.asm.store(R10, target, origin, 8)

    def place(self, variable: Variable) -> Reg | int:
        """A register, or an offset from the frame pointer."""
        return self.register(variable) if variable in (A, X) else self.memory[variable]

    def arithmetic(self, operation: Arithmetic, order: int) -> None:
        operand = self.operand(operation.operand, order)
        if operation.operation in (cbpf.DIV, cbpf.MOD) and isinstance(operand, Reg):
            self.asm.jump_if(ebpf.JEQ, operand, 0, self.exits.reject, bits=32)
        # Classic and extended BPF number their operations alike.
        self.asm.alu(operation.operation, self.a, operand, bits=32)

    def operand(self, operand: Variable | int, order: int) -> Reg | int:
        if isinstance(operand, int):
            return in_order(operand, order)
        place = self.place(operand)
        if isinstance(place, Reg):
            return place
        self.asm.load(R1, R10, place, 8)
        return R1

    def end(self, end: Terminator, order: int, follower: Label) -> None:
        match end:
            case Jump(target):
                self.go(self.labels[target], follower)
            case Branch():
                self.branch(end, order, follower)
            case Return(value):
                self.finish(value, follower)

    def go(self, label: Label, follower: Label) -> None:
        if label is not follower:
            self.asm.jump(label)

    def branch(self, branch: Branch, order: int, follower: Label) -> None:
        operand = self.operand(branch.operand, order)
        yes, no = self.labels[branch.yes], self.labels[branch.no]
        if yes is follower and branch.condition in _OPPOSITES:
            self.asm.jump_if(_OPPOSITES[branch.condition], self.a, operand, no, bits=32)
            return
        self.asm.jump_if(_CONDITIONS[branch.condition], self.a, operand, yes, bits=32)
        self.go(no, follower)

    def finish(self, value: Variable | int, follower: Label) -> None:
        if isinstance(value, int):
            self.asm.mov(ACCEPTED, value, bits=32)
        else:
            self.asm.jump_if(ebpf.JEQ, self.a, 0, self.exits.reject, bits=32)
            self.asm.mov(ACCEPTED, self.a, bits=32)
        self.go(self.exits.accept, follower)


class DirectEmitter(Emitter):
    """Through packet pointers; what is not there goes to `beyond`."""

    a, x = R0, R9

    def __init__(self, graph: Graph, hook: Hook, asm: Assembler, exits: Exits) -> None:
        graph = split(_with_a_kept(graph, hook), lambda operation: self.moves_pointer(operation, hook))
        super().__init__(graph, hook, byte_orders(graph), asm, exits)
        self.guards: Guards = place_guards(graph, lambda operation: self.moves_pointer(operation, hook))
        if not any(calls_helper(o, hook) for block in graph.values() for o in block.operations):
            self.memory |= dict(zip(_most_used(graph), _MEMORY_REGISTERS, strict=False))

    @staticmethod
    def moves_pointer(operation: Operation, hook: Hook) -> bool:
        return writes(operation) == X or calls_helper(operation, hook)

    def start(self) -> None:
        if self.hook.window is None:
            self.asm.load(R7, CONTEXT, self.hook.data, 4)
            self.asm.load(R8, CONTEXT, self.hook.data_end, 4)
        else:
            self.start_in_window(self.hook.window)
        super().start()
        if self.guards.pointer_at_start:
            self.asm.mov(R5, R7)

    def start_in_window(self, window: int) -> None:
        """The verifier asks for no check there, but bounds what is added to a pointer."""
        assert self.hook.readable is not None
        self.asm.mov(R7, CONTEXT)
        self.asm.alu(ebpf.ADD, R7, window)
        self.asm.load(R8, CONTEXT, self.hook.readable, 4)
        self.asm.alu(ebpf.AND, R8, BEYOND - 1)
        self.asm.alu(ebpf.ADD, R8, R7)

    def block(self, number: int) -> None:
        self.guard(R7, self.guards.packet[number])
        self.guard(R5, self.guards.indexed[number])
        super().block(number)
        if number in self.guards.pointers:
            self.make_pointer(number)

    def guard(self, start: Reg, size: int) -> None:
        if size:
            self.asm.mov(R1, start)
            self.asm.alu(ebpf.ADD, R1, size)
            self.asm.jump_if(ebpf.JGT, R1, R8, self.exits.beyond)

    def make_pointer(self, number: int) -> None:
        """r5 = data + X, at the end of a block. The verifier knows how large X is if it is the length of a header."""
        self.asm.mov(R5, R9, bits=32)
        if not isinstance(self.graph[number].operations[-1], LoadHeaderLength):
            bound = min(self.guards.x_bounds[successor] for successor in self.graph[number].successors)
            self.asm.jump_if(ebpf.JGT, R5, bound, self.exits.reject)
        self.asm.alu(ebpf.ADD, R5, R7)

    def load_packet(self, load: LoadPacket, block: int, order: int) -> None:
        if not load.indexed:
            self.load_direct(self.a, R7, load.offset, load.size)
        elif self.guards.is_shared(load, block):
            self.load_direct(self.a, R5, load.header + load.offset, load.size)
        else:
            self.load_guarded(load)
        self.swap(load.size, order)

    def load_direct(self, to: Reg, base: Reg, offset: int, size: int) -> None:
        if offset > 0x7FFF:
            self.asm.mov(R1, base)
            self.asm.alu(ebpf.ADD, R1, offset)
            base, offset = R1, 0
        self.asm.load(to, base, offset, size)

    def load_guarded(self, load: LoadPacket) -> None:
        """X may be anything: the sum wraps around at 32 bits, as in classic BPF."""
        self.index(load, R1)
        self.asm.jump_if(ebpf.JGT, R1, BEYOND - 1 - load.size, self.exits.beyond)
        self.asm.alu(ebpf.ADD, R1, R7)
        self.asm.mov(R2, R1)
        self.asm.alu(ebpf.ADD, R2, load.size)
        self.asm.jump_if(ebpf.JGT, R2, R8, self.exits.beyond)
        self.asm.load(self.a, R1, 0, load.size)

    def load_header_length(self, offset: int) -> None:
        self.load_direct(R9, R7, offset, 1)
        self.header_length()

    def load_length(self, to: Reg) -> None:
        if self.hook.length is not None:
            self.asm.load(to, CONTEXT, self.hook.length, 4)
        elif self.hook.load_bytes:
            self.call(ebpf.XDP_GET_BUFF_LEN, to)
        else:
            self.asm.mov(to, R8)
            self.asm.alu(ebpf.SUB, to, R7)


class HelperEmitter(Emitter):
    """Through bpf_xdp_load_bytes or bpf_skb_load_bytes: any packet, slowly."""

    a, x = R7, R8

    def __init__(self, graph: Graph, hook: Hook, load_bytes: int, asm: Assembler, exits: Exits) -> None:
        super().__init__(graph, hook, byte_orders(graph), asm, exits)
        self.load_bytes = load_bytes

    def load_packet(self, load: LoadPacket, block: int, order: int) -> None:
        if load.indexed:
            self.index(load, R2)
        else:
            self.asm.mov(R2, load.offset, bits=32)
        self.load_bytes_at_r2(self.a, load.size)
        self.swap(load.size, order)

    def load_bytes_at_r2(self, to: Reg, size: int) -> None:
        self.asm.mov(R1, CONTEXT)
        self.asm.mov(R3, R10)
        self.asm.alu(ebpf.ADD, R3, _BUFFER)
        self.asm.mov(R4, size, bits=32)
        self.asm.call(self.load_bytes)
        self.asm.jump_if(ebpf.JNE, R0, 0, self.exits.reject)
        self.asm.load(to, R10, _BUFFER, size)

    def load_header_length(self, offset: int) -> None:
        self.asm.mov(R2, offset, bits=32)
        self.load_bytes_at_r2(self.x, 1)
        self.header_length()

    def load_length(self, to: Reg) -> None:
        if self.hook.length is not None:
            self.asm.load(to, CONTEXT, self.hook.length, 4)
        else:
            self.call(ebpf.XDP_GET_BUFF_LEN, to)


def calls_helper(operation: Operation, hook: Hook) -> bool:
    match operation:
        case LoadAncillary(what):
            return isinstance(hook.ancillary[what], Helper)
        case LoadLength():
            return hook.length is None and hook.load_bytes is not None
    return False


def _with_a_kept(graph: Graph, hook: Hook) -> Graph:
    """A helper's answer is in A's register first, also where X shall have it."""
    if not calls_helper(LoadLength(X), hook):
        return graph
    around: Sequence[Operation] = (Copy(_KEPT_A, A), LoadLength(A), Copy(X, A), Copy(A, _KEPT_A))
    return {
        number: replace(
            block,
            operations=tuple(part for o in block.operations for part in (around if o == LoadLength(X) else (o,))),
        )
        for number, block in graph.items()
    }


def emit_beyond(asm: Assembler, hook: Hook, exits: Exits) -> None:
    """A byte is missing: of the packet, or only of its linear area? Then what follows starts over."""
    asm.place(exits.beyond)
    if hook.length is not None:
        asm.load(R0, CONTEXT, hook.length, 4)
    else:
        asm.mov(R1, CONTEXT)
        asm.call(ebpf.XDP_GET_BUFF_LEN)
    asm.alu(ebpf.SUB, R8, R7)
    asm.jump_if(ebpf.JGE, R8, R0, exits.reject)


def _memory_uses(graph: Graph) -> Iterable[Variable]:
    for block in graph.values():
        for operation in block.operations:
            yield from (v for v in (writes(operation), *reads(operation)) if v not in (A, X))


def _stack_slots(graph: Graph) -> dict[Variable, Reg | int]:
    slots = sorted(set(_memory_uses(graph)))
    return {variable: _FIRST_SLOT - 8 * number for number, variable in enumerate(slots)}


def _most_used(graph: Graph) -> list[Variable]:
    return [variable for variable, _ in Counter(_memory_uses(graph)).most_common()]
