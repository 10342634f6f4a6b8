"""Files of records: what is in them, when they change, what a full disk leaves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from scapy.utils import RawPcapReader

from filters.errors import DumpError, NotWritten
from filters.records.pcap import File, FilesFull, Rotation, count_records, file_header, offsets, record

HEADER = file_header(1, 96, nano=False)
SIZE = 16 + 84


def records(count: int, seconds: int = 0) -> bytes:
    return b"".join(record(seconds, number, bytes([number]) * 84, 84) for number in range(count))


def sizes(directory: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in directory.iterdir()}


@pytest.mark.parametrize("nano", [False, True])
def test_file_is_one_that_scapy_reads(tmp_path: Path, nano: bool) -> None:
    path = tmp_path / "file"
    with File(str(path), file_header(1, 96, nano=nano)) as file:
        file.write([memoryview(record(7, 8, b"first", 60)), record(9, 10, b"second", 6)])
    with RawPcapReader(str(path)) as reader:
        assert (reader.snaplen, reader.linktype, reader.nano) == (96, 1, nano)
        assert [(data, meta.sec, meta.usec, meta.wirelen) for data, meta in reader] == [
            (b"first", 7, 8, 60),
            (b"second", 9, 10, 6),
        ]


def test_more_spans_than_one_system_call_takes_are_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with File(str(path), HEADER) as file:
        file.write([record(1, number, b"x", 1) for number in range(3000)])
    assert [fraction for _, _, fraction in offsets(path.read_bytes()[24:])] == list(range(3000))


def test_next_file_begins_with_the_record_after_the_one_that_filled_the_last(tmp_path: Path) -> None:
    with File(str(tmp_path / "f"), HEADER, Rotation(size=24 + 3 * SIZE)) as file:
        file.write([records(5), records(4)])
        file.write([records(2)])
    assert sizes(tmp_path) == {"f": 24 + 4 * SIZE, "f1": 24 + 4 * SIZE, "f2": 24 + 3 * SIZE}


def test_numbers_of_files_have_as_many_digits_as_the_last_one_and_begin_again(tmp_path: Path) -> None:
    with File(str(tmp_path / "f"), HEADER, Rotation(size=24, files=11)) as file:
        file.write([records(13)])
    assert sorted(sizes(tmp_path)) == [f"f{number:02d}" for number in range(11)]
    assert [fraction for _, _, fraction in offsets((tmp_path / "f01").read_bytes()[24:])] == [12]


def test_file_changes_with_the_time_of_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1000.0)
    with File(str(tmp_path / "f-%s"), HEADER, Rotation(seconds=10)) as file:
        monkeypatch.setattr("time.time", lambda: 1030.0)
        file.write([records(2, 1009) + records(3, 1010) + records(1, 1019) + records(1, 1025)])
    assert sizes(tmp_path) == {"f-1000": 24 + 2 * SIZE, "f-1010": 24 + 4 * SIZE, "f-1025": 24 + SIZE}


def test_last_file_of_a_number_of_periods_ends_it_and_says_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", lambda: 1000.0)
    with File(str(tmp_path / "f-%s"), HEADER, Rotation(seconds=10, files=2)) as file:
        monkeypatch.setattr("time.time", lambda: 1030.0)
        with pytest.raises(FilesFull) as ending:
            file.write([records(2, 1005) + records(1, 1012), records(2, 1013) + records(7, 1022)])
    assert ending.value.written == 5
    assert sizes(tmp_path) == {"f-1000": 24 + 2 * SIZE, "f-1012": 24 + 3 * SIZE}


@pytest.mark.parametrize("room", [0, 1, SIZE - 1, SIZE, 2 * SIZE + 50, 4 * SIZE + 15])
def test_full_disk_leaves_whole_records_and_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    path = tmp_path / "file"
    file = File(str(path), HEADER)
    file.write([records(1)])
    monkeypatch.setattr("os.writev", disk_with(room))
    with pytest.raises(NotWritten, match=rf"^{path}: No space left on device$") as failure:
        file.write([records(2), records(3)])
    file.close()
    assert failure.value.written == room // SIZE
    assert path.stat().st_size == 24 + SIZE + room // SIZE * SIZE
    assert count_records(path.read_bytes()[24:]) == 1 + room // SIZE


def disk_with(room: int) -> object:
    """writev(2) that has so many bytes left and then ENOSPC."""

    def writev(fd: int, spans: list[memoryview]) -> int:
        nonlocal room
        if room == 0:
            raise OSError(28, os.strerror(28))
        written = os.write(fd, b"".join(spans)[:room])
        room -= written
        return written

    return writev


def test_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(DumpError, match=rf"^{tmp_path}/no/file: No such file or directory$"):
        File(f"{tmp_path}/no/file", HEADER)
