"""The hash that gives a flow its slot, as xdp/bpf/lb/ring.h computes it (pure).

In come the fields of a flow, or entries of the flow table; out go hashes and slots. Integers are as the program sees
them: 32-bit words and ports loaded from network byte order by a little-endian CPU.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lb import native

_MASK = (1 << 64) - 1


def mix(x: int) -> int:
    """Finaliser of SplitMix64."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31


def flow_hash(seed: int, protocol: int, source_port: int, source: Sequence[int]) -> int:
    """64 bits. source: the client's address in one word (IPv4) or four (IPv6)."""
    ports = protocol << 48 | source_port << 32
    first = mix(seed ^ (ports | source[0]))
    if len(source) == 1:
        return first
    return mix(first ^ source[1] << 32 ^ source[2] ^ mix((first + source[3]) & _MASK))


def slot_of(hash_value: int, ring_size: int) -> int:
    return (hash_value >> 32) * ring_size >> 32


@dataclass(frozen=True, slots=True)
class Sought:
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


@native.compiled(native.recorded_slots)
def recorded_slots(keys: Any, flows: Any, sought: Sought) -> set[int]:
    """The slots of those entries of the flow table that are sought.

    keys: a ctypes array of struct flow_key4 or flow_key, as the family of the sought address wants.
    flows: one of struct flow, as long. ValueError if the lengths differ.
    """
    return {sought.slot(key) for key, flow in zip(keys, flows, strict=True) if sought.includes(key, flow)}
