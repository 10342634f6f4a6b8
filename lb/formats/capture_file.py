"""Capture files with Ethernet frames, for the commands that test packets.

Enters: a path (`-` for standard input), or the content of such a file. Leaves: packets; raises InvalidInput for other
files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from filters.errors import FilterError
from filters.files.savefile import Packet, SaveFile
from filters.records.pcap import file_header, record
from lb.errors import InvalidInput

ETHERNET = 1  # DLT_EN10MB

Keep = Callable[[int, Packet], None]
"""Takes a packet, and its position in the file."""
Piece = tuple[list[Packet], bytes]
"""Packets, and a capture file of them."""


class Capture:
    """An open file; `name` is what its errors call it. Fractions of a second are nanoseconds."""

    def __init__(self, file: SaveFile, path: str, name: str) -> None:
        self._file, self._path, self.name = file, path, name
        self.snaplen = file.snaplen
        if file.link_type != ETHERNET:
            raise InvalidInput(f"{name}: not a capture of Ethernet frames: {file.link_type_words}")

    def packets(self) -> Iterator[Packet]:
        with _named(self._path, self.name):
            yield from self._file.packets()


@contextmanager
def open_capture(path: str, name: str | None = None) -> Iterator[Capture]:
    """Raises InvalidInput."""
    with _named(path, name or path):
        file = SaveFile(path, nano=True)
    with file:
        yield Capture(file, path, name or path)


@contextmanager
def capture_of(content: bytes, name: str) -> Iterator[Capture]:
    """Of the bytes of a file. Raises InvalidInput."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(content)
        os.lseek(fd, 0, os.SEEK_SET)
        with open_capture(f"/proc/self/fd/{fd}", name) as capture:
            yield capture
    finally:
        os.close(fd)


@contextmanager
def _named(path: str, name: str) -> Iterator[None]:
    try:
        yield
    except FilterError as error:
        raise InvalidInput(f"{name}: {str(error).removeprefix(f'{path}: ')}") from error


def pieces(capture: Capture, size: int) -> Iterator[Piece]:
    """Of about `size` bytes; one at least."""
    head = file_header(ETHERNET, capture.snaplen, nano=True)
    packets, content = list[Packet](), bytearray(head)
    for packet in capture.packets():
        if len(content) >= size:
            yield packets, bytes(content)
            packets, content = [], bytearray(head)
        packets.append(packet)
        content += _record(packet)
    yield packets, bytes(content)


@contextmanager
def writer(path: str | None, snaplen: int) -> Iterator[Keep]:
    """What keeps packets in a file. Raises InvalidInput for one that cannot be written."""
    if path is None:
        yield lambda *_: None
        return
    try:
        with open(path, "wb") as out:
            out.write(file_header(ETHERNET, snaplen, nano=True))

            def keep(_: int, packet: Packet) -> None:
                out.write(_record(packet))

            yield keep
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror}") from error


def _record(packet: Packet) -> bytes:
    return record(packet.seconds, packet.fraction, packet.data, packet.length)
