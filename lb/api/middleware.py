"""ASGI middleware in front of the API: authentication, roles, size and time limits, audit log.

Enters: a request. Leaves: the request with its complete body, passed on to the API, or a Problem. The Unix socket is
protected by its file mode and identifies the peer by SO_PEERCRED (unix(7)); TCP, browsers and forwarded sockets use
bearer tokens (RFC 6750).
"""

from __future__ import annotations

import asyncio
import json
import pwd
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes

import structlog

from lb.api import page
from lb.api import sessions as page_sessions
from lb.api.access import Access, Entry, Failures, Role
from lb.api.body import LARGEST_ITEMS, LARGEST_LOCAL_ITEMS, check_items
from lb.api.in_flight import InFlight
from lb.api.origin import UNIX_NAMES, check_host, check_site, is_of_browser
from lb.api.sessions import Sessions
from lb.errors import LbError
from lb.formats.problems import MEDIA_TYPE, Problem
from lb.host.ssh import Connection
from lb.runtime.rejections import Rejections

LARGEST_OF_ANYBODY = 4 << 10  # a code
LARGEST_BODY = 1 << 20
LARGEST_LOCAL_BODY = 64 << 20  # of who may use the socket: a file of a hundred thousand backends goes through it
LARGEST_RULES = 64 << 20  # of who may write rules: a million prefixes are 13 to 30 MB
BODY_S = 10.0  # in all
RULES_S = 120.0  # for those, which take 5 Mbit/s then
SEND_S = 60.0  # for the client to take some of the answer
OPEN_PATHS = ("/healthz", "/readyz", *page.ASSETS)  # tell nothing but yes or no, and the page nothing at all
SESSIONS = "/v1/sessions"  # opened by POST with a code, which is what authenticates
READING = ("GET", "HEAD", "OPTIONS")
READING_PATHS = ("/v1/plan", "/v1/explain", "/v1/filter-test")  # whatever the method
RULES = "/v1/filters/"
SET = "/set"  # of a rule: /v1/filters/IFACE/N/set

MISSING = "token missing: send Authorization: Bearer xlb_..."
MISSING_HERE = f"{MISSING}, as browsers and forwarded sockets must: see xdp-lb web and xdp-lb token create"

T = TypeVar("T")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

log = structlog.get_logger("xdp-lb")


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end of a connection: `uid` on the Unix socket, else `connection`, its ends. forwarded: by an
    SSH server, for who knows whom."""

    address: str
    uid: int | None = None
    connection: Connection | None = None
    forwarded: bool = False


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, as the audit log has it, and what they may. local: a program on this host, through the Unix socket; of
    this `uid`."""

    who: str
    role: Role
    uid: int | None = None

    @property
    def local(self) -> bool:
        return self.uid is not None


ANYBODY = Caller("anybody", Role.READ)


