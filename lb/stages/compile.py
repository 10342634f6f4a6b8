"""All that knows BCC: a text of C becomes a loaded program, with tables to read and events to wait for.

Enters: a Source and its place. Leaves: a Stage. BCC is Debian's and Ubuntu's python3-bpfcc, in the system Python's
folder (what the Python Package Index calls bcc is another thing); it wants kernel headers, and those of another version
do as long as a program keeps to what the kernel promises to user space (UAPI). What clang and the verifier say, BCC
writes to file descriptor 2.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from lb.errors import DataplaneError, InvalidInput, LbError
from lb.stages.source import OWN_TABLES, PROGRAM, STAGES, Chain, Source, wrapped
from lb.stages.values import CType, added, event, event_class, plain

BCC = Path("/usr/lib/python3/dist-packages/bcc")
MODULES = Path("/lib/modules")  # V/build, and V/source where the headers come in two folders, as Debian's do
OS_RELEASE = Path("/etc/os-release")

# enum bpf_map_type and enum bpf_attach_type, <linux/bpf.h>
_TABLES = {1: "hash", 2: "array", 5: "hash", 6: "array", 9: "hash", 10: "hash", 11: "trie"}
_PER_CPU = {5, 6, 10}
_PERF_OUTPUT, _RING_OUTPUT = 4, 27
_ATTACH_TYPE_XDP = 37

_PAGES = 64  # of the buffer for perf events of each CPU
_LOG_LINES_SHOWN = 12
_ARCHITECTURES = {"x86_64": ("x86", "amd64"), "aarch64": ("arm64", "arm64")}  # of the headers, of packages


class NotInstalled(LbError):
    """BCC, or the headers that it needs."""


@dataclass(frozen=True, slots=True)
class Table:
    """A map of the user's: `kind` is hash, array, trie, histogram or log2_histogram."""

    name: str
    kind: str
    read: Callable[[], list[tuple[Any, Any]]]


@dataclass(frozen=True, slots=True)
class Event:
    table: str
    data: Any


class Stage:
    """A loaded program of the user's. close() frees it, unless it is in a place or held on an interface."""

    def __init__(self, bcc: Any, bpf: Any, program_fd: int, source: Source) -> None:
        self._bcc, self._bpf, self.program_fd, self._source = bcc, bpf, program_fd, source
        self._events: list[Event] = []
        self.lost = 0  # events that found their buffer full
        self._has_perf, self._has_ring = self._listen(_PERF_OUTPUT), self._listen(_RING_OUTPUT)

    @cached_property
    def tables(self) -> tuple[Table, ...]:
        """In the order of their names, but for those that begin with an underscore."""
        names = [(name, kind) for name, kind in self._maps() if kind in _TABLES and not name.startswith("_")]
        return tuple(
            Table(
                name, self._source.histogram_kind(name) or _TABLES[kind], self._reader(name, per_cpu=kind in _PER_CPU)
            )
            for name, kind in names
        )

    @property
    def stages_fd(self) -> int:
        """The stage map that the program tail-calls through."""
        return int(self._bpf[STAGES.encode()].map_fd)

    def events(self) -> list[Event]:
        """Those since the last call; does not wait."""
        if self._has_perf:
            self._bpf.perf_buffer_poll(timeout=0)
        if self._has_ring:
            self._bpf.ring_buffer_consume()
        found, self._events = self._events, []
        return found

    def close(self) -> None:
        self._bpf.cleanup()

    def _maps(self) -> Iterator[tuple[str, int]]:
        """Name and type of the user's maps."""
        library, module = self._bcc.lib, self._bpf.module
        name_of = _prototype(library.bpf_table_name, ctypes.c_char_p)
        for number in range(_prototype(library.bpf_num_tables, ctypes.c_size_t)(module)):
            name = name_of(module, ctypes.c_size_t(number)).decode()
            if name not in OWN_TABLES:
                yield name, library.bpf_table_type_id(module, number)

    def _reader(self, name: str, *, per_cpu: bool) -> Callable[[], list[tuple[Any, Any]]]:
        try:
            table = self._bpf[name.encode()]
        except IndexError:
            raise InvalidInput(f"{name}: value size of per-CPU tables must be a multiple of 8 bytes") from None

        def read() -> list[tuple[Any, Any]]:
            """(key, value) as plain values."""
            return [(plain(key), added(plain(value)) if per_cpu else plain(value)) for key, value in table.items()]

        return read

    def _listen(self, kind: int) -> bool:
        """To all outputs of a kind; whether there are any."""
        names = [name for name, number in self._maps() if number == kind]
        for name in names:
            output, keep = self._bpf[name.encode()], self._keeper(name)
            if kind == _PERF_OUTPUT:
                output.open_perf_buffer(keep, page_cnt=_PAGES, lost_cb=self._count_lost)
            else:
                output.open_ring_buffer(keep)
        return bool(names)

    def _keeper(self, name: str) -> Callable[[Any, int, int], None]:
        layout = self._event_class(name)

        def keep(_: Any, address: int, size: int) -> None:
            self._events.append(Event(name, event(layout, address, size)))

        return keep

    def _event_class(self, name: str) -> CType:
        library, module, table = self._bcc.lib, self._bpf.module, name.encode()
        count = library.bpf_perf_event_fields(module, table)
        return event_class(name, [library.bpf_perf_event_field(module, table, n).decode() for n in range(count)])

    def _count_lost(self, events: int) -> None:
        self.lost += events


