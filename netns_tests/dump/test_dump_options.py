"""Options of tcpdump that scripts use: -z, -Z, -y, -L, -j, -J, --time-stamp-precision; and those that are refused."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator
from pathlib import Path

import pytest
from scapy.utils import RawPcapReader

from filters.tests.packets import FRAMES
from netns_tests.bed.dump import FAR, LAST, NEAR, XDP_DUMP, command, has_written, records, running, send, veth_host
from netns_tests.bed.topology import Host, wait_until

USER = "nobody"


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with veth_host() as made:
        yield made


@pytest.fixture
def of_user(tmp_path: Path) -> Path:
    """A folder that USER may write to, below those of root that pytest makes."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o005 != 0o005:
            folder.chmod(0o755)
    made = tmp_path / "captures"
    made.mkdir()
    os.chown(made, pwd.getpwnam(USER).pw_uid, -1)
    return made


@pytest.mark.parametrize("place", ["xdp", "tc-in", "tc-out"])
def test_capture_goes_on_as_another_user_whose_the_files_are(host: Host, of_user: Path, place: str) -> None:
    file = of_user / "ours"
    with running(host, XDP_DUMP, "-i", FAR, "--at", place, "-Z", USER, "-w", str(file)) as dump:
        status = Path(f"/proc/{dump.process.pid}/status").read_text()
        send(host, [FRAMES["udp"], LAST], FAR if place == "tc-out" else NEAR)
        wait_until(lambda: has_written(file, LAST[:14]), "the last frame in the file")
        ended, _, errors = dump.end()
    user = pwd.getpwnam(USER)
    assert f"\nUid:\t{user.pw_uid}\t{user.pw_uid}\t{user.pw_uid}\t" in status
    assert f"dropped privs to {USER}\n" in errors
    assert (ended, file.stat().st_uid) == (0, user.pw_uid)
    assert [data for data, _ in records(file)] == [FRAMES["udp"], LAST]
    assert "xdp" not in host.run(["ip", "link", "show", "dev", FAR]).stdout


def test_nothing_of_roots_can_be_opened_behind_it(host: Host, of_user: Path, tmp_path: Path) -> None:
    secret = tmp_path / "roots"
    secret.mkdir(mode=0o700)
    with running(host, XDP_DUMP, "-i", FAR, "-Z", USER, "-c", "1", "-w", str(of_user / "ours")) as dump:
        capabilities = Path(f"/proc/{dump.process.pid}/status").read_text().split("CapEff:\t")[1].split()[0]
        send(host, [LAST])
        dump.end(None)
    assert int(capabilities, 16) == 1 << 12 | 1 << 38 | 1 << 39
    status, _, errors = command(host, XDP_DUMP, "-Z", USER, "-r", str(of_user / "ours"), "-w", str(secret / "copy"))
    assert (status, errors.splitlines()[-1]) == (1, f"xdp-dump: {secret / 'copy'}: Permission denied")


def test_unknown_user_is_named(host: Host) -> None:
    status, _, errors = command(host, XDP_DUMP, "-i", FAR, "-Z", "nosuchuser")
    assert (status, errors) == (1, "xdp-dump: Couldn't find user 'nosuchuser'\n")


def test_each_rotated_file_is_given_to_a_command(host: Host, tmp_path: Path) -> None:
    command_file, told = tmp_path / "told.sh", tmp_path / "told"
    command_file.write_text(f'#!/bin/sh\necho "$# $1" >> {told}\n')
    command_file.chmod(0o755)
    source, copy = tmp_path / "source", tmp_path / "copy"
    large = FRAMES["udp"] + bytes(8000)
    with running(host, XDP_DUMP, "-i", FAR, "-c", "300", "-w", str(source)) as dump:
        send(host, [large] * 300)
        dump.end(None)
    status, _, errors = command(host, XDP_DUMP, "-r", str(source), "-w", str(copy), "-C", "1", "-z", str(command_file))
    assert status == 0, errors
    wait_until(lambda: told.exists() and told.read_text().count("\n") == 2, "two files given to the command")
    assert sorted(told.read_text().splitlines()) == [f"1 {copy}", f"1 {copy}1"]  # the last, copy2, is not rotated


