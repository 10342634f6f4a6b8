"""Which values stay in network byte order.

A load that is only tested for equality or for bits, perhaps masked first, need not be swapped: its constants are.
Definitions and uses of A that meet form a web; a web stays in network order where every use allows it and every load
has the same size.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from filters.compiler import cbpf
from filters.compiler.graph import (
    A,
    Arithmetic,
    Branch,
    Graph,
    LoadPacket,
    Operation,
    Terminator,
    end_reads,
    reads,
    writes,
)

NATIVE = 1
USE, DEFINITION = "use", "definition"
Site = tuple[int, int, str]
"""Number of the block, place in it (-1: before the first operation; the terminator's: behind the last), what of A."""


def in_order(value: int, size: int) -> int:
    """A constant to compare with a value of `size` bytes that was not swapped; with 1, with one that was.

    Only the low bytes change places, so that it maps 32-bit words one to one and bit by bit.
    """
    if size == NATIVE or sys.byteorder == "big":
        return value
    low = value & (1 << 8 * size) - 1
    return value ^ low | int.from_bytes(low.to_bytes(size, "little"), "big")


@dataclass(frozen=True, slots=True)
class Orders:
    """How large the unswapped value of A is that an operation or terminator reads or writes; NATIVE: it is swapped."""

    sizes: dict[Site, int]

    def used(self, block: int, place: int) -> int:
        return self.sizes.get((block, place, USE), NATIVE)

    def defined(self, block: int, place: int) -> int:
        return self.sizes.get((block, place, DEFINITION), NATIVE)


def byte_orders(graph: Graph) -> Orders:
    webs = _Webs()
    for site, other in _meetings(graph):
        webs.join(site, other)
    preferences: dict[Site, set[int]] = defaultdict(set)
    for site, size in _preferences(graph):
        preferences[webs.find(site)].add(size)
    return Orders({site: _agreed(preferences[webs.find(site)]) for site in webs.sites()})


def _agreed(sizes: set[int]) -> int:
    return next(iter(sizes)) if len(sizes) == 1 else NATIVE


def _meetings(graph: Graph) -> Iterator[tuple[Site, Site]]:
    """Each use with every definition that reaches it, and both sides of an operation that works in any order."""
    reaching: dict[int, set[Site]] = defaultdict(set)
    reaching[min(graph)] = {(min(graph), -1, DEFINITION)}
    for number, block in graph.items():
        definitions = reaching[number]
        for place, operation in enumerate(block.operations):
            use, definition = (number, place, USE), (number, place, DEFINITION)
            if A in reads(operation):
                yield from ((use, reached) for reached in definitions)
            if _is_bitwise(operation):
                yield use, definition
            if writes(operation) == A:
                definitions = {definition}
        if A in end_reads(block.end):
            yield from (((number, len(block.operations), USE), reached) for reached in definitions)
        for successor in block.successors:
            reaching[successor] |= definitions


def _preferences(graph: Graph) -> Iterator[tuple[Site, int]]:
    """The sizes that sites ask for; a site that takes any asks for none."""
    for number, block in graph.items():
        yield (number, -1, DEFINITION), NATIVE
        for place, operation in enumerate(block.operations):
            if isinstance(operation, LoadPacket):
                yield (number, place, DEFINITION), operation.size
            elif not _is_bitwise(operation):
                yield (number, place, DEFINITION), NATIVE
                yield (number, place, USE), NATIVE
        if not _compares_bits(block.end):
            yield (number, len(block.operations), USE), NATIVE


def _is_bitwise(operation: Operation) -> bool:
    match operation:
        case Arithmetic(cbpf.AND | cbpf.OR | cbpf.XOR, int()):
            return True
    return False


def _compares_bits(end: Terminator) -> bool:
    match end:
        case Branch(cbpf.JEQ | cbpf.JSET, int()):
            return True
    return False


class _Webs:
    """Disjoint sets of sites."""

    def __init__(self) -> None:
        self._parents: dict[Site, Site] = {}

    def find(self, site: Site) -> Site:
        parent = self._parents.setdefault(site, site)
        while parent != self._parents[parent]:
            parent = self._parents[parent] = self._parents[self._parents[parent]]
        self._parents[site] = parent
        return parent

    def join(self, site: Site, other: Site) -> None:
        self._parents[self.find(site)] = self.find(other)

    def sites(self) -> list[Site]:
        return list(self._parents)
