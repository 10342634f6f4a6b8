"""Counts of packets as a capture reports them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Counts:
    """matched = captured + lost + over."""

    matched: int = 0
    captured: int = 0
    lost: int = 0
    over: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.matched + other.matched,
            self.captured + other.captured,
            self.lost + other.lost,
            self.over + other.over,
        )
