"""HTTP on open sockets: uvicorn with time limits and the peer made known.

Enters: an ASGI application and listening sockets. Leaves: requests with the lb.api.middleware.Peer of the connection in
`scope["state"]["peer"]`, and in `["abort"]` a function that closes it at once.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from lb.api.middleware import Peer
from lb.daemon.accept import TCP_LIMITS, UNIX_LIMITS, Acceptor, Admission, Connections
from lb.errors import DaemonError, InvalidInput
from lb.formats.problems import MEDIA_TYPE, Problem
from lb.runtime.rejections import Rejections

HEAD_S = 10.0  # from a connection, or from the first byte of a request, to the end of its head
IDLE_S = 75  # between requests
HANDSHAKE_S = 10.0
ENDING_S = 30  # for answers that are on their way when the daemon ends
BACKLOG = 4096


class Http(H11Protocol):
    """One connection. uvicorn itself would wait for the head of a request for ever."""

    _head: asyncio.TimerHandle | None = None

    def __init__(self, config: uvicorn.Config, state: ServerState, peer: Peer, admission: Admission) -> None:
        super().__init__(config, state, {"peer": peer})
        self._admission = admission

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "abort": transport.abort}
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._is_idle:
            self._end_wait()
        elif self._head is None:
            self._await_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_idle and self.conn.trailing_data[0] and self._head is None:
            self._await_head()  # of a request that had begun behind the one before

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_wait()
        self._admission.release()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._head = self.loop.call_later(HEAD_S, self.transport.abort)

    def _end_wait(self) -> None:
        if self._head:
            self._head.cancel()
            self._head = None

    def send_400_response(self, msg: str) -> None:
        """As a Problem, like all others."""
        body = json.dumps(Problem(400, msg).document).encode()
        headers = [("Content-Type", MEDIA_TYPE), ("Content-Length", str(len(body))), ("Connection", "close")]
        with suppress(h11.LocalProtocolError):  # an answer has begun already
            events = h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()
            for event in events:
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class Listener(uvicorn.Server):
    """Serves until `should_exit`; signals are the daemon's."""

    def __init__(
        self, app: Any, sockets: Sequence[socket.socket], rejections: Rejections, tls: ssl.SSLContext | None = None
    ) -> None:
        config = uvicorn.Config(
            app,
            interface="asgi3",
            http=Http,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=IDLE_S,
            timeout_graceful_shutdown=ENDING_S,
        )
        super().__init__(config)
        self.sockets = list(sockets)
        self._tls, self._limits, self._rejections = tls, TCP_LIMITS if tls else UNIX_LIMITS, rejections

    async def run_until_exit(self) -> None:
        await self.serve(self.sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: Sequence[socket.socket] | None = None) -> None:
        connections = Connections(self._limits)
        self.servers = [Acceptor(each, connections, self._connect, self._rejections) for each in self.sockets]  # type: ignore[misc]
        self.started = True

    async def _connect(self, sock: socket.socket, peer: Peer, admission: Admission) -> None:
        loop, patience_s = asyncio.get_running_loop(), HANDSHAKE_S if self._tls else None
        try:
            await loop.connect_accepted_socket(
                lambda: Http(self.config, self.server_state, peer, admission),
                sock,
                ssl=self._tls,
                ssl_handshake_timeout=patience_s,
            )
        except OSError:  # no TLS, or gone
            sock.close()
            admission.release()


def unix_socket(path: Path) -> socket.socket:
    """Bound at `path`, for its owner and group alone. What a dead daemon has left there is removed: the caller holds
    the writer's lock, so no other can be alive. Raises DaemonError."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        mask = os.umask(0o117)
        try:
            listening.bind(str(path))
        finally:
            os.umask(mask)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise DaemonError(f"{path}: {error.strerror or error}: set XDP_LB_RUN_DIR to another directory") from None
    return listening


def tcp_socket(address: str, port: int) -> socket.socket:
    """Raises DaemonError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise DaemonError(f"listen {address} port {port}: {error.strerror or error}") from None


def tls_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """Raises InvalidInput."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load_certificate(context, certificate, key)
    return context


def load_certificate(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    """Connections from now on get it. Raises InvalidInput, and then the old one stays."""
    try:
        # Tried first where nothing is lost: a key that does not fit would leave the context without one.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
        context.load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        raise InvalidInput(f"tls: {certificate} and {key}: not a PEM certificate and its key: {error.reason}") from None
    except OSError as error:
        raise InvalidInput(f"tls: {certificate} or {key}: {error.strerror}") from None
