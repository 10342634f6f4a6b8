"""Accepts connections, within limits: of a listener, of an address, and of the descriptors of this process.

Enters: a listening socket. Leaves: each accepted socket with its Peer, handed on; what is beyond a limit is closed at
once, counted and seldom logged. Descriptors are given lowest first, so the number of a new one tells how many are in
use: those that TCP leaves are for the Unix socket, and the last ones for the daemon's own work.
"""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import struct
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from errno import EMFILE, ENFILE, ENOBUFS, ENOMEM
from pathlib import Path
from typing import Any

from lb.api.access import UNIX, network_of
from lb.api.middleware import Peer
from lb.formats.problems import MEDIA_TYPE, Problem
from lb.host.ssh import Connection
from lb.runtime.rejections import Rejections

EXHAUSTED = (EMFILE, ENFILE, ENOBUFS, ENOMEM)
PAUSE_S = 1.0  # of a listener, when the host has no descriptor or memory for a connection
UCRED = struct.Struct("iII")  # struct ucred of unix(7): pid, uid, gid
FORWARDERS = ("sshd", "sshd-session", "dropbear")  # by their name in /proc/PID/comm


@dataclass(frozen=True, slots=True)
class Limits:
    """connections: of the listener. of_address: of one IPv4 address or IPv6 /64, of one user other than root, and of
    sockets forwarded by SSH. reserved: descriptors that are left for others."""

    connections: int
    of_address: int
    reserved: int


TCP_LIMITS = Limits(connections=4096, of_address=256, reserved=96)
UNIX_LIMITS = Limits(connections=16384, of_address=256, reserved=32)


class Admission:
    """One connection's place within the limits, until `release`, which may be called again."""

    def __init__(self, connections: Connections, source: str) -> None:
        self._connections: Connections | None = connections
        self._source = source

    def release(self) -> None:
        if self._connections:
            self._connections.left(self._source)
            self._connections = None


class Connections:
    """Those of one listener."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._all = 0
        self._of: Counter[str] = Counter()

    def fault(self, descriptor: int, source: str) -> tuple[str, str] | None:
        """The reason of lb.runtime.rejections why there is no place, and a sentence."""
        limits, available = self._limits, resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if descriptor >= available - limits.reserved:
            return "descriptors", f"too many open files ({available} allowed): raise LimitNOFILE in the unit"
        if self._all >= limits.connections:
            return "connections", f"too many connections ({limits.connections})"
        if source and self._of[source] >= limits.of_address:
            return "connections_of_address", f"too many connections of one address or user ({limits.of_address})"
        return None

    def admit(self, source: str) -> Admission:
        self._all += 1
        self._of[source] += 1
        return Admission(self, source)

    def left(self, source: str) -> None:
        self._all -= 1
        self._of[source] -= 1
        self._of += Counter()  # without those that are 0


Serve = Callable[[socket.socket, Peer, Admission], Coroutine[Any, Any, None]]


class Acceptor:
    """A listening socket's loop; `close` and `wait_closed` are those of asyncio.Server, for uvicorn."""

    def __init__(
        self, listening: socket.socket, connections: Connections, serve: Serve, rejections: Rejections
    ) -> None:
        listening.setblocking(False)
        self._listening, self._connections, self._serve = listening, connections, serve
        self._rejections = rejections
        self._beginning: set[asyncio.Task[None]] = set()
        self._task = asyncio.create_task(self._run())

    def close(self) -> None:
        self._task.cancel()

    async def wait_closed(self) -> None:
        await asyncio.gather(self._task, *self._beginning, return_exceptions=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(self._listening)
            except OSError as error:
                if error.errno in EXHAUSTED:
                    self._rejections.add("descriptors", f"accept: {error.strerror}: paused for {PAUSE_S:g} s")
                    await asyncio.sleep(PAUSE_S)
            else:
                self._take(sock)
            await asyncio.sleep(0)  # a flood of connections leaves time for others

    def _take(self, sock: socket.socket) -> None:
        try:
            sock.setblocking(False)
            peer = peer_of(sock)
        except OSError:  # gone already
            sock.close()
            return
        source = _source(peer)
        if fault := self._connections.fault(sock.fileno(), source):
            self._rejections.add(*fault, peer.address)
            _turn_away(sock, peer, fault[1])
            return
        task = asyncio.create_task(self._serve(sock, peer, self._connections.admit(source)))
        self._beginning.add(task)
        task.add_done_callback(self._beginning.discard)


def _source(peer: Peer) -> str:
    """What counts as one address; empty: root's own, which the limit of the listener is enough for."""
    if peer.uid is None:
        return network_of(peer.address)
    if peer.forwarded:
        return "forwarded"
    return f"uid {peer.uid}" if peer.uid else ""


def _turn_away(sock: socket.socket, peer: Peer, why: str) -> None:
    """A client on the Unix socket is told; for one of TCP that would take a TLS handshake."""
    if peer.address == UNIX:
        body = json.dumps(Problem(503, f"daemon: {why}: try again later").document).encode()
        head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: {MEDIA_TYPE}\r\nContent-Length: {len(body)}\r\n"
        with suppress(OSError):
            sock.send(f"{head}Retry-After: 1\r\nConnection: close\r\n\r\n".encode() + body)
    sock.close()


def peer_of(sock: socket.socket) -> Peer:
    """Raises OSError where the other end has gone."""
    if sock.family == socket.AF_UNIX:
        pid, uid, _ = UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
        return Peer(UNIX, uid, forwarded=_is_forwarder(pid))
    client, server = sock.getpeername(), sock.getsockname()
    ends = Connection.parse(f"{client[0]} {client[1]} {server[0]} {server[1]}")
    return Peer(client[0].partition("%")[0], connection=ends)


def _is_forwarder(pid: int) -> bool:
    """Whether the process is an SSH server, behind whose end of the connection is somebody else. Of one in another PID
    namespace (pid 0), or hidden, nothing is known."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() in FORWARDERS
    except OSError:
        return False
