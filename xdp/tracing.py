"""What a program needs that looks at another one (fentry, fexit): the function in the other's BTF, and where the
kernel's structs have their fields.

Enters: the id of a loaded program, names of structs. Leaves: a Target to load a tracing program with, offsets in bytes.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EPERM
from typing import Self

from xdp import libbpf
from xdp.btf import ENUM, STRUCT
from xdp.errors import NotPermitted, NotSupported
from xdp.object import program_info

_TYPE = struct.Struct("=III")  # struct btf_type: name, kind and number of members, size
_MEMBER = struct.Struct("=III")  # struct btf_member: name, type, offset in bits
_VALUE = struct.Struct("=Ii")  # struct btf_enum: name, value
_FUNCTION = 12  # BTF_KIND_FUNC
_ANONYMOUS = 0


@dataclass(frozen=True, slots=True)
class Target:
    """An open program, and the id of its main function in its own BTF."""

    fd: int
    function: int

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def target(program_id: int) -> Target:
    """To be closed. Raises NotSupported for a program without BTF, NotPermitted."""
    try:
        fd = libbpf.program_fd_by_id(program_id)
    except OSError as error:
        kind = NotPermitted if error.errno == EPERM else NotSupported
        raise kind(f"program {program_id}: cannot be inspected: {error.strerror}") from error
    name, function = program_info(fd).name.decode(errors="replace"), _main_function(fd)
    if function is None:
        os.close(fd)
        raise NotSupported(f"program {program_id} ({name}): has no BTF: cannot be traced")
    return Target(fd, function)


def _main_function(fd: int) -> int | None:
    """The first function of struct bpf_func_info {insn_off, type_id}, <linux/bpf.h>."""
    first = (ctypes.c_uint32 * 2)()
    info = libbpf.ProgramInfo(
        nr_func_info=1, func_info_rec_size=ctypes.sizeof(first), func_info=ctypes.addressof(first)
    )
    libbpf.info_by_fd(fd, ctypes.byref(info), ctypes.c_uint32(ctypes.sizeof(info)))
    return int(first[1]) if info.btf_id and info.nr_func_info else None


class KernelTypes:
    """The structs of the running kernel, from its BTF: some ms to open, too large to be read as a whole in Python."""

    def __init__(self) -> None:
        try:
            self._btf = libbpf.kernel_btf()
        except OSError as error:
            raise NotSupported(f"the kernel has no BTF (CONFIG_DEBUG_INFO_BTF): {error.strerror}") from error

    def close(self) -> None:
        libbpf.btf_free(self._btf)

    def offset(self, struct_name: str, member: str) -> int:
        """In bytes, also of a member of an anonymous struct or union in it. Raises NotSupported."""
        found = self._offset(self._id("struct", struct_name, STRUCT), member)
        if found is None:
            raise NotSupported(f"struct {struct_name}: has no {member} in the kernel's BTF")
        return found // 8

    def constant(self, enum_name: str, name: str) -> int:
        """Of an enum. Raises NotSupported."""
        for found, value in self._parts(self._id("enum", enum_name, ENUM), _VALUE):
            if self._name(found) == name:
                return int(value)
        raise NotSupported(f"enum {enum_name}: has no {name} in the kernel's BTF")

    def function(self, name: str) -> int:
        """Its id, by which programs call it. Raises NotSupported."""
        return self._id("function", name, _FUNCTION)

    def _id(self, what: str, name: str, kind: int) -> int:
        try:
            return int(libbpf.btf_find(self._btf, name.encode(), kind))
        except OSError as error:
            raise NotSupported(f"{what} {name}: not in the kernel's BTF") from error

    def _offset(self, type_id: int, member: str) -> int | None:
        """In bits."""
        for name, inner, bits in self._parts(type_id, _MEMBER):
            at = bits & 0xFFFFFF  # above it: the size of a bit field
            if self._name(name) == member:
                return int(at)
            within = self._offset(inner, member) if name == _ANONYMOUS else None
            if within is not None:
                return int(at + within)
        return None

    def _parts(self, type_id: int, form: struct.Struct) -> Iterator[tuple[int, ...]]:
        at = libbpf.btf_type(self._btf, type_id)
        _, info, _ = _TYPE.unpack(ctypes.string_at(at, _TYPE.size))
        yield from form.iter_unpack(ctypes.string_at(at + _TYPE.size, (info & 0xFFFF) * form.size))

    def _name(self, at: int) -> str:
        return str(libbpf.btf_name(self._btf, at).decode())


@contextmanager
def kernel_types() -> Iterator[KernelTypes]:
    types = KernelTypes()
    try:
        yield types
    finally:
        types.close()
