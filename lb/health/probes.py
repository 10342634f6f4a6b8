"""One check of one backend: a connection, an HTTP exchange, a datagram or a script, over asyncio.

Enters: a Target with its check (lb.model.health_check). Leaves: an Outcome, within the timeout. Local failures (no
descriptor or port left) say nothing about the backend and raise CannotCheck. Sockets are closed with a reset, like
HAProxy's checks: thousands of checks per second would leave every local port in TIME_WAIT.

An exchange without TLS waits for its socket in an epoll of its own, at half the cost of asyncio's streams.
"""

from __future__ import annotations

import asyncio
import os
import re
import select
import signal
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from errno import EADDRNOTAVAIL, EAGAIN, EINPROGRESS, EMFILE, ENFILE, ENOBUFS, ENOMEM
from functools import cache, cached_property
from ipaddress import ip_address
from typing import Self
from weakref import WeakKeyDictionary

from lb.health.state import SUCCESS, Outcome
from lb.host.trusted_file import fault_of_program
from lb.model.health_check import HealthCheck, Kind, seconds_text
from lb.model.regex import compiled
from lb.model.vip import join_port

OURS = {EMFILE, ENFILE, ENOBUFS, ENOMEM, EADDRNOTAVAIL, EAGAIN}
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger
LATE_S = 0.02
MORE_TIMES = 5
MAX_HEAD = 16 << 10
MAX_BODY = 256 << 10
PIECE = 64 << 10
CHUNK_HEAD = re.compile(rb"([0-9a-fA-F]{1,8})[^\r\n]*\r\n")
MAX_SCRIPTS = 32  # at a time

Read = Callable[[], Awaitable[bytes]]  # the next piece, empty at the end


class CannotCheck(Exception):
    """Something that this host lacks: nothing is known about the backend."""


@dataclass(frozen=True)
class Target:
    """address, port: what to connect to; source: the own address to do it from (empty: the kernel's choice).
    environment: of scripts."""

    check: HealthCheck
    address: str
    port: int
    source: str = ""
    environment: tuple[tuple[str, str], ...] = ()

    @cached_property
    def request(self) -> bytes:
        """Of HTTP."""
        host = self.check.host or join_port(ip_address(self.address), self.port)
        return (
            f"{self.check.method} {self.check.path} HTTP/1.1\r\nHost: {host}\r\n"
            "User-Agent: xdp-lb\r\nAccept: */*\r\nConnection: close\r\n\r\n"
        ).encode()


async def probe(target: Target) -> Outcome:
    """Raises CannotCheck."""
    try:
        return await _PROBES[target.check.kind](target)
    except TimeoutError:
        return Outcome(f"no response within {seconds_text(target.check.timeout_s)}")
    except ssl.SSLCertVerificationError as error:
        return Outcome(f"TLS: {error.verify_message}")
    except ssl.SSLError as error:
        return Outcome(f"TLS: {(error.reason or str(error)).lower().replace('_', ' ')}")
    except OSError as error:
        if error.errno in OURS:
            raise CannotCheck(error.strerror) from error
        return Outcome((error.strerror or str(error)).lower())


# Sockets


