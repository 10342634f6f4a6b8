"""Whether only root can change what a path leads to.

Enters: a path from the root. Leaves: what is wrong with it, or nothing. Every directory and symbolic link on the way
counts, since who can replace one of them chooses the file.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

MAX_LINKS = 40  # as the kernel, path_resolution(7)
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def fault_of_program(path: str) -> str:
    """Empty: root alone can change it, and it can be run."""
    try:
        steps = list(_steps(path))
    except FileNotFoundError:
        return f"{path}: not found"
    except OSError as error:
        return f"{path}: {(error.strerror or str(error)).lower()}"
    for place, found in steps:
        if fault := _fault_of_step(place, found):
            return fault
    _, last = steps[-1]
    if not stat.S_ISREG(last.st_mode):
        return f"{path}: not a file"
    return "" if last.st_mode & stat.S_IXUSR else f"{path}: not executable: run chmod +x {path}"


def _fault_of_step(place: Path, found: os.stat_result) -> str:
    if found.st_uid != 0:
        return f"{place}: not owned by root: run chown root {place}"
    if found.st_mode & OTHERS_WRITE and not stat.S_ISLNK(found.st_mode):  # the mode of a link means nothing
        return f"{place}: writable by others than root: run chmod go-w {place}"
    return ""


def _steps(path: str) -> Iterator[tuple[Path, os.stat_result]]:
    """Each directory and link on the way, and the file. Raises OSError."""
    place, links = Path("/"), 0
    waiting = list(Path(path).parts[:0:-1])
    yield place, place.lstat()
    while waiting:
        name = waiting.pop()
        place = place.parent if name == ".." else place / name
        found = place.lstat()
        yield place, found
        if stat.S_ISLNK(found.st_mode):
            links += 1
            if links > MAX_LINKS:
                raise OSError(0, "too many levels of symbolic links")
            target = place.readlink()
            place = Path("/") if target.is_absolute() else place.parent
            waiting += [part for part in reversed(target.parts) if part != "/"]
