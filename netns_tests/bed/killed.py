"""`xdp-lb` that is killed at a given place: `python -m netns_tests.bed.killed CALLS WORD...` is `xdp-lb WORD...`, which
gets SIGKILL once a change has made so many calls. For -1 it comes to its end and prints how many there were."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType

from lb.cli import main
from lb.control.writer import Writer

REPOSITORY = Path(__file__).resolve().parents[2]
WRITERS = ("lb/control/writer.py", "lb/store/", "lb/dataplane/", "lb/host/neighbours.py", "xdp/")


def die_after(calls: int) -> None:
    """Have this process killed after so many calls within a change; for -1, print how many there were."""
    carry_out, seen = Writer._apply, 0

    def count(frame: FrameType, event: str, _: object) -> None:
        nonlocal seen
        if frame.f_code.co_filename.startswith(written):
            seen += 1
            if seen == calls:
                os.kill(os.getpid(), signal.SIGKILL)

    def counted(*arguments: object) -> object:
        sys.setprofile(count)
        try:
            return carry_out(*arguments)  # type: ignore[arg-type]
        finally:
            sys.setprofile(None)
            print(seen, file=sys.stderr)

    written = tuple(str(REPOSITORY / path) for path in WRITERS)
    Writer._apply = counted  # type: ignore[assignment,method-assign]


if __name__ == "__main__":
    die_after(int(sys.argv.pop(1)))
    main.main()
