"""Passes over the graph: each takes one and returns one, without changing what the filter answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

from filters.compiler import cbpf
from filters.compiler.graph import (
    BEYOND,
    REJECT,
    A,
    Arithmetic,
    Block,
    Branch,
    Graph,
    Jump,
    LoadAncillary,
    LoadHeaderLength,
    LoadPacket,
    Operation,
    Set,
    Terminator,
    Variable,
    X,
    end_reads,
    reads,
    writes,
)
from filters.compiler.hook import FrameField, Hook
from filters.errors import UnsupportedPrimitive


def prune(graph: Graph) -> Graph:
    """Without branches that decide nothing, and without blocks that nothing leads to.

    Blocks have no effects but their answer: what can only lead to a rejection is one.
    """
    pruned: Graph = {}
    for number in sorted(graph, reverse=True):
        pruned[number] = _pruned_block(graph[number], pruned)
    return _reachable(pruned, min(graph))


def _pruned_block(block: Block, behind: Graph) -> Block:
    if any(_reads_beyond(operation) for operation in block.operations):
        return REJECT
    end = _pruned_end(block.end, behind)
    if end == REJECT.end or (isinstance(end, Jump) and behind[end.target].rejects):
        return REJECT
    return replace(block, end=end)


def _reads_beyond(operation: Operation) -> bool:
    match operation:
        case LoadPacket(size, offset, indexed=False):
            return offset + size > BEYOND - 1
        case LoadHeaderLength(offset):
            return offset + 1 > BEYOND - 1
    return False


def _pruned_end(end: Terminator, behind: Graph) -> Terminator:
    match end:
        case Jump(target):
            return Jump(_through(target, behind))
        case Branch(condition, operand, yes, no):
            yes, no = _through(yes, behind), _through(no, behind)
            both_reject = behind[yes].rejects and behind[no].rejects
            return Jump(yes) if yes == no or both_reject else Branch(condition, operand, yes, no)
    return end


def _through(target: int, graph: Graph) -> int:
    """Where a jump ends up that leads to a block which only jumps on."""
    block = graph[target]
    return block.end.target if not block.operations and isinstance(block.end, Jump) else target


def _reachable(graph: Graph, entry: int) -> Graph:
    seen, waiting = set(), [entry]
    while waiting:
        number = waiting.pop()
        if number not in seen:
            seen.add(number)
            waiting += graph[number].successors
    return {number: graph[number] for number in sorted(seen)}


def split(graph: Graph, ends_block: Callable[[Operation], bool]) -> Graph:
    """Cut so that an operation of that kind is the last one of its block."""
    pieces = {number: _pieces(block, ends_block) for number, block in graph.items()}
    firsts, count = {}, 0
    for number, parts in pieces.items():
        firsts[number] = count
        count += len(parts)
    result: Graph = {}
    for number, parts in pieces.items():
        for at, part in enumerate(parts, firsts[number]):
            result[at] = Block(part, Jump(at + 1))
        result[at] = Block(part, _renumbered(graph[number].end, firsts))
    return result


def _pieces(block: Block, ends_block: Callable[[Operation], bool]) -> list[tuple[Operation, ...]]:
    cuts = [at for at, operation in enumerate(block.operations, 1) if ends_block(operation)]
    return [block.operations[start:end] for start, end in pairwise([0, *cuts, None])]


def _renumbered(end: Terminator, numbers: dict[int, int]) -> Terminator:
    match end:
        case Jump(target):
            return Jump(numbers[target])
        case Branch(condition, operand, yes, no):
            return Branch(condition, operand, numbers[yes], numbers[no])
    return end


def liveness(graph: Graph) -> dict[int, frozenset[Variable]]:
    """The variables that each block, or one behind it, reads before they are written."""
    live: dict[int, frozenset[Variable]] = {}
    for number in sorted(graph, reverse=True):
        now = _live_at_end(graph[number], live)
        for operation in reversed(graph[number].operations):
            now = now - {writes(operation)} | set(reads(operation))
        live[number] = now
    return live


def _live_at_end(block: Block, live: dict[int, frozenset[Variable]]) -> frozenset[Variable]:
    return frozenset(end_reads(block.end)).union(*(live[successor] for successor in block.successors))


def without_dead(graph: Graph) -> Graph:
    """Without operations whose result is unused."""
    result: Graph = {}
    live: dict[int, frozenset[Variable]] = {}
    for number in sorted(graph, reverse=True):
        now = _live_at_end(graph[number], live)
        kept: list[Operation] = []
        for operation in reversed(graph[number].operations):
            if writes(operation) in now or _may_reject(operation):
                kept.append(operation)
                now = now - {writes(operation)} | set(reads(operation))
        live[number] = now
        result[number] = replace(graph[number], operations=tuple(reversed(kept)))
    return dict(sorted(result.items()))


def _may_reject(operation: Operation) -> bool:
    match operation:
        case LoadPacket() | LoadHeaderLength():
            return True
        case Arithmetic(cbpf.DIV | cbpf.MOD, operand):
            return operand == X
    return False


def with_answers(graph: Graph, hook: Hook) -> Graph:
    """Questions about the packet that need not be asked at a hook, answered. Raises UnsupportedPrimitive for those that
    is not available there."""
    return {
        number: replace(block, operations=tuple(_answered(operation, hook) for operation in block.operations))
        for number, block in graph.items()
    }


def _answered(operation: Operation, hook: Hook) -> Operation:
    if not isinstance(operation, LoadAncillary):
        return operation
    if operation.what not in hook.ancillary:
        raise UnsupportedPrimitive(f"[{cbpf.ANCILLARY[operation.what]}]: not available at {hook}")
    match hook.ancillary[operation.what]:
        case FrameField(offset):
            return LoadPacket(2, offset)
        case int(value):
            return Set(A, value)
    return operation
