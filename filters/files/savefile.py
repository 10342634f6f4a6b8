"""Existing capture files, and a filter run over them in the kernel.

Enters: a file that libpcap can read (pcap, pcapng, `-` for standard input). Leaves: its packets, or those that a filter
accepts: the translated program is run on each by BPF_PROG_TEST_RUN.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, c_long, c_uint8, c_uint32
from dataclasses import dataclass
from typing import Self

from filters.compiler import cbpf
from filters.compiler.cbpf import Instruction
from filters.compiler.expr import compile_for, libpcap
from filters.compiler.graph import has_loops
from filters.compiler.hook import XDP_FRAGS
from filters.errors import DamagedFile, DumpError
from filters.programs.program import LoadedProgram
from filters.selftest.frames import run
from filters.selftest.selftest import load_bare
from xdp import libbpf
from xdp.errors import NotPermitted

_MICRO, _NANO = 0, 1
_ERRBUF_SIZE = 256
_END = -2
# BPF_PROG_TEST_RUN at XDP: an Ethernet header at least, at most what one page and 17 fragments of one hold.
_SHORTEST, _LONGEST = 14, 3520 + 16 * 4096
# LINKTYPE_ values in files that differ from DLT_ values on Linux; <pcap/dlt.h>, pcap-linktype(7)
_LINK_TYPES = {11: 100, 12: 101, 15: 102, 16: 103, 19: 106}


class _Header(ctypes.Structure):
    """struct pcap_pkthdr, <pcap/pcap.h>."""

    _fields_ = (("seconds", c_long), ("fraction", c_long), ("caplen", c_uint32), ("length", c_uint32))


@dataclass(frozen=True, slots=True)
class Packet:
    """`data` is what was captured of `length` bytes; `fraction` is in micro- or nanoseconds, as the file was opened."""

    seconds: int
    fraction: int
    length: int
    data: bytes


class SaveFile:
    """An open file. Raises DumpError with libpcap's words."""

    def __init__(self, path: str, *, nano: bool) -> None:
        said = ctypes.create_string_buffer(_ERRBUF_SIZE)
        self._handle = libpcap().pcap_open_offline_with_tstamp_precision(
            os.fsencode(path), _NANO if nano else _MICRO, said
        )
        if not self._handle:
            raise DumpError(said.value.decode(errors="replace"))
        self.link_type: int = libpcap().pcap_datalink(self._handle)
        self.snaplen: int = libpcap().pcap_snapshot(self._handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        libpcap().pcap_close(self._handle)

    def compiled(self, expression: str, *, optimise: bool = True) -> tuple[Instruction, ...]:
        """For packets of this file. Raises ExpressionError."""
        return compile_for(self._handle, expression, optimise=optimise, netmask=0)

    @property
    def link_type_in_files(self) -> int:
        return _LINK_TYPES.get(self.link_type, self.link_type)

    @property
    def link_type_words(self) -> str:
        """Such as `EN10MB (Ethernet)`."""
        return link_type_words(self.link_type)

    def packets(self) -> Iterator[Packet]:
        """Raises DamagedFile behind the last one that can be read."""
        header, data = POINTER(_Header)(), POINTER(c_uint8)()
        while (status := libpcap().pcap_next_ex(self._handle, ctypes.byref(header), ctypes.byref(data))) == 1:
            found = header.contents
            yield Packet(found.seconds, found.fraction, found.length, ctypes.string_at(data, found.caplen))
        if status != _END:
            raise DamagedFile(libpcap().pcap_geterr(self._handle).decode(errors="replace"))


def link_type_words(link_type: int) -> str:
    name = libpcap().pcap_datalink_val_to_name(link_type)
    if name is None:
        return str(link_type)
    return f"{name.decode()} ({libpcap().pcap_datalink_val_to_description(link_type).decode()})"


class FileFilter:
    """A filter over packets of files.

    libpcap's own interpreter takes over where a test run cannot: for a user without permission, for packets that the
    kernel takes none of, where a filter asks for the length of a packet that was cut, and for loops, which it follows
    without a limit.
    """

    def __init__(self, instructions: Sequence[Instruction], program: LoadedProgram | None) -> None:
        self._instructions, self._classic, self._program = instructions, cbpf.encode(instructions), program
        self._loops = has_loops(instructions)
        self._asks_for_length = any(i.cls in (cbpf.LD, cbpf.LDX) and i.mode == cbpf.LEN for i in instructions)
        self._opts = libbpf.TestRunOpts(sz=ctypes.sizeof(libbpf.TestRunOpts))

    def accepts(self, packet: Packet) -> bool:
        if self._loops and not run(self._instructions, packet.data).ends:
            return True  # libpcap's interpreter would not return
        if self._program is None or not self._is_runnable(packet):
            return bool(libpcap().bpf_filter(self._classic, packet.data, packet.length, len(packet.data)))
        self._opts.data_in = ctypes.cast(ctypes.c_char_p(packet.data), ctypes.c_void_p)
        self._opts.data_size_in, self._opts.data_size_out = len(packet.data), 0
        libbpf.program_test_run(self._program.fd, ctypes.byref(self._opts))
        return bool(self._opts.retval)

    def _is_runnable(self, packet: Packet) -> bool:
        whole = packet.length == len(packet.data) or not self._asks_for_length
        return whole and _SHORTEST <= len(packet.data) <= _LONGEST


@contextmanager
def file_filter(instructions: Sequence[Instruction]) -> Iterator[FileFilter]:
    if has_loops(instructions):
        yield FileFilter(instructions, None)
        return
    try:
        program = load_bare(instructions, XDP_FRAGS)
    except NotPermitted:
        yield FileFilter(instructions, None)
        return
    with program:
        yield FileFilter(instructions, program)
