"""A client whose kernel speaks to a VIP through tunnels, each packet's chosen by the test.

Enters: where tunnels lead, a backend's outer address and, for a second chance, another one's. Leaves:
connected sockets. The kernel's packets to the VIP come out of a TUN device, and go on through raw
sockets (IPIP) or UDP ones (GUE); what the backend answers reaches the client directly.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import socket
import struct
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from netns_tests.bed.topology import XDP_LB, Bed, Host
from netns_tests.oracle.tunnels import GUE_PORT, second_chance

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
ROOM_FOR_HEADERS = 100


def run_on(bed: Bed, backend: Host, *words: str, check: bool = True) -> Any:
    """`xdp-lb decap ...` on a backend, its pins in the bed's directory. A CompletedProcess."""
    return backend.run([str(XDP_LB), "decap", *words], check=check, env=os.environ | places(bed))


def places(bed: Bed) -> dict[str, str]:
    return {"XDP_LB_STATE_DIR": str(bed.directory / "state"), "XDP_LB_RUN_DIR": str(bed.directory / "run")}


def end_tunnels_on(bed: Bed, backend: Host, *options: str) -> None:
    run_on(bed, backend, "attach", "eth0", *options)


def decap_status(bed: Bed, backend: Host) -> Any:
    return json.loads(run_on(bed, backend, "status", "--json").stdout)


@dataclass(frozen=True)
class Tunnel:
    """`kind`: ipip or gue."""

    kind: str
    outer: str
    private: bytes = b""


class Tunnels:
    """The client's way to the VIPs, as a context manager. Packets are lost until lead_to()."""

    def __init__(self, client: Host, vip4: str, vip6: str) -> None:
        self._client, self._vips = client, (vip4, vip6)
        self._tunnel: Tunnel | None = None
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            self._resources = undo
            self._open()
            self._resources = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.close()

    def lead_to(self, outer: str, *, kind: str = "gue", previous: str | None = None) -> None:
        """From now on the VIPs are behind a tunnel to this outer address."""
        self._tunnel = Tunnel(kind, outer, second_chance(previous) if previous else b"")

    def connection(self, vip: str) -> socket.socket:
        with self._client.entered():
            made = socket.socket(_family(vip), socket.SOCK_STREAM)
        made.settimeout(5)
        try:
            made.connect((vip, 80))
        except OSError:
            made.close()
            raise
        return made

    def ask(self, vip: str, port: int, question: bytes) -> bytes:
        """One datagram and its answer; TimeoutError without one."""
        with self._client.entered():
            asking = socket.socket(_family(vip), socket.SOCK_DGRAM)
        with asking:
            asking.settimeout(2)
            asking.sendto(question, (vip, port))
            return asking.recv(2000)

    def _open(self) -> None:
        self._tun = self._open_tun()
        self._resources.callback(os.close, self._tun)
        self._stop_reading, self._stop = os.pipe()
        self._resources.callback(os.close, self._stop_reading)
        self._sockets = {
            (kind, version, inner): self._resources.enter_context(self._socket(kind, version, inner))
            for kind in ("ipip", "gue")
            for version in (4, 6)
            for inner in (4, 6)
        }
        carrying = threading.Thread(target=self._carry)
        carrying.start()
        self._resources.callback(carrying.join)
        self._resources.callback(os.close, self._stop)

    def _open_tun(self) -> int:
        with self._client.entered():
            tun = os.open("/dev/net/tun", os.O_RDWR)
            fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", b"tunnels", IFF_TUN | IFF_NO_PI))
        with self._client.netlink() as ip:
            (index,) = ip.link_lookup(ifname="tunnels")
            ip.link("set", index=index, state="up", mtu=1500 - ROOM_FOR_HEADERS)
            for vip, source in zip(self._vips, (self._client.ipv4, self._client.ipv6), strict=True):
                length = 128 if ":" in vip else 32
                ip.route("add", dst=f"{vip}/{length}", oif=index, prefsrc=source)
        return tun

    def _socket(self, kind: str, version: int, inner: int) -> socket.socket:
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        with self._client.entered():
            if kind == "gue":
                return socket.socket(family, socket.SOCK_DGRAM)
            return socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_IPIP if inner == 4 else socket.IPPROTO_IPV6)

    def _carry(self) -> None:
        """Until the pipe's other end is closed."""
        while self._stop_reading not in select.select([self._tun, self._stop_reading], [], [])[0]:
            packet = os.read(self._tun, 2000)
            if tunnel := self._tunnel:
                self._send(packet, tunnel)

    def _send(self, packet: bytes, tunnel: Tunnel) -> None:
        inner, outer = packet[0] >> 4, 6 if ":" in tunnel.outer else 4
        through = self._sockets[tunnel.kind, outer, inner]
        if tunnel.kind == "ipip":
            through.sendto(packet, (tunnel.outer, 0))
            return
        header = bytes([len(tunnel.private) // 4, 4 if inner == 4 else 41, 0, 0])
        through.sendto(header + tunnel.private + packet, (tunnel.outer, GUE_PORT))


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
