"""The writers' lock: one writer at a time in a network namespace."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lb.errors import Busy
from lb.store.files import LOCK_WAIT_S, make_folder, translated

LOCK_POLL_S = 0.02


@contextmanager
def writer_lock(path: Path, netns: str, wait_s: float = LOCK_WAIT_S) -> Iterator[None]:
    """Hold the right to change `netns`. The kernel releases it with the process, however that ends.

    Raises Busy when another process keeps it for `wait_s`, StoreError when the file cannot be made.
    """
    with translated(path):
        make_folder(path)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not _locked_within(lock, wait_s):
            raise Busy(
                f"another xdp-lb ({_holder(lock)}) is changing network namespace {netns}: try again when it has ended"
            )
        with translated(path):
            _name_holder(lock)
        yield
    finally:
        os.close(lock)


def _locked_within(lock: int, wait_s: float) -> bool:
    deadline = time.monotonic() + wait_s
    while not _locked(lock):
        if time.monotonic() > deadline:
            return False
        time.sleep(LOCK_POLL_S)  # flock(2) can wait for ever or not at all
    return True


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _name_holder(lock: int) -> None:
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    words = f"pid {os.getpid()}, {' '.join(command.split())[:80]}".encode()
    if os.pread(lock, len(words) + 1, 0) != words:
        os.ftruncate(lock, 0)
        os.pwrite(lock, words, 0)


def _holder(lock: int) -> str:
    return os.pread(lock, 400, 0).decode(errors="replace") or "starting"
