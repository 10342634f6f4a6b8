"""The words of a command line, as getopt_long(3) and tcpdump take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from filters.cli.options import Options, UsageError, parse
from filters.errors import DumpError


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["-i", "eth0", "udp", "port", "53"], {"interfaces": ("eth0",), "expression": "udp port 53"}),
        (["-ieth0", "--interface=eth1", "--interf", "lo"], {"interfaces": ("eth0", "eth1", "lo")}),
        (["udp", "-c5", "port", "53"], {"count": 5, "expression": "udp port 53"}),
        (["-c", "1", "--", "-c", "2"], {"count": 1, "expression": "-c 2"}),
        (["-nnvvs0"], {"verbose": 2, "decode": ("-n", "-n", "-v", "-v")}),
        (
            ["-s", "96", "-w", "f", "-C2", "-W3", "-G", "60"],
            {"snaplen": 96, "write": "f", "size": 2 * 10**6} | {"files": 3, "seconds": 60},
        ),
        (
            ["-B", "4096", "-Q", "in", "-p", "-O"],
            {"buffer": 4 << 20, "direction": "in", "promiscuous": False} | {"optimise": False},
        ),
        (["-ddd"], {"code": 3}),
        (["-tttt", "-e"], {"times": 4, "decode": ("-t", "-t", "-t", "-t", "-e")}),
        (["-T", "vxlan", "-#"], {"decode": ("-Tvxlan", "-#")}),
        (["--number", "--absolute-tcp-sequence-numbers"], {"decode": ("-#", "-S")}),
        (["--nano", "--no-selftest", "--at", "tc-in"], {"nano": True, "selftest": False, "at": "tc-in"}),
        (["--nano", "--micro"], {}),
        (["-r", "f", "--count", "--print"], {"read": "f", "count_only": True, "print_too": True}),
        (["-l", "-U", "--immediate-mode"], {"decode": ("-l", "-U")}),
    ],
)
def test_words_become_options(words: list[str], expected: dict[str, Any]) -> None:
    assert parse(words) == Options(**expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-k"], "invalid option -- 'k'"),
        (["-w"], "option requires an argument -- 'w'"),
        (["--foo"], "unrecognized option '--foo'"),
        (["--direction"], "option '--direction' requires an argument"),
        (["--count=1"], "option '--count' doesn't allow an argument"),
        (["--no"], "option '--no' is ambiguous"),
    ],
)
def test_wrong_words_are_told_as_getopt_tells_them(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(words)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-c", "-1"], "invalid packet count -1"),
        (["-c", "99999999999"], "invalid packet count 99999999999"),
        (["-c", "²"], "invalid packet count ²"),
        (["-s", "-1"], "invalid snaplen -1 (must be >= 0 and <= 262144)"),
        (["-G", "-1"], "invalid number of seconds -1"),
        (["--at", "nowhere"], "unknown capture point `nowhere': use one of xdp, xdp-exit, tc-in, tc-out"),
    ],
)
def test_bad_values_are_named(words: list[str], message: str) -> None:
    with pytest.raises(DumpError) as error:
        parse(words)
    assert str(error.value) == message


def test_expression_of_a_file_takes_the_place_of_the_words(tmp_path: Path) -> None:
    file = tmp_path / "filter"
    file.write_text("udp\nport 53\n")
    assert parse(["-F", str(file), "tcp"]).expression == "udp\nport 53\n"


@pytest.mark.parametrize(
    ("words", "prints"), [([], True), (["-w", "f"], False), (["-w", "f", "--print"], True), (["-r", "f"], True)]
)
def test_packets_are_printed_unless_they_are_written(words: list[str], prints: bool) -> None:
    assert parse(words).prints is prints


@pytest.mark.parametrize(
    ("words", "prompt"),
    [
        ([], True),
        (["-w", "f"], False),
        (["-w", "f", "-C", "1"], False),
        (["-w", "-"], True),
        (["-w", "f", "-U"], True),
        (["-w", "f", "-c", "1"], True),
        (["-w", "f", "--print"], True),
    ],
)
def test_only_a_file_can_wait(words: list[str], prompt: bool) -> None:
    assert parse(words).is_prompt is prompt


@pytest.mark.parametrize(
    ("words", "blocks", "metadata"),
    [
        (["-w", "a.pcapng"], True, True),
        (["-w", "a.pcap", "--pcapng"], True, True),
        (["-w", "a.pcap"], False, False),
        (["--pcapng"], False, False),
        (["--json"], False, True),
        (["--json", "-w", "a.pcap"], False, False),
        (["--json", "-w", "a.pcap", "--print"], False, True),
    ],
)
def test_format_is_chosen_by_name_or_by_option(words: list[str], blocks: bool, metadata: bool) -> None:
    options = parse(words)
    assert (options.writes_blocks, options.metadata, options.in_nanoseconds) == (blocks, metadata, metadata)
