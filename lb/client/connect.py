"""Where a command is carried out: on this host, or by its daemon where one runs, since that holds the writers' lock.

Enters: the paths of this network namespace. Leaves: a balancer, filter rules, explanations or stages, whose methods are
the same both ways. What either way imports is imported only when it is taken.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from lb.errors import DaemonError, StoreError
from lb.model.options import Options
from lb.model.report import Report, Status
from lb.model.state import Backend, Interface, Service, State
from lb.model.vip import Vip
from lb.paths import Paths

if TYPE_CHECKING:
    from lb.client.client import Client
    from lb.control.contracts import Network
    from lb.explain.request import ExplainService
    from lb.model.rule_report import ApplyOptions, FilterReport, FilterTestResult, RuleSpec, RuleStatus
    from lb.model.rules import At
    from lb.stages.local import StageService

S = TypeVar("S")
ACCEPT_S = 5  # for the daemon to accept a connection


class BalancerLike(Protocol):
    """The methods of lb.control.balancer.Balancer that commands call. Each raises LbError, and then nothing has
    changed."""

    on_progress: Callable[[int, int], None] | None

    @property
    def network(self) -> Network: ...

    @property
    def state(self) -> State: ...

    def status(self) -> Status: ...

    def attach(
        self,
        interfaces: Sequence[Interface],
        services: Sequence[Service] = (),
        *,
        own_addresses: bool = True,
        dry_run: bool = False,
    ) -> Report: ...

    def detach(self, names: Sequence[str] = (), *, dry_run: bool = False) -> Report: ...

    def add_service(self, service: Service, *, own_address: bool = True, dry_run: bool = False) -> Report: ...

    def remove_service(self, vip: Vip, *, dry_run: bool = False) -> Report: ...

    def add_backends(self, vip: Vip, backends: Iterable[Backend], *, dry_run: bool = False) -> Report: ...

    def remove_backends(self, vip: Vip, backends: Iterable[Backend], *, dry_run: bool = False) -> Report: ...

    def drain_backends(self, vip: Vip, backends: Iterable[Backend], *, dry_run: bool = False) -> Report: ...

    def undrain_backends(self, vip: Vip, backends: Iterable[Backend], *, dry_run: bool = False) -> Report: ...

    def set_weights(self, vip: Vip, backends: Iterable[Backend], weight: int, *, dry_run: bool = False) -> Report: ...

    def set_options(self, vip: Vip, options: Options, *, dry_run: bool = False) -> Report: ...

    def set_server_ids(
        self, vip: Vip, backend: Backend, server_ids: tuple[str, ...], *, dry_run: bool = False
    ) -> Report: ...

    def apply(
        self,
        services: Sequence[Service],
        *,
        own_addresses: bool = True,
        prune: bool = False,
        dry_run: bool = False,
    ) -> Report: ...


class FilterService(Protocol):
    """The methods of lb.firewall.firewall.Firewall that commands call. Raises LbError."""

    def add(self, spec: RuleSpec, position: int | None = None, options: ApplyOptions | None = None) -> FilterReport: ...

    def delete(self, interface: str, number: int, options: ApplyOptions | None = None) -> FilterReport: ...

    def move(self, interface: str, number: int, to: int, options: ApplyOptions | None = None) -> FilterReport: ...

    def flush(self, interface: str | None = None, options: ApplyOptions | None = None) -> FilterReport: ...

    def reload(self, interface: str, number: int, options: ApplyOptions | None = None) -> FilterReport: ...

    def restore(self, options: ApplyOptions | None = None) -> FilterReport: ...

    def status(self, interface: str | None = None) -> list[RuleStatus]: ...

    def test(
        self, interface: str, path: str, at: At | None = None, write_to: str | None = None
    ) -> FilterTestResult: ...

    def test_specs(self, specs: Sequence[RuleSpec], path: str, write_to: str | None = None) -> FilterTestResult: ...


class Connector(Protocol):
    """Gives a command the balancer of its network namespace. Raises LbError."""

    def open(self, *, write: bool) -> AbstractContextManager[BalancerLike]:
        """To `write` is to hold the lock until the end, or to have the daemon do it."""
        ...

    def state(self) -> State:
        """The desired state, as it is stored."""
        ...


class HostConnector:
    """See Connector; of the network namespace that this process is in."""

    def open(self, *, write: bool) -> AbstractContextManager[BalancerLike]:
        return open_balancer(Paths.here(), write=write)

    def state(self) -> State:
        return stored_state(Paths.here())


def daemon_listens(path: Path) -> bool:
    """False also for the socket that a killed daemon has left, and where this process may not connect: it may do
    nothing without the daemon either, and the error of that is the better one. Raises DaemonError for one that does not
    accept."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        # Not settimeout(): connect() of a socket that does not block fails at once while the backlog is full, unix(7).
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", ACCEPT_S, 0))
        try:
            connection.connect(str(path))
        except BlockingIOError:
            raise DaemonError(f"daemon: {path} accepts no connection within {ACCEPT_S} s: check its log") from None
        except OSError:
            return False
    return True


@contextmanager
def open_service(
    paths: Paths, local: Callable[[], AbstractContextManager[S]], remote: Callable[[Client], S]
) -> Iterator[S]:
    """What `local` opens, or, where the daemon runs, what `remote` makes of a client of it."""
    if not daemon_listens(paths.socket):
        with local() as service:
            yield service
        return
    from lb.client.client import Client  # with httpx

    with Client.unix(paths.socket) as client:
        yield remote(client)


def open_balancer(paths: Paths, *, write: bool) -> AbstractContextManager[BalancerLike]:
    def local() -> AbstractContextManager[BalancerLike]:
        from lb.control.open import open_balancer

        return open_balancer(paths, write=write)

    def remote(client: Client) -> BalancerLike:
        from lb.client.balancer import RemoteBalancer
        from lb.host.neighbours import Network as KernelNetwork

        return RemoteBalancer(client, KernelNetwork())

    return open_service(paths, local, remote)


def stored_state(paths: Paths) -> State:
    """Read from the store: neither the kernel nor the daemon is asked. Who may not read the store asks the daemon."""
    from lb.store.store import Store

    try:
        with Store.open(paths.store, write=False) as store:
            return store.load()
    except StoreError:
        if not daemon_listens(paths.socket):
            raise
    with open_balancer(paths, write=False) as balancer:
        return balancer.state


def open_filters(paths: Paths, *, write: bool) -> AbstractContextManager[FilterService]:
    def local() -> AbstractContextManager[FilterService]:
        from lb.firewall.firewall import open_firewall

        return open_firewall(paths, write=write)

    return open_service(paths, local, lambda client: client.filters)


def open_explainer(paths: Paths) -> AbstractContextManager[ExplainService]:
    @contextmanager
    def local() -> Iterator[ExplainService]:
        from lb.explain.explainer import open_explainer
        from lb.explain.request import LocalExplainer

        with open_explainer(paths) as explainer:
            yield LocalExplainer(explainer)

    return open_service(paths, local, lambda client: client.explainer)


def open_stages(paths: Paths) -> AbstractContextManager[StageService]:
    """A stage is run by the process of `xdp-lb stage run` itself: a user's own C, and the 128 MB that its compiler
    takes, stay out of the daemon."""

    @contextmanager
    def local() -> Iterator[StageService]:
        from lb.stages.local import LocalStages

        yield LocalStages(paths)

    return open_service(paths, local, lambda client: client.stages)