def test_command_that_cannot_be_run_is_named_and_ends_nothing(host: Host, tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    with running(host, XDP_DUMP, "-i", FAR, "-c", "200", "-w", str(source)) as dump:
        send(host, [FRAMES["udp"] + bytes(8000)] * 200)
        dump.end(None)
    status, _, errors = command(host, XDP_DUMP, "-r", str(source), "-w", str(copy), "-C", "1", "-z", "/nowhere")
    assert (status, errors.splitlines()[1:]) == (0, [f"xdp-dump: -z /nowhere {copy}: No such file or directory"])
    assert (tmp_path / "copy1").exists()


@pytest.mark.parametrize("precision", ["nano", "micro"])
def test_time_stamp_precision_is_that_of_the_file(host: Host, tmp_path: Path, precision: str) -> None:
    file = tmp_path / "ours"
    with running(host, XDP_DUMP, "-i", FAR, "-c", "1", "--time-stamp-precision", precision, "-w", str(file)) as dump:
        send(host, [LAST])
        dump.end(None)
    with RawPcapReader(str(file)) as reader:
        assert reader.nano is (precision == "nano")


@pytest.mark.parametrize("option", ["-L", "-J", "--list-data-link-types", "--list-time-stamp-types"])
def test_link_types_and_time_stamp_types_are_listed_as_tcpdump_lists_them(host: Host, option: str) -> None:
    ours, theirs = (command(host, program, "-i", FAR, option) for program in (XDP_DUMP, "tcpdump"))
    listed = [line for line in theirs[2].splitlines() if "DOCSIS" not in line]
    assert (ours[0], ours[1], ours[2].splitlines()) == (0, theirs[1], listed)


@pytest.mark.parametrize("words", [("-y", "EN10MB"), ("--linktype=en10mb",), ("-j", "host"), ("-E", "des-cbc:none")])
def test_the_only_value_there_is_is_taken(host: Host, words: tuple[str, ...]) -> None:
    with running(host, XDP_DUMP, "-i", FAR, "-c", "1", *words) as dump:
        send(host, [LAST])
        assert dump.end(None)[0] == 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("-y", "FOO"), "invalid data link type FOO"),
        (("-y", "RAW"), "-y RAW: not supported: use EN10MB (Ethernet)"),
        (("-j", "foo"), "invalid time stamp type foo"),
        (("-j", "adapter"), "-j adapter: not supported: use host"),
        (("--time-stamp-precision", "milli"), "unsupported time stamp precision"),
        (("-I",), "-I: not supported: frames in monitor mode have no Ethernet header"),
        (("-V", "list"), "-V: not supported: read one file with -r, or join files with mergecap"),
        (("-f",), "-f: not supported: packets are printed by tcpdump -r, which takes no -f: use -n"),
    ],
)
def test_what_is_not_supported_is_named_with_the_reason(host: Host, words: tuple[str, ...], line: str) -> None:
    assert command(host, XDP_DUMP, *words) == (1, "", f"xdp-dump: {line}\n")


def test_decoder_that_refuses_its_options_is_one_line_and_an_error(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "ours"
    with running(host, XDP_DUMP, "-i", FAR, "-c", "1", "-w", str(file)) as dump:
        send(host, [LAST])
        dump.end(None)
    for _ in range(4):
        status, out, errors = command(host, XDP_DUMP, "-r", str(file), "-T", "foo")
        assert (status, out, errors.splitlines()[1:]) == (1, "", ["xdp-dump: unknown packet type `foo'"])


@pytest.mark.parametrize("place", ["inout", "in", "out"])
@pytest.mark.parametrize("expression", ["inbound", "outbound"])
def test_direction_in_an_expression_selects_packets(host: Host, tmp_path: Path, expression: str, place: str) -> None:
    file = tmp_path / "ours"
    wanted = f"{expression} or ether proto 0x88b5"
    with running(host, XDP_DUMP, "-i", FAR, "-Q", place, "-w", str(file), wanted) as dump:
        send(host, [FRAMES["udp"]], NEAR)
        send(host, [FRAMES["tcp syn"]], FAR)
        send(host, [LAST], FAR if place == "out" else NEAR)
        wait_until(lambda: has_written(file, LAST[:14]), "the last frame in the file")
        dump.end()
    seen = {"in": ["udp"], "out": ["tcp syn"], "inout": ["udp", "tcp syn"]}[place]
    selected = {"inbound": "udp", "outbound": "tcp syn"}[expression]
    assert [data for data, _ in records(file)] == [*(FRAMES[name] for name in seen if name == selected), LAST]


@pytest.mark.parametrize("options", [(), ("-e",), ("--nano",)], ids=" ".join)
def test_text_of_any_names_interface_and_direction_as_tcpdump_does(host: Host, options: tuple[str, ...]) -> None:
    said = []
    to_all = b"\xff" * 6 + FRAMES["udp"][6:]
    for program in ("tcpdump", XDP_DUMP):
        with running(host, program, "-i", "any", "-nt", "-l", "-c", "6", *options) as dump:
            send(host, [FRAMES["udp"], to_all, FRAMES["tcp syn"]])
            status, out, errors = dump.end(None)
        assert (status, "Warning" in errors) == (0, False)
        said.append(sorted(line for line in out.splitlines() if line[:1].isalpha()))
    theirs, ours = said
    assert ours == theirs
    assert {tuple(line.split()[:2]) for line in ours} == {(NEAR, "Out"), (FAR, "P"), (FAR, "B")}
