"""Backends and their weights -> Maglev lookup table.

In come the weighted backends of one service and the size of its ring; out goes an array that names
a backend for every slot. The table is that of section 3.4 of "Maglev: A Fast and Reliable Software
Network Load Balancer" (NSDI'16): each backend has a permutation of all slots, and the backends
take turns, each claiming the first slot of its permutation that is still free. Nothing but names,
weights and size decides, so every node computes the same table.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from itertools import count
from math import isqrt

from lb.hashing import native

RING_SIZES = range(251, 131072)  # the first and the last of them are primes
WEIGHTS = range(65536)


def table(weights: Mapping[str, int], size: int, labels: Sequence[int] = ()) -> array[int]:
    """The backend of each slot.

    weights: backend name ("10.0.0.11:80") -> weight, 0 to 65535. Weight 0 takes no slot. Only
    ratios count: equal weights, whatever they are, give the unweighted table of the paper; `turns`
    says what others give.
    size: number of slots, a prime.
    labels: what stands for each backend in the table, in the iteration order of `weights`, 0 to
    65535; without them its position in that order.

    Returns `size` entries of type "H"; no entry at all if no backend has a weight. Giving the same
    backends in another order changes the positions, never the backend that a slot goes to.

    Raises ValueError for a size that is not a prime or a weight out of range.
    """
    _check(weights, size)
    names = sorted(name for name, weight in weights.items() if weight)
    if not names:
        return array("H")
    label = dict(zip(weights, labels or range(len(weights)), strict=True))
    return claims(
        [weights[name] for name in names],
        [permutation(name, size) for name in names],
        [label[name] for name in names],
        size,
    )


def _check(weights: Mapping[str, int], size: int) -> None:
    # With a composite size a permutation can miss slots, and `populate` would search for ever.
    if not is_prime(size):
        raise ValueError(f"ring size {size}: not a prime")
    for name, weight in weights.items():
        if weight not in WEIGHTS:
            raise ValueError(f"backend {name}: weight {weight} is not in 0..{WEIGHTS[-1]}")


@native.compiled(native.claims)
def claims(
    weights: Sequence[int], permutations: Sequence[tuple[int, int]], labels: Sequence[int], size: int
) -> array[int]:
    """The claims of the backends, each with its weight, permutation and label: slot -> label.

    Weights are 1 to 65535, backends at most 65536, and the size is a prime.
    """
    owners = populate(turns(weights, size), permutations, size)
    return array("H", [labels[owner] for owner in owners])


def turns(weights: Sequence[int], size: int) -> list[int]:
    """Whose turn it is to claim a slot, for `size` claims: indices into `weights`, each 1 to 65535.

    Turn k (from 0) of a backend is due at time k / weight; turns due at the same time go by index.
    Equal weights therefore go round and round. At any time each backend has had its exact share,
    rounded up (Adams' method of apportionment), so even the smallest weight gets a slot, as long as
    there are slots for all. A changed weight moves only the turns of its own backend among those of
    the others, which keep their order: that is what keeps the disruption small.

    Two times k / weight that differ do so by more than 2**-32, since weights are below 2**16;
    fixed-point numbers with 32 fractional bits put them in their exact order.
    """
    backends, total = len(weights), sum(weights)
    due = [
        ((k << 32) // weight) * backends + backend
        for backend, weight in enumerate(weights)
        for k in range(size * weight // total + 1)
    ]
    due.sort()
    return [time_and_backend % backends for time_and_backend in due[:size]]


def permutation(name: str, size: int) -> tuple[int, int]:
    """(offset, skip) of a backend: it prefers slot (offset + j * skip) % size in its j-th place.

    Both come from the 16-byte BLAKE2b digest of the name in UTF-8: the first eight bytes, little
    endian, modulo size, and the last eight modulo (size - 1), plus 1.
    """
    digest = blake2b(name.encode(), digest_size=16).digest()
    offset = int.from_bytes(digest[:8], "little") % size
    skip = int.from_bytes(digest[8:], "little") % (size - 1) + 1
    return offset, skip


def populate(order: Iterable[int], permutations: Sequence[tuple[int, int]], size: int) -> array[int]:
    """The claims made in `order` (indices into `permutations`, `size` of them): slot -> index."""
    owners = array("H", bytes(2 * size))
    taken = bytearray(size)
    slots = [offset for offset, _ in permutations]
    skips = [skip for _, skip in permutations]
    for backend in order:
        slot, skip = slots[backend], skips[backend]
        while taken[slot]:
            slot += skip
            if slot >= size:  # cheaper than a modulo
                slot -= size
        taken[slot] = 1
        owners[slot] = backend
        slots[backend] = slot
    return owners


def is_prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, isqrt(n) + 1))


def nearest_primes(n: int) -> tuple[int, int]:
    """The ring sizes to offer instead of `n`: the nearest prime at or below it, and at or above it.

    Both are within RING_SIZES; an `n` outside is taken for the nearest end, itself a prime.
    """
    n = min(max(n, RING_SIZES[0]), RING_SIZES[-1])
    below = next(size for size in count(n, -1) if is_prime(size))
    above = next(size for size in count(n) if is_prime(size))
    return below, above
