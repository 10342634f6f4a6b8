"""A compiled BPF object: open, set its constants and sizes, load (or adopt what an earlier process pinned), use.

Enters: a .bpf.o made by xdp/Makefile. Leaves: programs that can be attached or test-run, typed maps, live global
variables. What a process has loaded dies with it unless it is pinned or attached. What is pinned says itself which
object it comes from and what its maps hold, so that another version can read it: see Description.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Self
from weakref import finalize

from xdp import libbpf
from xdp.btf import Btf, CType, layout
from xdp.errors import LoadError, NotPermitted, XdpError
from xdp.maps import Map, map_info

_BPF = Path(__file__).with_name("bpf")
LB_OBJECT = _BPF / "lb" / "lb.bpf.o"
DECAP_OBJECT = _BPF / "decap" / "decap.bpf.o"
CHECK_OBJECT = _BPF / "check" / "check.bpf.o"

_LOG_LINES_SHOWN = 12
_NOT_PERMITTED = "not permitted to use BPF programs: run as root (CAP_BPF and CAP_NET_ADMIN)"
_DESCRIPTION = "description"
_MAP_TYPE_ARRAY = 2
_LONGEST_NAME = 15  # BPF_OBJ_NAME_LEN, with the zero at its end
_OUTPUT_ROOM = 512  # what a program may add in front of a frame, with room to spare


class XdpMd(ctypes.Structure):
    """struct xdp_md, <linux/bpf.h>: in a test run `data` counts from the start of the frame."""

    _fields_ = tuple(
        (name, ctypes.c_uint32)
        for name in ("data", "data_end", "data_meta", "ingress_ifindex", "rx_queue_index", "egress_ifindex")
    )


@dataclass(frozen=True, slots=True)
class TestRun:
    """The outcome of BPF_PROG_TEST_RUN: `verdict` is the program's return value, `duration_ns` the mean of one run."""

    verdict: int
    data: bytes
    duration_ns: int


class Program:
    """One loaded program."""

    def __init__(self, name: str, fd: int) -> None:
        self.name, self.fd = name, fd

    @cached_property
    def id(self) -> int:
        return int(program_info(self.fd).id)

    def test_run(self, frame: bytes, *, ingress_ifindex: int = 0, repeat: int = 1, metadata: bytes = b"") -> TestRun:
        """Runs the program on `frame` (14 to 3,520 bytes), as if it had come in on that interface (0: the loopback).

        metadata: what data_meta shows to the programs, 4 to 32 bytes in words of 4; wants an interface. Raises OSError.
        """
        given = metadata + frame
        out = ctypes.create_string_buffer(len(given) + _OUTPUT_ROOM)
        context = XdpMd(data=len(metadata), data_end=len(given), ingress_ifindex=ingress_ifindex)
        opts = libbpf.TestRunOpts(
            sz=ctypes.sizeof(libbpf.TestRunOpts),
            data_in=ctypes.cast(ctypes.c_char_p(given), ctypes.c_void_p),
            data_size_in=len(given),
            data_out=ctypes.addressof(out),
            data_size_out=len(out),
            repeat=repeat,
        )
        if ingress_ifindex:
            opts.ctx_in, opts.ctx_size_in = ctypes.addressof(context), ctypes.sizeof(context)
        libbpf.program_test_run(self.fd, ctypes.byref(opts))
        return TestRun(opts.retval, out.raw[len(metadata) : opts.data_size_out], opts.duration)

    def run_syscall(self, context: ctypes.Structure) -> int:
        """Runs a SEC("syscall") program; `context` is changed in place. Returns the program's value."""
        opts = libbpf.TestRunOpts(
            sz=ctypes.sizeof(libbpf.TestRunOpts),
            ctx_in=ctypes.addressof(context),
            ctx_size_in=ctypes.sizeof(context),
        )
        libbpf.program_test_run(self.fd, ctypes.byref(opts))
        return ctypes.c_int32(opts.retval).value


