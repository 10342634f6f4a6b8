"""Maps handed on from one version of an object to the next: shared where their shape is the same, else carried over.

Enters: an object in force, and one that is to take its place. Leaves: maps of the new one with the contents of the old,
field by field by their names, as BTF has them; what is new is zero, what is gone is left out. A field may become wider,
not narrower. What shapes do not tell, numbers that mean something else now, enums and `enum schema` (names.h) do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from xdp.btf import Btf, CType, is_big_endian, layout
from xdp.errors import CannotCarry
from xdp.maps import Map
from xdp.object import BpfObject, Loaded

ARRAYS = {2, 6}  # BPF_MAP_TYPE_ARRAY, _PERCPU_ARRAY
LRU_HASH = 9
BPF_F_MMAPABLE = 1 << 10

CONSTANTS = ".rodata"  # the new object's own
NAMES = "names"  # the struct whose fields are the enums that user space knows
COUNTED = {"counters", "reasons"}
BY_NAME = {"reasons": "reason"}  # the map that an enum counts in: numbers may change, names stay
SEEN = "seen_ns"  # the field that says which of two entries is the later one


@dataclass(frozen=True, slots=True)
class Piece:
    """So many bytes, at these offsets in the old value and in the new."""

    old_at: int
    new_at: int
    size: int


def check_meanings(old: Btf, new: Btf) -> None:
    """Raises CannotCarry where a number in a map means something else to the new object."""
    known = old.enums_of(NAMES)
    for name, enum in new.enums_of(NAMES).items():
        for each in enum.keys() & known.get(name, {}).keys():
            if enum[each] != known[name][each] and name not in BY_NAME.values() and not each.endswith("_COUNT"):
                raise CannotCarry(f"{each} was {known[name][each]} and is {enum[each]} now")


def pieces(old: CType, new: CType, where: str) -> Iterator[Piece]:
    """What to copy so that a value of type `old` becomes one of type `new`. Raises CannotCarry, naming `where`."""
    if layout(old) == layout(new):
        yield Piece(0, 0, ctypes.sizeof(old))
    elif hasattr(old, "_fields_") and hasattr(new, "_fields_"):
        yield from _pieces_of_struct(old, new, where)
    elif hasattr(old, "_length_") and hasattr(new, "_length_") and old._length_ <= new._length_:
        yield from _pieces_of_array(old, new, where)
    elif _is_wider(old, new):
        yield Piece(0, 0, ctypes.sizeof(old))
    else:
        raise CannotCarry(f"{where}: cannot be converted to the new layout")


def _pieces_of_struct(old: CType, new: CType, where: str) -> Iterator[Piece]:
    fields = {name: kind for name, kind, *_ in old._fields_}
    for name, kind, *_ in new._fields_:
        if name in fields:
            bases = getattr(old, name).offset, getattr(new, name).offset
            yield from _moved(pieces(fields[name], kind, f"{where}.{name}"), *bases)


def _pieces_of_array(old: CType, new: CType, where: str) -> Iterator[Piece]:
    sizes = ctypes.sizeof(old._type_), ctypes.sizeof(new._type_)
    for at in range(old._length_):
        yield from _moved(pieces(old._type_, new._type_, where), at * sizes[0], at * sizes[1])


def _moved(found: Iterator[Piece], old_base: int, new_base: int) -> Iterator[Piece]:
    return (Piece(each.old_at + old_base, each.new_at + new_base, each.size) for each in found)


def _is_wider(old: CType, new: CType) -> bool:
    """Integers of the host's byte order, which is little-endian: zeros follow."""
    return _is_integer(old) and _is_integer(new) and ctypes.sizeof(old) <= ctypes.sizeof(new)


def _is_integer(kind: CType) -> bool:
    return issubclass(kind, ctypes._SimpleCData) and not is_big_endian(kind)


def merged(found: Iterator[Piece]) -> list[Piece]:
    """Neighbours become one."""
    whole: list[Piece] = []
    for each in found:
        last = whole[-1] if whole else None
        if last and (last.old_at + last.size, last.new_at + last.size) == (each.old_at, each.new_at):
            whole[-1] = Piece(last.old_at, last.new_at, last.size + each.size)
        else:
            whole.append(each)
    return whole


