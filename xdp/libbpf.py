"""The system's libbpf (1.x) through ctypes: signatures, and nothing else.

A negative return or a NULL becomes an OSError with the errno here, so that callers deal in exceptions only. libbpf's
own messages (warnings, and the verifier's log when a load fails) are kept for the caller instead of being printed.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import POINTER, c_bool, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any

from xdp.errors import NotSupported


class _Missing:
    """In the place of the library: whatever is called raises NotSupported, which each command tells in its own way."""

    def __init__(self, why: OSError) -> None:
        self._why = f"{why}: install libbpf 1.x (Debian, Ubuntu: libbpf1)"

    def __getattr__(self, _name: str) -> Callable[..., Any]:
        def refuse(*_: Any) -> Any:
            raise NotSupported(self._why)

        return refuse


def _load(name: str) -> ctypes.CDLL | _Missing:
    try:
        return ctypes.CDLL(name, use_errno=True)
    except OSError as error:
        return _Missing(error)


_library = _load("libbpf.so.1")


class TestRunOpts(ctypes.Structure):
    """struct bpf_test_run_opts, <bpf/bpf.h>."""

    _fields_ = (
        ("sz", c_size_t),
        ("data_in", c_void_p),
        ("data_out", c_void_p),
        ("data_size_in", c_uint32),
        ("data_size_out", c_uint32),
        ("ctx_in", c_void_p),
        ("ctx_out", c_void_p),
        ("ctx_size_in", c_uint32),
        ("ctx_size_out", c_uint32),
        ("retval", c_uint32),
        ("repeat", c_int),
        ("duration", c_uint32),
        ("flags", c_uint32),
        ("cpu", c_uint32),
        ("batch_size", c_uint32),
    )


class ProgramLoadOpts(ctypes.Structure):
    """struct bpf_prog_load_opts, <bpf/bpf.h>."""

    _fields_ = (
        ("sz", c_size_t),
        ("attempts", c_int),
        ("expected_attach_type", c_uint32),
        ("prog_btf_fd", c_uint32),
        ("prog_flags", c_uint32),
        ("prog_ifindex", c_uint32),
        ("kern_version", c_uint32),
        ("attach_btf_id", c_uint32),
        ("attach_prog_fd", c_uint32),
        ("attach_btf_obj_fd", c_uint32),
        ("fd_array", c_void_p),
        ("func_info", c_void_p),
        ("func_info_cnt", c_uint32),
        ("func_info_rec_size", c_uint32),
        ("line_info", c_void_p),
        ("line_info_cnt", c_uint32),
        ("line_info_rec_size", c_uint32),
        ("log_level", c_uint32),
        ("log_size", c_uint32),
        ("log_buf", c_void_p),
    )


class MapCreateOpts(ctypes.Structure):
    """The head of struct bpf_map_create_opts, <bpf/bpf.h>."""

    _fields_ = (
        ("sz", c_size_t),
        ("btf_fd", c_uint32),
        ("btf_key_type_id", c_uint32),
        ("btf_value_type_id", c_uint32),
        ("btf_vmlinux_value_type_id", c_uint32),
        ("inner_map_fd", c_uint32),
        ("map_flags", c_uint32),
    )


class LinkCreateOpts(ctypes.Structure):
    """The head of struct bpf_link_create_opts, <bpf/bpf.h>."""

    _fields_ = (("sz", c_size_t), ("flags", c_uint32), ("_padding", c_uint32))


class MapInfo(ctypes.Structure):
    """The head of struct bpf_map_info, <linux/bpf.h>; the kernel fills as much as is asked for."""

    _fields_ = (
        ("type", c_uint32),
        ("id", c_uint32),
        ("key_size", c_uint32),
        ("value_size", c_uint32),
        ("max_entries", c_uint32),
        ("map_flags", c_uint32),
        ("name", ctypes.c_char * 16),
    )


class ProgramInfo(ctypes.Structure):
    """The head of struct bpf_prog_info, <linux/bpf.h>."""

    _fields_ = (
        ("type", c_uint32),
        ("id", c_uint32),
        ("tag", ctypes.c_uint8 * 8),
        ("jited_prog_len", c_uint32),
        ("xlated_prog_len", c_uint32),
        ("jited_prog_insns", c_uint64),
        ("xlated_prog_insns", c_uint64),
        ("load_time", c_uint64),
        ("created_by_uid", c_uint32),
        ("nr_map_ids", c_uint32),
        ("map_ids", c_uint64),
        ("name", ctypes.c_char * 16),
        ("ifindex", c_uint32),
        ("gpl_compatible", c_uint32),
        ("netns_dev", c_uint64),
        ("netns_ino", c_uint64),
        ("nr_jited_ksyms", c_uint32),
        ("nr_jited_func_lens", c_uint32),
        ("jited_ksyms", c_uint64),
        ("jited_func_lens", c_uint64),
        ("btf_id", c_uint32),
        ("func_info_rec_size", c_uint32),
        ("func_info", c_uint64),
        ("nr_func_info", c_uint32),
        ("nr_line_info", c_uint32),
        ("line_info", c_uint64),
        ("jited_line_info", c_uint64),
        ("nr_jited_line_info", c_uint32),
        ("line_info_rec_size", c_uint32),
        ("jited_line_info_rec_size", c_uint32),
        ("nr_prog_tags", c_uint32),
        ("prog_tags", c_uint64),
        ("run_time_ns", c_uint64),
        ("run_cnt", c_uint64),
        ("recursion_misses", c_uint64),
        ("verified_insns", c_uint32),
    )


def _check_int(result: int, _function: object, _arguments: object) -> int:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def _check_pointer(result: int | None, _function: object, _arguments: object) -> int:
    if not result:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def _optional(result: int | None, _function: object, _arguments: object) -> int | None:
    return result


def _function(name: str, result: Any, check: Callable[..., Any] | None, *arguments: Any) -> Any:
    function = getattr(_library, name)
    function.restype, function.argtypes = result, arguments
    if check:
        function.errcheck = check
    return function


object_open = _function("bpf_object__open_file", c_void_p, _check_pointer, c_char_p, c_void_p)
object_load = _function("bpf_object__load", c_int, _check_int, c_void_p)
object_close = _function("bpf_object__close", None, None, c_void_p)
object_btf = _function("bpf_object__btf", c_void_p, _check_pointer, c_void_p)
object_find_program = _function("bpf_object__find_program_by_name", c_void_p, _check_pointer, c_void_p, c_char_p)
object_next_map = _function("bpf_object__next_map", c_void_p, _optional, c_void_p, c_void_p)
object_next_program = _function("bpf_object__next_program", c_void_p, _optional, c_void_p, c_void_p)
btf_raw_data = _function("btf__raw_data", c_void_p, _check_pointer, c_void_p, POINTER(c_uint32))

program_set_autoload = _function("bpf_program__set_autoload", c_int, _check_int, c_void_p, c_bool)
program_fd = _function("bpf_program__fd", c_int, _check_int, c_void_p)
program_name = _function("bpf_program__name", c_char_p, None, c_void_p)
program_test_run = _function("bpf_prog_test_run_opts", c_int, _check_int, c_int, POINTER(TestRunOpts))
program_load = _function(
    "bpf_prog_load", c_int, _check_int, c_uint32, c_char_p, c_char_p, c_char_p, c_size_t, POINTER(ProgramLoadOpts)
)
program_fd_by_id = _function("bpf_prog_get_fd_by_id", c_int, _check_int, c_uint32)
enable_stats = _function("bpf_enable_stats", c_int, _check_int, c_int)

kernel_btf = _function("btf__load_vmlinux_btf", c_void_p, _check_pointer)
btf_free = _function("btf__free", None, None, c_void_p)
btf_find = _function("btf__find_by_name_kind", c_int, _check_int, c_void_p, c_char_p, c_uint32)
btf_type = _function("btf__type_by_id", c_void_p, _check_pointer, c_void_p, c_uint32)
btf_name = _function("btf__name_by_offset", c_char_p, None, c_void_p, c_uint32)

link_create = _function("bpf_link_create", c_int, _check_int, c_int, c_int, c_uint32, POINTER(LinkCreateOpts))

map_fd_by_id = _function("bpf_map_get_fd_by_id", c_int, _check_int, c_uint32)
map_create = _function("bpf_map_create", c_int, _check_int, c_uint32, c_char_p, c_uint32, c_uint32, c_uint32, c_void_p)
map_name = _function("bpf_map__name", c_char_p, None, c_void_p)
map_type = _function("bpf_map__type", c_uint32, None, c_void_p)
map_flags = _function("bpf_map__map_flags", c_uint32, None, c_void_p)
map_max_entries = _function("bpf_map__max_entries", c_uint32, None, c_void_p)
map_fd = _function("bpf_map__fd", c_int, _check_int, c_void_p)
map_reuse_fd = _function("bpf_map__reuse_fd", c_int, _check_int, c_void_p, c_int)
map_set_max_entries = _function("bpf_map__set_max_entries", c_int, _check_int, c_void_p, c_uint32)
map_initial_value = _function("bpf_map__initial_value", c_void_p, _check_pointer, c_void_p, POINTER(c_size_t))

lookup = _function("bpf_map_lookup_elem", c_int, _check_int, c_int, c_void_p, c_void_p)
update = _function("bpf_map_update_elem", c_int, _check_int, c_int, c_void_p, c_void_p, c_uint64)
delete = _function("bpf_map_delete_elem", c_int, _check_int, c_int, c_void_p)
lookup_batch = _function(
    "bpf_map_lookup_batch",
    c_int,
    _check_int,
    c_int,
    c_void_p,
    c_void_p,
    c_void_p,
    c_void_p,
    POINTER(c_uint32),
    c_void_p,
)
update_batch = _function(
    "bpf_map_update_batch", c_int, _check_int, c_int, c_void_p, c_void_p, POINTER(c_uint32), c_void_p
)
delete_batch = _function("bpf_map_delete_batch", c_int, _check_int, c_int, c_void_p, POINTER(c_uint32), c_void_p)

pin = _function("bpf_obj_pin", c_int, _check_int, c_int, c_char_p)
get_pinned = _function("bpf_obj_get", c_int, _check_int, c_char_p)
info_by_fd = _function("bpf_obj_get_info_by_fd", c_int, _check_int, c_int, c_void_p, POINTER(c_uint32))
possible_cpus = _function("libbpf_num_possible_cpus", c_int, _check_int)

_PRINT = ctypes.CFUNCTYPE(c_int, c_int, c_char_p, c_void_p)
_set_print = _function("libbpf_set_print", c_void_p, None, _PRINT)
_vsnprintf = ctypes.CDLL(None).vsnprintf
_vsnprintf.argtypes = (c_char_p, c_size_t, c_char_p, c_void_p)

_LOG_SIZE = 1 << 25  # a verifier log of the largest program fits
_WARNING = 0


@contextmanager
def messages() -> Iterator[list[str]]:
    """What libbpf has to say while the block runs, one string a message."""
    said: list[str] = []

    def keep(level: int, text: bytes, arguments: int) -> int:
        if level == _WARNING:
            buffer = ctypes.create_string_buffer(_LOG_SIZE)
            _vsnprintf(buffer, _LOG_SIZE, text, arguments)
            said.append(buffer.value.decode(errors="replace"))
        return 0

    callback = _PRINT(keep)
    _set_print(callback)
    try:
        yield said
    finally:
        _set_print(_SILENT)


_SILENT = _PRINT(lambda _level, _text, _arguments: 0)
if isinstance(_library, ctypes.CDLL):
    _set_print(_SILENT)
