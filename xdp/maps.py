"""Typed BPF maps: keys and values are the ctypes classes that BTF gives.

A key or value may be given as a plain int where its type is one. Per-CPU maps are read as sums, hash maps in batches,
arrays that are BPF_F_MMAPABLE through one mmap.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
from array import array
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from xdp import libbpf
from xdp.btf import CType
from xdp.errors import MapError

ANY, NO_EXIST, EXIST = 0, 1, 2
_PER_CPU_TYPES = {5, 6, 10}  # per-CPU hash, array, LRU hash
_BATCH = 4096
_TYPECODES = {1: "B", 2: "H", 4: "I", 8: "Q"}


def map_info(fd: int) -> libbpf.MapInfo:
    info = libbpf.MapInfo()
    libbpf.info_by_fd(fd, ctypes.byref(info), ctypes.c_uint32(ctypes.sizeof(info)))
    return info


class Map:
    """One map. Raises KeyError for a key that is not there, MapError for anything the kernel refuses."""

    def __init__(self, name: str, fd: int, key_type: CType, value_type: CType) -> None:
        self.name, self.fd, self.key_type, self.value_type = name, fd, key_type, value_type

    @cached_property
    def info(self) -> libbpf.MapInfo:
        return map_info(self.fd)

    def __len__(self) -> int:
        """The size of an array; how many entries any other map can hold."""
        return int(self.info.max_entries)

    @property
    def memory(self) -> int:
        """Bytes of the kernel that it takes; before Linux 6.4, what its size says."""
        try:
            with open(f"/proc/self/fdinfo/{self.fd}", encoding="ascii") as facts:
                return next(int(line.split()[1]) for line in facts if line.startswith("memlock:"))
        except OSError as error:
            raise self._failed("measure", error) from error

    def _key(self, key: Any) -> Any:
        return key if isinstance(key, self.key_type) else self.key_type(key)

    def _failed(self, doing: str, error: OSError) -> MapError:
        return MapError(f"map {self.name}: cannot {doing}: {error.strerror}")

    def __getitem__(self, key: Any) -> Any:
        value = self.value_type()
        try:
            libbpf.lookup(self.fd, ctypes.byref(self._key(key)), ctypes.byref(value))
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise KeyError(key) from None
            raise self._failed("read", error) from error
        return value

    def get(self, key: Any) -> Any | None:
        try:
            return self[key]
        except KeyError:
            return None

    def __contains__(self, key: Any) -> bool:
        return self.get(key) is not None

    def put(self, key: Any, value: Any, flags: int = ANY) -> None:
        given = value if isinstance(value, self.value_type) else self.value_type(value)
        try:
            libbpf.update(self.fd, ctypes.byref(self._key(key)), ctypes.byref(given), flags)
        except OSError as error:
            if error.errno == errno.E2BIG:
                raise MapError(f"map {self.name}: full: holds {len(self)} entries") from error
            raise self._failed("write", error) from error

    __setitem__ = put

    def __delitem__(self, key: Any) -> None:
        try:
            libbpf.delete(self.fd, ctypes.byref(self._key(key)))
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise KeyError(key) from None
            raise self._failed("delete", error) from error

    def items(self) -> Iterator[tuple[Any, Any]]:
        """All entries of a hash map, as batches() finds them."""
        for keys, values in self.batches():
            yield from zip(keys, values, strict=True)

    def batches(self) -> Iterator[tuple[Any, Any]]:
        """All entries of a hash map, as arrays of keys and of values; what comes and goes meanwhile may be missed."""
        return self._batches(self.value_type)

    def raw_batches(self) -> Iterator[tuple[bytes, bytes]]:
        """All entries of any map, an array too: keys one after the other, and values that fill `value_stride` each."""
        for keys, values in self._batches(ctypes.c_uint8 * self.value_stride):
            yield bytes(keys), bytes(values)

    def total_of(self, raw: bytes) -> Any:
        """The sum over CPUs of an entry as `raw_batches` gives it."""
        each = self.value_stride // self.values_each
        return _sum(self.value_type, [self.value_type.from_buffer_copy(raw, at) for at in range(0, len(raw), each)])

    @cached_property
    def values_each(self) -> int:
        """How many values an entry has: one for each CPU, in per-CPU maps."""
        return int(libbpf.possible_cpus()) if self.info.type in _PER_CPU_TYPES else 1

    @cached_property
    def value_stride(self) -> int:
        """Bytes of all values of an entry; those of per-CPU maps are padded to 8."""
        size = ctypes.sizeof(self.value_type)
        return size if self.values_each == 1 else (size + 7 & ~7) * self.values_each

    def put_raw(self, keys: bytes, values: bytes) -> None:
        """Writes entries as `raw_batches` gives them, one or many, in the place of those that are there."""
        count = ctypes.c_uint32(len(keys) // ctypes.sizeof(self.key_type))
        try:
            libbpf.update_batch(self.fd, keys, values, ctypes.byref(count), None)
        except OSError as error:
            raise self._failed("copy", error) from error

    def _batches(self, value_type: CType) -> Iterator[tuple[Any, Any]]:
        size, token, first = 0, (ctypes.c_uint8 * max(ctypes.sizeof(self.key_type), 8))(), True
        while True:
            try:
                size = size or min(_BATCH, len(self))
                keys, values, count = (self.key_type * size)(), (value_type * size)(), ctypes.c_uint32(size)
                start = None if first else token
                libbpf.lookup_batch(self.fd, start, token, keys, values, ctypes.byref(count), None)
            except OSError as error:
                if error.errno == errno.ENOSPC:  # a bucket longer than the batch
                    size *= 2
                    continue
                if error.errno != errno.ENOENT:
                    raise self._failed("read", error) from error
                yield _head(keys, count.value), _head(values, count.value)
                return
            first = False
            yield _head(keys, count.value), _head(values, count.value)

    def view(self) -> Any:
        """A live ctypes array over the whole of an array map; it stays mapped as long as it is referred to."""
        return (self.value_type * len(self)).from_buffer(self.bytes())

    def bytes(self) -> mmap.mmap:
        """The memory of an array map: values lie 8-byte aligned, one after the other."""
        size = len(self) * (ctypes.sizeof(self.value_type) + 7 & ~7)
        try:
            return mmap.mmap(self.fd, size)
        except OSError as error:
            raise self._failed("map into memory", error) from error

    def per_cpu(self, index: int) -> list[Any]:
        """The values of one entry of a per-CPU map, by CPU."""
        try:
            buffer = (ctypes.c_uint8 * self.value_stride)()
            libbpf.lookup(self.fd, ctypes.byref(self._key(index)), buffer)
        except OSError as error:
            raise self._failed("read", error) from error
        each = self.value_stride // self.values_each
        return [self.value_type.from_buffer(buffer, at) for at in range(0, self.value_stride, each)]

    def total(self, index: int) -> Any:
        """One entry of a per-CPU map, summed over CPUs field by field (all of them counters)."""
        return _sum(self.value_type, self.per_cpu(index))

    def set_total(self, index: int, value: Any) -> None:
        """Gives the whole sum to the first CPU, zero to the others."""
        raw = bytes(value if isinstance(value, ctypes.Structure) else self.value_type(value))
        padded = len(raw) + 7 & ~7
        try:
            libbpf.update(
                self.fd, ctypes.byref(self._key(index)), raw.ljust(padded * libbpf.possible_cpus(), b"\0"), ANY
            )
        except OSError as error:
            raise self._failed("write", error) from error

    def copy_from(self, other: Map) -> None:
        """All entries of a hash map of the same shape."""
        for key, value in other.items():
            same = value if isinstance(value, ctypes.Structure) else self.value_type(value)
            try:
                libbpf.update(self.fd, ctypes.byref(key), ctypes.byref(same), ANY)
            except OSError as error:
                raise self._failed("copy", error) from error

    def totals(self) -> list[Any]:
        """As total() gives them, of all entries of a per-CPU array."""
        values = b"".join(values for _, values in self.raw_batches())
        return [self.total_of(values[at : at + self.value_stride]) for at in range(0, len(values), self.value_stride)]


def column(entries: Any, field: str) -> array[int]:
    """One field, an unsigned integer, of each struct of a ctypes array: five times faster than entry by entry."""
    member, stride = getattr(entries._type_, field), ctypes.sizeof(entries._type_)
    values = array(_TYPECODES[member.size], bytes(entries))
    return values[member.offset // member.size :: stride // member.size]


def _head(entries: Any, count: int) -> Any:
    """The first elements of a ctypes array, as one that shares its memory."""
    return (entries._type_ * count).from_buffer(entries)


def _sum(value_type: CType, values: list[Any]) -> Any:
    if not hasattr(value_type, "_fields_"):
        return sum(v.value for v in values)
    result = value_type()
    for field, _ in value_type._fields_:
        setattr(result, field, sum(getattr(v, field) for v in values))
    return result
