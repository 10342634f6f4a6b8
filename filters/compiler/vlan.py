"""At tc the VLAN tag is out of band; the filter is rewritten to see it where it was on the wire.

The kernel takes the outer tag off before tc-in, and has not put it on yet at tc-out. Enters: the graph of a filter.
Leaves: the same, and behind a test for a tag its twin, in which bytes 12 to 15 are the tag's and all that follow are
four bytes nearer. So an expression means at tc what it means at XDP and in a file. But a load through X of a byte of
the tag rejects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from filters.compiler import cbpf
from filters.compiler.graph import (
    A,
    Arithmetic,
    Block,
    Branch,
    Copy,
    Graph,
    Jump,
    LoadAncillary,
    LoadHeaderLength,
    LoadLength,
    LoadPacket,
    Operation,
    Set,
    Terminator,
    X,
    writes,
)

TAG, TAG_END, TAG_SIZE = 12, 16, 4

_TAG_TYPES = (0x8100, 0x88A8)  # eth_type_vlan(), <linux/if_vlan.h>
_QUESTIONS = (cbpf.VLAN_TAG, cbpf.VLAN_TAG_PRESENT, cbpf.VLAN_TPID)

# Scratch words of the twin, beyond those of classic BPF.
_HIGH, _LOW, _KEPT = "M16", "M17", "M18"


def with_out_of_band_tag(graph: Graph) -> Graph:
    """A filter that asks for the tag itself (SKF_AD_VLAN_TAG and its like) stays as it is."""
    if any(isinstance(o, LoadAncillary) and o.what in _QUESTIONS for b in graph.values() for o in b.operations):
        return graph
    size = max(graph) + 1
    plain = _moved(graph, 1, lambda operation: iter([operation]))
    twin = _moved(_without_other_types(graph), 1 + size, _with_tag)
    entry, tagged = min(plain), min(twin)
    twin[tagged] = replace(twin[tagged], operations=(Set(A, 0), *twin[tagged].operations))
    question = Block((LoadAncillary(cbpf.VLAN_TAG_PRESENT),), Branch(cbpf.JEQ, 0, entry, tagged))
    return {0: question, **plain, **twin}


def _moved(graph: Graph, distance: int, change: Callable[[Operation], Iterator[Operation]]) -> Graph:
    moved: Graph = {}
    for number, block in graph.items():
        operations = tuple(changed for operation in block.operations for changed in change(operation))
        moved[number + distance] = Block(operations, _later(block.end, distance))
    return moved


def _later(end: Terminator, distance: int) -> Terminator:
    match end:
        case Jump(target):
            return Jump(target + distance)
        case Branch(condition, operand, yes, no):
            return Branch(condition, operand, yes + distance, no + distance)
    return end


def _with_tag(operation: Operation) -> Iterator[Operation]:
    match operation:
        case LoadPacket(indexed=True):
            yield _shift_indexed(operation)
        case LoadPacket(size, offset):
            yield from _bytes(offset, size)
        case LoadHeaderLength(offset) if TAG <= offset < TAG_END:
            yield from _keeping_a([*_bytes(offset, 1), Arithmetic(cbpf.AND, 0xF), Arithmetic(cbpf.LSH, 2)])
        case LoadHeaderLength(offset):
            yield LoadHeaderLength(_nearer(offset))
        case LoadLength(to):
            ask: list[Operation] = [LoadLength(A), Arithmetic(cbpf.ADD, TAG_SIZE)]
            yield from ask if to == A else _keeping_a(ask)
        case _:
            yield operation


def _shift_indexed(load: LoadPacket) -> LoadPacket:
    if load.header == 0 and TAG_END <= load.offset < 1 << 31:
        return replace(load, offset=load.offset - TAG_SIZE)
    return replace(load, out_of_band_tag=True)


def _keeping_a(steps: list[Operation]) -> Iterator[Operation]:
    """What `steps` make of A becomes X instead."""
    return iter([Copy(_KEPT, A), *steps, Copy(X, A), Copy(A, _KEPT)])


def _nearer(offset: int) -> int:
    return offset - TAG_SIZE if offset >= TAG_END else offset


def _bytes(offset: int, size: int) -> Iterator[Operation]:
    """A = those bytes of the frame with its tag, big-endian."""
    if offset + size <= TAG or offset >= TAG_END:
        yield LoadPacket(size, _nearer(offset))
    elif size == 2 and offset in (TAG, TAG + 2):
        yield _half_tag(offset)
    else:
        yield from _byte(offset)
        for place in range(offset + 1, offset + size):
            yield Copy(_HIGH, A)
            yield from _byte(place)
            yield from (Copy(_LOW, A), Copy(A, _HIGH), Arithmetic(cbpf.LSH, 8), Arithmetic(cbpf.OR, _LOW))


def _byte(offset: int) -> Iterator[Operation]:
    if not TAG <= offset < TAG_END:
        yield LoadPacket(1, _nearer(offset))
        return
    yield _half_tag(offset & ~1)
    yield Arithmetic(cbpf.AND, 0xFF) if offset & 1 else Arithmetic(cbpf.RSH, 8)


def _half_tag(offset: int) -> LoadAncillary:
    return LoadAncillary(cbpf.VLAN_TPID if offset == TAG else cbpf.VLAN_TAG)


# What a tag's type decides


def _without_other_types(graph: Graph) -> Graph:
    """Without branches that ask whether the ethertype is one that no tag has."""
    holds_type: dict[int, bool] = {min(graph): False}
    result: Graph = {}
    for number, block in graph.items():
        holds = holds_type.get(number, False)
        for operation in block.operations:
            if writes(operation) == A:
                holds = operation == LoadPacket(2, TAG)
        result[number] = replace(block, end=_decided(block.end)) if holds else block
        for successor in block.successors:
            holds_type[successor] = holds and holds_type.get(successor, True)
    return result


def _decided(end: Terminator) -> Terminator:
    match end:
        case Branch(cbpf.JEQ, int(value), _, no) if value not in _TAG_TYPES:
            return Jump(no)
        case Branch(cbpf.JGT | cbpf.JGE, int(value), yes, _) if value < min(_TAG_TYPES):
            return Jump(yes)
    return end
