"""The hash that gives a flow its slot, as xdp/bpf/lb/ring.h computes it (pure).

In come the fields of a flow, or entries of the flow table; out go hashes and slots. Integers are as the program sees
them: 32-bit words and ports loaded from network byte order by a little-endian CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

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
