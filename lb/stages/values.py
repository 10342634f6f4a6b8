"""What a user's program keeps, as plain values: numbers, text, addresses, dicts of fields.

Enters: ctypes objects as BCC makes them of C declarations, and the fields of an event as BCC names them. Leaves: what
`json` can write. Integers are shown as the host has them, as in BCC (bpf_ntohs() is the author's); struct in_addr and
struct in6_addr become addresses, char[] text, u8[6] a MAC address, other u8[] hexadecimal.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from lb.errors import InvalidInput

CType = Any  # ctypes has no common type that a checker knows
MAC_BYTES = 6
PADDING = "__pad_"  # how BCC calls the fields that it puts into holes

ADDRESSES = {"in_addr": IPv4Address, "in6_addr": IPv6Address}


class _InAddr(ctypes.Structure):
    _fields_ = (("s_addr", ctypes.c_uint32),)


class _In6Addr(ctypes.Structure):
    _fields_ = (("u6_addr32", ctypes.c_uint32 * 4),)


_InAddr.__name__, _In6Addr.__name__ = ADDRESSES

_SIZES = (8, 16, 32, 64)
_FIELD_TYPES: dict[str, CType] = {
    "bool": ctypes.c_bool,
    "_Bool": ctypes.c_bool,
    "char": ctypes.c_char,
    "signed char": ctypes.c_int8,
    "unsigned char": ctypes.c_uint8,
    "short": ctypes.c_int16,
    "unsigned short": ctypes.c_uint16,
    "int": ctypes.c_int32,
    "unsigned int": ctypes.c_uint32,
    "long": ctypes.c_int64,
    "unsigned long": ctypes.c_uint64,
    "long long": ctypes.c_int64,
    "unsigned long long": ctypes.c_uint64,
    "size_t": ctypes.c_uint64,
    "struct in_addr": _InAddr,
    "struct in6_addr": _In6Addr,
    **{f"{prefix}{bits}": getattr(ctypes, f"c_uint{bits}") for prefix in ("u", "__u") for bits in _SIZES},
    **{f"{prefix}{bits}": getattr(ctypes, f"c_int{bits}") for prefix in ("s", "__s") for bits in _SIZES},
    **{f"uint{bits}_t": getattr(ctypes, f"c_uint{bits}") for bits in _SIZES},
    **{f"int{bits}_t": getattr(ctypes, f"c_int{bits}") for bits in _SIZES},
    **{f"__{order}{bits}": getattr(ctypes, f"c_uint{bits}") for order in ("be", "le") for bits in (16, 32, 64)},
}
_ARRAY = re.compile(r"(.+?) ?\[(\d+)\]")


def plain(value: Any) -> Any:
    """A ctypes object (or the Python value that ctypes returns for it) as a JSON value."""
    if isinstance(value, ctypes.Structure):
        return _struct(value)
    if isinstance(value, ctypes.Union):
        return bytes(value).hex()
    if isinstance(value, ctypes.Array):
        return _array(value)
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return plain(value.value) if hasattr(value, "value") else value


def _struct(value: ctypes.Structure) -> Any:
    name = type(value).__name__
    if name in ADDRESSES:
        return str(ADDRESSES[name](bytes(value)))
    return {field: plain(getattr(value, field)) for field, *_ in value._fields_ if not field.startswith(PADDING)}


def _array(value: ctypes.Array[Any]) -> Any:
    if value._type_ is ctypes.c_char:
        return value.raw.partition(b"\0")[0].decode(errors="replace")
    if value._type_ is ctypes.c_uint8:
        return bytes(value).hex(":") if len(value) == MAC_BYTES else bytes(value).hex()
    return [plain(each) for each in value]


def added(values: Sequence[Any]) -> Any:
    """One entry of a per-CPU map: numbers are summed over CPUs, in structs field by field; the rest is the first's."""
    first = values[0]
    if isinstance(first, dict):
        return {name: added([value[name] for value in values]) for name in first}
    if isinstance(first, list):
        return [added(column) for column in zip(*values, strict=True)]
    return sum(values) if isinstance(first, int) else first


def event_class(table: str, fields: Sequence[str]) -> CType:
    """The struct of an event from its fields, `NAME#TYPE` each. Raises InvalidInput for a type that is not known."""
    members = [(name, _field_type(table, name, text)) for name, _, text in (field.partition("#") for field in fields)]
    return type(table, (ctypes.Structure,), {"_fields_": members})


def _field_type(table: str, name: str, text: str) -> CType:
    if array := _ARRAY.fullmatch(text):
        return _field_type(table, name, array[1]) * int(array[2])
    if text.startswith("enum "):
        return ctypes.c_uint32
    if text.endswith("*"):
        return ctypes.c_uint64
    try:
        return _FIELD_TYPES[text]
    except KeyError:
        raise InvalidInput(
            f"{table}: cannot show field {name} of type {text}: fields of events are integers, enums, struct in_addr,"
            " struct in6_addr, and arrays of them"
        ) from None


def event(kind: CType, address: int, size: int) -> Any:
    """The event at an address; hexadecimal where its size is not that of `kind` (perf adds up to 7 bytes)."""
    if not ctypes.sizeof(kind) <= size < ctypes.sizeof(kind) + 8:
        return ctypes.string_at(address, size).hex()
    return plain(kind.from_buffer_copy(ctypes.string_at(address, size)))
