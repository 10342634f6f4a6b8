"""lb.toml -> services, and which weights and drains it gives.

Enters: the text of a file such as

    [[service]]
    vip = "10.0.0.1:80/tcp"
    mode = "nat"                # or "dr", "ipip", "gue"
    ring_size = 16381           # a prime
    flow_timeout = 3600         # seconds
    affinity = 300              # and the other options: OPTION_KEYS
    backends = [
        "10.0.0.11",
        "10.0.0.12:8080@3",
        {address = "10.0.0.13:80", weight = 2, drain = true},
    ]

where only `vip` must be there; the table of a backend may also have `server_ids = ["CONFIG:HEX"]`.
Leaves: a Desired, or InvalidInput with one line that names file, service and key.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from lb.errors import InvalidInput, LbError
from lb.model.desired import Desired, Given
from lb.model.health_check import HealthCheck
from lb.model.options import DEFAULTS, FIELDS, PREFIX_FIELDS, Options, parse_network
from lb.model.state import DEFAULT_FLOW_TIMEOUT_S, DEFAULT_RING_SIZE, Backend, Mode, Service
from lb.model.vip import Vip, join_port

Value = TypeVar("Value", str, int, bool, list[object])

KINDS = {
    str: "a string",
    int: "a whole number",
    float: "a number with a fraction",
    bool: "true or false",
    list: "a list",
    dict: "a table",
}
FILE_KEYS = ("service",)
# Key -> field of Options: the unit is not in the key, and one prefix is one source.
SHORTER = {"affinity_s": "affinity", "tunnel_sources": "tunnel_source", "slow_start_s": "slow_start"}
OPTION_KEYS = {SHORTER.get(field, field): field for field in FIELDS}
SERVICE_KEYS = ("vip", "mode", "ring_size", "flow_timeout", *OPTION_KEYS, "backends")
BACKEND_KEYS = ("address", "weight", "drain", "server_ids")
NOTHING: list[object] = []


def read(path: Path) -> Desired:
    """Raises InvalidInput."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidInput(f"{path}: not UTF-8 text") from None
    return parse(text, str(path))


def parse(text: str, name: str = "lb.toml") -> Desired:
    """`name` is what the errors call the text. Raises InvalidInput."""
    file = _Table(_document(text, name), name)
    file.allow(FILE_KEYS)
    services: dict[Vip, Service] = {}
    given: Given = {}
    for entries in _service_tables(file):
        service, given_here = _service(entries, name)
        if services.setdefault(service.vip, service) is not service:
            raise InvalidInput(f"{name}: service {service}: vip: given twice")
        given |= given_here
    return Desired(tuple(services.values()), given)


def _document(text: str, name: str) -> dict[str, object]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"{name}: not valid TOML: {error}") from None


@contextmanager
def _speaking_of(name: str, vip: str = "") -> Iterator[None]:
    """What the model finds wrong, with the place in the file before it, which names `vip` already."""
    try:
        yield
    except LbError as error:
        raise InvalidInput(f"{name}: {str(error).removeprefix(f'{vip}: ')}") from None


@dataclass(frozen=True, slots=True)
class _Table:
    """A TOML table, and what the errors call it."""

    entries: Mapping[str, object]
    name: str

    def allow(self, keys: tuple[str, ...]) -> None:
        for key in self.entries:
            if key not in keys:
                raise InvalidInput(f"{self.name}: {key}: unknown key: known keys are {', '.join(keys)}")

    def get(self, key: str, default: Value) -> Value:
        """The value, which has to be of the default's type."""
        value = self.entries.get(key, default)
        # Not isinstance: a bool is no number here.
        if type(value) is type(default):
            return value
        raise InvalidInput(f"{self.name}: {key}: expected {_kind(default)}, got {_kind(value)}")

    def texts(self, key: str) -> list[str]:
        """A list of strings, empty if missing."""
        found = []
        for entry in self.get(key, NOTHING):
            if not isinstance(entry, str):
                raise InvalidInput(f"{self.name}: {key}: expected a string, got {_kind(entry)}")
            found.append(entry)
        return found

    def require(self, key: str) -> str:
        if key not in self.entries:
            raise InvalidInput(f"{self.name}: {key}: missing")
        return self.get(key, "")