class AccessThread:
    """`Access` in a thread of its own, for the event loop."""

    def __init__(self, opener: Callable[[], Access]) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="access")
        self._access = self._thread.submit(opener).result()

    async def call(self, work: Callable[[Access], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, self._access)

    def close(self) -> None:
        self._thread.submit(self._access.close).result()
        self._thread.shutdown()


class AccessMiddleware:
    """An ASGI application around another. `scope["state"]["peer"]` is the Peer; the API may leave sentences for the
    audit log: what has changed in `scope["state"]["change"]`, or why not in `["detail"]`."""

    def __init__(
        self, app: App, access: AccessThread, sessions: Sessions, rejections: Rejections, hosts: Iterable[str] = ()
    ) -> None:
        """`hosts`: names besides the address of the connection by which the daemon may be called."""
        self._app = app
        self._access = access
        self._sessions = sessions
        self._rejections = rejections
        self._hosts = frozenset(host.lower() for host in hosts)
        self._failures = Failures()
        self._in_flight = InFlight(rejections)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        send = _patient(scope, send)
        # Slashes that are part of a VIP stay encoded until the route is found.
        scope["path"] = scope["raw_path"].decode("ascii")
        try:
            self._check_origin(scope)
            caller = await self._admit(scope)
            scope["state"]["caller"] = caller
            with self._in_flight.entered(caller.who, scope["path"], limited=_has_token(caller)):
                await self._serve(scope, caller, await _with_whole_body(scope, receive), send)
        except Problem as problem:
            if problem.status == 413:
                self._rejections.add("body_size", problem.detail, scope["state"]["peer"].address)
            await answer(problem, send)

    async def _serve(self, scope: MutableMapping[str, Any], caller: Caller, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send if _reads(scope) else self._audited(scope, caller, send))
        except Exception:  # the API has answered, without what is in it
            log.exception("internal error", method=scope["method"], path=scope["path"])

    def _check_origin(self, scope: MutableMapping[str, Any]) -> None:
        """Raises Problem."""
        peer: Peer = scope["state"]["peer"]
        try:
            check_host(scope["headers"], self._hosts | _own_names(peer))
        except Problem as problem:
            self._rejections.add("host", problem.detail, peer.address)
            raise
        try:
            if not (scope["path"] in OPEN_PATHS and scope["method"] in READING):
                check_site(scope["headers"])
        except Problem as problem:
            self._rejections.add("cross_site", problem.detail, peer.address)
            raise

    async def _admit(self, scope: MutableMapping[str, Any]) -> Caller:
        """Raises Problem."""
        peer: Peer = scope["state"]["peer"]
        if peer.uid is not None and not peer.forwarded and not is_of_browser(scope["headers"]):
            return Caller(_user(peer.uid), Role.WRITE, peer.uid)
        if (scope["path"] in OPEN_PATHS and scope["method"] in READING) or _opens_session(scope):
            return ANYBODY
        caller = await self._authenticate(scope, peer)
        if caller.role is not Role.WRITE and not _reads(scope):
            await self._record(scope, caller.who, "403: the token is read-only")
            raise Problem(403, "the token is read-only: use one with role write")
        return caller

    async def _authenticate(self, scope: MutableMapping[str, Any], peer: Peer) -> Caller:
        now_s = time.monotonic()
        secret = _bearer(scope)
        if secret.startswith(page_sessions.PREFIX):
            if who := self._sessions.who(secret, now_s):
                return Caller(f"web page of {who}", Role.WRITE)
        elif token := await self._access.call(lambda access: access.authenticate(secret)):
            return Caller(f"token {token.name}", token.role)
        await self._refuse(scope, peer, now_s)
        raise _unauthorized("invalid token: see xdp-lb token list", 'error="invalid_token"')

    async def _refuse(self, scope: MutableMapping[str, Any], peer: Peer, now_s: float) -> None:
        """Only after a secret that is wrong: others from the same address are not locked out. Raises Problem."""
        self._rejections.add("invalid_token", "invalid token", peer.address)
        if wait_s := self._failures.wait_s(peer.address, now_s):
            headers = {"Retry-After": str(ceil(wait_s))}
            raise Problem(429, "too many invalid tokens from this address: try again later", headers=headers)
        self._failures.record(peer.address, now_s)
        await self._record(scope, "unknown", "401: invalid token")

    def _audited(self, scope: MutableMapping[str, Any], caller: Caller, send: Send) -> Send:
        """What is answered has been recorded."""

        async def recorded(message: Message) -> None:
            # A code that is wrong is no change, and who guesses fills no log.
            if message["type"] == "http.response.start" and not (caller is ANYBODY and message["status"] >= 400):
                await self._record(scope, caller.who, _outcome(scope, message["status"]))
            await send(message)

        return recorded

    async def _record(self, scope: MutableMapping[str, Any], who: str, outcome: str) -> None:
        path = unquote_to_bytes(scope["path"]).decode(errors="replace")
        if scope["query_string"]:
            path += "?" + scope["query_string"].decode("ascii", "replace")
        change = scope["state"].get("change", "")
        peer: Peer = scope["state"]["peer"]
        entry = Entry(time.time(), who, peer.address, scope["method"], path[:500], change[:500], outcome[:500])
        log.info("audit", who=who, address=peer.address, method=entry.method, path=path, change=change, outcome=outcome)
        try:
            await self._access.call(lambda access: access.record(entry))
        except LbError as error:  # the change itself has been made; this log has it
            log.error("the audit log cannot be written", reason=str(error))


def _reads(scope: MutableMapping[str, Any]) -> bool:
    return scope["method"] in READING or scope["path"] in READING_PATHS


def _has_token(caller: Caller) -> bool:
    return not caller.local and caller is not ANYBODY


def _opens_session(scope: MutableMapping[str, Any]) -> bool:
    return (scope["method"], scope["path"]) == ("POST", SESSIONS)


def _own_names(peer: Peer) -> frozenset[str]:
    """A port forwarder may make any address of this host `localhost`."""
    if peer.uid is not None:
        return UNIX_NAMES
    return frozenset({"localhost", *([str(peer.connection.server)] if peer.connection else [])})


def _user(uid: int) -> str:
    try:
        return f"uid {uid} ({pwd.getpwuid(uid).pw_name})"
    except KeyError:
        return f"uid {uid}"


def _outcome(scope: MutableMapping[str, Any], status: int) -> str:
    detail = scope["state"].get("detail", "")
    return f"{status}: {detail}" if detail else str(status)


def _bearer(scope: MutableMapping[str, Any]) -> str:
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    scheme, _, secret = given[0].decode("latin-1").partition(" ") if len(given) == 1 else ("", "", "")
    if scheme.lower() != "bearer" or not secret.strip():
        raise _unauthorized(MISSING if scope["state"]["peer"].uid is None else MISSING_HERE)
    return secret.strip()


def _unauthorized(detail: str, challenge: str = "") -> Problem:
    return Problem(401, detail, headers={"WWW-Authenticate": f"Bearer {challenge}".strip()})


async def _with_whole_body(scope: MutableMapping[str, Any], receive: Receive) -> Receive:
    """A `receive` that gives all of the body at once. Raises Problem for one that is too large, too slow or of the
    wrong type."""
    headers = dict(scope["headers"])
    limit, patience_s = _limits(scope)
    if int(headers.get(b"content-length", b"0")) > limit:
        raise _too_large(limit)
    try:
        async with asyncio.timeout(patience_s):
            body = await _body(receive, limit)
    except TimeoutError:
        raise Problem(
            408, f"request body not received within {patience_s:g} s", headers={"Connection": "close"}
        ) from None
    media_type = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    is_list = _is_set(scope["path"])
    _check_type(body, media_type, is_list=is_list)
    if not is_list:
        check_items(body, LARGEST_LOCAL_ITEMS if scope["state"]["caller"].local else LARGEST_ITEMS)
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return unread.pop() if unread else await receive()

    return replay


def _limits(scope: MutableMapping[str, Any]) -> tuple[int, float]:
    """Bytes and seconds."""
    caller: Caller = scope["state"]["caller"]
    if caller is ANYBODY:
        return LARGEST_OF_ANYBODY, BODY_S
    if scope["path"].startswith(RULES) and caller.role is Role.WRITE:
        return LARGEST_RULES, RULES_S
    return (LARGEST_LOCAL_BODY if caller.local else LARGEST_BODY), BODY_S


def _is_set(path: str) -> bool:
    return path.startswith(RULES) and path.endswith(SET) and path.count("/") == 5


def _check_type(body: bytes, media_type: bytes, *, is_list: bool) -> None:
    """Raises Problem."""
    if is_list and media_type != b"text/plain":
        raise Problem(415, "unsupported content type: send one prefix per line with Content-Type: text/plain")
    if not is_list and body and media_type != b"application/json":
        raise Problem(415, "unsupported content type: send JSON with Content-Type: application/json")


async def _body(receive: Receive, limit: int) -> bytes:
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Problem(400, "connection closed before the end of the request body")
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > limit:
            raise _too_large(limit)
    return bytes(body)


def _too_large(limit: int) -> Problem:
    return Problem(413, f"request body larger than {limit} bytes")


def _patient(scope: MutableMapping[str, Any], send: Send) -> Send:
    """But not for ever: a client that takes nothing of its answer is cut off."""

    async def limited(message: Message) -> None:
        try:
            async with asyncio.timeout(SEND_S):
                await send(message)
        except TimeoutError:
            scope["state"]["abort"]()

    return limited


async def answer(problem: Problem, send: Send) -> None:
    body = json.dumps(problem.document).encode()
    own = {"Content-Type": MEDIA_TYPE, "Content-Length": str(len(body)), **problem.headers}
    headers = [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in own.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
