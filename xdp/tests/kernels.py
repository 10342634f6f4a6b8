"""Which tests ask for more than Linux 6.1, the oldest kernel that all else runs on."""

from __future__ import annotations

import platform
import re

import pytest


def since(major: int, minor: int, what: str) -> pytest.MarkDecorator:
    """For tests of what came with that version."""
    running = tuple(map(int, re.findall(r"\d+", platform.release())[:2]))
    return pytest.mark.skipif(running < (major, minor), reason=f"{what} came with Linux {major}.{minor}")


KERNEL_CONTEXT = since(6, 2, "the kernel's own side of a program's context")
DRIVER_FEATURES = since(6, 3, "the question for a driver's XDP features")
MAP_MEMORY = since(6, 4, "the kernel's account of a map's memory")
TCX = since(6, 6, "tcx")
