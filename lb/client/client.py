"""The API from Python: values of lb.model.state in, reports out, as with lb.control.balancer.

Enters: the Unix socket of a daemon, or a URL and a token. Leaves: what the daemon answers. Its problems become the
errors of lb.errors that they were made of; DaemonError where there is no answer. Beside the balancer's methods there
are those of the firewall in `filters`, of explanations in `explainer`, of users' stages in `stages`.

    with Client.unix(Paths.here().socket) as client:
        found = client.service(Vip.parse("10.0.0.100:443/tcp"))
        client.drain_backend(found.value.vip, found.value.backends[0], etag=found.etag)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx

from lb.client.explain import ExplainClient
from lb.client.filters import FilterClient
from lb.client.http import DaemonHttp, WithEtag
from lb.client.stages import StageClient
from lb.formats.documents import Document, read_report, read_service, read_status
from lb.host.ssh import SshConnection, ssh_connection
from lb.model.options import changed_values
from lb.model.report import Report, Status
from lb.model.state import Backend, Interface, Service
from lb.model.vip import Vip

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Event:
    """`id` is what `Client.events` goes on behind; empty: none of its own."""

    id: str
    kind: str
    document: Document


class Client:
    """Closed by `close`, or as a context manager. `etag` of a change: raise Conflict unless the thing is as it was
    read; `dry_run`: say what would change. All methods raise LbError."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        verify: Any = True,
        transport: httpx.BaseTransport | None = None,
        own_connection: Callable[[], SshConnection | None] = lambda: None,
    ) -> None:
        """`verify`: as in httpx; an ssl.SSLContext for a private certificate. `own_connection`: the connection that
        no filter rule may drop without force, besides the one of the request."""
        self._http = DaemonHttp(url, token, verify, transport)
        self.filters = FilterClient(self._http, own_connection)
        self.explainer = ExplainClient(self._http)
        self.stages = StageClient(self._http)

    @classmethod
    def unix(cls, path: Path) -> Client:
        """Of the daemon that listens at `path`."""
        transport = httpx.HTTPTransport(uds=str(path))
        return cls("http://xdp-lb", verify=False, transport=transport, own_connection=ssh_connection)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # What is desired, and what is

    def services(self) -> WithEtag[tuple[Service, ...]]:
        return self._read("/v1/services", lambda document: tuple(map(read_service, document)))

    def service(self, vip: Vip) -> WithEtag[Service]:
        return self._read(_path(vip), read_service)

    def status(self) -> Status:
        return self._read("/v1/status", read_status).value

    def stats(self) -> Document:
        """The counters alone, as JSON has them."""
        return self._read("/v1/stats", dict[str, Any]).value

    def events(self, after: str | None = None) -> Iterator[Event]:
        """What happens from now on, or behind the event with the id `after`; until the daemon ends."""
        headers = {"Last-Event-ID": after} if after else {}
        with self._http.stream("/v1/events", headers) as lines:
            yield from _events(lines)

    def web_code(self) -> str:
        """Opens one session of the web page; given to programs on the host of the daemon alone."""
        return self._http.ask("POST", "/v1/session-codes", lambda document: str(document["code"])).value

    # Changes

    def put_service(
        self, service: Service, *, own_address: bool = True, etag: str | None = None, dry_run: bool = False
    ) -> Report:
        """Have it served as it is given, also in the place of another at its VIP."""
        body = _service_body(service)
        return self._change("PUT", _path(service.vip), body, etag, dry_run, own_address=own_address)

    def add_service(self, service: Service, *, own_address: bool = True, dry_run: bool = False) -> Report:
        """Raises AlreadyExists where the VIP is served."""
        body, headers = _service_body(service), {"If-None-Match": "*"}
        return self._change("PUT", _path(service.vip), body, None, dry_run, headers, own_address=own_address)

    def remove_service(self, vip: Vip, *, etag: str | None = None, dry_run: bool = False) -> Report:
        return self._change("DELETE", _path(vip), None, etag, dry_run)

    def set_options(
        self, vip: Vip, options: Mapping[str, Any], *, etag: str | None = None, dry_run: bool = False
    ) -> Report:
        """Those that are to change, by the names and values of lb.model.options.values."""
        return self._change("PATCH", _path(vip), {"options": dict(options)}, etag, dry_run)

    def add_backends(
        self, vip: Vip, backends: Iterable[Backend], *, etag: str | None = None, dry_run: bool = False
    ) -> Report:
        body = {"backends": [_backend_body(backend) for backend in backends]}
        return self._change("POST", f"{_path(vip)}/backends", body, etag, dry_run)

    def remove_backends(
        self, vip: Vip, backends: Iterable[Backend], *, etag: str | None = None, dry_run: bool = False
    ) -> Report:
        names = [str(backend) for backend in backends]
        return self._change("DELETE", f"{_path(vip)}/backends", None, etag, dry_run, backend=names)

    def drain_backends(
        self, vip: Vip, backends: Iterable[Backend], *, etag: str | None = None, dry_run: bool = False
    ) -> Report:
        return self._change_backends(vip, backends, {"draining": True}, etag, dry_run)

    def undrain_backends(
        self, vip: Vip, backends: Iterable[Backend], *, etag: str | None = None, dry_run: bool = False
    ) -> Report:
        return self._change_backends(vip, backends, {"draining": False}, etag, dry_run)

    def set_weights(
        self, vip: Vip, backends: Iterable[Backend], weight: int, *, etag: str | None = None, dry_run: bool = False
    ) -> Report:
        """Also ends a drain."""
        return self._change_backends(vip, backends, {"weight": weight, "draining": False}, etag, dry_run)

    def remove_backend(self, vip: Vip, backend: Backend, *, etag: str | None = None, dry_run: bool = False) -> Report:
        return self._change("DELETE", _path(vip, backend), None, etag, dry_run)

    def drain_backend(self, vip: Vip, backend: Backend, *, etag: str | None = None, dry_run: bool = False) -> Report:
        return self._change("PATCH", _path(vip, backend), {"draining": True}, etag, dry_run)

    def set_weight(
        self, vip: Vip, backend: Backend, weight: int, *, etag: str | None = None, dry_run: bool = False
    ) -> Report:
        """Also ends a drain."""
        body = {"weight": weight, "draining": False}
        return self._change("PATCH", _path(vip, backend), body, etag, dry_run)

    def set_server_ids(
        self,
        vip: Vip,
        backend: Backend,
        server_ids: tuple[str, ...],
        *,
        etag: str | None = None,
        dry_run: bool = False,
    ) -> Report:
        return self._change("PATCH", _path(vip, backend), {"server_ids": list(server_ids)}, etag, dry_run)

    def apply(
        self,
        services: Sequence[Service],
        *,
        own_addresses: bool = True,
        prune: bool = False,
        etag: str | None = None,
        dry_run: bool = False,
    ) -> Report:
        """Make `services` all that is served. Raises PruneRequired where that removes more than half of the services
        or backends, unless told to `prune`."""
        body = {"services": [_service_body(service) for service in services]}
        return self._change("PUT", "/v1/config", body, etag, dry_run, own_address=own_addresses, prune=prune)

    def attach(
        self,
        interfaces: Sequence[Interface],
        services: Sequence[Service] = (),
        *,
        own_addresses: bool = True,
        dry_run: bool = False,
    ) -> Report:
        body = {
            "interfaces": [{"name": each.name, "xdp_mode": str(each.xdp_mode)} for each in interfaces],
            "services": [_service_body(service) for service in services],
            "own_address": own_addresses,
        }
        return self._change("POST", "/v1/interfaces", body, None, dry_run)

    def detach(self, names: Sequence[str] = (), *, dry_run: bool = False) -> Report:
        """No names: everywhere."""
        return self._change("DELETE", "/v1/interfaces", None, None, dry_run, name=list(names))

    # How the daemon is spoken to

    def _change_backends(
        self, vip: Vip, backends: Iterable[Backend], changes: Document, etag: str | None, dry_run: bool
    ) -> Report:
        body = {"backends": [{"backend": str(backend)} | changes for backend in backends]}
        return self._change("PATCH", f"{_path(vip)}/backends", body, etag, dry_run)

    def _read(self, path: str, read: Callable[[Any], T]) -> WithEtag[T]:
        return self._http.ask("GET", path, read)

    def _change(
        self,
        method: str,
        path: str,
        body: Document | None,
        etag: str | None,
        dry_run: bool,
        headers: dict[str, str] | None = None,
        **query: Any,
    ) -> Report:
        conditions = {**(headers or {}), **({"If-Match": etag} if etag else {})}
        asked = {**query, "dry_run": dry_run}
        return self._http.ask(method, path, read_report, body=body, query=asked, headers=conditions).value


def _path(vip: Vip, backend: Backend | None = None) -> str:
    service = f"/v1/services/{quote(str(vip), safe='')}"
    return service if backend is None else f"{service}/backends/{quote(str(backend), safe='')}"


def _backend_body(backend: Backend) -> Document:
    """Without what has its default: there may be a hundred thousand."""
    more = {"draining": backend.draining, "server_ids": list(backend.server_ids)}
    return {"backend": f"{backend}@{backend.weight}"} | {key: value for key, value in more.items() if value}


def _service_body(service: Service) -> Document:
    return {
        "vip": str(service.vip),
        "mode": str(service.mode),
        "ring_size": service.ring_size,
        "flow_timeout_s": service.flow_timeout_s,
        "options": changed_values(service.options),
        "backends": [_backend_body(backend) for backend in service.backends],
    }


def _events(lines: Iterable[str]) -> Iterator[Event]:
    """Server-sent events, as lb.runtime.events writes them."""
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(": ")
        if name:  # a comment begins with the colon
            fields[name] = value
        elif not line and fields:
            yield Event(fields.get("id", ""), fields["event"], json.loads(fields["data"]))
            fields = {}
