"""Times as tcpdump writes them: compared with it in a file of packets at various times."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from filters.compiler.expr import ETHERNET
from filters.files.summaries import Summaries, Times
from filters.records.pcap import file_header, record
from filters.tests.packets import FRAMES

TIMES = [(1_700_000_000, 5), (1_700_000_000, 999_999), (1_700_003_661, 0), (1_700_003_660, 7)]


@pytest.mark.parametrize("nano", [False, True], ids=["micro", "nano"])
@pytest.mark.parametrize("style", range(6))
def test_times_are_those_of_tcpdump(tmp_path: Path, style: int, nano: bool) -> None:
    file = tmp_path / "file"
    packets = b"".join(record(*when, FRAMES["udp"], len(FRAMES["udp"])) for when in TIMES)
    file.write_bytes(file_header(ETHERNET, 65535, nano=nano) + packets)
    words = ["tcpdump", "-n", "-r", str(file), *(["--nano"] if nano else []), *["-t"] * style]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    times = Times(style, nano=nano)
    assert [times.text(*when) for when in TIMES] == [line[: line.index("IP ")] for line in done.stdout.splitlines()]


def test_packet_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    summaries = Summaries(ETHERNET, Times(2, nano=False))
    summaries.write([record(7, 8, FRAMES["udp"], 99) + record(9, 0, FRAMES["arp"], 60)])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("7.000008 Ether / IP / UDP 192.168.7.9:")
    assert second.startswith("9.000000 Ether / ARP ")
