"""The lines of bpf_trace_printk(), as they come.

Enters: how our lines begin. Leaves: lines. The kernel has one trace for all programs, and reading it consumes
the lines, so a reader gets an instance of its own (Documentation/trace/ftrace.rst). tracefs need
not be mounted, and `ip netns exec` would hide it: fsopen(2) and fsmount(2) give a private mount.
"""

from __future__ import annotations

import ctypes
import os
import re
from contextlib import suppress
from pathlib import Path

PREFIX = "xdp-lb-"

# include/uapi/asm-generic/unistd.h, <linux/mount.h>
_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
_CLOEXEC = 1
_FSCONFIG_CMD_CREATE = 6
_EVENT = "events/bpf_trace/bpf_trace_printk/enable"
_CHUNK = 1 << 16

_libc = ctypes.CDLL(None, use_errno=True)


class Trace:
    """An instance of this process; close() takes it away, and what a process before was killed too early to take."""

    def __init__(self, mark: str) -> None:
        """Raises OSError where the kernel has no tracefs, or this process may not use it."""
        self._mount = _mounted_tracefs()
        self._instances = Path(f"/proc/self/fd/{self._mount}/instances")
        self._own = self._instances / f"{PREFIX}{os.getpid()}"
        self._line = re.compile(rf".*?bpf_trace_printk: {re.escape(mark)}(.*)")
        self._rest = b""
        self._sweep()
        self._own.mkdir(exist_ok=True)
        (self._own / _EVENT).write_text("1")
        self._pipe = os.open(self._own / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def lines(self) -> list[str]:
        """Those since the last call; does not wait."""
        *whole, self._rest = (self._rest + self._read()).split(b"\n")
        found = (self._line.fullmatch(line.decode(errors="replace")) for line in whole)
        return [line[1] for line in found if line]

    def close(self) -> None:
        os.close(self._pipe)
        self._own.rmdir()
        os.close(self._mount)

    def _read(self) -> bytes:
        read = b""
        with suppress(BlockingIOError):
            while chunk := os.read(self._pipe, _CHUNK):
                read += chunk
        return read

    def _sweep(self) -> None:
        for path in self._instances.glob(f"{PREFIX}*"):
            if not Path("/proc", path.name.removeprefix(PREFIX)).exists():
                with suppress(OSError):  # another process sweeps too
                    path.rmdir()


def _mounted_tracefs() -> int:
    """A file descriptor of its root."""
    filesystem = _system_call(_SYS_FSOPEN, b"tracefs", _CLOEXEC)
    try:
        _system_call(_SYS_FSCONFIG, filesystem, _FSCONFIG_CMD_CREATE, None, None, 0)
        return _system_call(_SYS_FSMOUNT, filesystem, _CLOEXEC, 0)
    finally:
        os.close(filesystem)


def _system_call(number: int, *arguments: bytes | int | None) -> int:
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"tracefs: {os.strerror(error)}")
    return result
