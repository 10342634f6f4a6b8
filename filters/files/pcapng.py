"""Capture files in the pcapng format: a section of interfaces, packets with what is known of them, statistics.

Enters: records with metadata (filters.records.metadata), times in ns. Leaves: blocks in the host's byte order.
Format: draft-ietf-opsawg-pcapng. Each packet names its interface and direction, and behind XDP in a comment what
became of it: `XDP_TX forwarded`. filters.native has the loops over packets once more, in C.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from filters import native
from filters.records.counts import Counts
from filters.records.metadata import ACTIONS, CapturedPacket, CapturePoint, PacketMetadata, captured_packets
from filters.records.pcap import File, Sink, Span, record

_SECTION, _INTERFACE, _STATISTICS, _PACKET = 0x0A0D0D0A, 1, 5, 6
_BYTE_ORDER, _VERSION, _UNKNOWN_LENGTH = 0x1A2B3C4D, (1, 0), -1
_END, _COMMENT = 0, 1
_SECTION_APPLICATION = 4
_INTERFACE_NAME, _INTERFACE_RESOLUTION, _INTERFACE_FILTER = 2, 9, 11
_STATISTICS_START, _STATISTICS_END = 2, 3
_STATISTICS_RECEIVED, _STATISTICS_DROPPED, _STATISTICS_ACCEPTED, _STATISTICS_DELIVERED = 4, 5, 6, 8
_PACKET_FLAGS = 2
_NANOSECONDS, _FILTER_IS_TEXT = b"\x09", b"\0"
_DIRECTIONS = {None: 0, "in": 1, "out": 2}

_HEAD, _SIZE = struct.Struct("=II"), struct.Struct("=I")
_PACKET_HEAD = struct.Struct("=IIIIIII")  # type, size, interface, time (high, low), captured length, length
_NS = 10**9


def _padded(data: bytes) -> bytes:
    return data.ljust(len(data) + 3 & ~3, b"\0")


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("=HH", code, len(value)) + _padded(value)


def _options(*options: bytes) -> bytes:
    given = b"".join(options)
    return given + _option(_END, b"") if given else b""


def _block(kind: int, body: bytes) -> bytes:
    size = _SIZE.pack(_HEAD.size + len(body) + _SIZE.size)
    return _SIZE.pack(kind) + size + body + size


def _time(nanoseconds: int) -> bytes:
    return struct.pack("=II", nanoseconds >> 32, nanoseconds & 0xFFFFFFFF)


def _section(application: str) -> bytes:
    fixed = struct.pack("=IHHq", _BYTE_ORDER, *_VERSION, _UNKNOWN_LENGTH)
    return _block(_SECTION, fixed + _options(_option(_SECTION_APPLICATION, application.encode())))


@dataclass(frozen=True, slots=True)
class Source:
    """An interface as a file knows it; those of packets from other files have no name, and index 0."""

    ifindex: int
    name: str = ""

    def block(self, link_type: int, snaplen: int, expression: str) -> bytes:
        options = [_option(_INTERFACE_RESOLUTION, _NANOSECONDS)]
        if self.name:
            options.insert(0, _option(_INTERFACE_NAME, self.name.encode()))
        if expression:
            options.append(_option(_INTERFACE_FILTER, _FILTER_IS_TEXT + expression.encode(errors="surrogateescape")))
        return _block(_INTERFACE, struct.pack("=HHI", link_type, 0, snaplen) + _options(*options))


@dataclass(frozen=True)
class Layout:
    """How packets become blocks. `reasons`: the balancer's words by number, the first for packets it has not judged."""

    sources: Sequence[Source]
    reasons: Sequence[str] = ("",)

    @cached_property
    def numbers(self) -> dict[int, int]:
        """ifindex -> number in the file; the first for all others."""
        return {source.ifindex: number for number, source in enumerate(self.sources)}

    @cached_property
    def directions(self) -> list[int]:
        return [_DIRECTIONS[point.direction] for point in CapturePoint]

    @cached_property
    def comments(self) -> list[bytes]:
        """By action and reason; the last action stands for none, the last reason for unknown ones."""
        none = [b""] * (len(self.reasons) + 1)
        return [_comment(action, reason) for action in ACTIONS for reason in (*self.reasons, "")] + none

    @cached_property
    def native_table(self) -> native.Table:
        ends = list(accumulate(map(len, self.comments)))
        ifindexes = [source.ifindex for source in self.sources]
        return native.table(
            ifindexes, self.directions, b"".join(self.comments), ends, len(ACTIONS) + 1, len(self.reasons) + 1
        )

    def comment(self, metadata: PacketMetadata) -> bytes:
        columns = len(self.reasons) + 1
        found: bytes = self.comments[min(metadata.action, len(ACTIONS)) * columns + min(metadata.reason, columns - 1)]
        return found


