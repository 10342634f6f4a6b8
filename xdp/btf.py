"""From an object's BTF to ctypes classes: the C headers stay the only definition of every struct.

Enters: raw BTF (Documentation/bpf/btf.rst). Leaves: one ctypes class for each struct, with big-endian fields where the
header says __be16 or __be32, name -> value for enums, and the (key, value) types of maps. Only what shared structs use
is known: integers, arrays, structs, enums.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Any

INT, PTR, ARRAY, STRUCT, UNION, ENUM, TYPEDEF, VAR, DATASEC = 1, 2, 3, 4, 5, 6, 8, 14, 15
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


class Btf:
    """The types of one object, by name."""

    def __init__(self, raw: bytes) -> None:
        header_size, types_at, types_size, strings_at, strings_size = struct.unpack_from("=4x5I", raw)
        self._strings = raw[header_size + strings_at :][:strings_size]
        self._types = [_Type("void", 0, 0, ()), *self._read(raw[header_size + types_at :][:types_size])]
        self._classes: dict[int, CType] = {}
        self._sections: dict[str, CType] = {}

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
        extra = self._types[self._ids[ENUM, name]].extra
        return {self._string(n): value for n, value in zip(extra[::2], extra[1::2], strict=True)}

    def section(self, name: str) -> CType:
        """A data section (.rodata, .data) as a ctypes class with a field for each of its variables."""
        if name not in self._sections:
            variables = [(self._types[var], at) for var, at, _ in self._types[self._ids[DATASEC, name]].triples]
            fields = [(variable.name, variable.size_or_type, at * 8) for variable, at in variables]
            self._sections[name] = self._structure(name, sorted(fields, key=lambda f: f[2]))
        return self._sections[name]

    def map_types(self, name: str) -> tuple[CType, CType] | None:
        """(key, value) as the map's definition in .maps says; None for a map that is not defined there."""
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
        return made
