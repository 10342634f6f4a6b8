"""libpcap's own interpreter, the second oracle."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from filters.compiler import cbpf
from filters.compiler.cbpf import Instruction

_library = ctypes.CDLL("libpcap.so.0.8")
_library.bpf_filter.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint)
_library.bpf_filter.restype = ctypes.c_uint
_library.bpf_image.argtypes = (ctypes.c_char_p, ctypes.c_int)
_library.bpf_image.restype = ctypes.c_char_p


def bpf_filter(instructions: Sequence[Instruction], frame: bytes) -> int:
    """The accepted length. The program is not checked first."""
    return int(_library.bpf_filter(cbpf.encode(instructions), frame, len(frame), len(frame)))


def bpf_image(instruction: Instruction, number: int) -> str:
    """A line of `tcpdump -d`."""
    return str(_library.bpf_image(cbpf.encode([instruction]), number).decode())