def _prototype(function: Any, result: Any) -> Any:
    """A function of libbcc that BCC's Python does not describe: all arguments are pointers or sizes."""
    function.restype = result
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t)[: 1 if result is ctypes.c_size_t else 2]
    return function


def compile_stage(bcc: Any, source: Source, ifindex: int, chain: Chain | None, mark: str) -> Stage:
    """1 to 2 s and 128 MB. Raises InvalidInput with clang's words or the verifier's, NotInstalled, DataplaneError."""
    text = wrapped(source, ifindex, chain, mark)
    flags = [f"-I{source.path.resolve().parent}", *(f"-D{define}" for define in source.defines)]
    with headers() as notes, _captured_stderr() as compiler_output:
        try:
            bpf = bcc.BPF(text=text.encode(), cflags=flags)
        except Exception as error:  # BCC knows no other
            raise InvalidInput(f"{source.path}: compilation failed:\n{compiler_output() or error}") from error
        try:
            function = bpf.load_func(PROGRAM.encode(), bcc.BPF.XDP, attach_type=_ATTACH_TYPE_XDP)
        except Exception as error:
            raise DataplaneError(
                f"{source.path}: rejected by the kernel: {_last_lines(compiler_output()) or error}"
            ) from error
        warnings = compiler_output()
    for line in (*notes, *warnings.splitlines()):
        print(line, file=sys.stderr)
    return Stage(bcc, bpf, function.fd, source)


# What the compiler and the verifier say


@contextmanager
def _captured_stderr() -> Iterator[Callable[[], str]]:
    """Keeps what C code writes to file descriptor 2; the function gives all of it."""
    sys.stderr.flush()
    shown = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield lambda: _whole(kept.fileno()).strip()
        finally:
            os.dup2(shown, 2)
            os.close(shown)


def _whole(fd: int) -> str:
    return os.pread(fd, os.fstat(fd).st_size, 0).decode(errors="replace")


def _last_lines(log: str) -> str:
    """The last lines of a verifier's log that say something."""
    lines = [line for line in log.splitlines() if line.strip() and not line.startswith("processed ")]
    left_out = [f"({len(lines) - _LOG_LINES_SHOWN} log lines omitted)"] if len(lines) > _LOG_LINES_SHOWN else []
    return "".join(f"\n  {line}" for line in (*left_out, *lines[-_LOG_LINES_SHOWN:]))


# Where BCC and its headers are


def check_installed() -> None:
    """Raises NotInstalled with all that is missing, so that it is said before anything else is done."""
    missing = {
        "python3-bpfcc": (BCC / "__init__.py").is_file(),
        _headers_package(): _are_found_by_bcc() or bool(_versions()),
    }
    packages = " ".join(name for name, is_there in missing.items() if not is_there)
    if packages:
        raise NotInstalled(f"stages require BCC and kernel headers: apt install {packages}")


def _headers_package() -> str:
    """Of any version: by the name that this distribution gives the newest."""
    architecture = _ARCHITECTURES.get(platform.machine(), ("", "$(dpkg --print-architecture)"))[1]
    return f"linux-headers-{'generic' if 'ID=ubuntu' in _os_release().splitlines() else architecture}"


def _os_release() -> str:
    try:
        return OS_RELEASE.read_text()
    except OSError:
        return ""


def load_bcc() -> Any:
    """The module, from the system Python's folder, none of whose other modules becomes visible. Raises NotInstalled."""
    spec = spec_from_file_location("bcc", BCC / "__init__.py", submodule_search_locations=[str(BCC)])
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["bcc"] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (ImportError, OSError) as error:  # such as of libbcc.so.0
        del sys.modules["bcc"]
        raise NotInstalled(f"BCC does not load: {error}: apt install --reinstall python3-bpfcc libbpfcc") from None
    return module


@contextmanager
def headers() -> Iterator[list[str]]:
    """Leads BCC to kernel headers; gives what is to be said about them."""
    if _are_found_by_bcc():
        yield []
        return
    version = _versions()[-1]
    with tempfile.TemporaryDirectory(prefix="xdp-lb-headers-") as merged:
        _merge(MODULES / version, Path(merged))
        os.environ["BCC_KERNEL_SOURCE"] = merged
        try:
            yield [
                f"xdp-lb: note: kernel headers are for {version}, the running kernel is {platform.release()}:"
                " do not use kernel-internal structs"
            ]
        finally:
            del os.environ["BCC_KERNEL_SOURCE"]


def _are_found_by_bcc() -> bool:
    own = MODULES / platform.release() / "build"
    return "BCC_KERNEL_SOURCE" in os.environ or own.exists() or Path("/sys/kernel/kheaders.tar.xz").exists()


def _versions() -> list[str]:
    """Of the headers that are installed, the oldest first."""
    versions = [path.parent.parent.name for path in MODULES.glob("*/build/include")]
    return sorted(versions, key=lambda version: [int(number) for number in re.findall(r"\d+", version)])


def _merge(modules: Path, merged: Path) -> None:
    """One tree of links to the one or two that `modules` has, of the folders that BCC looks into."""
    architecture = _ARCHITECTURES.get(platform.machine(), (platform.machine(), ""))[0]
    for folder in ("include", f"arch/{architecture}/include"):
        (merged / folder).mkdir(parents=True)
        for tree in ("build", "source"):
            for path in (modules / tree / folder).glob("*"):
                with suppress(FileExistsError):
                    (merged / folder / path.name).symlink_to(path)