class _Poller:
    """One epoll for the sockets of all checks, itself watched by the event loop, whose own bookkeeping for a socket
    would cost more than a check. A socket is registered once, for all events as they come, and leaves when closed."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._exchanges: dict[int, _Exchange] = {}
        asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._wake)

    def add(self, exchange: _Exchange) -> None:
        self._exchanges[exchange.number] = exchange
        self._epoll.register(exchange.number, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)

    def remove(self, number: int) -> None:
        self._exchanges.pop(number, None)

    def release(self, number: int) -> None:
        """A socket that stays open."""
        self.remove(number)
        self._epoll.unregister(number)

    def _wake(self) -> None:
        for number, events in self._epoll.poll(0):
            if exchange := self._exchanges.get(number):
                exchange.on_events(events)


_pollers: WeakKeyDictionary[asyncio.AbstractEventLoop, _Poller] = WeakKeyDictionary()


def _poller() -> _Poller:
    loop = asyncio.get_running_loop()
    if loop not in _pollers:
        _pollers[loop] = _Poller()
    return _pollers[loop]


class _Exchange:
    """A socket that is connected to the target, as a context manager; all of it has the check's timeout."""

    def __init__(self, target: Target, kind: socket.SocketKind = socket.SOCK_STREAM) -> None:
        self._target, self._kind = target, kind
        self._events, self._is_late, self._more_time = 0, False, MORE_TIMES
        self._waiter: asyncio.Future[None] | None = None

    def __enter__(self) -> Self:
        family = socket.AF_INET6 if ":" in self._target.address else socket.AF_INET
        self.sock = socket.socket(family, self._kind | socket.SOCK_NONBLOCK)
        self.number, self._poller = self.sock.fileno(), _poller()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._target.check.timeout_s, self._expire)
        return self

    def __exit__(self, *_: object) -> None:
        self._poller.remove(self.number)
        self._timer.cancel()
        self.sock.close()

    def on_events(self, events: int) -> None:
        self._events |= events
        self._go_on()

    def _expire(self) -> None:
        """Where the loop itself is late, the answer may lie there unread: it gets that much more time."""
        loop = asyncio.get_running_loop()
        late_s = loop.time() - self._timer.when()
        if late_s > LATE_S and self._more_time:
            self._more_time -= 1
            self._timer = loop.call_later(late_s, self._expire)
            return
        self._is_late = True
        self._go_on()

    def _go_on(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    async def connect(self) -> None:
        if self._kind is socket.SOCK_STREAM:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        if self._target.source:
            self.sock.bind((self._target.source, 0))
        error = self.sock.connect_ex((self._target.address, self._target.port))
        self._poller.add(self)
        if error == EINPROGRESS:
            await self._until(select.EPOLLOUT)
            error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))

    def release(self) -> socket.socket:
        """Waited for elsewhere; always closed here."""
        self._poller.release(self.number)
        return self.sock

    async def receive(self) -> bytes:
        """Empty at the end. Raises TimeoutError."""
        while True:
            try:
                return self.sock.recv(PIECE)
            except BlockingIOError:
                self._events = 0
            await self._until(select.EPOLLIN)

    async def _until(self, event: int) -> None:
        """Also until an error, which the next call on the socket tells. What has come in time counts, however late the
        loop finds it."""
        while not self._events & (event | select.EPOLLERR | select.EPOLLHUP):
            if self._is_late:
                raise TimeoutError
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter


async def _tcp(target: Target) -> Outcome:
    with _Exchange(target) as exchange:
        await exchange.connect()
    return SUCCESS


async def _udp(target: Target) -> Outcome:
    """Without an `expect`, silence until the timeout is a success, and an ICMP error is none."""
    check = target.check
    with _Exchange(target, socket.SOCK_DGRAM) as exchange:
        _report_icmp_errors(exchange.sock)
        await exchange.connect()
        exchange.sock.send(check.send)
        try:
            while check.expect not in await exchange.receive():
                pass
        except TimeoutError:
            if check.expect:
                raise
    return SUCCESS


def _report_icmp_errors(sock: socket.socket) -> None:
    """Also ICMP errors other than port unreachable, such as host unreachable."""
    if sock.family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_IP, 11, 1)  # IP_RECVERR, <linux/in.h>
    else:
        sock.setsockopt(socket.IPPROTO_IPV6, 25, 1)  # IPV6_RECVERR, <linux/in6.h>


# HTTP


async def _http(target: Target) -> Outcome:
    with _Exchange(target) as exchange:
        await exchange.connect()
        exchange.sock.send(target.request)
        return await _answer(target.check, exchange.receive)


async def _https(target: Target) -> Outcome:
    """With asyncio's streams, whose cost is small next to the handshake."""
    check = target.check
    async with asyncio.timeout(check.timeout_s):
        with _Exchange(target) as exchange:
            await exchange.connect()
            reader, writer = await asyncio.open_connection(
                sock=exchange.release(),
                ssl=_tls(check.verify, check.ca),
                server_hostname=check.host or target.address,
            )
            try:
                writer.write(target.request)
                return await _answer(check, lambda: reader.read(PIECE))
            finally:
                writer.transport.abort()


