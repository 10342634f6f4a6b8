"""The tables of a running stage, served by its process: a Unix socket next to its record.

Enters: a connection. Leaves: the documents of lb.stages.tables as they are at that moment, and the end of the
connection. Only root may connect. Tables are only read on request.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lb.errors import DataplaneError
from lb.formats.documents import Document

SEND_S = 1.0  # to who does not read on
ANSWER_S = 10.0


class TableSocket:
    """Closed by `close`, which leaves nothing at its path."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path.unlink(missing_ok=True)
        mask = os.umask(0o177)
        try:
            with _short(path) as name:
                self._listening.bind(name)
        finally:
            os.umask(mask)
        self._listening.listen()
        self._listening.setblocking(False)

    def answer(self, documents: Callable[[], list[Document]]) -> None:
        """All who wait."""
        while True:
            try:
                connection, _ = self._listening.accept()
            except BlockingIOError:
                return
            with connection, suppress(OSError):  # they have gone
                connection.settimeout(SEND_S)
                connection.sendall(json.dumps(documents()).encode())

    def close(self) -> None:
        self._path.unlink(missing_ok=True)
        self._listening.close()


def ask_tables(path: Path, number: int) -> list[Document]:
    """Raises DataplaneError without an answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(ANSWER_S)
        try:
            with _short(path) as name:
                connection.connect(name)
            content = b"".join(iter(lambda: connection.recv(1 << 16), b""))
            found: list[Document] = json.loads(content)
        except (OSError, ValueError) as error:
            raise DataplaneError(f"stage {number}: cannot read tables from its process ({error}): try again") from None
    return found


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """A name for it that is no longer than unix(7) allows."""
    folder = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