class Succession:
    """From the maps of `old`, which are in force, to those of `new`: made before `new` is loaded, for it to share what
    it can. Others refer to the maps in `kept`, which have to be shared. Raises CannotCarry.

    What is not shared is copied. The old program writes on meanwhile, until the new one has its place: then it remains
    to catch_up(), and to add what was counted_since().
    """

    def __init__(self, old: Loaded, new: BpfObject, kept: Collection[str] = ()) -> None:
        check_meanings(old.types, new.types)
        self._old, self._new = old, new
        self._carried: list[str] = []
        self._counts: dict[str, Counts] = {}
        for name in new.map_names:
            if name not in old.map_names or name == CONSTANTS:
                continue
            if self._is_alike(name):
                new.reuse(name, old.map(name).fd)
            elif name in kept:
                raise CannotCarry(f"map {name}: layout changed, and other maps refer to it")
            else:
                self._carried.append(name)

    def _is_alike(self, name: str) -> bool:
        info = self._old.map(name).info
        shape, types = (
            (info.type, info.map_flags, info.max_entries),
            [each.map_types(name) for each in (self._old, self._new)],
        )
        if shape != self._new.shape(name) or [*map(layout, types[0])] != [*map(layout, types[1])]:
            return False
        return name not in BY_NAME or self._old.types.enum(BY_NAME[name]) == self._new.types.enum(BY_NAME[name])

    def copy(self) -> None:
        """Once the new object is loaded."""
        carriers = [Carrier(*self._both(name)) for name in self._carried if name not in COUNTED]
        self._counts = {name: Counts(*self._both(name), self._numbers(name)) for name in COUNTED & {*self._carried}}
        for carrier in carriers:
            carrier.copy()
        for counts in self._counts.values():
            counts.copy()

    def _both(self, name: str) -> tuple[Map, Map]:
        return self._old.map(name), self._new.map(name)

    def _numbers(self, name: str) -> dict[int, int]:
        """Old index -> new, where an enum says what an index is."""
        if name not in BY_NAME:
            return {number: number for number in range(min(map(len, self._both(name))))}
        old, new = (each.types.enum(BY_NAME[name]) for each in (self._old, self._new))
        there = range(len(self._new.map(name)))
        return {old[each]: new[each] for each in old.keys() & new.keys() if new[each] in there}

    def counted_since(self) -> Iterator[tuple[str, int, Any]]:
        """What the old program has counted since `copy`: the map, the index, and how much in the map's own type."""
        for name, counts in self._counts.items():
            yield from ((name, index, more) for index, more in counts.since())

    @property
    def has_to_catch_up(self) -> bool:
        """Whether flows have to be copied: while that goes on, some may be missing."""
        return any(self._old.map(name).info.type == LRU_HASH for name in self._carried)


def catch_up(old: Loaded, new: Loaded) -> int:
    """Entries that tables of flows have got while they were copied, of two with one key the later: how many."""
    names = [name for name in new.map_names if name in old.map_names and new.map(name).info.type == LRU_HASH]
    changed = (name for name in names if old.map(name).info.id != new.map(name).info.id)
    return sum(Carrier(old.map(name), new.map(name)).catch_up() for name in changed)


class Counts:
    """A per-CPU array whose values only grow: copied as it is at one moment. numbers: old index -> new."""

    def __init__(self, old: Map, new: Map, numbers: Mapping[int, int]) -> None:
        self._old, self._new, self._numbers = old, new, numbers
        self._copied: dict[int, bytes] = {}

    def _raw(self) -> Iterator[tuple[int, bytes]]:
        """By old index."""
        for keys, values in self._old.raw_batches():
            yield from zip(memoryview(keys).cast("I"), _cut(values, self._old.value_stride), strict=True)

    def copy(self) -> None:
        self._copied = {index: raw for index, raw in self._raw() if any(raw) and index in self._numbers}
        for index, raw in self._copied.items():
            self._new.set_total(self._numbers[index], self._as_new(self._old.total_of(raw)))

    def since(self) -> Iterator[tuple[int, Any]]:
        """By new index, what has been added."""
        nothing = bytes(self._old.value_stride)
        for index, raw in self._raw():
            before = self._copied.get(index, nothing)
            if raw != before and index in self._numbers:
                now, then = (self._as_new(self._old.total_of(each)) for each in (raw, before))
                yield self._numbers[index], _difference(now, then)

    def _as_new(self, total: Any) -> Any:
        kind = self._new.value_type
        if isinstance(total, int):
            return total
        names = _field_names(kind) & _field_names(self._old.value_type)
        return kind(**{name: getattr(total, name) for name in names})


