"""The kernel's own classic BPF: what it accepts of a frame.

Enters: classic instructions and frames. Leaves: accepted lengths. The program is attached to a socket
(SO_ATTACH_FILTER) and frames are sent to it over a socket pair; what arrives was accepted, cut to the accepted length.
"""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Sequence
from dataclasses import replace
from errno import ENOMEM
from typing import Self

from filters.compiler import cbpf
from filters.compiler.cbpf import Instruction
from filters.compiler.expr import libpcap
from filters.compiler.graph import LOOP_ROUNDS, has_loops
from filters.compiler.hook import NETWORK_HEADER, FrameField, Hook
from filters.errors import InvalidFilter
from filters.selftest.frames import run

_SO_ATTACH_FILTER = 26
_LARGEST_FRAME = 1 << 17


class _SockFprog(ctypes.Structure):
    """struct sock_fprog, <linux/filter.h>."""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


class KernelFilter:
    """A classic program in the kernel. Raises InvalidFilter if it is refused."""

    def __init__(self, instructions: Sequence[Instruction]) -> None:
        self._sender, self._receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._receiver.setblocking(False)
        program = _SockFprog(len(instructions), cbpf.encode(instructions))
        try:
            self._receiver.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, bytes(program))
        except OSError as error:
            self.close()
            raise InvalidFilter(
                f"{len(instructions)} instructions: rejected by the kernel: {error.strerror}"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._sender.close()
        self._receiver.close()

    def accepted(self, frame: bytes) -> int:
        """How many bytes of the frame it accepts; 0: none."""
        self._sender.send(frame)
        try:
            return len(self._receiver.recv(_LARGEST_FRAME))
        except BlockingIOError:
            return 0


class LoopingFilter:
    """libpcap's interpreter, for jumps back, which the kernel does not take.

    It would not return for some packets: `protochain` goes back to an earlier header behind an authentication header.
    Those it is not asked about, nor those with more headers than a translation follows, which accepts both.
    """

    def __init__(self, instructions: Sequence[Instruction]) -> None:
        self._instructions, self._raw = instructions, cbpf.encode(instructions)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def accepted(self, frame: bytes) -> int:
        if run(self._instructions, frame).rounds >= LOOP_ROUNDS:
            return len(frame)
        return min(int(libpcap().bpf_filter(self._raw, frame, len(frame), len(frame))), len(frame))


class InterpretedFilter:
    """The same in Python, for what the kernel does not take: more instructions than 4,096."""

    def __init__(self, instructions: Sequence[Instruction]) -> None:
        self._instructions = instructions

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def accepted(self, frame: bytes) -> int:
        return min(run(self._instructions, frame).accepted, len(frame))


def oracle(instructions: Sequence[Instruction]) -> KernelFilter | LoopingFilter | InterpretedFilter:
    """The kernel where it takes the program."""
    if has_loops(instructions):
        return LoopingFilter(instructions)
    if len(instructions) > cbpf.MAX_INSTRUCTIONS:
        return InterpretedFilter(instructions)
    try:
        return KernelFilter(instructions)
    except InvalidFilter as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno == ENOMEM:  # net.core.optmem_max
            return InterpretedFilter(instructions)
        raise


def on_any_socket(instructions: Sequence[Instruction], hook: Hook) -> tuple[Instruction, ...]:
    """The same filter, without what a socket pair would answer otherwise than a hook: frames there have no headers and
    come from no interface. Offsets from a header become offsets into the frame, fields of the packet constants."""
    return tuple(_on_any_socket(i, hook) for i in instructions)


def _on_any_socket(i: Instruction, hook: Hook) -> Instruction:
    if i.ancillary is not None and i.ancillary != cbpf.ALU_XOR_X:
        source = hook.ancillary.get(i.ancillary, 0)
        if isinstance(source, FrameField):
            return Instruction(cbpf.LD | cbpf.H | cbpf.ABS, k=source.offset)
        return Instruction(cbpf.LD | cbpf.IMM, k=source if isinstance(source, int) else 0)
    if i.cls in (cbpf.LD, cbpf.LDX) and i.mode in (cbpf.ABS, cbpf.IND, cbpf.MSH):
        return replace(i, k=_in_frame(i.k))
    return i


def _in_frame(k: int) -> int:
    if cbpf.NET_OFF <= k < cbpf.NET_OFF + 0x10000:
        return k - cbpf.NET_OFF + NETWORK_HEADER
    return k - cbpf.LL_OFF if cbpf.LL_OFF <= k < cbpf.LL_OFF + 0x10000 else k
