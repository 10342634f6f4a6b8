"""The slot and the recorded members that a flow's hash leads to."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import Any

from lb.hashing.flow_hash import flow_hash, slot_of


@dataclass(frozen=True, slots=True)
class FlowQuery:
    """Flows to one service's VIP that have been seen lately."""

    address: bytes  # the VIP's first, packed: 4 or 16 bytes
    prefix_length: int
    ports: range
    protocol: int
    oldest_ns: int  # CLOCK_MONOTONIC
    seed: int
    ring_size: int

    def includes(self, key: Any, flow: Any) -> bool:
        size = len(self.address)
        return (
            flow.seen_ns >= self.oldest_ns
            and key.protocol == self.protocol
            and key.destination_port in self.ports
            and all(a & m == b for a, m, b in zip(bytes(key.address)[size:], self.mask, self.address, strict=False))
        )

    @property
    def mask(self) -> bytes:
        """As long as the address: the bits of its prefix."""
        bits = 8 * len(self.address)
        return ((1 << bits) - (1 << bits - self.prefix_length)).to_bytes(len(self.address), "big")

    def slot(self, key: Any) -> int:
        source = struct.unpack(f"={len(self.address) // 4}I", bytes(key.address)[: len(self.address)])
        return slot_of(flow_hash(self.seed, key.protocol, socket.htons(key.source_port), source), self.ring_size)