@cache
def _tls(verify: bool, ca: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca or None)
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


async def _answer(check: HealthCheck, read: Read) -> Outcome:
    """Of the body only as much is read as the check needs: none at all where nothing is asked of it."""
    head, rest = await _head(read)
    status = re.match(rb"HTTP/1\.[01] (\d{3})[ \r]", head)
    if status is None:
        return Outcome("response is not HTTP")
    code = int(status[1])
    if not any(first <= code <= last for first, last in check.status):
        return Outcome(f"status {code}")
    if not (check.body or check.match):
        return SUCCESS
    return _body_outcome(check, await _body(head, rest, read))


async def _head(read: Read) -> tuple[bytes, bytes]:
    """Status line and fields, and what came behind them."""
    received = b""
    while b"\r\n\r\n" not in received:
        piece = await read()
        received += piece
        if not piece or len(received) > MAX_HEAD:
            break
    head, _, rest = received.partition(b"\r\n\r\n")
    return head + b"\r\n", rest


async def _body(head: bytes, received: bytes, read: Read) -> bytes:
    """Up to MAX_BODY bytes; it ends by its length, its last chunk or with the connection (RFC 9112, section 6)."""
    is_chunked = re.search(rb"(?im)^transfer-encoding:[ \t]*chunked[ \t]*\r$", head)
    length = re.search(rb"(?im)^content-length:[ \t]*(\d{1,18})[ \t]*\r$", head)
    limit = min(int(length[1]), MAX_BODY) if length and not is_chunked else MAX_BODY
    while len(received) < limit and not (is_chunked and received.endswith(b"0\r\n\r\n")):
        piece = await read()
        if not piece:
            break
        received += piece
    return _unchunked(received) if is_chunked else received[:limit]


def _unchunked(data: bytes) -> bytes:
    body, at = bytearray(), 0
    while match := CHUNK_HEAD.match(data, at):
        size, start = int(match[1], 16), match.end()
        if not size:
            break
        body += data[start : start + size]
        at = start + size + 2
    return bytes(body)


def _body_outcome(check: HealthCheck, body: bytes) -> Outcome:
    text = body.decode(errors="replace")
    if check.body not in text:
        return Outcome(f"response body does not contain {check.body}")
    if check.match and not compiled(check.match).search(text):
        return Outcome(f"response body does not match {check.match}")
    return SUCCESS


# Scripts


@cache
def _turns(_: asyncio.AbstractEventLoop) -> asyncio.Semaphore:
    return asyncio.Semaphore(MAX_SCRIPTS)


async def _script(target: Target) -> Outcome:
    async with _turns(asyncio.get_running_loop()):
        return await _run(target)


async def _run(target: Target) -> Outcome:
    """In its own session; of this process's environment it only gets PATH. What others can change is not run."""
    if fault := fault_of_program(target.check.command[0]):
        return Outcome(fault)
    try:
        process = await asyncio.create_subprocess_exec(
            *target.check.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env={"PATH": os.environ.get("PATH", os.defpath), **dict(target.environment)},
            start_new_session=True,
        )
    except FileNotFoundError:
        return Outcome(f"{target.check.command[0]}: not found")
    try:
        async with asyncio.timeout(target.check.timeout_s):
            code = await process.wait()
    finally:
        await _end(process)
    return SUCCESS if code == 0 else Outcome(f"exit code {code}" if code > 0 else f"killed by signal {-code}")


async def _end(process: asyncio.subprocess.Process) -> None:
    """With all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


_PROBES: Mapping[Kind, Callable[[Target], Awaitable[Outcome]]] = {
    Kind.TCP: _tcp,
    Kind.HTTP: _http,
    Kind.HTTPS: _https,
    Kind.UDP: _udp,
    Kind.SCRIPT: _script,
}
