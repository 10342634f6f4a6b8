"""Blocks of an array that several services share: where there is room for one more (pure)."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from typing import Self


class Blocks:
    """The blocks in use of an array of `capacity` elements. First fit: what was freed is filled before the end."""

    def __init__(self, used: Iterable[tuple[int, int]], capacity: int) -> None:
        self._used = sorted(used)
        self._capacity = capacity

    def copy(self) -> Self:
        return type(self)(self._used, self._capacity)

    def take(self, size: int) -> int | None:
        """The base of a new block; None where there is no room."""
        base = 0
        for start, length in self._used:
            if start - base >= size:
                break
            base = start + length
        if base + size > self._capacity:
            return None
        insort(self._used, (base, size))
        return base

    def release(self, base: int, size: int) -> None:
        self._used.remove((base, size))


def member_block_size(members: int) -> int:
    """A power of two with room to grow: twice the members, and place 0, which means "none"."""
    return max(32, 1 << (2 * members).bit_length())
