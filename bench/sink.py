"""The end of a benchmark's road: an XDP program that counts the packets for one port, and drops them."""

from __future__ import annotations

import socket
from pathlib import Path
from types import TracebackType
from typing import Self

from netns_tests.bed.topology import Host
from xdp import attach
from xdp.object import BpfObject

OBJECT = Path(__file__).with_name("sink.bpf.o")


class Sink:
    """On an interface of a host, as long as the `with` lasts. Raises XdpError."""

    def __init__(self, host: Host, interface: str, port: int) -> None:
        self._host, self._interface = host, interface
        self._obj = BpfObject.open(OBJECT)
        self._obj.configure("counted", port=port)

    def __enter__(self) -> Self:
        self._obj.load()
        program = self._obj.program("sink")
        with self._host.entered():
            self._ifindex = socket.if_nametoindex(self._interface)
            attach.attach(self._ifindex, program.fd, program.id, attach.NATIVE)
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        with self._host.entered():
            attach.detach(self._ifindex, self._obj.program("sink").fd)
        self._obj.close()

    def packets(self) -> int:
        """Counted since the beginning."""
        return int(self._obj.map("arrived").total(0).packets)
