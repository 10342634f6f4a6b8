"""Many clients at once against one URL, counting which backend answered and what failed.

What enters is `http://HOST[:PORT]/PATH` or `udp://HOST:PORT` and how much to ask of it; what leaves
is a `Report`, as one line of JSON on stdout when run as

    python -m netns_tests.bed.load URL --connections C [--requests N] [--duration S] [--keepalive]

SIGINT and SIGTERM end a run early, its requests under way finished, its report printed. asyncio's
own streams do for HTTP/1.1 here: thousands of connections in one process, nothing to install.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import itertools
import json
import resource
import signal
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import SplitResult, urlsplit


class RequestFailedError(Exception):
    """An answer came and was not the one asked for; the message is the reason counted."""


@dataclass
class Report:
    """What a run did: `requests` ended, `failed` of them without a good answer, for `reasons`.

    `backends` counts the good answers; `peak_connections` are those open at once, each after a
    first good answer. The keys of the JSON are the names of the fields.
    """

    requests: int = 0
    failed: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    backends: Counter[str] = field(default_factory=Counter)
    peak_connections: int = 0
    seconds: float = 0.0

    def json(self) -> str:
        return json.dumps(vars(self), sort_keys=True)

    @classmethod
    def parse(cls, line: str) -> Report:
        """What `json` wrote."""
        fields = json.loads(line)
        counters = {name: Counter(fields[name]) for name in ("reasons", "backends")}
        return cls(**(fields | counters))

    def answered(self, backend: str) -> None:
        self.requests += 1
        self.backends[backend] += 1

    def missed(self, reason: str) -> None:
        self.requests += 1
        self.failed += 1
        self.reasons[reason] += 1


class Client(Protocol):
    """One source port, opened by its first request."""

    async def request(self) -> str:
        """Ask once; the label of the backend that answered."""

    def close(self) -> None: ...


class HttpClient:
    """HTTP/1.1 (RFC 9112), as far as a server that sends Content-Length needs it."""

    def __init__(self, url: SplitResult, keepalive: bool) -> None:
        self._address = (url.hostname, url.port or 80)
        request_line = f"GET {url.path or '/'} HTTP/1.1"
        connection = "keep-alive" if keepalive else "close"
        self._head = f"{request_line}\r\nHost: {url.netloc}\r\nConnection: {connection}\r\n\r\n"
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def request(self) -> str:
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._address)
        reader, writer = self._streams
        writer.write(self._head.encode())
        status, headers = _parse_head(await reader.readuntil(b"\r\n\r\n"))
        await reader.readexactly(int(headers["content-length"]))
        if status != 200:
            raise RequestFailedError(f"status {status}")
        return headers["x-backend"]

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()


def _parse_head(head: bytes) -> tuple[int, dict[str, str]]:
    status_line, *lines = head.decode("latin-1").split("\r\n")
    fields = (line.split(":", 1) for line in lines if line)
    return int(status_line.split()[1]), {name.lower(): value.strip() for name, value in fields}


class UdpClient(asyncio.DatagramProtocol):
    """Asks the echo of `netns_tests.bed.echo`; a datagram lost either way is a failed request."""

    def __init__(self, url: SplitResult) -> None:
        self._address = (url.hostname or "", url.port or 0)
        self._numbers = itertools.count()
        self._transport: asyncio.DatagramTransport | None = None
        self._answer: asyncio.Future[bytes] | None = None

    async def request(self) -> str:
        loop = asyncio.get_running_loop()
        if self._transport is None:
            self._transport, _ = await loop.create_datagram_endpoint(lambda: self, remote_addr=self._address)
        self._answer = loop.create_future()
        payload = f"{next(self._numbers)}".encode()
        self._transport.sendto(payload)
        backend, _, echoed = (await self._answer).partition(b" ")
        if echoed != payload:
            raise RequestFailedError("wrong payload")
        return backend.decode()

    def datagram_received(self, data: bytes, addr: object) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(data)

    def error_received(self, exc: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


@dataclass
class Load:
    """A run of `connections` clients until `requests` are asked, `duration_s` is over or `stop()`.

    With `keepalive` a client uses one connection (one source port) for all of its requests and
    holds it until the run ends; else each request has its own. A request that takes longer than
    `timeout_s`, its connect included, has failed. After each a client waits for `pause_s`.
    """

    url: SplitResult
    connections: int = 1
    requests: int | None = None
    duration_s: float = 600.0
    keepalive: bool = False
    timeout_s: float = 10.0
    pause_s: float = 0.0
    report: Report = field(default_factory=Report, init=False)
    _open: set[Client] = field(default_factory=set, init=False)
    _stopped: bool = field(default=False, init=False)

    def stop(self) -> None:
        """Start no more requests."""
        self._stopped = True

    async def run(self) -> Report:
        start = time.monotonic()
        asyncio.get_running_loop().call_later(self.duration_s, self.stop)
        await asyncio.gather(*(self._ask_all(self._share(i)) for i in range(self.connections)))
        for client in list(self._open):
            self._close(client)
        await asyncio.sleep(0)  # one turn of the loop, in which the transports close
        self.report.seconds = round(time.monotonic() - start, 3)
        return self.report

    def _share(self, client: int) -> Iterable[int]:
        """What the client of this number has to ask, so that each opens a connection."""
        if self.requests is None:
            return itertools.count()
        return range(client, self.requests, self.connections)

    async def _ask_all(self, share: Iterable[int]) -> None:
        client: Client | None = None
        for _ in share:
            if self._stopped:
                return
            client = client or self._client()
            if not await self._ask(client) or not self.keepalive:
                self._close(client)
                client = None
            await asyncio.sleep(self.pause_s)

    def _client(self) -> Client:
        if self.url.scheme == "udp":
            return UdpClient(self.url)
        return HttpClient(self.url, self.keepalive)

    async def _ask(self, client: Client) -> bool:
        try:
            async with asyncio.timeout(self.timeout_s):
                self.report.answered(await client.request())
        except (RequestFailedError, OSError, EOFError, ValueError, LookupError) as error:
            self.report.missed(_reason(error))
            return False
        self._open.add(client)
        self.report.peak_connections = max(self.report.peak_connections, len(self._open))
        return True

    def _close(self, client: Client) -> None:
        self._open.discard(client)
        client.close()


def _reason(error: Exception) -> str:
    match error:
        case TimeoutError(errno=None):
            return "timeout"
        case RequestFailedError():
            return str(error)
        case EOFError():
            return "connection closed"
        case OSError(errno=int(number)):
            return errno.errorcode.get(number, f"errno {number}")
    return f"malformed answer: {error!r}"


async def _print_reports(report: Report, interval_s: float) -> None:
    while True:
        await asyncio.sleep(interval_s)
        print(report.json(), flush=True)


async def _run(load: Load, interval_s: float | None) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, load.stop)
    async with asyncio.TaskGroup() as tasks:
        if interval_s is not None:
            progress = tasks.create_task(_print_reports(load.report, interval_s))
        await load.run()
        if interval_s is not None:
            progress.cancel()
    print(load.report.json(), flush=True)


def _raise_file_limit() -> None:
    """One descriptor per connection: distributions start processes with 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m netns_tests.bed.load", description=__doc__)
    parser.add_argument("url", type=urlsplit, help="http://HOST[:PORT]/PATH or udp://HOST:PORT")
    parser.add_argument("--connections", type=int, default=1, help="clients at once")
    parser.add_argument("--requests", type=int, help="end after so many, over all clients")
    parser.add_argument("--duration", type=float, default=600, help="end after so many seconds")
    parser.add_argument("--timeout", type=float, default=10, help="seconds a request may take")
    parser.add_argument("--pause", type=float, default=0, help="seconds a client waits after each")
    parser.add_argument("--keepalive", action="store_true", help="one connection per client")
    parser.add_argument("--report-every", type=float, metavar="S", help="print reports meanwhile")
    return parser


def main() -> None:
    options = _parser().parse_args()
    _raise_file_limit()
    load = Load(
        options.url,
        connections=options.connections,
        requests=options.requests,
        duration_s=options.duration,
        keepalive=options.keepalive,
        timeout_s=options.timeout,
        pause_s=options.pause,
    )
    asyncio.run(_run(load, options.report_every))


if __name__ == "__main__":
    main()