def _kind(value: object) -> str:
    return KINDS.get(type(value), "a date or time")


def _service_tables(file: _Table) -> list[dict[str, object]]:
    tables = file.entries.get("service", [])
    if isinstance(tables, list) and all(isinstance(table, dict) for table in tables):
        return tables
    raise InvalidInput(f"{file.name}: service: not a list of tables: write [[service]]")


def _service(entries: Mapping[str, object], file: str) -> tuple[Service, Given]:
    vip_text = _Table(entries, f"{file}: service").require("vip")
    with _speaking_of(f"{file}: service"):
        vip = Vip.parse(vip_text)
    table = _Table(entries, f"{file}: service {vip}")
    table.allow(SERVICE_KEYS)
    ring_size = table.get("ring_size", DEFAULT_RING_SIZE)
    flow_timeout_s = table.get("flow_timeout", DEFAULT_FLOW_TIMEOUT_S)
    mode = _mode(table)
    options = _options(table)
    backend_entries = table.get("backends", NOTHING)
    backends = tuple(_backend(entry, table.name) for entry in backend_entries)
    with _speaking_of(table.name, str(vip)):
        service = Service(vip, mode, backends, ring_size, flow_timeout_s, options)
    names = (join_port(b.address, b.port or vip.fixed_port) for b in backends)
    return service, {(vip, name): _keys_of(entry) for name, entry in zip(names, backend_entries, strict=True)}


def _keys_of(backend: object) -> Set[str]:
    """See Given."""
    table = backend if isinstance(backend, dict) else {"address": backend}
    given = {"weight": "weight" in table or "@" in str(table["address"]), "draining": "drain" in table}
    return frozenset(name for name, is_given in given.items() if is_given)


def _mode(table: _Table) -> Mode:
    text = table.get("mode", Mode.NAT.value)
    if text not in list(Mode):
        *others, last = Mode
        raise InvalidInput(f"{table.name}: mode {text}: unknown: use {', '.join(others)} or {last}")
    return Mode(text)


def _options(table: _Table) -> Options:
    given = {key: field for key, field in OPTION_KEYS.items() if key in table.entries}
    values = {field: _option(table, key, field) for key, field in given.items()}
    with _speaking_of(table.name):
        return Options(**values)


def _option(table: _Table, key: str, field: str) -> Any:
    if field == "health":
        text = table.get(key, "")
        with _speaking_of(table.name):
            return HealthCheck.parse(text) if text else None
    if field not in PREFIX_FIELDS:
        return table.get(key, getattr(DEFAULTS, field))
    texts = table.texts(key)
    with _speaking_of(f"{table.name}: {key}"):
        return tuple(map(parse_network, texts))


def _backend(entry: object, service: str) -> Backend:
    if isinstance(entry, str):
        with _speaking_of(service):
            return Backend.parse(entry)
    if isinstance(entry, dict):
        return _backend_of_table(entry, service)
    raise InvalidInput(f"{service}: backends: expected a string or a table, got {_kind(entry)}")


def _backend_of_table(entries: dict[str, object], service: str) -> Backend:
    text = _Table(entries, f"{service}: backend").require("address")
    table = _Table(entries, f"{service}: backend {text}")
    table.allow(BACKEND_KEYS)
    if "@" in text and "weight" in table.entries:
        raise InvalidInput(f"{table.name}: weight: given twice: leave one of them out")
    draining = table.get("drain", False)
    server_ids = tuple(table.texts("server_ids"))
    with _speaking_of(service):
        backend = Backend.parse(text)
    weight = table.get("weight", backend.weight)
    with _speaking_of(service):
        return replace(backend, weight=weight, draining=draining, server_ids=server_ids)
