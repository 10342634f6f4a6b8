"""Capture files in the pcap format: the header, the records of a block, and files written in blocks.

Enters: spans of memory, each of whole records in the host's byte order, as the capture program makes them. Leaves: a
file, or, with a Rotation, several. The format: draft-ietf-opsawg-pcap. A File takes other formats as well.
"""

from __future__ import annotations

import os
import stat
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from filters.errors import DumpError, NotWritten

_MICROSECONDS, _NANOSECONDS = 0xA1B2C3D4, 0xA1B23C4D
_VERSION = (2, 4)
_HEADER = struct.Struct("=IHHiIII")
_RECORD = struct.Struct("=IIII")  # seconds, fraction, captured length, length
_WORD = 0xFFFFFFFF
_MAX_SPANS = 64  # of one writev(2); IOV_MAX is 1,024

Span = memoryview | bytes | bytearray
Offsets = Callable[[Span], Iterator[tuple[int, int, int]]]


def file_header(link_type: int, snaplen: int, *, nano: bool) -> bytes:
    return _HEADER.pack(_NANOSECONDS if nano else _MICROSECONDS, *_VERSION, 0, 0, snaplen, link_type)


def record(seconds: int, fraction: int, packet: bytes, length: int) -> bytes:
    """Numbers that are too large for the format, or negative, wrap around as in libpcap's pcap_dump()."""
    return _RECORD.pack(seconds & _WORD, fraction & _WORD, len(packet), length & _WORD) + packet


def offsets(span: Span) -> Iterator[tuple[int, int, int]]:
    """Of each record: where it begins, its seconds and its fraction."""
    at, end = 0, len(span)
    while at < end:
        seconds, fraction, caplen, _ = _RECORD.unpack_from(span, at)
        yield at, seconds, fraction
        at += _RECORD.size + caplen


def unpacked(view: memoryview, at: int) -> tuple[memoryview, int]:
    """The captured bytes of the record that begins there, and the length of the packet."""
    _, _, caplen, length = _RECORD.unpack_from(view, at)
    return view[at + _RECORD.size : at + _RECORD.size + caplen], length


def count_records(span: Span) -> int:
    return sum(1 for _ in offsets(span))


