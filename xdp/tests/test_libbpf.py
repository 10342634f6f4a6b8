"""What becomes of calls into a library that is not installed."""

from __future__ import annotations

from typing import Any

import pytest

from xdp.errors import NotSupported
from xdp.libbpf import _load


def test_library_that_is_missing_is_told_by_the_first_call_into_it() -> None:
    function: Any = _load("libabsent.so.1").bpf_object__open_file
    function.restype = None  # as its signature is set, before anybody calls it
    with pytest.raises(NotSupported, match=r"^libabsent\.so\.1: .*: install libbpf 1\.x \(Debian, Ubuntu: libbpf1\)$"):
        function(b"lb.bpf.o", None)
