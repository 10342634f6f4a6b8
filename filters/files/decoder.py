"""Packets as text: an installed tcpdump, fed through a pipe.

Enters: records of a capture file. Leaves: what tcpdump prints of them, on standard output.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from threading import Thread
from typing import IO

from filters.errors import DumpError
from filters.records.pcap import Span

# What is about the pipe, not about what the user reads from. The names are right: they are those of this host.
_ABOUT_THE_PIPE = ("reading from file -", "Warning: interface names might be incorrect")
_NAME = re.compile("^tcpdump: ")


class Decoder:
    """A Sink. `options` are tcpdump's own. Raises DumpError where there is no tcpdump."""

    def __init__(self, header: bytes, options: Sequence[str]) -> None:
        tcpdump = shutil.which("tcpdump")
        if tcpdump is None:
            raise DumpError("tcpdump: not found: install it to see packets as text, or write them to a file with -w")
        # In a process group of its own: an interrupt from the terminal is ours alone, and ends it by the end of input.
        self._process = subprocess.Popen(
            [tcpdump, "-r", "-", *options], stdin=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0, bufsize=0
        )
        assert self._process.stdin
        assert self._process.stderr
        self._input, self._errors = self._process.stdin, Thread(target=_forward, args=(self._process.stderr,))
        _start_without_signals(self._errors)
        with suppress(BrokenPipeError):  # it has said why, and check() or the next write notices
            self.write([header])

    def write(self, spans: Sequence[Span]) -> None:
        for span in spans:
            view = memoryview(span)
            while len(view):
                view = view[self._input.write(view) :]

    def check(self) -> None:
        if self._process.poll() is not None:
            raise BrokenPipeError

    @property
    def status(self) -> int:
        """After close(): tcpdump's exit status, 1 where a signal has ended it."""
        returned = self._process.returncode
        return returned if returned >= 0 else 1

    def give_up(self) -> None:
        """What is not printed yet will not be."""
        self._process.kill()

    def close(self) -> None:
        """Waits until everything is printed."""
        self._input.close()
        self._process.wait()
        self._errors.join()


def _start_without_signals(thread: Thread) -> None:
    """The kernel gives a signal to any thread; only in the main one it interrupts a write that waits for a reader."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    thread.start()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _forward(errors: IO[bytes]) -> None:
    """What it complains of, but for lines about the pipe."""
    with errors:
        for line in errors:
            text = line.decode(errors="replace")
            if not text.startswith(_ABOUT_THE_PIPE):
                print(_NAME.sub("xdp-dump: ", text), end="", file=sys.stderr, flush=True)
