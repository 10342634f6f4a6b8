"""Blocks of the pcapng format: in C and, its oracle, in Python; and as others read them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.utils import RawPcapNgReader

from filters import native
from filters.files import pcapng
from filters.files.pcapng import Layout, Source, Statistics, StripMetadata
from filters.records.counts import Counts
from filters.records.metadata import NO_ACTION, CapturePoint, PacketMetadata
from filters.records.pcap import record

LAYOUT = Layout([Source(3, "eth0"), Source(5, "eth1")], ["", "forwarded", "drop_no_backend"])
HEADER = pcapng.file_header("test", LAYOUT, 1, 65535, "udp port 53")

_NOTES = st.builds(
    PacketMetadata,
    ifindex=st.sampled_from([3, 5, 9]),
    point=st.sampled_from(list(map(int, CapturePoint))),
    action=st.sampled_from([0, 1, 2, 3, 4, 5, 77, NO_ACTION]),
    reason=st.integers(0, 5),
)
_RECORDS = st.lists(
    st.tuples(st.sampled_from([0, 1, 2**32 - 1]), st.integers(0, 10**9 - 1), _NOTES, st.binary(max_size=9)), max_size=9
)
Given = Sequence[tuple[int, int, PacketMetadata, bytes]]


def span(packets: Given, surplus: int = 0) -> bytes:
    """Records with metadata, of packets that were cut by `surplus` bytes."""
    made = ((when, fraction, bytes(metadata) + data) for when, fraction, metadata, data in packets)
    return b"".join(record(when, fraction, whole, len(whole) + surplus) for when, fraction, whole in made)


def read(blocks: bytes) -> list[tuple[bytes, bytes, int | None, list[bytes]]]:
    """Data, interface, direction and comments of packets, as scapy reads them."""
    reader: Any = RawPcapNgReader(io.BytesIO(HEADER + blocks))  # type: ignore[arg-type]
    return [(data, meta.ifname, meta.direction, meta.comments or []) for data, meta in reader]


def test_the_library_is_built() -> None:
    assert native.blocks_library, "filters/native/pcapng.so: run make build"


@given(_RECORDS, st.integers(0, 7))
def test_blocks_made_in_c_are_those_made_in_python(packets: Given, surplus: int) -> None:
    given = span(packets, surplus)
    assert native.blocks(given, LAYOUT.native_table) == pcapng.blocks([given], LAYOUT)


@given(_RECORDS, st.integers(0, 7))
def test_notes_are_taken_off_alike(packets: Given, surplus: int) -> None:
    plain = b"".join(record(when, fraction, data, len(data) + surplus) for when, fraction, _, data in packets)
    assert native.strip_metadata(span(packets, surplus)) == plain
    kept = native.blocks_library
    native.blocks_library = None
    try:
        assert b"".join(pcapng.plain([span(packets, surplus)])) == plain
    finally:
        native.blocks_library = kept


@given(_RECORDS)
def test_records_are_found_again_among_blocks(packets: Given) -> None:
    blocks = pcapng.blocks([span(packets)], LAYOUT)
    found = list(pcapng.offsets(blocks))
    assert [(seconds, fraction) for _, seconds, fraction in found] == [(s, f) for s, f, _, _ in packets]
    assert all(blocks[at : at + 4] == b"\6\0\0\0" for at, _, _ in found)


@pytest.mark.parametrize(
    ("metadata", "interface", "direction", "comments"),
    [
        (PacketMetadata(3, CapturePoint.XDP, NO_ACTION), b"eth0", 1, []),
        (PacketMetadata(5, CapturePoint.TC_OUT, NO_ACTION), b"eth1", 2, []),
        (PacketMetadata(5, CapturePoint.XDP_EXIT, 3, 1, 7), b"eth1", 1, [b"XDP_TX forwarded"]),
        (PacketMetadata(3, CapturePoint.XDP_EXIT, 1, 2), b"eth0", 1, [b"XDP_DROP drop_no_backend"]),
        (PacketMetadata(3, CapturePoint.XDP_EXIT, 2, 0), b"eth0", 1, [b"XDP_PASS"]),
        (PacketMetadata(3, CapturePoint.XDP_EXIT, 1, 99), b"eth0", 1, [b"XDP_DROP"]),
        (PacketMetadata(0, CapturePoint.FILE, NO_ACTION), b"eth0", None, []),
    ],
)
def test_packet_says_where_it_was_seen_and_what_became_of_it(
    metadata: PacketMetadata, interface: bytes, direction: int | None, comments: list[bytes]
) -> None:
    assert read(native.blocks(span([(1, 2, metadata, b"abcdef")]), LAYOUT.native_table).tobytes()) == [
        (b"abcdef", interface, direction, comments)
    ]


def test_statistics_are_bytes_that_the_format_asks_for() -> None:
    block = Statistics(1, 2**33, 2**34, Counts(matched=10, captured=7, lost=3)).block()
    words = [int.from_bytes(block[at : at + 4], "little") for at in range(0, len(block), 4)]
    assert words[:5] == [5, len(block), 1, 4, 0]
    assert words[5:11] == [2 | 8 << 16, 2, 0, 3 | 8 << 16, 4, 0]  # start and end of the capture
    assert words[11:23] == [4 | 8 << 16, 10, 0, 5 | 8 << 16, 3, 0, 6 | 8 << 16, 10, 0, 8 | 8 << 16, 7, 0]
    assert words[23:] == [0, len(block)]


def test_sink_without_notes_hands_over_plain_records() -> None:
    class Memory:
        taken = b""

        def write(self, spans: Sequence[memoryview | bytes | bytearray]) -> None:
            self.taken += b"".join(spans)

        def check(self) -> None:
            raise BrokenPipeError

        def close(self) -> None:
            self.taken += b"closed"

    memory = Memory()
    sink = StripMetadata(memory)
    sink.write([span([(1, 2, PacketMetadata(3), b"abc")])])
    sink.close()
    assert memory.taken == record(1, 2, b"abc", 3) + b"closed"
    with pytest.raises(BrokenPipeError):
        sink.check()
