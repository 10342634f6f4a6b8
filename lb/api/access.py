"""Tokens and audit log of the API over TCP, in access.db next to the store.

Enters: secrets, shown once on creation, and audit entries. Leaves: the token of a secret. Only the SHA-256 of a secret
is stored; for 256 random bits that is as good as a slow hash.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from ipaddress import IPv4Address, ip_address, ip_network
from pathlib import Path
from types import TracebackType
from typing import Self

from lb.errors import AlreadyExists, InvalidInput, NotFound, StoreError

PREFIX = "xlb_"
SECRET_BYTES = 32
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
ENTRIES_KEPT = 100_000
LOCK_WAIT_S = 5.0
SCHEMA_VERSION = 1
UNIX = "unix"  # the address of who comes by the Unix socket

SCHEMA = f"""
PRAGMA journal_mode = WAL;
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS token (
    name TEXT PRIMARY KEY,
    sha256 TEXT NOT NULL,
    role TEXT NOT NULL,
    created_s INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS audit (
    number INTEGER PRIMARY KEY,
    time_s REAL NOT NULL,
    who TEXT NOT NULL,
    address TEXT NOT NULL,
    method TEXT NOT NULL,
    path TEXT NOT NULL,
    change TEXT NOT NULL,
    outcome TEXT NOT NULL
);
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;
"""


class Role(StrEnum):
    """What a token may be used for."""

    READ = "read"
    WRITE = "write"


@dataclass(frozen=True, slots=True)
class Token:
    """All that is known of a token but its secret."""

    name: str
    role: Role
    created_s: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the audit log. who: a token's name or a uid; address: where from; outcome: an HTTP status, and why
    not, if so."""

    time_s: float
    who: str
    address: str
    method: str
    path: str
    change: str
    outcome: str


class Access:
    """The open file; one thread uses it. Every method raises StoreError."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path
        self._known: tuple[int, tuple[tuple[Token, str], ...]] | None = None

    @classmethod
    def open(cls, path: Path) -> Access:
        """The file is made where it is missing, for its owner alone."""
        with _translated(path):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            connection = sqlite3.connect(path, isolation_level=None, timeout=LOCK_WAIT_S)
        access = cls(connection, path)
        try:
            access._prepare()
        except BaseException:
            connection.close()
            raise
        return access

    def _prepare(self) -> None:
        with _translated(self._path):
            version = self._connection.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                raise StoreError(f"{self._path}: created by a newer xdp-lb (schema {version}): upgrade xdp-lb")
            if version < SCHEMA_VERSION:
                self._connection.executescript(SCHEMA)
            # A power cut may cost the last entries, but no change waits for the disk.
            self._connection.execute("PRAGMA synchronous = NORMAL")

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # Tokens

    def create(self, name: str, role: Role) -> str:
        """The secret, which cannot be read again. Raises InvalidInput, AlreadyExists."""
        if not NAME.fullmatch(name):
            raise InvalidInput(f"token {name or '(empty)'}: invalid name: use up to 63 letters, digits, and _ . -")
        secret = PREFIX + secrets.token_hex(SECRET_BYTES)
        row = (name, _digest(secret), role.value, int(time.time()))
        with _translated(self._path):
            try:
                self._connection.execute("INSERT INTO token VALUES (?, ?, ?, ?)", row)
            except sqlite3.IntegrityError:
                raise AlreadyExists(f"token {name}: already exists: revoke it first or choose another name") from None
        self._known = None
        return secret

    def revoke(self, name: str) -> None:
        """From its next request on. Raises NotFound."""
        with _translated(self._path):
            if not self._connection.execute("DELETE FROM token WHERE name = ?", (name,)).rowcount:
                raise NotFound(f"token {name}: not found: see xdp-lb token list")
        self._known = None

    def tokens(self) -> list[Token]:
        return [token for token, _ in self._tokens()]

    def authenticate(self, secret: str) -> Token | None:
        """In a time that does not tell how much of a secret is right."""
        digest, found = _digest(secret), None
        for token, known in self._tokens():
            if hmac.compare_digest(digest, known):
                found = token
        return found

    def _tokens(self) -> tuple[tuple[Token, str], ...]:
        """Read again when another process has written, sqlite.org/pragma.html#pragma_data_version."""
        with _translated(self._path):
            version = int(self._connection.execute("PRAGMA data_version").fetchone()[0])
            if self._known is None or self._known[0] != version:
                rows = self._connection.execute("SELECT name, role, created_s, sha256 FROM token ORDER BY name")
                tokens = tuple((Token(name, Role(role), created), sha256) for name, role, created, sha256 in rows)
                self._known = version, tokens
            return self._known[1]

    # The audit log

    def record(self, entry: Entry) -> None:
        values = tuple(_printable(v) if isinstance(v, str) else v for v in asdict(entry).values())
        with _translated(self._path):
            cursor = self._connection.execute("INSERT INTO audit VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)", values)
            self._connection.execute("DELETE FROM audit WHERE number <= ?", ((cursor.lastrowid or 0) - ENTRIES_KEPT,))

    def entries(self, count: int) -> list[Entry]:
        """The last ones, the oldest first."""
        with _translated(self._path):
            columns = "time_s, who, address, method, path, change, outcome"
            rows = self._connection.execute(f"SELECT {columns} FROM audit ORDER BY number DESC LIMIT ?", (count,))
            return [Entry(*row) for row in rows][::-1]


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="replace")).hexdigest()


def _printable(text: str) -> str:
    """What a client has sent must not steer the terminal on which it is read."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise StoreError(f"{path}: {error}: run as root, and check that the disk is writable and not full") from error
    except OSError as error:
        raise StoreError(f"{error.filename or path}: {error.strerror}: run as root, or set XDP_LB_STATE_DIR") from error


class Failures:
    """How often an address has failed to authenticate; `rate` times within `period_s` it may.

    A network counts as one address: of IPv6, a /64. The addresses that failed last are remembered, so many that
    somebody with many of them gains little.
    """

    def __init__(self, rate: int = 10, period_s: float = 60.0, remembered: int = 10_000) -> None:
        self._rate = rate
        self._period_s = period_s
        self._remembered = remembered
        self._failed: OrderedDict[str, list[float]] = OrderedDict()

    def wait_s(self, address: str, now_s: float) -> float:
        """For how long requests from this address are refused; 0: they are not."""
        failed = [at for at in self._failed.get(network_of(address), ()) if now_s - at < self._period_s]
        return self._period_s - (now_s - failed[0]) if len(failed) >= self._rate else 0.0

    def record(self, address: str, now_s: float) -> None:
        network = network_of(address)
        failed = self._failed.pop(network, [])
        self._failed[network] = [*failed, now_s][-self._rate :]
        while len(self._failed) > self._remembered:
            self._failed.popitem(last=False)


def network_of(address: str) -> str:
    """Of the Unix socket, itself: an attacker behind it is behind one forwarder."""
    if address == UNIX:
        return address
    found = ip_address(address)
    if isinstance(found, IPv4Address):
        return address
    mapped = found.ipv4_mapped
    return str(mapped or ip_network((found.packed, 64), strict=False))