def program_info(fd: int) -> libbpf.ProgramInfo:
    info = libbpf.ProgramInfo()
    libbpf.info_by_fd(fd, ctypes.byref(info), ctypes.c_uint32(ctypes.sizeof(info)))
    return info


def program_by_id(program_id: int) -> Program:
    """Any loaded program, its descriptor closed with it. Raises OSError; without CAP_SYS_ADMIN, always."""
    return _owner("", libbpf.program_fd_by_id(program_id))


def program_name(program_id: int) -> str:
    """The name of any loaded program; "?" when it is gone or may not be looked at."""
    try:
        program = program_by_id(program_id)
    except OSError:
        return "?"
    return bytes(program_info(program.fd).name).decode(errors="replace")


def pinned_program(directory: str, name: str) -> Program:
    """A program that pin() left in a directory, its descriptor closed with it. Raises LoadError."""
    try:
        return _owner(name, libbpf.get_pinned(os.fsencode(f"{directory}/prog_{name}")))
    except OSError as error:
        raise LoadError(f"pin {directory}/prog_{name}: {error.strerror}") from error


def _owner(name: str, fd: int) -> Program:
    program = Program(name, fd)
    finalize(program, os.close, fd)
    return program


@dataclass(frozen=True, slots=True)
class Description:
    """What is pinned beside programs and maps: the SHA-256 of their object file, the version of xdp-lb that pinned
    them, the names of the programs, and the object's BTF. (The kernel gives a map's own to CAP_SYS_ADMIN only.)"""

    sha256: str
    version: str
    programs: tuple[str, ...]
    btf: bytes

    @classmethod
    def read(cls, directory: str) -> Description:
        """Raises LoadError."""
        fd = _pinned(directory, _DESCRIPTION)
        try:
            info = map_info(fd)
            value = ctypes.create_string_buffer(info.value_size)
            libbpf.lookup(fd, ctypes.byref(ctypes.c_uint32()), value)
        finally:
            os.close(fd)
        (size,) = struct.unpack_from("=I", value.raw)
        head = json.loads(value.raw[4 : 4 + size])
        return cls(head["sha256"], head["version"], tuple(head["programs"]), value.raw[4 + size :])

    def pin(self, directory: str) -> None:
        head = json.dumps({"sha256": self.sha256, "version": self.version, "programs": self.programs}).encode()
        value = struct.pack("=I", len(head)) + head + self.btf
        fd = libbpf.map_create(_MAP_TYPE_ARRAY, _DESCRIPTION.encode(), 4, len(value), 1, None)
        try:
            libbpf.update(fd, ctypes.byref(ctypes.c_uint32()), value, 0)
            libbpf.pin(fd, os.fsencode(f"{directory}/{_DESCRIPTION}"))
        finally:
            os.close(fd)


def _pinned(directory: str, name: str) -> int:
    try:
        return int(libbpf.get_pinned(os.fsencode(f"{directory}/{name}")))
    except OSError as error:
        raise _not_adopted(f"pin {directory}/{name}", error) from error


def _not_adopted(what: str, error: OSError) -> XdpError:
    if error.errno in (errno.EPERM, errno.EACCES):
        return NotPermitted(_NOT_PERMITTED)
    return LoadError(f"{what}: {error.strerror}")


def _name_in_kernel(name: str) -> str:
    """Of a map; a section's is its object's name and, as here, the section's."""
    return name if name.startswith(".") else name[:_LONGEST_NAME]


def _map_ids(program_fd: int) -> Sequence[int]:
    info = program_info(program_fd)
    ids = (ctypes.c_uint32 * info.nr_map_ids)()
    wanted = libbpf.ProgramInfo(nr_map_ids=len(ids), map_ids=ctypes.addressof(ids))
    libbpf.info_by_fd(program_fd, ctypes.byref(wanted), ctypes.c_uint32(ctypes.sizeof(wanted)))
    return list(ids)


def _tag(program_fd: int) -> bytes:
    """The kernel's digest of its instructions, in which the maps do not count."""
    return bytes(program_info(program_fd).tag)


