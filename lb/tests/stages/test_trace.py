"""Instances of the kernel's trace; lines in them are seen in netns_tests/host/test_stage.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lb.stages import trace as stage_trace
from lb.stages.trace import PREFIX, Trace


def test_an_instance_goes_with_its_trace_and_that_of_a_killed_process_with_the_next() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    mount = stage_trace._mounted_tracefs()
    instances = Path(f"/proc/self/fd/{mount}/instances")
    left, own = instances / f"{PREFIX}{process.pid}", instances / f"{PREFIX}{os.getpid()}"
    left.mkdir()
    trace = Trace("mark")
    assert (left.exists(), own.exists()) == (False, True)
    assert trace.lines() == []
    trace.close()
    assert not own.exists()
    os.close(mount)