def _comment(action: str, reason: str) -> bytes:
    return _option(_COMMENT, f"{action} {reason}".rstrip().encode())


def blocks(spans: Sequence[Span], layout: Layout) -> bytes:
    """The packets of records with metadata."""
    return b"".join(_packet_block(packet, layout) for span in spans for packet in captured_packets(span))


def _packet_block(packet: CapturedPacket, layout: Layout) -> bytes:
    direction = layout.directions[packet.metadata.point]
    flags = _option(_PACKET_FLAGS, _SIZE.pack(direction)) if direction else b""
    number = layout.numbers.get(packet.metadata.ifindex, 0)
    fixed = _SIZE.pack(number) + _time(packet.seconds * _NS + packet.fraction)
    data = bytes(packet.data)
    body = fixed + struct.pack("=II", len(data), packet.length) + _padded(data)
    return _block(_PACKET, body + _options(flags, layout.comment(packet.metadata)))


def plain(spans: Sequence[Span]) -> Sequence[Span]:
    """The records without their metadata."""
    if native.blocks_library:
        return [native.strip_metadata(span) for span in spans]
    packets = (packet for span in spans for packet in captured_packets(span))
    return [b"".join(record(p.seconds, p.fraction, bytes(p.data), p.length) for p in packets)]


def offsets(span: Span) -> Iterator[tuple[int, int, int]]:
    """Of each packet block: where it begins, its seconds and its nanoseconds. All are packet blocks."""
    at, end = 0, len(span)
    while at < end:
        _, size, _, high, low, _, _ = _PACKET_HEAD.unpack_from(span, at)
        yield at, *divmod(high << 32 | low, _NS)
        at += size


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of one interface, by its number in the file; times in nanoseconds since 1970."""

    number: int
    start_ns: int
    end_ns: int
    counts: Counts

    def block(self) -> bytes:
        numbers = {
            _STATISTICS_RECEIVED: self.counts.matched,
            _STATISTICS_DROPPED: self.counts.lost,
            _STATISTICS_ACCEPTED: self.counts.matched,
            _STATISTICS_DELIVERED: self.counts.captured,
        }
        options = [_option(_STATISTICS_START, _time(self.start_ns)), _option(_STATISTICS_END, _time(self.end_ns))]
        options += [_option(code, struct.pack("=Q", value)) for code, value in numbers.items()]
        return _block(_STATISTICS, _SIZE.pack(self.number) + _time(self.end_ns) + _options(*options))


def file_header(application: str, layout: Layout, link_type: int, snaplen: int, expression: str) -> bytes:
    interfaces = (source.block(link_type, snaplen, expression) for source in layout.sources)
    return _section(application) + b"".join(interfaces)


class Blocks:
    """A Sink for records with metadata, in front of a File of blocks."""

    def __init__(self, file: File, layout: Layout) -> None:
        self._file, self._layout = file, layout

    @property
    def reasons(self) -> Sequence[str]:
        return self._layout.reasons

    @reasons.setter
    def reasons(self, words: Sequence[str]) -> None:
        self._layout = replace(self._layout, reasons=words)

    def write(self, spans: Sequence[Span]) -> None:
        if native.blocks_library:
            self._file.write([native.blocks(span, self._layout.native_table) for span in spans])
        else:
            self._file.write([blocks(spans, self._layout)])

    def check(self) -> None:
        self._file.check()

    def close(self) -> None:
        self._file.close()


class StripMetadata:
    """A Sink for records with metadata, in front of one for plain records."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def write(self, spans: Sequence[Span]) -> None:
        self._sink.write(plain(spans))

    def check(self) -> None:
        self._sink.check()

    def close(self) -> None:
        self._sink.close()