class Sink(Protocol):
    """Receives whole records. write() raises DumpError; both raise BrokenPipeError if the reader is gone."""

    def write(self, spans: Sequence[Span]) -> None: ...

    def check(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Rotation:
    """When to go on to the next file, and what it is called: tcpdump's -C, -G and -W."""

    size: int = 0
    seconds: int = 0
    files: int = 0

    def name(self, base: str, number: int, at: float) -> str:
        """`at` is when the file begins, for strftime(3); the number is left out where files are not counted."""
        if self.seconds:
            base = time.strftime(base, time.localtime(at))
        digits = len(str(self.files - 1)) if self.size and self.files > 1 else 0
        return f"{base}{number:0{digits}d}" if number or digits else base


class FilesFull(Exception):
    """The limit of -W with -G is reached. `written` records of the call are in the last file."""

    def __init__(self, written: int) -> None:
        self.written = written


class File:
    """A file of records, `-` for standard output. Raises DumpError for what cannot be opened or written.

    Of other formats `find` finds the records, as offsets() does, and `trailer` makes what each file ends with.
    `rotated` is told the name of each file that is complete because the next is due.
    """

    def __init__(
        self,
        path: str,
        header: bytes,
        rotation: Rotation | None = None,
        *,
        find: Offsets = offsets,
        trailer: Callable[[], bytes] = bytes,
        rotated: Callable[[str], None] | None = None,
    ) -> None:
        self._path, self._header, self._rotation = path, header, rotation or Rotation()
        self._offsets, self._trailer, self._is_cut = find, trailer, False
        self._rotated, self._is_complete = rotated, False
        self._number = self._periods = self._delivered = 0
        self._begun = time.time()
        self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, spans: Sequence[Span]) -> None:
        """Also raises FilesFull once all files are written; later records are not."""
        self._delivered = 0
        if not self._may_rotate(spans):
            self._append(spans)
            return
        for span in spans:
            self._write_rotating(span)

    def check(self) -> None:
        """A file is always there."""

    def close(self) -> None:
        """Raises DumpError where the trailer finds no room; the file is closed then."""
        whole = self._size
        try:
            if not self._is_cut:
                self._put([memoryview(self._trailer())])
        except BrokenPipeError:
            pass  # the reader is gone
        except DumpError:
            self._cut(whole)
            raise
        finally:
            if self._path != "-":
                os.close(self._fd)
                if self._rotated and self._is_complete:
                    self._rotated(self._name)
            self._is_complete = False

    def _open(self) -> None:
        self._size = 0
        self._name = self._rotation.name(self._path, self._number, self._begun)
        if self._path == "-":
            self._fd = 1
        else:
            try:
                self._fd = os.open(self._name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise DumpError(f"{self._name}: {error.strerror}") from error
        self._put([memoryview(self._header)])

    def _may_rotate(self, spans: Sequence[Span]) -> bool:
        """Without a look at a record. No record is younger than now."""
        rotation = self._rotation
        return (rotation.size > 0 and self._size + sum(map(len, spans)) > rotation.size) or (
            rotation.seconds > 0 and time.time() - self._begun >= rotation.seconds
        )

    def _write_rotating(self, span: Span) -> None:
        view, written, records = memoryview(span), 0, 0
        for at, seconds, _ in self._offsets(view):
            if self._is_over(seconds, at - written):
                self._append([view[written:at]])
                self._delivered += records
                written, records = at, 0
                self._rotate(seconds)
            records += 1
        self._append([view[written:]])
        self._delivered += records

    def _is_over(self, seconds: int, waiting: int) -> bool:
        rotation = self._rotation
        return (rotation.size > 0 and self._size + waiting > rotation.size) or self._period_is_over(seconds)

    def _period_is_over(self, seconds: int) -> bool:
        return self._rotation.seconds > 0 and seconds - self._begun >= self._rotation.seconds

    def _rotate(self, seconds: int) -> None:
        rotation = self._rotation
        self._is_complete = True
        if self._period_is_over(seconds):
            self._begun, self._number, self._periods = seconds, 0, self._periods + 1
            if not rotation.size and 0 < rotation.files <= self._periods:
                raise FilesFull(self._delivered)
        else:
            self._number += 1
            if rotation.files:
                self._number %= rotation.files
        self.close()
        self._open()

    def _append(self, spans: Sequence[Span]) -> None:
        before = self._size
        try:
            self._put([memoryview(span) for span in spans])
        except DumpError as error:
            whole, records = self._whole_records(spans, self._size - before)
            self._cut(before + whole)
            raise NotWritten(str(error), self._delivered + records) from error

    def _put(self, waiting: Sequence[memoryview]) -> None:
        waiting = [span for span in waiting if len(span)]
        while waiting:
            try:
                written = os.writev(self._fd, waiting[:_MAX_SPANS])
            except BrokenPipeError:
                raise
            except OSError as error:
                raise DumpError(f"{self._name}: {error.strerror}") from error
            self._size += written
            waiting = _rest(waiting, written)

    def _cut(self, size: int) -> None:
        """So that a full disk leaves a file that ends with a record."""
        self._is_cut = True
        if stat.S_ISREG(os.fstat(self._fd).st_mode):
            os.ftruncate(self._fd, size)

    def _whole_records(self, spans: Sequence[Span], size: int) -> tuple[int, int]:
        """How many bytes and records of the first `size` bytes are complete records."""
        whole = records = base = 0
        for span in spans:
            ends = [*(at for at, _, _ in self._offsets(span) if at), len(span)]
            complete = [base + end for end in ends if base + end <= size]
            whole, records, base = max([whole, *complete]), records + len(complete), base + len(span)
        return whole, records


def _rest(spans: Sequence[memoryview], written: int) -> list[memoryview]:
    rest = []
    for span in spans:
        if written < len(span):
            rest.append(span[written:])
        written = max(0, written - len(span))
    return rest
