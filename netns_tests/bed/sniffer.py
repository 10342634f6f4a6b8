"""Frames as they pass an interface: what tcpdump would write, as bytes.

Enters: a host and an interface's name. Leaves: its frames since the `with`. A host sees what comes in behind its XDP
program; what is sent to it, the switch sees on its port.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import TypeVar

from scapy.layers.l2 import Ether
from scapy.packet import Packet

from netns_tests.bed.topology import Bed, Host, wait_until

ETH_P_ALL = 3
SO_RCVBUFFORCE = 33

T = TypeVar("T")


class Sniffer:
    """Frames of one direction in one AF_PACKET socket, in the order they came."""

    def __init__(self, tap: socket.socket, outgoing: bool) -> None:
        self._tap, self._outgoing = tap, outgoing
        self._frames: list[bytes] = []

    def frames(self) -> list[bytes]:
        """All so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                frame, (_, _, kind, *_) = self._tap.recvfrom(70000)
                if (kind == socket.PACKET_OUTGOING) == self._outgoing:
                    self._frames.append(frame)
        return self._frames

    def packets(self) -> list[Packet]:
        return [Ether(frame) for frame in self.frames()]

    def wait_for(self, count: int, chosen: Callable[[Packet], T | None], what: str) -> list[T]:
        """Once there are so many, what `chosen` makes of the packets, less None."""

        def found() -> list[T]:
            return [made for packet in self.packets() if (made := chosen(packet)) is not None]

        wait_until(lambda: len(found()) >= count, f"{count} {what}")
        return found()


@contextlib.contextmanager
def sniffing(host: Host, interface: str, *, outgoing: bool = False) -> Iterator[Sniffer]:
    """What comes in, or what goes out."""
    with host.entered():
        tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    with tap:
        tap.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
        tap.bind((interface, ETH_P_ALL))
        tap.setblocking(False)
        yield Sniffer(tap, outgoing)


@contextlib.contextmanager
def sniffing_the_way_to(bed: Bed, host: Host) -> Iterator[Sniffer]:
    """What is sent to a host's first interface, before any program of the host has seen it."""
    with sniffing(bed.switch, f"{host.label}-eth0", outgoing=True) as sniffer:
        yield sniffer