class Loaded:
    """Programs and maps in the kernel, and what their object's BTF says of them."""

    types: Btf
    fingerprint: str  # SHA-256 of the object file
    version: str  # of xdp-lb

    def __init__(self) -> None:
        self._adopted: list[int] = []
        self._map_fds: dict[str, int] = {}
        self._program_fds: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the file descriptors back; programs and maps live on where they are pinned or attached."""
        for fd in self._adopted:
            os.close(fd)
        self._adopted.clear()

    @property
    def map_names(self) -> Sequence[str]:
        return tuple(self._map_fds)

    def program(self, name: str) -> Program:
        return Program(name, self._program_fds[name])

    def map(self, name: str) -> Map:
        if name not in self._map_fds:
            raise LoadError(f"map {name}: missing in the loaded version")
        return Map(name, self._map_fds[name], *self.map_types(name))

    def variable(self, name: str) -> Any:
        """A global variable of .data as a live ctypes struct."""
        section = self.types.section(".data")
        return getattr(section.from_buffer(self.map(".data").bytes()), name)

    def map_types(self, name: str) -> tuple[CType, CType]:
        """Of keys and of values; of a data section, as a map with one value."""
        if name.startswith("."):
            return ctypes.c_uint32, self.types.section(name)
        types = self.types.map_types(name)
        if types is None:
            raise LoadError(f"map {name}: not found")
        return types

    def pin(self, directory: str) -> None:
        """Pins every map and program in a directory of a bpffs: maps as map_NAME, programs as prog_NAME."""
        for name, fd in self._pinned_as.items():
            libbpf.pin(fd, os.fsencode(f"{directory}/{name}"))
        Description(self.fingerprint, self.version, tuple(self._program_fds), self.types.raw).pin(directory)

    def is_pinned(self, directory: str) -> bool:
        """Whether all that pin() leaves is in the directory; not whether it is this object's."""
        return all(os.path.exists(f"{directory}/{name}") for name in (_DESCRIPTION, *self._pinned_as))

    @property
    def _pinned_as(self) -> dict[str, int]:
        """File name -> file descriptor."""
        maps = {f"map_{name.removeprefix('.')}": fd for name, fd in self._map_fds.items()}
        return maps | {f"prog_{name}": fd for name, fd in self._program_fds.items()}

    def _get_pinned(self, directory: str, name: str) -> int:
        return self._adopt(_pinned(directory, name))

    def _adopt(self, fd: int) -> int:
        self._adopted.append(fd)
        return fd

    def _check_shape(self, name: str, fd: int, whose: str) -> None:
        info, (key, value) = map_info(fd), self.map_types(name)
        alignment = ctypes.alignment(value) if name.startswith(".") else 1  # a section ends with its last variable
        value_size = -(-info.value_size // alignment) * alignment
        if (info.key_size, value_size) != (ctypes.sizeof(key), ctypes.sizeof(value)):
            raise LoadError(f"map {name}: layout differs from that in {whose}")


class PinnedObject(Loaded):
    """What pin() left in a directory, of whatever version. Raises LoadError where it is incomplete.

    `expected`: of a newer version, whose fields are to be found in structs here too, as zeros (see xdp.btf).
    """

    @classmethod
    def open(cls, directory: str, path: Path) -> Self:
        """As the object at `path` expects it."""
        if Description.read(directory).sha256 == fingerprint(path):
            return cls(directory)
        with BpfObject.open(path) as installed:
            return cls(directory, installed.types)

    def __init__(self, directory: str, expected: Btf | None = None) -> None:
        super().__init__()
        description = Description.read(directory)
        self.fingerprint, self.version = description.sha256, description.version
        self.types = Btf(description.btf, expected)
        try:
            for name in self.types.map_names:
                fd = self._map_fds[name] = self._get_pinned(directory, f"map_{name.removeprefix('.')}")
                self._check_shape(name, fd, "its description")
            for name in description.programs:
                self._program_fds[name] = self._get_pinned(directory, f"prog_{name}")
        except LoadError:
            self.close()
            raise


class RunningObject(Loaded):
    """Programs that run although nothing pins them, and their maps. They say little of themselves: they are taken for
    those of `like`, and is_of() tells whether that is so."""

    def __init__(self, like: BpfObject) -> None:
        super().__init__()
        self.types, self.fingerprint, self.version = like.types, like.fingerprint, like.version
        self._kernel_names = {_name_in_kernel(name): name for name in like.map_names}

    def find(self, name: str, program_id: int) -> None:
        """Takes a program, as the one of this name, with its maps. Raises LoadError, NotPermitted."""
        try:
            fd = self._program_fds[name] = self._adopt(libbpf.program_fd_by_id(program_id))
            for map_id in _map_ids(fd):
                self._find_map(self._adopt(libbpf.map_fd_by_id(map_id)))
        except OSError as error:
            raise _not_adopted(f"program {program_id}", error) from error

    def _find_map(self, fd: int) -> None:
        found = bytes(map_info(fd).name).decode(errors="replace")
        name = self._kernel_names.get(found[found.find(".") :] if "." in found else found)
        if name is not None:
            self._check_shape(name, fd, "the installed version")
            self._map_fds[name] = fd

    def is_of(self, loaded: BpfObject) -> bool:
        """Whether that object has the same instructions under the same names."""
        return all(_tag(fd) == _tag(loaded.program(name).fd) for name, fd in self._program_fds.items())


class BpfObject(Loaded):
    """One object file, and after load() or adopt() its programs and maps."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._handle: int | None = _open(path)
        self.fingerprint = fingerprint(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        return cls(path)

    def close(self) -> None:
        super().close()
        if self._handle:
            libbpf.object_close(self._handle)
        self._handle = None

    @cached_property
    def version(self) -> str:  # type: ignore[override]
        from importlib.metadata import version  # 30 ms, for what loads a program

        return version("xdp-lb")

    @cached_property
    def types(self) -> Btf:  # type: ignore[override]
        size = ctypes.c_uint32()
        data = libbpf.btf_raw_data(libbpf.object_btf(self._handle), ctypes.byref(size))
        return Btf(ctypes.string_at(data, size.value))

    @cached_property
    def _map_handles(self) -> dict[str, int]:
        """Name -> struct bpf_map *. Global data is called by its section: .rodata, .data."""
        handles, handle = {}, libbpf.object_next_map(self._handle, None)
        while handle:
            name = libbpf.map_name(handle).decode()
            handles[name[name.index(".") :] if "." in name else name] = handle
            handle = libbpf.object_next_map(self._handle, handle)
        return handles

    @property
    def map_names(self) -> Sequence[str]:
        return tuple(self._map_handles)

    def configure(self, variable: str, **values: int) -> None:
        """Sets fields of a `const volatile struct` variable, before load(). AttributeError for an unknown field."""
        size = ctypes.c_size_t()
        address = libbpf.map_initial_value(self._map_handles[".rodata"], ctypes.byref(size))
        target = getattr(self.types.section(".rodata").from_address(address), variable)
        for field, value in values.items():
            setattr(target, field, value)

    def shape(self, name: str) -> tuple[int, int, int]:
        """Type, flags and number of entries of a map as they are set, before load() too."""
        handle = self._map_handles[name]
        return libbpf.map_type(handle), libbpf.map_flags(handle), libbpf.map_max_entries(handle)

    def resize(self, name: str, entries: int) -> None:
        """Sets how many entries a map holds, before load()."""
        libbpf.map_set_max_entries(self._map_handles[name], entries)

    def reuse(self, name: str, fd: int) -> None:
        """Takes an existing map in the place of a new one, before load(). LoadError if it is of another shape."""
        self._check_shape(name, fd, self.path.name)
        libbpf.map_reuse_fd(self._map_handles[name], fd)

    def load(self, *only: str) -> None:
        """Creates the maps, loads the programs: all, or these. Raises LoadError with the end of the verifier's log,
        NotPermitted."""
        programs = self._program_handles()
        wanted = {name: programs[name] for name in only or programs}
        for name, handle in programs.items():
            libbpf.program_set_autoload(handle, name in wanted)
        with libbpf.messages() as said:
            try:
                libbpf.object_load(self._handle)
            except OSError as error:
                raise _load_error(self.path, error, said) from error
        self._map_fds = {name: libbpf.map_fd(handle) for name, handle in self._map_handles.items()}
        self._program_fds = {name: libbpf.program_fd(handle) for name, handle in wanted.items()}

    def adopt(self, directory: str) -> None:
        """Takes programs and maps from what pin() left. Raises LoadError if it is of another version or incomplete."""
        pinned = Btf(Description.read(directory).btf)
        for name in self._map_handles:
            self._check_alike(name, pinned)
            self._map_fds[name] = self._get_pinned(directory, f"map_{name.removeprefix('.')}")
        for name in self._program_handles():
            self._program_fds[name] = self._get_pinned(directory, f"prog_{name}")

    def _program_handles(self) -> dict[str, int]:
        handles, handle = {}, libbpf.object_next_program(self._handle, None)
        while handle:
            handles[libbpf.program_name(handle).decode()] = handle
            handle = libbpf.object_next_program(self._handle, handle)
        return handles

    def _check_alike(self, name: str, pinned: Btf) -> None:
        """An object that has no such map, or one of another shape, is of another version."""
        theirs = pinned.map_types(name) if not name.startswith(".") else None
        if theirs is not None and [*map(layout, theirs)] != [*map(layout, self.map_types(name))]:
            raise LoadError(f"map {name}: layout differs from that in {self.path.name}")


def fingerprint(path: Path) -> str:
    """The SHA-256 of an object file. Raises LoadError."""
    try:
        found = path.stat()
        return _sha256(path, found.st_ino, found.st_size, found.st_mtime_ns)
    except OSError as error:
        raise LoadError(f"{path}: {error.strerror}") from error


@lru_cache
def _sha256(path: Path, *_as_it_is: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open(path: Path) -> int:
    with libbpf.messages() as said:
        try:
            handle: int = libbpf.object_open(os.fsencode(path), None)
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise LoadError(f"{path}: not found: run `make build`") from None
            raise LoadError(f"{path}: not a BPF object: {' '.join(said).strip() or error.strerror}") from error
    return handle


def _load_error(path: Path, error: OSError, said: list[str]) -> XdpError:
    if error.errno == errno.EPERM and not any("BEGIN PROG LOAD LOG" in message for message in said):
        return NotPermitted(_NOT_PERMITTED)
    lines = [line for message in said for line in message.splitlines() if line.strip()]
    return LoadError(f"{path.name}: rejected by the kernel: {error.strerror}{useful_tail(lines)}")


def in_one_line(error: XdpError) -> str:
    """What failed, and the last thing that the verifier said."""
    first, *log = str(error).splitlines()
    return f"{first}: {log[-1].strip()}" if log else first


def useful_tail(lines: list[str]) -> str:
    """The last lines of a verifier log that say something, and how many were left out."""
    begin = next((n for n, line in enumerate(lines) if "BEGIN PROG LOAD LOG" in line), -1)
    end = next((n for n, line in enumerate(lines) if "END PROG LOAD LOG" in line), len(lines))
    log = [
        line
        for line in lines[begin + 1 : end]
        if not line.startswith(("processed ", "verification time", "stack depth"))
    ]
    program = next((line for line in lines if "prog '" in line), "").removeprefix("libbpf: ")
    shown = log[-_LOG_LINES_SHOWN:]
    left_out = len(log) - len(shown)
    omitted = [f"({left_out} log lines omitted)"] if left_out else []
    return "".join(f"\n  {line}" for line in (program, *omitted, *shown) if line)
