"""`xdp-dump` beside tcpdump: the same traffic on a veth, the same words, and what they make of it."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scapy.utils import RawPcapReader

from filters.tests.packets import FRAMES
from netns_tests.bed.dump import (
    FAR,
    LAST,
    NEAR,
    TRAFFIC,
    XDP_DUMP,
    Dump,
    both,
    captured,
    command,
    disk_of_64_kib,
    has_written,
    records,
    running,
    send,
    summary,
    veth_host,
)
from netns_tests.bed.topology import Host, wait_until
from xdp import attach


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with veth_host() as made:
        yield made


# The same packets


@pytest.mark.parametrize("place", [(), ("-Q", "in"), ("--at", "xdp"), ("--at", "tc-in")], ids=" ".join)
def test_every_frame_is_captured_as_it_was_sent(host: Host, tmp_path: Path, place: tuple[str, ...]) -> None:
    """Tagged ones too, whose tag the kernel takes off before tc."""
    assert captured(host, tmp_path / "ours", *place) == [(frame, len(frame)) for frame in [*TRAFFIC, LAST]]


@pytest.mark.parametrize("place", ["xdp", "tc-in", "tc-out"])
def test_frame_in_fragments_is_captured_whole(host: Host, tmp_path: Path, place: str) -> None:
    """A packet socket leaves nothing but the Ethernet header of such a frame in the linear area."""
    file, large = tmp_path / "ours", FRAMES["udp"] + bytes(number * 7 & 0xFF for number in range(8000))
    with running(host, XDP_DUMP, "-i", FAR, "--at", place, "-c", "1", "-w", str(file), "udp port 53") as dump:
        send(host, [large], FAR if place == "tc-out" else NEAR)
        dump.end(None)
    assert records(file) == [(large, len(large))]


EXPRESSIONS = ["udp port 53", "ip6 and tcp", "arp or rarp", "not ip", "greater 100", "ip[0] != 0x45", "vlan and ip"]


@pytest.mark.parametrize("expression", EXPRESSIONS[:-1])
@pytest.mark.parametrize("direction", ["in", "inout"])
def test_expression_selects_what_tcpdump_selects(host: Host, tmp_path: Path, expression: str, direction: str) -> None:
    """Frames without tags: with them tcpdump's live filter runs on a packet without its tag, and finds `ip6` there."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    wanted = f"ether proto 0x88b5 or ({expression})"
    untagged = [frame for frame in TRAFFIC if frame[12:14] not in (b"\x81\x00", b"\x88\xa8")]
    with running(host, "tcpdump", "-i", FAR, "-Q", direction, "-U", "-w", str(theirs), wanted) as dump:
        found = captured(host, ours, "-Q", direction, wanted, frames=untagged)
        wait_until(lambda: has_written(theirs, LAST[:14]), "the last frame in tcpdump's file")
        dump.end()
    assert found == records(theirs)
    assert 2 <= len(found) <= len(untagged)


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("place", ["xdp", "tc-in"])
def test_expression_means_what_it_means_for_a_file(host: Host, tmp_path: Path, expression: str, place: str) -> None:
    everything, selected = tmp_path / "everything", tmp_path / "selected"
    wanted = f"ether proto 0x88b5 or ({expression})"
    captured(host, everything)
    command(host, "tcpdump", "-Z", "root", "-r", str(everything), "-w", str(selected), wanted)
    found = captured(host, tmp_path / "ours", "--at", place, wanted)
    assert found == records(selected)
    assert 2 <= len(found) <= len(TRAFFIC)


