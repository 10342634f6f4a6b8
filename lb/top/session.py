"""`xdp-lb top` on a terminal: what it shows, and what its keys do.

Enters: a function that reads the figures, and what is typed. Leaves: screens, until q, a signal or the last reading.
The terminal is given back as it was, also while the session is suspended.
"""

from __future__ import annotations

import os
import re
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum, auto
from types import FrameType

from rich.console import Console, Group
from rich.live import Live

from lb.errors import LbError
from lb.top.rates import View
from lb.top.view import Display, body_height, last_offset, screen

# A key is a byte, or what terminals send for one (ECMA-48: CSI and SS3 sequences).
KEY = re.compile(rb"\x1b\[[0-9;]*[A-Za-z~]|\x1bO[A-Za-z]|.", re.DOTALL)
LINES = {b"\x1b[A": -1, b"\x1bOA": -1, b"\x1b[B": 1, b"\x1bOB": 1}
PAGES = {b"\x1b[5~": -1, b"\x1b[6~": 1}
ENDS = {b"\x1b[H": 0, b"\x1bOH": 0, b"\x1b[1~": 0, b"\x1b[F": 1, b"\x1bOF": 1, b"\x1b[4~": 1}


class _End(Enum):
    QUIT = auto()
    SUSPENDED = auto()


class Session:
    """What the first reading raises, this raises; of later ones that fail the last line of the screen tells."""

    def __init__(self, read: Callable[[], View], delay_s: float, count: int | None) -> None:
        self._console = Console(highlight=False)
        self._display = Display(interval_s=delay_s, clock=_clock(), ascii_only=self._console.options.ascii_only)
        self._read, self._left = read, count
        self._view = read()
        self._due_s = time.monotonic() + delay_s

    def run(self) -> None:
        with _woken_by_signals() as wake:
            while self._watch(wake) is _End.SUSPENDED:
                os.kill(os.getpid(), signal.SIGSTOP)

    def _watch(self, wake: int) -> _End:
        with (
            _unechoed(sys.stdin.fileno()) as keyboard,
            Live(
                console=self._console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
            ) as live,
        ):
            while True:
                self._draw(live)
                end = self._wait(keyboard, wake)
                if end:
                    return end

    def _draw(self, live: Live) -> None:
        width, height = self._console.size
        offset = min(self._display.offset, last_offset(self._view, height))
        self._display = replace(self._display, width=width, height=height, offset=offset)
        live.update(Group(*screen(self._view, self._display)), refresh=True)

    def _wait(self, keyboard: int, wake: int) -> _End | None:
        """Wait for something to draw, or for the end."""
        timeout = None if self._display.paused else max(0.0, self._due_s - time.monotonic())
        ready, _, _ = select.select([keyboard, wake], [], [], timeout)
        if wake in ready and signal.SIGTSTP in os.read(wake, 64):
            return _End.SUSPENDED
        if keyboard in ready:
            return self._type(os.read(keyboard, 256))
        return None if ready else self._take_next()

    def _type(self, typed: bytes) -> _End | None:
        """Nothing at all is what a terminal sends that has gone."""
        keys = KEY.findall(typed)
        if not keys or b"q" in keys:
            return _End.QUIT
        for key in keys:
            self._press(key)
        return None

    def _press(self, key: bytes) -> None:
        display = self._display
        if key == b"s":
            self._display = replace(display, order=display.order.next)
        elif key == b" ":
            self._display = replace(display, paused=not display.paused)
        else:
            self._display = replace(display, offset=self._scrolled(key))

    def _scrolled(self, key: bytes) -> int:
        height = self._display.height
        last = last_offset(self._view, height)
        if key in ENDS:
            return ENDS[key] * last
        by = LINES.get(key, 0) + PAGES.get(key, 0) * body_height(self._view, height)
        return min(max(0, self._display.offset + by), last)

    def _take_next(self) -> _End | None:
        from lb.formats.error_text import explain  # whose command this is

        if self._left == 0:
            return _End.QUIT
        try:
            self._view = self._read()
            self._display = replace(self._display, clock=_clock(), notice="")
        except (LbError, OSError) as error:
            self._display = replace(self._display, notice=explain(error))
        self._left = None if self._left is None else self._left - 1
        self._due_s = time.monotonic() + self._display.interval_s
        return None


@contextmanager
def _unechoed(terminal: int) -> Iterator[int]:
    """Keys come one by one, and are not shown; Ctrl-C and Ctrl-Z stay what they are."""
    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal)
    try:
        yield terminal
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


@contextmanager
def _woken_by_signals() -> Iterator[int]:
    """A file descriptor from which the number of each signal can be read: another size of the terminal, Ctrl-Z. SIGTERM
    ends the process in an orderly way, so that the terminal is given back as it was."""
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    handlers = {signal.SIGWINCH: _go_on, signal.SIGTSTP: _go_on, signal.SIGTERM: _end}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        yield read
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(read)
        os.close(write)


def _go_on(number: int, frame: FrameType | None) -> None:
    """The wake-up is enough."""


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _clock() -> str:
    return time.strftime("%H:%M:%S")
