"""The desired state on disk: a SQLite file for each network namespace, and the lock of its writers.

Enters: a State. Leaves: the State that was saved last, whatever became of the process that saved
it. A change is one transaction that stays open while the caller writes to the kernel, so that store
and kernel go to the new state, or neither does.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from lb.errors import LbError, StoreError
from lb.model.options import changed_values, from_values
from lb.model.rules import Rules
from lb.model.state import Backend, Interface, Mode, OwnAddress, Service, State, XdpMode
from lb.model.vip import Vip, parse_address
from lb.store.files import FIXES, LOCK_WAIT_S, create_file, exists, translated
from lb.store.rules import PackedSet, read_rules, read_set, write_rules
from lb.store.schema import FIRST_WITH_RULES, MIGRATIONS, SCHEMA_VERSION, create_script


class Store:
    """Remembers what it has loaded or saved last, so that saving writes only what differs."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path
        self._state = State()
        self._generation = 0

    @classmethod
    def open(cls, path: Path, write: bool) -> Store:
        """Read-only, a missing store is an empty one, and nothing is created."""
        if write:
            create_file(path)
        with translated(path):
            store = cls(_connect(path, write), path)
            try:
                store._prepare(write)
            except BaseException:
                store.close()
                raise
        return store

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def state(self) -> State:
        """What was loaded or saved last."""
        return self._state

    @property
    def generation(self) -> int:
        """Grows by one with each saved change; 0 while there is no store. It starts at the time of
        creation, so that a store made anew does not agree by chance with the maps that its
        predecessor left in the kernel."""
        return self._generation

    def load(self) -> State:
        """What was saved last. Raises StoreError."""
        with translated(self._path):
            self._connection.execute("BEGIN")
            try:
                if self._version():
                    self._generation = self._stored_generation()
                    self._state = _read_state(self._connection, self._version())
            finally:
                self._roll_back()
        return self._state

    @contextmanager
    def saving(self, state: State) -> Iterator[None]:
        """Save `state` if the body ends well: an exception in the body, or the end of the process,
        leaves the old state. To be called with the lock held. Raises StoreError.

        A state that is stored already needs no transaction: so the kernel can be brought back to it
        when the store cannot be written.
        """
        if state == self._state:
            yield
            return
        with self._transaction(lambda: self._write(state)):
            yield
        self._state = state
        self._generation += 1

    def rules(self) -> Rules:
        """The filter rules that were saved last. Raises StoreError."""
        with translated(self._path):
            if self._version() < FIRST_WITH_RULES:
                return Rules()
            try:
                return read_rules(self._connection)
            except (LbError, ValueError, TypeError) as error:
                raise sqlite3.DatabaseError(f"holds an invalid value ({error})") from error

    def rule_set(self, slot: int) -> PackedSet:
        """The prefixes of a rule with a set."""
        with translated(self._path):
            return read_set(self._connection, slot)

    @contextmanager
    def saving_rules(self, rules: Rules, sets: Mapping[int, PackedSet]) -> Iterator[None]:
        """As saving(). `sets`: slot -> prefixes, of the rules whose set is new. Services and interfaces stay as they
        are, and so does the generation: the balancer's maps hold no rules."""
        with self._transaction(lambda: write_rules(self._connection, rules, sets)):
            yield

    @contextmanager
    def _transaction(self, write: Callable[[], None]) -> Iterator[None]:
        with translated(self._path):
            self._connection.execute("BEGIN IMMEDIATE")
        try:
            with translated(self._path):
                write()
            yield
            with translated(self._path):
                self._connection.execute("COMMIT")
        except BaseException:
            self._roll_back()
            raise

    def _roll_back(self) -> None:
        # SQLite itself may have rolled back already, on a full disk for one.
        if self._connection.in_transaction:
            with suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")

    def _prepare(self, write: bool) -> None:
        version = self._version()
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"store {self._path}: created by a newer xdp-lb (schema {version},"
                f" supported: {SCHEMA_VERSION}): upgrade xdp-lb"
            )
        if write and version < SCHEMA_VERSION:
            steps = [create_script()] if version == 0 else [MIGRATIONS[v] for v in range(version, SCHEMA_VERSION)]
            self._connection.executescript(
                f"BEGIN IMMEDIATE; {' '.join(steps)} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
            )

    def _version(self) -> int:
        return int(self._connection.execute("PRAGMA user_version").fetchone()[0])

    def _stored_generation(self) -> int:
        row = self._connection.execute("SELECT value FROM generation").fetchone()
        if row is None:
            raise StoreError(f"store {self._path}: {FIXES[sqlite3.SQLITE_CORRUPT]}")
        return int(row[0])

    def _write(self, state: State) -> None:
        """The rows that differ."""
        self._write_services(state)
        self._write_interfaces(state)
        self._write_own_addresses(state)
        self._connection.execute("UPDATE generation SET value = ?", (self._generation + 1,))

    def _write_services(self, state: State) -> None:
        old = {service.vip: service for service in self._state.services}
        new = {service.vip: service for service in state.services}
        for vip in old.keys() - new.keys():
            self._connection.execute("DELETE FROM backend WHERE vip = ?", (str(vip),))
            self._connection.execute("DELETE FROM service WHERE vip = ?", (str(vip),))
        for vip, service in new.items():
            if service != old.get(vip):
                self._write_service(old.get(vip), service)

    def _write_service(self, old: Service | None, new: Service) -> None:
        vip = str(new.vip)
        self._connection.execute(
            "INSERT OR REPLACE INTO service VALUES (?, ?, ?, ?, ?)",
            (vip, new.mode.value, new.ring_size, new.flow_timeout_s, json.dumps(changed_values(new.options))),
        )
        before = set(old.backends) if old else set()
        after = set(new.backends)
        self._connection.executemany(
            "DELETE FROM backend WHERE vip = ? AND address = ? AND port = ?",
            [(vip, str(b.address), b.port) for b in before - after],
        )
        self._connection.executemany(
            "INSERT INTO backend VALUES (?, ?, ?, ?, ?, ?)",
            [(vip, str(b.address), b.port, b.weight, b.draining, " ".join(b.server_ids)) for b in after - before],
        )

    def _write_interfaces(self, state: State) -> None:
        if state.interfaces != self._state.interfaces:
            rows = [(n, i.name, i.xdp_mode.value, i.replies_only) for n, i in enumerate(state.interfaces)]
            self._replace_table("interface", "(?, ?, ?, ?)", rows)

    def _write_own_addresses(self, state: State) -> None:
        if state.own_addresses != self._state.own_addresses:
            rows = [(str(own.address), own.interface) for own in state.own_addresses]
            self._replace_table("own_address", "(?, ?)", rows)

    def _replace_table(self, table: str, places: str, rows: Iterable[tuple[object, ...]]) -> None:
        self._connection.execute(f"DELETE FROM {table}")
        self._connection.executemany(f"INSERT INTO {table} VALUES {places}", rows)


