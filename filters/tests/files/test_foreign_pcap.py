"""Capture files that others have written: what is in them, and what is said of those that are damaged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from filters.errors import DamagedFile, DumpError
from filters.files.savefile import Packet, SaveFile
from filters.records.metadata import FILE_METADATA, METADATA_SIZE, captured_packets
from filters.records.pcap import file_header, record
from filters.tests.foreign_pcap import DAMAGED, FILES, FIRST, NANO, SECOND, Blocks, Expected, Pcap, T


def read(path: Path, content: bytes) -> tuple[list[Packet], str]:
    """The packets, and what is said of the damage behind them."""
    path.write_bytes(content)
    found: list[Packet] = []
    with SaveFile(str(path), nano=True) as file:
        try:
            for packet in file.packets():
                found.append(packet)
        except DamagedFile as damage:
            return found, str(damage)
    return found, ""


def plainly(packets: Sequence[Packet]) -> list[Expected]:
    return [(packet.seconds & 0xFFFFFFFF, packet.fraction, packet.data) for packet in packets]


@pytest.mark.parametrize("name", FILES)
def test_packets_and_times_are_those_in_the_file(tmp_path: Path, name: str) -> None:
    content, expected = FILES[name]
    packets, damage = read(tmp_path / "file", content)
    assert (plainly(packets), damage) == (expected, "")


@pytest.mark.parametrize("name", DAMAGED)
def test_what_comes_before_the_damage_is_read(tmp_path: Path, name: str) -> None:
    content, words = DAMAGED[name]
    packets, damage = read(tmp_path / "file", content)
    assert [packet.data for packet in packets] == [FIRST]
    assert damage.startswith(words)


@pytest.mark.parametrize("magic", [NANO, None], ids=["pcap", "pcapng"])
def test_file_may_end_at_every_byte(tmp_path: Path, magic: int | None) -> None:
    """As many packets as are whole; an error, but where a packet ends."""
    head, packets = pieces(magic)
    ends = [len(head) + sum(map(len, packets[:count])) for count in range(len(packets) + 1)]
    content = head + b"".join(packets)
    for size in range(len(head), len(content) + 1):
        whole, damage = read(tmp_path / "file", content[:size])
        assert (len(whole), bool(damage)) == (sum(end <= size for end in ends) - 1, size not in ends), size
    for size in range(len(head)):
        with pytest.raises(DumpError):
            read(tmp_path / "file", content[:size])


def pieces(magic: int | None) -> tuple[bytes, list[bytes]]:
    """What a file begins with, and its packets."""
    if magic:
        pcap = Pcap(">", magic)
        return pcap.file(), [pcap.record(T, 0, data) for data in (FIRST, SECOND)]
    b = Blocks(">")
    return b.section() + b.interface(), [b.packet(T, data, b.option(1, b"?")) for data in (FIRST, SECOND)]


@pytest.mark.parametrize("link_type", [1, 9, 100, 101, 102, 103, 106, 113, 276])
def test_link_type_is_written_as_it_was_read(tmp_path: Path, link_type: int) -> None:
    (tmp_path / "file").write_bytes(file_header(link_type, 96, nano=False))
    with SaveFile(str(tmp_path / "file"), nano=False) as file:
        assert file.link_type_in_files == link_type


@pytest.mark.parametrize("seconds", [-1, 2**32 + 5, -(2**40)])
def test_numbers_that_a_record_has_no_room_for_wrap_around(tmp_path: Path, seconds: int) -> None:
    content = file_header(1, 96, nano=True) + record(seconds, 2**32 + 7, b"x", 2**32 + 1)
    ((packet,), _) = read(tmp_path / "file", content)
    assert (packet.seconds & 0xFFFFFFFF, packet.fraction, packet.length) == (seconds & 0xFFFFFFFF, 7, 1)


def test_length_of_a_packet_with_a_note_may_be_the_largest() -> None:
    (packet,) = captured_packets(record(T, 0, FILE_METADATA + FIRST, METADATA_SIZE + 0xFFFFFFFF))
    assert (packet.length, bytes(packet.data)) == (0xFFFFFFFF, FIRST)
