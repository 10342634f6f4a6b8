"""The two implementations of the loops: a module that is tested on both asks for `implementation`."""

from __future__ import annotations

import signal
from collections.abc import Iterator

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
