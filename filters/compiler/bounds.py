"""Which bounds checks a filter needs, and where.

A load beyond the packet's end rejects the packet, and nothing that a filter did before can be seen. So a check may be
made as early as is known that every way to acceptance needs it, one for the furthest byte of them all; and not again
behind it. Checks count from the start of the packet, or from data + X while X stays the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from filters.compiler import cbpf
from filters.compiler.graph import (
    BEYOND,
    A,
    Arithmetic,
    Block,
    Copy,
    Graph,
    LoadHeaderLength,
    LoadPacket,
    Negate,
    Operation,
    Set,
    Variable,
    X,
    predecessors,
    writes,
)

_FURTHEST_OFFSET = 0x7FFF - 4  # of an eBPF load

Moves = Callable[[Operation], bool]
"""Whether an operation makes the pointer data + X stale: it writes X, or calls a helper."""


@dataclass(frozen=True, slots=True)
class Guards:
    """`packet`, `indexed`: bytes to check at the start of a block, from the packet's start and from data + X.

    `x_bounds`: the largest X there; `pointers`: blocks at whose end data + X is made, `pointer_at_start`: also before
    the first. With X unknown or large an indexed load checks for itself: is_shared().
    """

    packet: dict[int, int]
    indexed: dict[int, int]
    x_bounds: dict[int, int]
    pointers: frozenset[int]
    pointer_at_start: bool

    def is_shared(self, load: LoadPacket, block: int) -> bool:
        return is_shared(load, self.x_bounds[block])


def is_shared(load: LoadPacket, x_bound: int) -> bool:
    """Whether the sum of X and the offset cannot leave what packet pointers may span."""
    offset = load.header + load.offset
    return (
        load.indexed
        and not load.out_of_band_tag
        and offset <= _FURTHEST_OFFSET
        and x_bound + offset + load.size < BEYOND
    )


def place_guards(graph: Graph, moves_pointer: Moves) -> Guards:
    """For a graph whose blocks end where the pointer moves (passes.split)."""
    x_bounds = {number: bounds[X] for number, bounds in upper_bounds(graph).items()}
    movers = {number for number, block in graph.items() if any(map(moves_pointer, block.operations))}
    own = {number: _furthest_indexed(block, x_bounds[number]) for number, block in graph.items()}
    wanted = _pointer_wanted(graph, own, movers)
    makers = {n for n in movers if any(wanted[successor] for successor in graph[n].successors)}
    return Guards(
        packet=_placed(graph, {n: _furthest_direct(block) for n, block in graph.items()}, frozenset()),
        indexed=_placed(graph, own, frozenset(movers)),
        x_bounds=x_bounds,
        pointers=frozenset(makers),
        pointer_at_start=wanted[min(graph)],
    )


def _furthest_direct(block: Block) -> int:
    return max((_end(o) for o in block.operations if not getattr(o, "indexed", False)), default=0)


def _furthest_indexed(block: Block, x_bound: int) -> int:
    return max(
        (_end(o) for o in block.operations if isinstance(o, LoadPacket) and is_shared(o, x_bound)),
        default=0,
    )


def _end(operation: Operation) -> int:
    match operation:
        case LoadPacket(size, offset, _, header):
            return header + offset + size
        case LoadHeaderLength(offset):
            return offset + 1
    return 0


def _pointer_wanted(graph: Graph, own: dict[int, int], movers: set[int]) -> dict[int, bool]:
    wanted: dict[int, bool] = {}
    for number in sorted(graph, reverse=True):
        behind = number not in movers and any(wanted[successor] for successor in graph[number].successors)
        wanted[number] = own[number] > 0 or behind
    return wanted


def _placed(graph: Graph, own: dict[int, int], ends: frozenset[int]) -> dict[int, int]:
    """The checks to make; at the end of a block in `ends` what was checked is void."""
    needed = _needed(graph, own, ends)
    before = predecessors(graph)
    known: dict[int, int] = {}
    placed = {}
    for number in graph:
        have = min((0 if p in ends else known[p] for p in before[number]), default=0)
        placed[number] = needed[number] if needed[number] > have else 0
        known[number] = max(have, needed[number])
    return placed


def _needed(graph: Graph, own: dict[int, int], ends: frozenset[int]) -> dict[int, int]:
    """What every way from a block to acceptance needs; ways to rejection do not count."""
    needed: dict[int, int] = {}
    for number in sorted(graph, reverse=True):
        successor_bounds = [needed[s] for s in graph[number].successors if not graph[s].rejects]
        behind = min(successor_bounds, default=0) if number not in ends else 0
        needed[number] = 0 if graph[number].rejects else max(own[number], behind)
    return needed


# How large values can get

_WORD = cbpf.WORD
Bounds = dict[Variable, int]


def upper_bounds(graph: Graph) -> dict[int, Bounds]:
    """The largest value of each variable at the start of each block."""
    bounds: dict[int, Bounds] = {min(graph): {A: 0, X: 0}}
    for number, block in graph.items():
        now = dict(bounds[number])
        for operation in block.operations:
            now[writes(operation)] = _largest(operation, now)
        for successor in block.successors:
            bounds[successor] = _joined(bounds.get(successor), now)
    return bounds


def _joined(one: Bounds | None, other: Bounds) -> Bounds:
    """A variable that is not set on both ways is read on neither."""
    return dict(other) if one is None else {name: max(one[name], other[name]) for name in one.keys() & other.keys()}


def _largest(operation: Operation, bounds: Bounds) -> int:
    match operation:
        case LoadPacket(size):
            return (1 << 8 * size) - 1
        case LoadHeaderLength():
            return 4 * 0xF
        case Set(_, value):
            return value
        case Copy(_, source):
            return bounds[source]
        case Arithmetic(kind, operand):
            return _largest_result(kind, bounds[A], operand, bounds)
        case Negate():
            return _WORD
    return _WORD


def _largest_result(operation: int, a: int, operand: Variable | int, bounds: Bounds) -> int:
    exact = isinstance(operand, int)
    b = operand if isinstance(operand, int) else bounds[operand]
    match operation:
        case cbpf.ADD:
            return _if_word(a + b)
        case cbpf.MUL:
            return _if_word(a * b)
        case cbpf.OR | cbpf.XOR:
            return (1 << max(a, b).bit_length()) - 1
        case cbpf.AND:
            return min(a, b)
        case cbpf.DIV:
            return a // b if exact else a
        case cbpf.MOD:
            return min(a, b - 1) if exact else a
        case cbpf.RSH:
            return a >> b if exact else a
        case cbpf.LSH if exact:
            return _if_word(a << b)
    return _WORD


def _if_word(value: int) -> int:
    """What may not fit wraps around, so it may be anything."""
    return min(value, _WORD)
