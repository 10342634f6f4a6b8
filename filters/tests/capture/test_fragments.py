"""The flag that says whether a frame is in fragments: where the kernel has it, and that it is right."""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

import pytest

from filters.capture import fragments
from filters.capture.fragments import FragmentFlag, fragment_flag
from filters.compiler import ebpf
from filters.compiler.hook import XDP_FRAGS
from filters.programs.program import assemble, load
from xdp.errors import NotSupported
from xdp.tests.kernels import KERNEL_CONTEXT
from xdp.tracing import KernelTypes


@pytest.fixture(scope="module")
def flag() -> FragmentFlag:
    found = fragment_flag()
    assert found
    return found


def length(flag: FragmentFlag, frame: bytes) -> int:
    """As a program sees it."""
    with load("length", XDP_FRAGS, assemble(XDP_FRAGS, [], flag)) as program:
        return program.test_run(frame).verdict


@KERNEL_CONTEXT
@pytest.mark.parametrize("size", [14, 60, 1514, 3000, 5000, 60000])
def test_length_is_that_of_the_whole_frame(flag: FragmentFlag, size: int) -> None:
    assert length(flag, bytes(size)) == size


@KERNEL_CONTEXT
def test_it_is_the_flag_that_tells_fragments(flag: FragmentFlag) -> None:
    assert length(replace(flag, mask=1 << 30), bytes(5000)) < 5000


@KERNEL_CONTEXT
def test_helper_is_called_for_frames_in_fragments_only(flag: FragmentFlag) -> None:
    listing = ebpf.disassemble(assemble(XDP_FRAGS, [], flag)).splitlines()
    (jump,) = (number for number, line in enumerate(listing) if f" & {hex(flag.mask)} goto" in line)
    (behind,) = (number for number, line in enumerate(listing) if "goto pc" in line and number > jump)
    (helper,) = (number for number, line in enumerate(listing) if "bpf_xdp_get_buff_len" in line)
    assert jump < behind < helper


def test_kernel_without_such_types_has_no_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> NoReturn:
        raise NotSupported("the kernel has no BTF")

    monkeypatch.setattr(fragments, "kernel_types", missing)
    assert fragment_flag() is None


def test_flag_that_the_verifier_does_not_let_us_read_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(FragmentFlag):
        @classmethod
        def of(cls, types: KernelTypes) -> FragmentFlag:
            return FragmentFlag(cast=1, offset=0, mask=1)  # type 1 is no function

    monkeypatch.setattr(fragments, "FragmentFlag", Elsewhere)
    assert fragment_flag() is None
