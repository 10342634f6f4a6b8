"""A tcpdump expression to classic BPF, through the system's libpcap.

Enters: the text of an expression (pcap-filter(7)). Leaves: classic instructions, the same that `tcpdump -d` prints, or
an ExpressionError with the words that tcpdump prints. Names of hosts, networks and ports are looked up by libpcap.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, c_char_p, c_int, c_uint, c_uint32, c_void_p
from functools import cache
from typing import Any

from filters.compiler import cbpf
from filters.compiler.cbpf import Instruction
from filters.compiler.lists import compile_with_lists
from filters.errors import ExpressionError, FilterError, TooLong

ETHERNET = 1  # DLT_EN10MB, <pcap/dlt.h>
SNAPLEN = 262144  # tcpdump's default
LONGEST = 1 << 14  # classic instructions, before they are optimised
_LONG_TEXT = 1 << 10
NETMASK_UNKNOWN = 0xFFFFFFFF  # PCAP_NETMASK_UNKNOWN


class _Program(ctypes.Structure):
    """struct bpf_program, <pcap/bpf.h>."""

    _fields_ = (("length", c_uint), ("instructions", c_void_p))


@cache
def libpcap() -> ctypes.CDLL:
    """The library and its signatures, loaded on first use, so it is not needed without filters."""
    library = _open_library()
    library.pcap_open_dead.restype = c_void_p
    library.pcap_open_dead.argtypes = (c_int, c_int)
    library.pcap_close.argtypes = (c_void_p,)
    library.pcap_compile.argtypes = (c_void_p, POINTER(_Program), c_char_p, c_int, c_uint32)
    library.pcap_freecode.argtypes = (POINTER(_Program),)
    library.pcap_geterr.restype = c_char_p
    library.pcap_geterr.argtypes = (c_void_p,)
    library.pcap_findalldevs.argtypes = (c_void_p, c_char_p)
    library.pcap_freealldevs.argtypes = (c_void_p,)
    library.pcap_lookupnet.argtypes = (c_char_p, c_void_p, c_void_p, c_char_p)
    library.pcap_lib_version.restype = c_char_p
    library.pcap_open_offline_with_tstamp_precision.restype = c_void_p
    library.pcap_open_offline_with_tstamp_precision.argtypes = (c_char_p, c_uint, c_char_p)
    library.pcap_next_ex.argtypes = (c_void_p, c_void_p, c_void_p)
    library.pcap_datalink.argtypes = library.pcap_snapshot.argtypes = (c_void_p,)
    library.pcap_datalink_val_to_name.restype = library.pcap_datalink_val_to_description.restype = c_char_p
    library.pcap_datalink_name_to_val.argtypes = library.pcap_tstamp_type_name_to_val.argtypes = (c_char_p,)
    library.bpf_filter.restype = c_uint
    library.bpf_filter.argtypes = (c_char_p, c_char_p, c_uint, c_uint)
    return library


def _open_library() -> ctypes.CDLL:
    for name in ("libpcap.so.0.8", "libpcap.so.1"):  # Debian's soname, everybody else's
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            reason = error
    raise FilterError(f"libpcap: {reason}: install libpcap (Debian: libpcap0.8, Ubuntu: libpcap0.8t64)")


def compile_expression(
    text: str,
    *,
    link_type: int = ETHERNET,
    snaplen: int = SNAPLEN,
    optimise: bool = True,
    netmask: int = NETMASK_UNKNOWN,
) -> tuple[Instruction, ...]:
    """The classic program for an expression; an empty one accepts everything.

    `link_type` is a DLT_ value, `snaplen` what the program returns for a packet it accepts, `netmask` (in network byte
    order) what `ip broadcast` needs to know. Raises ExpressionError, TooLong, or
    FilterError where there is no libpcap.
    """
    with _handle(link_type, snaplen) as handle:
        return compile_for(handle, text, optimise=optimise, netmask=netmask)


def compile_for(
    handle: int, text: str, *, optimise: bool = True, netmask: int = NETMASK_UNKNOWN
) -> tuple[Instruction, ...]:
    """The same for a handle of libpcap's (pcap_t), such as an open file, in which some primitives have no meaning."""
    return compile_with_lists(text, lambda plain: _compile(handle, plain, optimise, netmask))


def _compile(handle: int, text: str, optimise: bool, netmask: int) -> tuple[Instruction, ...]:
    """Looks at the length first: the optimiser takes minutes for programs a few times longer."""
    if optimise and len(text) > _LONG_TEXT:
        length = len(_compile(handle, text, False, netmask))
        if length > LONGEST:
            raise TooLong(f"{length} classic BPF instructions, at most {LONGEST}: shorten the expression")
    encoded = os.fsencode(text)
    if b"\0" in encoded:
        raise ExpressionError("can't parse filter expression: syntax error")
    with _compiled(handle, encoded, optimise, netmask) as program:
        return cbpf.decode(ctypes.string_at(program.instructions, program.length * cbpf.INSTRUCTION_SIZE))


@contextmanager
def _handle(link_type: int, snaplen: int) -> Iterator[int]:
    library = libpcap()
    handle = library.pcap_open_dead(link_type, snaplen)
    try:
        yield handle
    finally:
        library.pcap_close(handle)


@contextmanager
def _compiled(handle: int, text: bytes, optimise: bool, netmask: int) -> Iterator[Any]:
    library, program = libpcap(), _Program()
    if library.pcap_compile(handle, ctypes.byref(program), text, optimise, netmask) < 0:
        raise ExpressionError(library.pcap_geterr(handle).decode(errors="replace"))
    try:
        yield program
    finally:
        library.pcap_freecode(ctypes.byref(program))
