"""A capture session in a namespace of the test's own, and what a kernel or a driver may lack."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
from pyroute2 import netns

from filters.capture import taps
from filters.capture.session import Session
from filters.capture.taps import Request
from filters.compiler.ebpf import disassemble
from filters.compiler.expr import compile_expression
from filters.errors import DumpError, NotWritten, SelftestFailed
from filters.interfaces import Interface, all_interfaces, chosen, netmask
from filters.records.counts import Counts
from filters.records.pcap import Span, count_records
from filters.selftest import selftest
from filters.tests.packets import FRAMES
from xdp.errors import NotSupported
from xdp.netlink import route_socket
from xdp.tests.kernels import KERNEL_CONTEXT

DEADLINE_S = 5


class Memory:
    """A Sink that takes so many records and is full then."""

    def __init__(self, room: int = 1 << 30) -> None:
        self.room, self.records, self.taken = room, 0, b""

    def write(self, spans: Sequence[Span]) -> None:
        found = sum(count_records(span) for span in spans)
        written, self.room = min(found, self.room), max(self.room - found, 0)
        self.records += written
        self.taken += b"".join(spans)
        if written < found:
            raise NotWritten("memory: full", written)

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    """With a veth, `near` and `far`."""
    name = f"dump-{os.getpid()}"
    with ExitStack() as cleanup:
        netns.create(name)
        cleanup.callback(netns.remove, name)
        netns.pushns(name)
        cleanup.callback(netns.popns)
        with route_socket() as ipr:
            ipr.link("add", ifname="near", kind="veth", peer={"ifname": "far"})
            for end in ("near", "far", "lo"):
                ipr.link("set", index=socket.if_nametoindex(end), state="up")
        yield


def request(expression: str = "udp port 53", **more: Any) -> Request:
    return Request(compile_expression(expression), chosen(("far",)), buffer=1 << 20, **more)


def send(frames: Sequence[bytes], interface: str = "near") -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
        sender.bind((interface, 0))
        for frame in frames:
            sender.send(frame)


def until_matched(session: Session, packets: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while session.counts().matched < packets:
        assert time.monotonic() < deadline, session.counts()


def test_session_delivers_what_the_filter_takes() -> None:
    sink = Memory()
    with Session(request()) as session:
        session.start()
        send([FRAMES["udp"], FRAMES["tcp syn"]], "near")
        send([FRAMES["udp"]], "far")
        until_matched(session, 2)
        session.finish(sink)
        assert session.settled() == Counts(matched=2, captured=2)
    assert sink.taken.count(FRAMES["udp"]) == sink.records == 2


@KERNEL_CONTEXT
@pytest.mark.parametrize("prompt", [True, False])
def test_only_who_can_wait_pays_for_the_kernels_types(prompt: bool) -> None:
    with Session(request(ingress=True, egress=False, prompt=prompt)) as session:
        session.start()
        (tap,) = session.taps
        assert ("kernel-function" in disassemble(tap.program.instructions)) is not prompt


def test_session_is_complete_when_as_many_are_captured_as_were_asked_for() -> None:
    with Session(request(limit=2)) as session:
        session.start()
        send([FRAMES["udp"]])
        until_matched(session, 1)
        assert not session.is_complete
        send([FRAMES["udp"], FRAMES["udp"]])
        until_matched(session, 3)
        assert session.is_complete


def test_without_tcx_programs_hang_on_clsact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux before 6.6."""

    def refuse(*_: object, **__: object) -> None:
        raise NotSupported("interface: cannot attach: Invalid argument")

    monkeypatch.setattr(taps, "hold_at_tc", refuse)
    sink = Memory()
    with Session(request(at=None, ingress=False)) as out, Session(request(at="tc-in")) as into:
        out.start()
        into.start()
        send([FRAMES["udp"]], "near")
        send([FRAMES["udp"], FRAMES["udp"]], "far")
        until_matched(out, 2)
        until_matched(into, 1)
        for session in (out, into):
            session.finish(sink)
        assert (into.settled(), out.settled()) == (Counts(matched=1, captured=1), Counts(matched=2, captured=2))
    with route_socket() as ipr:
        kinds = [qdisc.get_attr("TCA_KIND") for qdisc in ipr.get_qdiscs(index=socket.if_nametoindex("far"))]
    assert "clsact" not in kinds


