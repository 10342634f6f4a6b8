"""From an object's BTF to ctypes classes: the C headers stay the only definition of every struct.

Enters: raw BTF (Documentation/bpf/btf.rst). Leaves: one ctypes class for each struct, with big-endian fields where the
header says __be16 or __be32, name -> value for enums, and the (key, value) types of maps. Only what shared structs use
is known: integers, arrays, structs, enums.

Of an older object the types can be asked for as a newer one has them: a number that a struct lacks is zero, and stays
it.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from xdp.errors import NotSupported

INT, PTR, ARRAY, STRUCT, UNION, ENUM, TYPEDEF, VAR, DATASEC = 1, 2, 3, 4, 5, 6, 8, 14, 15
DATA_SECTIONS = (".rodata", ".data", ".bss")
_MODIFIERS = {9, 10, 11, 18}  # volatile, const, restrict, type tag
_EXTRA_BYTES = {INT: 4, ARRAY: 12, VAR: 4, 17: 4}
_EXTRA_BYTES_EACH = {STRUCT: 12, UNION: 12, ENUM: 8, 13: 8, DATASEC: 12, 19: 12}
_INTEGERS = {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}

CType = Any  # ctypes has no common type that a checker knows


@dataclass(frozen=True, slots=True)
class _Type:
    name: str
    kind: int
    size_or_type: int
    extra: tuple[int, ...]

    @property
    def triples(self) -> list[tuple[int, int, int]]:
        return list(zip(self.extra[::3], self.extra[1::3], self.extra[2::3], strict=True))


def layout(kind: CType) -> object:
    """What two types have in common whose values are the same bytes with the same meaning."""
    if hasattr(kind, "_fields_"):
        fields = ((name, getattr(kind, name).offset, layout(of)) for name, of, *_ in kind._fields_)
        return ctypes.sizeof(kind), tuple(fields)
    if hasattr(kind, "_length_"):
        return kind._length_, layout(kind._type_)
    return ctypes.sizeof(kind), is_big_endian(kind)


def is_big_endian(kind: CType) -> bool:
    """Of an integer of more than one byte."""
    return kind is not kind.__ctype_le__


class Enumerators(dict[str, int]):
    """Name -> value. Raises NotSupported for a name that the object does not know."""

    def __missing__(self, name: str) -> int:
        raise NotSupported(f"{name}: not supported by the loaded program, which is older")


class Btf:
    """The types of one object, by name. `expected`: those of a newer one, whose fields are to be found here too."""

    def __init__(self, raw: bytes, expected: Btf | None = None) -> None:
        self.raw, self._expected = raw, expected
        header_size, types_at, types_size, strings_at, strings_size = struct.unpack_from("=4x5I", raw)
        self._strings = raw[header_size + strings_at :][:strings_size]
        self._types = [_Type("void", 0, 0, ()), *self._read(raw[header_size + types_at :][:types_size])]
        self._classes: dict[int, CType] = {}
        self._sections: dict[str, CType] = {}
        self._map_types: dict[str, tuple[CType, CType] | None] = {}

    def _string(self, offset: int) -> str:
        return self._strings[offset : self._strings.index(b"\0", offset)].decode()

    def _read(self, raw: bytes) -> list[_Type]:
        types, at = [], 0
        while at < len(raw):
            name, info, size_or_type = struct.unpack_from("=3I", raw, at)
            kind, members = info >> 24 & 0x1F, info & 0xFFFF
            size = _EXTRA_BYTES.get(kind, 0) + members * _EXTRA_BYTES_EACH.get(kind, 0)
            extra = struct.unpack_from(f"={size // 4}I", raw, at + 12)
            types.append(_Type(self._string(name), kind, size_or_type, extra))
            at += 12 + size
        return types

    @cached_property
    def _ids(self) -> dict[tuple[int, str], int]:
        return {(t.kind, t.name): number for number, t in enumerate(self._types)}

    def struct(self, name: str) -> CType:
        """The ctypes class of `struct name`. Raises KeyError."""
        return self._ctype(self._ids[STRUCT, name])

    def enum(self, name: str) -> dict[str, int]:
        """Name -> value, in the order of the header. Raises KeyError."""
        return self._enumerators(self._types[self._ids[ENUM, name]])

    def _enumerators(self, enum: _Type) -> Enumerators:
        pairs = zip(enum.extra[::2], enum.extra[1::2], strict=True)
        return Enumerators({self._string(n): value for n, value in pairs})

    def enums_of(self, name: str) -> dict[str, dict[str, int]]:
        """Of the fields of `struct name` that are enums: their enumerators, by the enum's name."""
        fields = (self._types[type_id] for _, type_id, _ in self._types[self._ids[STRUCT, name]].triples)
        return {field.name: self._enumerators(field) for field in fields if field.kind == ENUM}

    @property
    def map_names(self) -> list[str]:
        """Those of .maps, and the data sections that are maps too."""
        sections = [t.name for t in self._types if t.kind == DATASEC]
        maps = (self._types[self._ids[DATASEC, ".maps"]].triples) if ".maps" in sections else []
        return [*(self._types[var].name for var, _, _ in maps), *(name for name in sections if name in DATA_SECTIONS)]

    def section(self, name: str) -> CType:
        """A data section (.rodata, .data) as a ctypes class with a field for each of its variables."""
        if name not in self._sections:
            variables = [(self._types[var], at) for var, at, _ in self._types[self._ids[DATASEC, name]].triples]
            fields = [(variable.name, variable.size_or_type, at * 8) for variable, at in variables]
            self._sections[name] = self._structure(name, sorted(fields, key=lambda f: f[2]))
        return self._sections[name]

    def map_types(self, name: str) -> tuple[CType, CType] | None:
        """(key, value) as the map's definition in .maps says; None for a map that is not defined there."""
        if name not in self._map_types:
            self._map_types[name] = self._read_map_types(name)
        return self._map_types[name]

    def _read_map_types(self, name: str) -> tuple[CType, CType] | None:
        if (VAR, name) not in self._ids or (DATASEC, ".maps") not in self._ids:
            return None
        definition = self._types[self._types[self._ids[VAR, name]].size_or_type]
        members = {self._string(n): type_id for n, type_id, _ in definition.triples}
        key, value = (self._types[members[side]].size_or_type for side in ("key", "value"))
        return self._ctype(key), self._ctype(value)

    def _ctype(self, number: int) -> CType:
        if number not in self._classes:
            self._classes[number] = self._make(self._types[number])
        return self._classes[number]

    def _make(self, t: _Type) -> CType:
        if t.kind in (TYPEDEF, *_MODIFIERS):
            inner = self._ctype(t.size_or_type)
            return inner.__ctype_be__ if t.name in ("__be16", "__be32") else inner
        if t.kind == ARRAY:
            return self._ctype(t.extra[0]) * t.extra[2]
        if t.kind == STRUCT:
            return self._structure(t.name, [(self._string(n), type_id, bit) for n, type_id, bit in t.triples])
        if t.kind in (INT, ENUM):
            return _INTEGERS[t.size_or_type]
        raise TypeError(f"BTF kind {t.kind} ({t.name or 'anonymous'}): not for structs shared with user space")

    def _structure(self, name: str, members: list[tuple[str, int, int]]) -> CType:
        """`__slots__` is empty, so that a misspelt field raises instead of being forgotten."""
        fields = [(field, self._ctype(type_id)) for field, type_id, _ in members]
        made: CType = type(name, (ctypes.Structure,), {"__slots__": (), "_fields_": fields})
        for field, _, bit in members:
            if getattr(made, field).offset * 8 != bit:
                raise TypeError(f"struct {name}: field {field} is not where C has it")
        self._add_lacking(made)
        return made

    def _add_lacking(self, made: CType) -> None:
        name = made.__name__
        if self._expected is None or (STRUCT, name) not in self._expected._ids:
            return
        known = {field for field, *_ in made._fields_}
        for field, kind, *_ in self._expected.struct(name)._fields_:
            if field not in known:
                setattr(made, field, _lacking(name, field, kind))


def _lacking(struct_name: str, field: str, kind: CType) -> property:
    """What is there in the place of a field."""
    why = f"struct {struct_name} has no {field} in the loaded program, which is older"
    is_number = issubclass(kind, ctypes._SimpleCData)

    def read(_: object) -> int:
        if not is_number:
            raise NotSupported(why)
        return 0

    def write(_: object, value: int) -> None:
        if value:
            raise NotSupported(why)

    return property(read, write)