def _connect(path: Path, write: bool) -> sqlite3.Connection:
    if not write and not exists(path):
        return sqlite3.connect(":memory:", isolation_level=None)
    # For a reader too: SQLite may have to roll back what a killed writer has left in the file.
    uri = f"{path.absolute().as_uri()}?mode=rw"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=LOCK_WAIT_S)
    if not write:
        connection.execute("PRAGMA query_only = ON")
    return connection


def _read_state(connection: sqlite3.Connection, version: int) -> State:
    """Of a store of any version that there has been: who reads alone cannot bring it up to date."""
    try:
        return State(
            tuple(_read_services(connection, version)),
            tuple(_read_interfaces(connection, version)),
            tuple(
                OwnAddress(interface, parse_address(address))
                for address, interface in connection.execute("SELECT address, interface FROM own_address")
            ),
        )
    except (LbError, ValueError, TypeError, AttributeError) as error:
        raise sqlite3.DatabaseError(f"holds an invalid value ({error})") from error


def _read_interfaces(connection: sqlite3.Connection, version: int) -> Iterator[Interface]:
    replies_only = "replies_only" if version >= 4 else "0"
    for name, mode, only in connection.execute(
        f"SELECT name, xdp_mode, {replies_only} FROM interface ORDER BY position"
    ):
        yield Interface(name, XdpMode(mode), bool(only))


def _read_services(connection: sqlite3.Connection, version: int) -> Iterator[Service]:
    backends: dict[str, list[Backend]] = {}
    server_ids, options = ("server_ids", "options") if version >= 2 else ("''", "'{}'")
    rows = connection.execute(f"SELECT vip, address, port, weight, draining, {server_ids} FROM backend")
    for vip, address, port, weight, draining, ids in rows:
        backend = Backend(parse_address(address), port, weight, bool(draining), tuple(ids.split()))
        backends.setdefault(vip, []).append(backend)
    rows = connection.execute(f"SELECT vip, mode, ring_size, flow_timeout_s, {options} FROM service")
    for vip, mode, ring_size, flow_timeout_s, text in rows:
        members = tuple(backends.get(vip, ()))
        yield Service(Vip.parse(vip), Mode(mode), members, ring_size, flow_timeout_s, from_values(json.loads(text)))
