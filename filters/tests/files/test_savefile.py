"""Files read by libpcap, filters run over them in the kernel: the same packets as libpcap's own interpreter takes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from filters.compiler.expr import compile_expression
from filters.errors import DumpError, ExpressionError
from filters.files.savefile import FileFilter, Packet, SaveFile, file_filter
from filters.records.pcap import file_header, record
from filters.tests.corpus import EXPRESSIONS
from filters.tests.libpcap import bpf_filter
from filters.tests.packets import FRAMES

NOBODY = 65534
LIVE_ONLY = ("inbound", "outbound", "ifindex")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """All frames, one that is too short for any kernel, and one that is too long for a test run."""
    file = tmp_path_factory.mktemp("savefile") / "frames"
    frames = [*FRAMES.values(), b"\2\0\0", FRAMES["udp"] + bytes(100_000)]
    written = (record(100, number, frame, len(frame)) for number, frame in enumerate(frames))
    file.write_bytes(file_header(1, 262144, nano=False) + b"".join(written))
    return str(file)


@pytest.fixture(scope="module")
def packets(path: str) -> list[Packet]:
    with SaveFile(path, nano=False) as file:
        return list(file.packets())


def accepted(expression: str, packets: list[Packet]) -> list[int]:
    with file_filter(compile_expression(expression)) as accepting:
        return [number for number, packet in enumerate(packets) if accepting.accepts(packet)]


def expected(expression: str, packets: list[Packet]) -> list[int]:
    instructions = compile_expression(expression)
    return [number for number, packet in enumerate(packets) if bpf_filter(instructions, packet.data)]


def test_packets_of_a_file_are_those_that_were_written(packets: list[Packet]) -> None:
    assert [packet.data for packet in packets[: len(FRAMES)]] == list(FRAMES.values())
    assert (packets[1].seconds, packets[1].fraction, packets[1].length) == (100, 1, len(packets[1].data))


@pytest.mark.parametrize("expression", [e for e in EXPRESSIONS if e.split()[0] not in LIVE_ONLY][::4])
def test_filter_takes_what_libpcap_takes(packets: list[Packet], expression: str) -> None:
    assert accepted(expression, packets) == expected(expression, packets)


def test_packets_that_no_test_run_takes_are_filtered_too(packets: list[Packet]) -> None:
    short, long = len(FRAMES), len(FRAMES) + 1
    assert accepted("less 13 or greater 90000", packets) == [short, long]
    assert accepted("udp port 53 and greater 90000", packets) == [long]


def test_length_of_a_packet_that_was_cut_is_the_one_it_had(packets: list[Packet]) -> None:
    cut = Packet(1, 0, 1000, FRAMES["udp"][:60])
    assert accepted("greater 900", [cut, packets[0]]) == [0]
    assert accepted("len = 60", [cut]) == []


def test_without_permission_the_same_packets_are_taken(packets: list[Packet]) -> None:
    with as_nobody():
        assert accepted("udp port 53", packets) == expected("udp port 53", packets)


@contextmanager
def as_nobody() -> Iterator[None]:
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_kernel_is_asked_where_it_can_be(packets: list[Packet], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not libpcap, which here would say no."""
    instructions = compile_expression("udp port 53")
    with file_filter(instructions) as accepting:
        monkeypatch.setattr(accepting, "_classic", b"\6\0\0\0\0\0\0\0")
        kernel = [number for number, packet in enumerate(packets) if accepting.accepts(packet)]
    assert kernel == expected("udp port 53", packets)[:-1]
    assert FileFilter(instructions, None).accepts(packets[kernel[0]])


@pytest.mark.parametrize("primitive", ["inbound", "ifindex 1"])
def test_what_has_no_meaning_in_a_file_is_refused(path: str, primitive: str) -> None:
    with SaveFile(path, nano=False) as file, pytest.raises(ExpressionError, match=r"when reading savefiles$"):
        file.compiled(primitive)


def test_nanoseconds_are_read_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "nano"
    file.write_bytes(file_header(1, 96, nano=True) + record(1, 123_456_789, b"x" * 14, 14))
    for nano, fraction in ((True, 123_456_789), (False, 123_456)):
        with SaveFile(str(file), nano=nano) as read:
            assert [packet.fraction for packet in read.packets()] == [fraction]
            assert (read.snaplen, read.link_type_words) == (96, "EN10MB (Ethernet)")


def test_file_that_ends_in_a_record_is_told_of(tmp_path: Path) -> None:
    file = tmp_path / "cut"
    file.write_bytes(file_header(1, 96, nano=False) + record(1, 0, b"x" * 14, 14)[:-1])
    with SaveFile(str(file), nano=False) as read, pytest.raises(DumpError, match="truncated dump file"):
        list(read.packets())


def test_link_type_of_raw_ip_is_written_by_its_number_for_files(tmp_path: Path) -> None:
    file = tmp_path / "raw"
    file.write_bytes(file_header(101, 96, nano=False))
    with SaveFile(str(file), nano=False) as read:
        assert (read.link_type, read.link_type_in_files, read.link_type_words) == (12, 101, "RAW (Raw IP)")
