"""The two implementations of the loops, for modules that are tested on both; a place for programs that root runs."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lb.hashing import native

# Of a command in the background, shells ignore Ctrl-C, and so would what the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=["native", "pure"], scope="module")
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test of the module once with ring.so and once without."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "pure":
            patch.setattr(native, "library", None)
        yield


@pytest.fixture
def root_directory() -> Iterator[Path]:
    """Where root alone can change anything, up to the root; not so pytest's own, in /tmp."""
    with tempfile.TemporaryDirectory(dir="/run", prefix="xdp-lb-test-") as made:
        Path(made).chmod(0o755)
        yield Path(made)
