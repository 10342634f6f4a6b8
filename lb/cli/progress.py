"""A progress bar for what takes longer than a second.

In come the balancer's reports of how far it is; out goes a bar on standard error, if that is a
terminal. rich is imported when the second is over, so that a quick command does not pay for it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from lb.control.balancer import Balancer

PATIENCE_S = 1.0


class Bar:
    """Appears with the first report that comes more than `PATIENCE_S` after its creation."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._shown: tuple[Progress, TaskID] | None = None

    def update(self, done: int, total: int) -> None:
        if self._shown is None and time.monotonic() - self._since > PATIENCE_S:
            self._shown = _start()
        if self._shown:
            progress, task = self._shown
            progress.update(task, completed=done, total=total)

    def close(self) -> None:
        if self._shown:
            self._shown[0].stop()


def _start() -> tuple[Progress, TaskID]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = TextColumn("services"), BarColumn(), MofNCompleteColumn()
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    progress.start()
    return progress, progress.add_task("services", total=None)


@contextmanager
def progress(balancer: Balancer) -> Iterator[None]:
    """Show how far `balancer` is, as long as the body runs."""
    if not sys.stderr.isatty():
        yield
        return
    bar = Bar()
    balancer.on_progress = bar.update
    try:
        yield
    finally:
        bar.close()
