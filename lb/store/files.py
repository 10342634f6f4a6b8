"""The file of the store: creation, opening, and its errors."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EEXIST, EISDIR, EMFILE, ENFILE, ENOTDIR
from pathlib import Path

from lb.errors import StoreError

LOCK_WAIT_S = 5.0
UNWRITABLE = "not writable: run as root on a writable file system"
FIXES = {
    sqlite3.SQLITE_NOTADB: "not an xdp-lb store: move the file away",
    sqlite3.SQLITE_CORRUPT: "damaged: move the file away and run xdp-lb apply -f lb.toml",
    sqlite3.SQLITE_FULL: "the disk is full: free some space and repeat the command",
    sqlite3.SQLITE_READONLY: UNWRITABLE,
    sqlite3.SQLITE_CANTOPEN: UNWRITABLE,
    sqlite3.SQLITE_PERM: "not permitted: run as root",
    sqlite3.SQLITE_IOERR: "I/O error: see the kernel log",
    sqlite3.SQLITE_BUSY: "locked by another process: stop it and repeat the command",
}
_BLOCKING = {EEXIST, EISDIR, ENOTDIR}


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """The only place where SQLite's and OS errors become StoreError."""
    try:
        yield
    except sqlite3.Error as error:
        raise StoreError(f"store {path}: {_fix(error)}") from error
    except OSError as error:
        name, reason = error.filename or path, error.strerror
        if error.errno in (EMFILE, ENFILE):
            raise StoreError(f"store {name}: {reason}: raise the limit of open files (ulimit -n)") from error
        fix = "move it away" if error.errno in _BLOCKING else "run as root"
        raise StoreError(f"store {name}: {reason}: {fix}, or set XDP_LB_STATE_DIR") from error


def _fix(error: sqlite3.Error) -> str:
    # The low byte of an extended code is the plain one. What `_read_state` raises has none.
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return FIXES.get(code) or f"{error}: {FIXES[sqlite3.SQLITE_CORRUPT]}"


def make_folder(path: Path) -> None:
    path.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.mkdir(mode=0o700, exist_ok=True)


def create_file(path: Path) -> None:
    """SQLite gives its journal the permissions that it finds on the file."""
    with translated(path):
        make_folder(path)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


def exists(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(EISDIR, os.strerror(EISDIR), str(path))
    return True