def test_interface_without_native_xdp_is_captured_from_at_tc() -> None:
    with Session(Request(compile_expression("udp"), chosen(("lo",)), at="xdp", buffer=1 << 20)) as session:
        session.start()  # generic, as that was asked for
    sink = Memory()
    with Session(Request(compile_expression("udp"), chosen(("lo",)), buffer=1 << 20)) as session:
        session.start()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"hello", ("127.0.0.1", 9))
        until_matched(session, 1)
        session.finish(sink)
    assert sink.taken.endswith(b"hello")


def test_records_that_the_sink_did_not_take_count_as_lost() -> None:
    with Session(request()) as session:
        session.start()
        send([FRAMES["udp"]] * 7)
        until_matched(session, 7)
        with pytest.raises(NotWritten, match=r"^memory: full$"):
            session.deliver(Memory(room=3))
        session.stop()
        assert session.settled() == Counts(matched=7, captured=3, lost=4)


def test_filter_that_fails_its_selftest_is_not_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    mismatch = selftest.Mismatch(b"\0", 1, 0)
    monkeypatch.setattr(selftest, "selftest", lambda *_: [mismatch])
    with Session(request()) as session, pytest.raises(SelftestFailed, match="--no-selftest"):
        session.start()
    with Session(request(selftest=False)) as session:
        session.start()


def test_promiscuous_mode_lasts_as_long_as_the_session() -> None:
    with Session(request()) as session:
        session.start()
        assert promiscuity() == 1
    assert promiscuity() == 0
    with Session(request(promiscuous=False)) as session:
        session.start()
        assert promiscuity() == 0


def promiscuity() -> int:
    with route_socket() as ipr:
        return int(ipr.link("get", index=socket.if_nametoindex("far"))[0].get_attr("IFLA_PROMISCUITY"))


# Interfaces


def test_any_stands_for_all_that_are_up_and_have_ethernet_headers() -> None:
    with route_socket() as ipr:
        ipr.link("set", index=socket.if_nametoindex("near"), state="down")
    assert {interface.name for interface in chosen(("any",))} == {"lo", "far"}


def test_interface_is_chosen_by_its_number_too() -> None:
    numbers = {interface.name: str(number) for number, interface in enumerate(all_interfaces(), 1)}
    assert [interface.name for interface in chosen((numbers["far"], "far", numbers["lo"]))] == ["far", "lo"]


def test_first_interface_that_is_no_loopback_is_the_default() -> None:
    assert chosen(())[0].name in ("near", "far")


def test_interface_without_ethernet_headers_is_refused() -> None:
    with route_socket() as ipr:
        ipr.link("add", ifname="tun0", kind="tuntap", mode="tun")
        ipr.link("set", index=socket.if_nametoindex("tun0"), state="up")
    with pytest.raises(DumpError, match=r"^tun0: not an Ethernet interface: xdp-dump supports only Ethernet$"):
        chosen(("tun0",))


def test_netmask_is_that_of_the_first_address() -> None:
    assert netmask(Interface("far")) == 0
    with route_socket() as ipr:
        ipr.addr("add", index=socket.if_nametoindex("far"), address="10.1.2.3", prefixlen=20)
    assert netmask(Interface("far")).to_bytes(4, "little") == b"\xff\xff\xf0\0"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (0x06 | 0x10, "[Up, Running, Connected]"),
        (0x02 | 0x20, "[Up, Disconnected]"),
        (0x08 | 0x02 | 0x20, "[Up, Wireless, Not associated]"),
        (0x30, "[none]"),
        (0x00, "[none, Connection status unknown]"),
    ],
)
def test_flags_are_told_in_tcpdumps_words(flags: int, words: str) -> None:
    assert str(Interface("eth0", flags, "the first")) == f"eth0 (the first) {words}"
