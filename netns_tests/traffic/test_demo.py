"""`make demo`, with short phases: what it prints is what the README promises."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import pytest
from rich.console import Console

from netns_tests import demo
from netns_tests.bed.servers import start_http
from netns_tests.bed.topology import Bed


def test_the_demo_shows_the_changes_and_no_failed_request(
    bed: Callable[..., Bed], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "PHASE_S", 0.5)
    up = bed(backends=4)
    for backend in up.backends:
        start_http(up, backend)
    printed = io.StringIO()
    assert demo.Demo(up, Console(file=printed, highlight=False), as_json=False).run() == 0
    lines = printed.getvalue().splitlines()
    assert lines.count("$ xdp-lb status") == 3
    first, fourth = (f"{backend.ipv4}:80" for backend in (up.backends[0], up.backends[3]))
    states = [line.split()[0::2][:2] for line in lines if line.startswith(f"  {first} ")]
    assert states == [[first, "active"], [first, "active"], [first, "draining"]]
    assert len([line for line in lines if line.startswith(f"  {fourth} ")]) == 2
    assert re.fullmatch(r"0 failed of [1-9][0-9]* requests", lines[-1])
