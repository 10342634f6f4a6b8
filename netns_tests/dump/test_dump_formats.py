"""What `xdp-dump` makes of packets besides tcpdump's text and files: pcapng, JSON, summaries, accounts of hooks."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.l2 import Ether
from scapy.utils import RawPcapNgReader

from filters.tests.foreign_pcap import DAMAGED, FILES, FIRST
from netns_tests.bed.dump import (
    FAR,
    LAST,
    NEAR,
    TRAFFIC,
    XDP_DUMP,
    command,
    disk_of_64_kib,
    has_written,
    records,
    running,
    send,
    veth_host,
)
from netns_tests.bed.topology import Host, wait_until

UDP = next(frame for frame in TRAFFIC if frame[23:24] == b"\x11")


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with veth_host() as made:
        yield made


def noted(file: Path) -> list[tuple[bytes, int, bytes, int]]:
    """Bytes, length, interface and direction (1: in, 2: out) of each packet, as scapy reads them."""
    reader: Any
    with RawPcapNgReader(str(file)) as reader:
        return [(data, meta.wirelen, meta.ifname, meta.direction) for data, meta in reader]


def capture_to(host: Host, file: Path, *words: str, frames: Sequence[bytes] = TRAFFIC) -> str:
    """What is said on standard error."""
    with running(host, XDP_DUMP, "-w", str(file), *words) as dump:
        send(host, [*frames, LAST])
        wait_until(lambda: has_written(file, LAST[:14]), "the last frame in the file")
        _, _, errors = dump.end()
    return errors


# pcapng


@pytest.mark.parametrize("words", ["--at=xdp", "--at=tc-in", "-Qin --pcapng"])
def test_file_with_blocks_has_every_frame_and_where_it_was_seen(host: Host, tmp_path: Path, words: str) -> None:
    """Tagged ones too, whose tag the kernel takes off before tc."""
    file = tmp_path / ("ours" if "--pcapng" in words else "ours.pcapng")
    capture_to(host, file, "-i", FAR, *words.split())
    assert noted(file) == [(frame, len(frame), FAR.encode(), 1) for frame in [*TRAFFIC, LAST]]


def test_interfaces_and_directions_are_told_apart(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "ours.pcapng"
    capture_to(host, file, "-i", FAR, "-i", NEAR, "udp port 53 or ether proto 0x88b5", frames=[UDP])
    found = {(data, name, direction) for data, _, name, direction in noted(file)}
    assert found == {(f, *where) for f in (UDP, LAST) for where in ((NEAR.encode(), 2), (FAR.encode(), 1))}


def test_tcpdump_reads_what_it_would_have_written(host: Host, tmp_path: Path) -> None:
    blocks, plain, back = (tmp_path / name for name in ("ours.pcapng", "plain", "back"))
    capture_to(host, blocks, "-i", FAR, "-Q", "in", "-s", "60")
    command(host, "tcpdump", "-Z", "root", "-r", str(blocks), "--nano", "-w", str(plain))
    assert records(plain) == [(frame[:60], len(frame)) for frame in [*TRAFFIC, LAST]]
    command(host, XDP_DUMP, "-r", str(plain), "--nano", "-w", str(tmp_path / "again.pcapng"))
    command(host, XDP_DUMP, "-r", str(tmp_path / "again.pcapng"), "--nano", "-w", str(back))
    assert back.read_bytes() == plain.read_bytes()


def test_file_ends_with_what_was_received_and_lost(host: Host, tmp_path: Path) -> None:
    """isb_ifrecv, isb_ifdrop and isb_usrdeliv, in the last block."""
    file = tmp_path / "ours.pcapng"
    with running(host, XDP_DUMP, "-i", FAR, "-Q", "in", "-B", "64", "-w", str(file)) as dump:
        dump.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: " T " in Path(f"/proc/{dump.process.pid}/stat").read_text(), "the process stopped")
        send(host, [UDP + bytes(1000)] * 300)
        dump.process.send_signal(signal.SIGCONT)
        _, _, errors = dump.end()
    said = re.search(r"(\d+) packets captured\n(\d+) packets received by filter\n(\d+) packets dropped", errors)
    assert said
    captured, received, dropped = map(int, said.groups())
    assert (received, dropped > 0, len(noted(file))) == (300, True, captured)
    assert statistics(file.read_bytes()) == {4: received, 5: dropped, 6: received, 8: captured}


def statistics(file: bytes) -> dict[int, int]:
    """The counters of the last block, by option code."""
    block = file[-int.from_bytes(file[-4:], "little") :]
    assert int.from_bytes(block[:4], "little") == 5
    found, options = {}, block[20:-4]
    while options:
        code, size = (int.from_bytes(options[at : at + 2], "little") for at in (0, 2))
        if size == 8 and code >= 4:
            found[code] = int.from_bytes(options[4:12], "little")
        options = options[4 + (size + 3 & ~3) :]
    return found


def test_blocks_go_into_a_pipe(host: Host) -> None:
    piped = f"{XDP_DUMP} -i {FAR} -Q in -c 2 --pcapng -w - | tcpdump -r - -n -t"
    with running(host, "sh", "-c", piped) as dump:
        send(host, [UDP, UDP])
        status, out, _ = dump.end(None)
    assert (status, out.count("10.1.2.3.53")) == (0, 2)


def test_each_of_several_files_is_whole(host: Host, tmp_path: Path) -> None:
    large = [UDP + bytes(1000) + number.to_bytes(2, "big") for number in range(2500)]
    capture_to(host, tmp_path / "all", "-i", FAR, "-Q", "in", "-B", "16384", frames=large)
    command(host, XDP_DUMP, "-r", str(tmp_path / "all"), "-w", str(tmp_path / "part.pcapng"), "-C", "1")
    files = [tmp_path / f"part.pcapng{number}" for number in ("", 1, 2)]
    packets = [data for file in files for data, *_ in noted(file)]
    assert packets == [*large, LAST]
    assert all(10**6 <= file.stat().st_size < 10**6 + 2000 for file in files[:2])


def test_full_disk_leaves_whole_blocks(host: Host, tmp_path: Path) -> None:
    with disk_of_64_kib(tmp_path / "disk") as disk:
        fill_disk(host, disk / "ours.pcapng")


def fill_disk(host: Host, file: Path) -> None:
    with running(host, XDP_DUMP, "-i", FAR, "-Q", "in", "-w", str(file)) as dump:
        send(host, [UDP + bytes(1000)] * 200)
        status, _, errors = dump.end(None)
    said = re.search(r"(\d+) packets captured\n", errors)
    assert said
    assert errors.endswith(f"xdp-dump: {file}: No space left on device\n")
    assert (status, len(noted(file))) == (1, int(said[1]))


# Files that others have written


@pytest.mark.parametrize("words", [["-w", "-"], ["-n", "-tttt", "--nano"]], ids=" ".join)
@pytest.mark.parametrize("name", FILES)
def test_file_of_others_is_read_as_tcpdump_reads_it(host: Host, tmp_path: Path, name: str, words: list[str]) -> None:
    (tmp_path / "file").write_bytes(FILES[name][0])
    ours, theirs = (reading(host, program, tmp_path / "file", *words) for program in (XDP_DUMP, "tcpdump"))
    assert ours == theirs


@pytest.mark.parametrize("words", [["-w", "-"], ["-n", "-tttt", "udp"], ["--count"]], ids=" ".join)
@pytest.mark.parametrize("name", DAMAGED)
def test_packets_in_front_of_damage_are_read_as_tcpdump_reads_them(
    host: Host, tmp_path: Path, name: str, words: list[str]
) -> None:
    (tmp_path / "file").write_bytes(DAMAGED[name][0])
    ours, theirs = (reading(host, program, tmp_path / "file", *words) for program in (XDP_DUMP, "tcpdump"))
    assert ours == theirs
    assert ours[0] == 1


def test_packets_in_front_of_damage_go_into_blocks(host: Host, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DAMAGED["pcap cut"][0])
    status, _, _ = command(host, XDP_DUMP, "-r", str(tmp_path / "file"), "-w", str(tmp_path / "ours.pcapng"))
    assert (status, [data for data, *_ in noted(tmp_path / "ours.pcapng")]) == (1, [FIRST])


def reading(host: Host, program: Path | str, file: Path, *words: str) -> tuple[int, str, str]:
    """Exit status, standard output, standard error; bytes that are no text as they are."""
    status, out, errors = command(host, program, "-r", str(file), *words, encoding="latin-1")
    return status, out, errors.replace("xdp-dump: ", "tcpdump: ")


# JSON


def lines(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_packets_are_objects_a_line(host: Host) -> None:
    with running(host, XDP_DUMP, "-i", FAR, "-Q", "in", "--json", "-c", str(len(TRAFFIC))) as dump:
        send(host, TRAFFIC)
        status, out, _ = dump.end(None)
    assert status == 0
    for told, frame in zip(lines(out), TRAFFIC, strict=True):
        assert [told[key] for key in ("interface", "at", "direction", "length", "captured")] == [
            FAR,
            "xdp",
            "in",
            len(frame),
            len(frame),
        ]
        assert told["ether"]["source"] == Ether(frame).src
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", told["time"])


def test_packets_of_a_file_are_objects_too(host: Host, tmp_path: Path) -> None:
    capture_to(host, tmp_path / "ours", "-i", FAR, "-Q", "in", "--nano")
    status, out, _ = command(host, XDP_DUMP, "-r", str(tmp_path / "ours"), "--json", "udp dst port 53")
    found = lines(out)
    assert (status, {told["udp"]["destination_port"] for told in found}) == (0, {53})
    assert all("interface" not in told for told in found)


def test_reader_of_objects_may_go_away(host: Host) -> None:
    with running(host, XDP_DUMP, "-i", FAR, "--json") as dump:
        assert dump.process.stdout
        dump.process.stdout.close()

        def ended() -> bool:
            send(host, [UDP])
            return dump.process.poll() is not None

        wait_until(ended, "the end")
        assert dump.process.stderr
        assert "Traceback" not in dump.process.stderr.read()


# Without a tcpdump


def without_tcpdump(directory: Path) -> dict[str, str]:
    """An environment. `ip` is what the test bed enters namespaces with."""
    (directory / "ip").symlink_to(shutil.which("ip") or "ip")
    return {"PATH": str(directory)}


def test_without_tcpdump_there_is_a_summary_a_line(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "file"
    capture_to(host, file, "-i", FAR, "-Q", "in")
    _, theirs, _ = command(host, "tcpdump", "-r", str(file), "-n", "udp port 53")
    (tmp_path / "bin").mkdir()
    environment = without_tcpdump(tmp_path / "bin")
    status, ours, _ = command(host, XDP_DUMP, "-r", str(file), "udp port 53", env=environment)
    assert status == 0
    assert [line.split()[0] for line in ours.splitlines()] == [line.split()[0] for line in theirs.splitlines()]
    assert all("UDP" in line for line in ours.splitlines())


def test_without_tcpdump_and_scapy_it_says_what_to_install(host: Host, tmp_path: Path) -> None:
    (tmp_path / "scapy.py").write_text("raise ImportError")
    environment = without_tcpdump(tmp_path) | {"PYTHONPATH": str(tmp_path)}
    status, _, errors = command(host, XDP_DUMP, "-i", FAR, env=environment)
    words = "install it, or scapy, to see packets as text, or write them to a file with -w"
    assert (status, errors) == (1, f"xdp-dump: tcpdump: not found: {words}\n")


# What is said


def test_hooks_are_accounted_for(host: Host, tmp_path: Path) -> None:
    errors = capture_to(host, tmp_path / "ours.pcapng", "-i", FAR, "--hook-stats", "udp port 53 or ether proto 0x88b5")
    head, *rows = (line.split() for line in errors.split("dropped by kernel\n")[1].splitlines())
    hooks = {row[0]: row[1:] for row in rows if row[0] != "cpu"}
    assert head == ["HOOK", "INTERFACE", "RUNS", "NS/RUN", "MATCHED", "CAPTURED", "LOST", "OVER"]
    assert hooks.keys() == {"xdp", "tc-out"}
    interface, runs, nanoseconds, *counts = hooks["xdp"]
    matched = len(noted(tmp_path / "ours.pcapng"))
    assert (interface, int(runs), counts) == (FAR, len(TRAFFIC) + 1, [str(matched), str(matched), "0", "0"])
    assert int(nanoseconds) > 0
    assert sum(int(row[2]) for row in rows if row[0] == "cpu") == matched


def test_progress_is_told_as_tcpdump_tells_it(host: Host, tmp_path: Path) -> None:
    said = []
    for program, user in (("tcpdump", ["-Z", "root"]), (XDP_DUMP, [])):
        words = ["-i", FAR, "-Q", "in", "-v", "-U", "-w", str(tmp_path / "file"), *user]
        with running(host, program, *words) as dump:
            assert dump.process.stderr
            send(host, [UDP] * 3)
            told = b""
            while not told.endswith(b"\r"):
                told += os.read(dump.process.stderr.fileno(), 100)
            _, _, errors = dump.end()
            said.append((told, errors.split("bytes\n")[1]))
    assert said[0] == said[1]
    assert said[0][0] == b"Got 3\r"