def test_what_goes_out_is_captured_and_what_comes_in_is_not(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "ours"
    with running(host, XDP_DUMP, "-i", FAR, "-Q", "out", "-w", str(file)) as dump:
        send(host, [FRAMES["udp"]], NEAR)
        send(host, [FRAMES["tcp syn"], FRAMES["vlan"], LAST], FAR)
        wait_until(lambda: has_written(file, LAST[:14]), "the last frame in the file")
        dump.end()
    assert [data for data, _ in records(file)] == [FRAMES["tcp syn"], FRAMES["vlan"], LAST]


def test_both_directions_are_in_the_order_of_time(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "ours"
    sent = []
    with running(host, XDP_DUMP, "-i", FAR, "-w", str(file)) as dump:
        for number in range(40):
            sent.append(FRAMES["udp"] + bytes([number]))
            send(host, sent[-1:], NEAR if number % 2 else FAR)
        send(host, [LAST])
        wait_until(lambda: has_written(file, LAST[:14]), "the last frame in the file")
        dump.end()
    assert [data for data, _ in records(file)] == [*sent, LAST]


def test_several_interfaces_go_into_one_file(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "ours"
    with running(host, XDP_DUMP, "-i", FAR, "-i", NEAR, "-Q", "in", "-w", str(file)) as dump:
        send(host, [FRAMES["udp"]], NEAR)
        send(host, [FRAMES["tcp syn"], LAST], FAR)
        wait_until(lambda: has_written(file, LAST[:14]), "the last frame in the file")
        dump.end()
    assert [data for data, _ in records(file)] == [FRAMES["udp"], FRAMES["tcp syn"], LAST]


def test_packet_on_the_loopback_is_seen_once(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "ours"
    with running(host, XDP_DUMP, "-i", "lo", "-w", str(file), "udp") as dump:
        with host.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for word in (b"first", b"last one"):
                sender.sendto(word, ("127.0.0.1", 4444))
        wait_until(lambda: has_written(file, b"last one"), "the last packet in the file")
        dump.end()
    assert [data[42:] for data, _ in records(file)] == [b"first", b"last one"]


def test_any_is_every_interface(host: Host, tmp_path: Path) -> None:
    """With Ethernet headers; tcpdump's records of `any` have a header of their own."""
    file = tmp_path / "ours"
    with running(host, XDP_DUMP, "-i", "any", "-Q", "in", "-w", str(file)) as dump:
        send(host, [FRAMES["udp"]], NEAR)
        send(host, [FRAMES["tcp syn"], LAST], FAR)
        wait_until(lambda: has_written(file, LAST[:14]), "the last frame in the file")
        _, _, errors = dump.end()
    assert [data for data, _ in records(file)] == [FRAMES["udp"], FRAMES["tcp syn"], LAST]
    assert errors.startswith("xdp-dump: listening on any, link-type EN10MB (Ethernet), ")


def test_snapshot_length_is_in_every_record_and_in_the_header(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "ours"
    found = captured(host, file, "-s", "40")
    assert found == [(frame[:40], len(frame)) for frame in [*TRAFFIC, LAST]]
    with RawPcapReader(str(file)) as reader:
        assert reader.snaplen == 40


def test_nanoseconds_are_said_to_be_nanoseconds(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "ours"
    captured(host, file, "--nano")
    with RawPcapReader(str(file)) as reader:
        assert reader.nano
        fractions = [meta.usec for _, meta in reader]
    assert any(fraction % 1000 for fraction in fractions)


def test_capture_beside_another_xdp_program_is_at_tc(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "ours"
    with running(host, XDP_DUMP, "-i", FAR, "--at", "xdp", "-w", str(tmp_path / "first")):
        assert captured(host, file, "-Q", "in") == [(frame, len(frame)) for frame in [*TRAFFIC, LAST]]
        status, _, errors = command(host, XDP_DUMP, "-i", FAR, "--at", "xdp", "-w", str(tmp_path / "third"))
    assert status == 1
    why = r"program \d+ \(xdp_dump\): has no BTF: cannot be traced"
    assert re.fullmatch(f"xdp-dump: far: another XDP program is attached: {why}\n", errors)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_stays_attached_however_it_ends(host: Host, tmp_path: Path, number: int) -> None:
    with running(host, XDP_DUMP, "-i", FAR, "-w", str(tmp_path / "ours")) as dump:
        with host.entered():
            assert FAR in attach.all_attached()
        dump.end(number)
        with host.entered():
            assert attach.all_attached() == {}


# The same text


@pytest.mark.parametrize("options", ["-tn", "-tnq", "-tne", "-tnvv", "-tnX", "-tnA", "-tnxx", "-tnS", "-tn#"])
def test_printed_packets_are_those_of_tcpdump(host: Host, options: str) -> None:
    with both(host, "-i", FAR, "-l", "-Q", "in", "-c", str(len(TRAFFIC)), options) as dumps:
        send(host, TRAFFIC)
        theirs, ours = (dump.end(None) for dump in dumps)
    assert ours[1] == theirs[1]
    assert len(ours[1].splitlines()) >= len(TRAFFIC)
    assert ours[2].replace("xdp-dump", "tcpdump") == theirs[2]


@pytest.mark.parametrize("options", [("-n",), ("-n", "-v"), ("-w", "/dev/null"), ("-w", "/dev/null", "--print", "-n")])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_after_a_signal_all_is_said_as_tcpdump_says_it(host: Host, options: tuple[str, ...], number: int) -> None:
    with both(host, "-i", FAR, *options) as dumps:
        theirs, ours = (dump.end(number) for dump in dumps)
    assert (ours[0], ours[1], ours[2].replace("xdp-dump", "tcpdump")) == theirs
    assert theirs[2].endswith(summary(0, 0, 0))


def test_one_packet_is_said_to_be_one(host: Host, tmp_path: Path) -> None:
    with running(host, XDP_DUMP, "-i", FAR, "-Q", "in", "-c", "1", "-w", str(tmp_path / "ours")) as dump:
        send(host, [FRAMES["udp"]])
        status, _, errors = dump.end(None)
    assert (status, errors.split("bytes\n")[1]) == (0, summary(1, 1, 0))


def test_state_is_told_on_request_without_an_end(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "ours"
    with running(host, XDP_DUMP, "-i", FAR, "-Q", "in", "-w", str(file)) as dump:
        send(host, [FRAMES["udp"], LAST])
        wait_until(lambda: has_written(file, LAST[:14]), "the last frame in the file")
        dump.process.send_signal(signal.SIGUSR1)
        assert dump.process.stderr
        line = dump.process.stderr.readline()
        dump.process.send_signal(signal.SIGUSR2)
        status, _, errors = dump.end()
    assert line == "xdp-dump: 2 packets captured, 2 packets received by filter, 0 packets dropped by kernel\n"
    assert (status, errors.split("bytes\n")[1]) == (0, summary(2, 2, 0))


def test_filter_beyond_the_count_is_not_in_the_file_but_in_the_account(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "ours"
    with running(host, XDP_DUMP, "-i", FAR, "-Q", "in", "-c", "3", "-w", str(file)) as dump:
        send(host, [FRAMES["udp"]] * 50)
        status, _, errors = dump.end(None)
    found = re.search(r"(\d+) packets captured\n(\d+) packets received by filter\n(\d+) packets dropped", errors)
    assert found
    assert status == 0
    assert (int(found[1]), int(found[3]), len(records(file))) == (3, 0, 3)
    assert 3 <= int(found[2]) <= 50


BAD_WORDS = [
    ["-c", "0"],
    ["-c", "x"],
    ["-s", "262145"],
    ["-s", "x"],
    ["-Q", "foo"],
    ["-W", "x"],
    ["-C", "x"],
    ["-B", "0"],
    ["-i", "nonexistent"],
    ["-i", "99"],
    ["-t", "-ttttt"],
    ["-r", "nonexistent"],
    ["-r", "/etc/hosts"],
    ["-F", "nonexistent"],
    ["-i", NEAR, "-w", "/nonexistent/file"],
    ["-i", NEAR, "udp", "portt", "53"],
    ["-i", NEAR, "-d", "host", "nohost.invalid"],
    ["-i", NEAR, "gateway"],
    ["-i", NEAR, "port", "70000"],
]


@pytest.mark.parametrize("words", BAD_WORDS, ids=" ".join)
def test_what_tcpdump_rejects_is_rejected_with_its_words(host: Host, words: list[str]) -> None:
    status, out, errors = command(host, "tcpdump", *words)
    assert command(host, XDP_DUMP, *words) == (status, out, errors.replace("tcpdump", "xdp-dump"))
    assert status == 1


@pytest.mark.parametrize("words", [["-k"], ["-i"], ["--foo"], ["--count=3"], ["--interface"]], ids=" ".join)
def test_wrong_usage_is_told_in_the_same_first_line(host: Host, words: list[str]) -> None:
    theirs, ours = command(host, "tcpdump", *words), command(host, XDP_DUMP, *words)
    assert ours[0] == theirs[0] == 1
    assert ours[2].splitlines()[0] == theirs[2].splitlines()[0].replace("tcpdump", "xdp-dump")
    assert "Usage: xdp-dump " in ours[2]


@pytest.mark.parametrize("option", ["-dd", "-ddd"])
@pytest.mark.parametrize("more", [[], ["-O"], ["-s", "96"]], ids=" ".join)
def test_classic_code_is_what_tcpdump_prints(host: Host, option: str, more: list[str]) -> None:
    words = ["-i", NEAR, option, *more, "tcp port 80 and not host 10.0.0.1 or ip broadcast"]
    assert command(host, XDP_DUMP, *words) == command(host, "tcpdump", *words)


def test_classic_code_stands_beside_what_becomes_of_it(host: Host) -> None:
    words = ["-i", NEAR, "-d", "ip and udp dst port 53"]
    theirs = [line.expandtabs() for line in command(host, "tcpdump", *words)[1].splitlines()]
    rows = [row.split("|") for row in command(host, XDP_DUMP, *words)[1].splitlines()]
    assert [left.rstrip() for left, _ in rows[: len(theirs)]] == theirs
    assert all(left.isspace() for left, _ in rows[len(theirs) :])
    assert rows[0][1] == " 0: (bf) r6 = r1"
    assert re.fullmatch(r" \d+ eBPF instructions, \d+ verified", rows[-1][1])


def test_interfaces_are_listed_as_tcpdump_lists_them(host: Host) -> None:
    theirs = [
        line for line in command(host, "tcpdump", "-D")[1].splitlines() if re.search(r"\.(near|far|lo|any)", line)
    ]
    assert command(host, XDP_DUMP, "-D") == (0, "".join(f"{line}\n" for line in theirs), "")


def test_user_without_permission_is_told_so_in_tcpdumps_words(host: Host) -> None:
    (_, _, theirs), ours = (
        command(host, "setpriv", "--reuid=65534", "--clear-groups", str(program), "-i", FAR)
        for program in ("tcpdump", XDP_DUMP)
    )
    first, second = theirs.replace("tcpdump", "xdp-dump").splitlines()
    assert second == "(socket: Operation not permitted)"
    assert ours == (
        1,
        "",
        f"{first}\n(not permitted to use BPF programs: run as root (CAP_BPF and CAP_NET_ADMIN))\n",
    )


def test_user_without_permission_may_read_files(host: Host, large_file: Path) -> None:
    endings = []
    for program in ("tcpdump", XDP_DUMP):
        words = ["setpriv", "--reuid=65534", "--clear-groups", str(program), "-r", "-", "--count", "greater 700"]
        with large_file.open("rb") as file:
            done = host.run(words, stdin=file)
        endings.append((done.stdout, done.stderr))
    assert endings[0] == endings[1]


def test_user_without_permission_sees_classic_code_alone(host: Host) -> None:
    words = ["-d", "-i", FAR, "udp"]
    ours = command(host, "setpriv", "--reuid=65534", "--clear-groups", str(XDP_DUMP), *words)
    assert ours == command(host, "tcpdump", *words)


def test_second_signal_does_not_wait_for_a_reader(host: Host) -> None:
    """Nobody reads what is printed, and pipes are full."""
    with running(host, XDP_DUMP, "-i", FAR, "-Q", "in", "-l", "-n", "-XX") as dump:
        send(host, [FRAMES["udp"] + bytes(1000)] * 300)
        decoder = wait_for_child(dump.process.pid)
        wait_until(lambda: "pipe_write" in wait_channel(decoder), "the decoder waiting for its reader")
        wait_until(lambda: "pipe_write" in wait_channel(dump.process.pid), "the capture waiting for the decoder")
        dump.process.send_signal(signal.SIGINT)
        wait_until(insists_or_ended(dump), "the end")
    assert dump.process.returncode == 130
    assert not Path(f"/proc/{decoder}").exists()


def insists_or_ended(dump: Dump) -> Callable[[], bool]:
    """One more signal at each call, until the process is gone."""

    def ended() -> bool:
        dump.process.send_signal(signal.SIGTERM)
        return dump.process.poll() is not None

    return ended


def wait_for_child(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    wait_until(lambda: children.read_text(), "a child process")
    return int(children.read_text().split()[0])


def wait_channel(pid: int) -> str:
    """The function of the kernel in which a process sleeps."""
    return Path(f"/proc/{pid}/wchan").read_text()


def test_interface_that_is_down_is_refused_in_tcpdumps_words(host: Host) -> None:
    with host.netlink() as ip:
        ip.link("add", ifname="idle", kind="veth", peer={"ifname": "other"})
    try:
        status, _, errors = command(host, "tcpdump", "-i", "idle")
        assert command(host, XDP_DUMP, "-i", "idle")[::2] == (status, errors.replace("tcpdump", "xdp-dump"))
    finally:
        with host.netlink() as ip:
            ip.link("del", ifname="idle")


# Files


@pytest.fixture(scope="module")
def large_file(tmp_path_factory: pytest.TempPathFactory, host: Host) -> Path:
    """3.5 MB of UDP packets of all sizes."""
    file = tmp_path_factory.mktemp("dump") / "large"
    with running(host, XDP_DUMP, "-i", FAR, "-Q", "in", "-w", str(file)) as dump:
        send(host, [*(FRAMES["udp"] + bytes(number % 1400) for number in range(4500)), LAST])
        wait_until(lambda: has_written(file, LAST[:14]), "the last frame in the file")
        dump.end()
    return file


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize("options", [["-C", "1"], ["-C", "1", "-W", "2"], ["-C", "1", "-W", "11"]], ids=" ".join)
def test_files_change_where_tcpdumps_do(host: Host, tmp_path: Path, large_file: Path, options: list[str]) -> None:
    for program in ("tcpdump", XDP_DUMP):
        directory = tmp_path / Path(program).name
        directory.mkdir(mode=0o777)
        directory.chmod(0o777)  # tcpdump gives up root's rights first
        user = ["-Z", "root"] if program == "tcpdump" else []
        command(host, program, "-r", str(large_file), "-w", str(directory / "part"), *options, *user)
    theirs, ours = contents(tmp_path / "tcpdump"), contents(tmp_path / "xdp-dump")
    assert ours.keys() == theirs.keys()
    assert {name: len(data) for name, data in ours.items()} == {name: len(data) for name, data in theirs.items()}
    assert ours == theirs
    assert len(ours) > 1


def test_files_change_with_the_time_and_end_with_their_number(host: Host, tmp_path: Path) -> None:
    name = str(tmp_path / "part-%s")
    with running(host, XDP_DUMP, "-i", FAR, "-Q", "in", "-w", name, "-G", "1", "-W", "2") as dump:
        wait_until(sends_or_ended(host, dump), "the end of the last file")
        status, _, errors = dump.end(None)
    files = sorted(tmp_path.iterdir())
    found = re.search(r"Maximum file limit reached: 2\n(\d+) packets captured\n\d+ .*\n0 packets dropped", errors)
    assert found
    assert (status, len(files)) == (0, 2)
    assert sum(len(records(file)) for file in files) == int(found[1])


@pytest.mark.parametrize("expression", ["", "udp", "udp[8:2] = 0 and greater 700", "tcp"])
def test_packets_of_a_file_are_counted_as_tcpdump_counts_them(host: Host, large_file: Path, expression: str) -> None:
    words = ["-r", str(large_file), "--count", expression]
    assert command(host, XDP_DUMP, *words) == command(host, "tcpdump", *words)


@pytest.mark.parametrize("count", ["1", "7"])
def test_packets_of_a_file_are_printed_as_tcpdump_prints_them(host: Host, large_file: Path, count: str) -> None:
    words = ["-n", "-r", str(large_file), "-c", count, "greater 100"]
    theirs = command(host, "tcpdump", *words)
    assert command(host, XDP_DUMP, *words) == theirs
    assert theirs[1].count("\n") == int(count)


def test_one_packet_of_a_file_is_one_packet(host: Host, large_file: Path) -> None:
    assert command(host, XDP_DUMP, "-r", str(large_file), "--count", "ether proto 0x88b5")[1] == "1 packet\n"


def test_capture_goes_into_a_pipe(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "ours"
    piped = f"{XDP_DUMP} -i {FAR} -Q in -c 2 -w - | cat > {file}"
    with running(host, "sh", "-c", piped) as dump:
        send(host, [FRAMES["udp"], FRAMES["tcp syn"]])
        status, out, errors = dump.end(None)
    assert (status, out, errors.split("bytes\n")[1]) == (0, "", summary(2, 2, 0))
    assert [data for data, _ in records(file)] == [FRAMES["udp"], FRAMES["tcp syn"]]


@pytest.mark.parametrize("words", [["-w", "-"], ["-l", "-n"]], ids=" ".join)
def test_reader_that_goes_away_ends_it_as_it_ends_tcpdump(host: Host, words: list[str]) -> None:
    endings = []
    for program in ("tcpdump", XDP_DUMP):
        with running(host, program, "-i", FAR, "-U", *words) as dump:
            assert dump.process.stdout
            dump.process.stdout.close()
            wait_until(sends_or_ended(host, dump), "the end")
            assert dump.process.stderr
            said = dump.process.stderr.read().replace("xdp-dump", "tcpdump")
            endings.append((dump.process.returncode, re.sub(r"\d+ packets?", "N packets", said)))
    theirs, ours = endings
    assert ours[0] == theirs[0]
    assert ours[1].splitlines()[0] == theirs[1].splitlines()[0]


def sends_or_ended(host: Host, dump: Dump) -> Callable[[], bool]:
    """One more frame at each call, until the process is gone."""

    def ended() -> bool:
        send(host, [FRAMES["udp"]])
        return dump.process.poll() is not None

    return ended


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with disk_of_64_kib(tmp_path / "disk") as place:
        yield place


def test_full_disk_ends_the_capture_with_what_was_written_intact(host: Host, small_disk: Path) -> None:
    file = small_disk / "ours"
    with running(host, XDP_DUMP, "-i", FAR, "-Q", "in", "-w", str(file)) as dump:
        send(host, [FRAMES["udp"] + bytes(1000)] * 200)
        status, _, errors = dump.end(None)
    found = re.search(r"(\d+) packets captured\n(\d+) packets received by filter\n(\d+) packets dropped", errors)
    assert found
    written, matched, lost = map(int, found.groups())
    assert errors.endswith(f"xdp-dump: {file}: No space left on device\n")
    assert status == 1
    assert records(file) == [(FRAMES["udp"] + bytes(1000), len(FRAMES["udp"]) + 1000)] * written
    assert (matched - lost, 50 < written < 66) == (written, True)
    assert command(host, "tcpdump", "-r", str(file), "--count")[1] == f"{written} packets\n"


def test_small_buffer_loses_packets_and_says_how_many(host: Host, tmp_path: Path) -> None:
    """The reader stands still meanwhile."""
    file = tmp_path / "ours"
    with running(host, XDP_DUMP, "-i", FAR, "-Q", "in", "-B", "64", "-w", str(file)) as dump:
        dump.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: stopped(dump.process.pid), "the process stopped")
        send(host, [FRAMES["udp"] + bytes(1000)] * 300)
        dump.process.send_signal(signal.SIGCONT)
        status, _, errors = dump.end()
    found = re.search(r"(\d+) packets captured\n300 packets received by filter\n(\d+) packets dropped", errors)
    assert found
    assert (status, int(found[1]) + int(found[2])) == (0, 300)
    assert 50 < len(records(file)) == int(found[1]) < 200


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "T"
