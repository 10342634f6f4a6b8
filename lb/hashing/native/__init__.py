"""The loops of lb.hashing.maglev, lb.hashing.ring and lb.hashing.flow_hash in C: ring.so, through ctypes.

Every function here but `compiled` is the twin of a pure one, which says what it does and is the oracle of its tests:
the same arguments go in, the same result comes out, or None for arguments that only the pure function can judge.
`compiled` is the one place that chooses between the two. Without ring.so, which `make build` compiles and the wheel
carries, all is done by the pure functions, tens of times slower.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Callable, Collection, Sequence
from ctypes import c_int, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from lb.hashing.flow_query import FlowQuery

P = ParamSpec("P")
R = TypeVar("R")

_NUMBERS = 1 << 15  # 0 and the members of a service

_SIGNATURES = {
    "maglev_claims": (c_int, c_void_p, c_void_p, c_void_p, c_uint32, c_uint32, c_void_p),
    "ring_transition": (c_int, c_void_p, c_void_p, c_void_p, c_uint32, c_void_p),
    "ring_expire": (None, c_void_p, c_uint32, c_void_p, c_uint32, c_void_p),
    "ring_costs": (None, c_void_p, c_void_p, c_uint32, c_void_p),
    "ring_changed_runs": (c_uint32, c_void_p, c_void_p, c_uint32, c_uint32, c_void_p),
    "flow_recorded_slots": (c_uint32, c_void_p, c_void_p, c_void_p, c_uint32, c_void_p),
}


def _load() -> Any:
    """ring.so, or None where it is not built."""
    try:
        library = ctypes.CDLL(str(Path(__file__).with_name("ring.so")))
    except OSError:
        return None
    for name, (result, *arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


library: Any = _load()


def compiled(twin: Callable[P, R | None]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Lets `twin` do the work of the decorated function, wherever it can; `__wrapped__` is the pure function."""

    def decorate(pure: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(pure)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            result = _attempt(twin, *args, **kwargs) if library else None
            return pure(*args, **kwargs) if result is None else result

        return call

    return decorate


def _attempt(twin: Callable[P, R | None], *args: P.args, **kwargs: P.kwargs) -> R | None:
    try:
        return twin(*args, **kwargs)
    except OverflowError:  # a number that does not fit its array
        return None


def _at(values: array[int]) -> int:
    """The address; good for as long as the caller holds the array."""
    return values.buffer_info()[0]


def _array(typecode: str, values: Collection[int]) -> array[int]:
    return values if isinstance(values, array) and values.typecode == typecode else array(typecode, values)


def _zeros(typecode: str, count: int) -> array[int]:
    return array(typecode, bytes(count * array(typecode).itemsize))


def claims(
    weights: Sequence[int], permutations: Sequence[tuple[int, int]], labels: Sequence[int], size: int
) -> array[int] | None:
    if not all(weights):
        return None
    walks = array("I", [number for offset_and_skip in permutations for number in offset_and_skip])
    given, names, table = array("I", weights), array("H", labels), _zeros("H", size)
    if library.maglev_claims(_at(given), _at(walks), _at(names), len(given), size, _at(table)) < 0:
        raise MemoryError
    return table


def transition(words: array[int], table: Sequence[int], alive: Collection[int]) -> array[int] | None:
    if len(words) != len(table):
        return None
    wanted, flags, new = _array("H", table), _flags(alive), _zeros("I", len(words))
    in_range = library.ring_transition(_at(words), _at(wanted), _at(flags), len(words), _at(new)) == 0
    return new if in_range else None


def _flags(members: Collection[int]) -> array[int]:
    """One for each number; none for 0, which is no member."""
    flags = _zeros("B", _NUMBERS)
    for member in members:
        if 0 < member < _NUMBERS:
            flags[member] = 1
    return flags


def expire(words: array[int], tracked: Collection[int] = ()) -> array[int]:
    slots, new = _array("I", tracked), _zeros("I", len(words))
    library.ring_expire(_at(words), len(words), _at(slots), len(slots), _at(new))
    return new


def costs(old: array[int], new: array[int]) -> tuple[int, int, int] | None:
    if len(old) != len(new):
        return None
    moved_minimum_in_transition = _zeros("I", 3)
    library.ring_costs(_at(old), _at(new), len(new), _at(moved_minimum_in_transition))
    moved, minimum, in_transition = moved_minimum_in_transition
    return moved, minimum, in_transition


def runs(old: array[int], new: array[int], gap: int) -> list[tuple[int, int]] | None:
    if len(old) != len(new):
        return None
    ends = _zeros("I", 2 * (len(new) // (gap + 1) + 1))
    count = library.ring_changed_runs(_at(old), _at(new), len(new), gap, _at(ends))
    return list(zip(ends[: 2 * count : 2], ends[1 : 2 * count : 2], strict=True))


class _FlowQuery(ctypes.Structure):
    """struct query, ring.c."""

    _fields_ = (
        ("seed", c_uint64),
        ("oldest_ns", c_uint64),
        ("ring_size", c_uint32),
        ("words", c_uint32),
        ("address", c_uint8 * 16),
        ("mask", c_uint8 * 16),
        ("first_port", c_uint16),
        ("last_port", c_uint16),
        ("protocol", c_uint8),
    )

    @classmethod
    def of(cls, query: FlowQuery) -> _FlowQuery:
        return cls(
            seed=query.seed,
            oldest_ns=max(query.oldest_ns, 0),
            ring_size=query.ring_size,
            words=len(query.address) // 4,
            address=(c_uint8 * 16)(*query.address),
            mask=(c_uint8 * 16)(*query.mask),
            first_port=query.ports.start,
            last_port=query.ports.stop - 1,
            protocol=query.protocol,
        )


def recorded_slots(keys: Any, flows: Any, query: FlowQuery) -> set[int] | None:
    if len(keys) != len(flows):
        return None
    slots = _zeros("I", len(keys))
    c_query = ctypes.byref(_FlowQuery.of(query))
    count = library.flow_recorded_slots(c_query, ctypes.byref(keys), ctypes.byref(flows), len(keys), _at(slots))
    return set(slots[:count])
