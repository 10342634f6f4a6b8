"""A host with a veth, frames that are sent on it, and xdp-dump or tcpdump listening there."""

from __future__ import annotations

import itertools
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scapy.utils import RawPcapReader

from filters.tests.packets import FRAMES
from netns_tests.bed.topology import Host, own_prefix, wait_until

XDP_DUMP = Path(sys.executable).with_name("xdp-dump")
NEAR, FAR = "near", "far"
# Nothing but the tests sends here: no IPv6, and no neighbour to ask for.
TRAFFIC = [frame for name, frame in FRAMES.items() if "cut" not in name]
LAST = b"\2\0\0\0\0\1\2\0\0\0\0\2\x88\xb5" + bytes(46)  # ends a capture: ETH_P_802_EX1
_numbers = itertools.count()


@contextmanager
def veth_host() -> Iterator[Host]:
    """With a veth, NEAR and FAR."""
    made = Host(f"{own_prefix()}dump{next(_numbers)}", "host")
    try:
        made.create()
        made.sysctl("net.ipv6.conf.default.disable_ipv6", 1)
        with made.netlink() as ip:
            ip.link("add", ifname=NEAR, kind="veth", mtu=9000, peer={"ifname": FAR, "mtu": 9000})
            for end in (NEAR, FAR):
                ip.link("set", ifname=end, state="up")
        yield made
    finally:
        made.close()


def send(host: Host, frames: Sequence[bytes], interface: str = NEAR) -> None:
    with host.entered(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
        sender.bind((interface, 0))
        for frame in frames:
            sender.send(frame)


class Dump:
    """A running xdp-dump or tcpdump that has begun to listen."""

    def __init__(self, host: Host, program: Path | str, words: Sequence[str], **options: Any) -> None:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = host.popen([str(program), *words], **pipes, **options)
        self.errors = ""
        assert self.process.stderr
        while "listening on" not in self.errors:
            line = self.process.stderr.readline()
            assert line, self.errors
            self.errors += line

    def end(self, number: int | None = signal.SIGINT) -> tuple[int, str, str]:
        """Exit status, standard output, standard error, after a signal; None: it ends by itself."""
        if number is not None:
            self.process.send_signal(number)
        out, errors = self.process.communicate(timeout=20)
        return self.process.returncode, out, self.errors + errors


@contextmanager
def running(host: Host, program: Path | str, *words: str, cwd: Path | None = None) -> Iterator[Dump]:
    dump = Dump(host, program, words, cwd=cwd)
    try:
        yield dump
    finally:
        if dump.process.poll() is None:
            dump.process.kill()
        dump.process.wait()
        for stream in (dump.process.stdout, dump.process.stderr):
            assert stream
            stream.close()


@contextmanager
def both(host: Host, *words: str) -> Iterator[tuple[Dump, Dump]]:
    """tcpdump and xdp-dump on the same traffic."""
    with running(host, "tcpdump", *words) as theirs, running(host, XDP_DUMP, *words) as ours:
        yield theirs, ours


def command(host: Host, program: Path | str, *words: str, **options: Any) -> tuple[int, str, str]:
    done = host.run([str(program), *words], check=False, **options)
    return done.returncode, done.stdout, done.stderr


def records(file: Path) -> list[tuple[bytes, int]]:
    """Bytes and length of each packet; scapy reads the file, which knows nothing of ours."""
    with RawPcapReader(str(file)) as reader:
        return [(data, meta.wirelen) for data, meta in reader]


def has_written(file: Path, packet: bytes) -> bool:
    return file.exists() and packet in file.read_bytes()


def captured(host: Host, file: Path, *words: str, frames: Sequence[bytes] = TRAFFIC) -> list[tuple[bytes, int]]:
    with running(host, XDP_DUMP, "-i", FAR, "-w", str(file), *words) as dump:
        send(host, [*frames, LAST])
        wait_until(lambda: has_written(file, LAST[:14]), "the last frame in the file")
        status, _, _ = dump.end()
    assert status == 0
    return records(file)


def summary(captured: int, matched: int, lost: int) -> str:
    words = [f"{number} packet{'' if number == 1 else 's'}" for number in (captured, matched, lost)]
    return f"{words[0]} captured\n{words[1]} received by filter\n{words[2]} dropped by kernel\n"


@contextmanager
def disk_of_64_kib(place: Path) -> Iterator[Path]:
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)