def _difference(one: Any, other: Any) -> Any:
    if isinstance(one, int):
        return one - other
    return type(one)(**{name: getattr(one, name) - getattr(other, name) for name in _field_names(type(one))})


class Carrier:
    """From one map to the next. Raises CannotCarry, before anything is written."""

    def __init__(self, old: Map, new: Map) -> None:
        self._where = f"map {old.name}"
        if old.info.type != new.info.type:
            raise CannotCarry(f"{self._where}: type changed")
        self._check_key(old.key_type, new.key_type)
        self._old, self._new = old, new
        self._keys = self._converter(
            old.key_type, new.key_type, ctypes.sizeof(old.key_type), ctypes.sizeof(new.key_type)
        )
        strides = (each.value_stride // each.values_each for each in (old, new))
        self._values = self._converter(old.value_type, new.value_type, *strides)

    def _check_key(self, old: CType, new: CType) -> None:
        """Of two entries, a key that loses a field would make one."""
        lost = _field_names(old) - _field_names(new)
        if lost:
            raise CannotCarry(f"{self._where}: key no longer has {', '.join(sorted(lost))}")

    def _converter(self, old: CType, new: CType, old_stride: int, new_stride: int) -> Callable[[bytes], bytes]:
        """For values that lie one after the other, each filling its stride."""
        parts = merged(pieces(old, new, self._where))

        def convert(raw: bytes) -> bytes:
            made = bytearray(len(raw) // old_stride * new_stride)
            for part in parts:
                for at in range(part.size):
                    made[part.new_at + at :: new_stride] = raw[part.old_at + at :: old_stride]
            return bytes(made)

        return (lambda raw: raw) if layout(old) == layout(new) and old_stride == new_stride else convert

    def copy(self) -> None:
        if self._old.info.map_flags & self._new.info.map_flags & BPF_F_MMAPABLE:
            self._copy_memory()
            return
        for keys, values in self._old.raw_batches():
            self._put(self._keys(keys), self._values(values))

    def _put(self, keys: bytes, values: bytes) -> None:
        """Of an array that is shorter now, the head."""
        count = len(keys) // ctypes.sizeof(self._new.key_type)
        if self._new.info.type in ARRAYS:
            count = sum(key < len(self._new) for key in memoryview(keys).cast("I"))
        if count:
            self._new.put_raw(
                keys[: count * ctypes.sizeof(self._new.key_type)], values[: count * self._new.value_stride]
            )

    def _copy_memory(self) -> None:
        strides = [ctypes.sizeof(each.value_type) + 7 & ~7 for each in (self._old, self._new)]
        convert = self._converter(self._old.value_type, self._new.value_type, *strides)
        made = convert(self._old.bytes()[: min(len(self._old), len(self._new)) * strides[0]])
        self._new.bytes()[: len(made)] = made

    def catch_up(self) -> int:
        """Of a table of flows: what the old map has got since `copy`."""
        there = dict(self._entries(self._new.raw_batches()))
        converted = ((self._keys(keys), self._values(values)) for keys, values in self._old.raw_batches())
        found = ((key, value, there.get(key)) for key, value in self._entries(converted))
        late = [(key, value) for key, value, other in found if other != value and self._is_later(value, other)]
        if late:
            self._new.put_raw(b"".join(key for key, _ in late), b"".join(value for _, value in late))
        return len(late)

    def _entries(self, found: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
        for keys, values in found:
            yield from zip(
                _cut(keys, ctypes.sizeof(self._new.key_type)), _cut(values, self._new.value_stride), strict=True
            )

    def _is_later(self, value: bytes, other: bytes | None) -> bool:
        kind = self._new.value_type
        if other is None or not hasattr(kind, SEEN):
            return other is None
        seen, seen_by_other = (getattr(kind.from_buffer_copy(each), SEEN) for each in (value, other))
        return bool(seen > seen_by_other)


def _field_names(kind: CType) -> set[str]:
    return {name for name, *_ in getattr(kind, "_fields_", ())}


def _cut(raw: bytes, size: int) -> Iterator[bytes]:
    return (raw[at : at + size] for at in range(0, len(raw), size))
