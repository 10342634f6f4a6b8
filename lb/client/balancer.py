"""What a command uses instead of a Balancer where the daemon runs.

Enters: the calls that commands make. Leaves: what a Balancer would answer, from the daemon, which has the lock; only
the host's interfaces and addresses are looked up here, since it is the same host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from lb.model.options import Options, values
from lb.model.report import Report, Status
from lb.model.state import Backend, Interface, Service, State
from lb.model.vip import Vip

if TYPE_CHECKING:
    from lb.client.client import Client
    from lb.control.contracts import Network


class RemoteBalancer:
    """See lb.control.balancer.Balancer, of which this has the methods that commands call."""

    def __init__(self, client: Client, network: Network) -> None:
        self.network = network
        self.on_progress: Callable[[int, int], None] | None = None  # the daemon does not tell how far it is
        self._client = client
        self._state, self._etag = State(), ""

    @property
    def state(self) -> State:
        """The services; interfaces and addresses are the daemon's to know."""
        found = self._client.services()
        self._state, self._etag = State(found.value), found.etag
        return self._state

    def attach(
        self,
        interfaces: Sequence[Interface],
        services: Sequence[Service] = (),
        *,
        own_addresses: bool = True,
        dry_run: bool = False,
    ) -> Report:
        return self._client.attach(interfaces, services, own_addresses=own_addresses, dry_run=dry_run)

    def detach(self, names: Sequence[str] = (), *, dry_run: bool = False) -> Report:
        return self._client.detach(names, dry_run=dry_run)

    def add_service(self, service: Service, *, own_address: bool = True, dry_run: bool = False) -> Report:
        return self._client.add_service(service, own_address=own_address, dry_run=dry_run)

    def remove_service(self, vip: Vip, *, dry_run: bool = False) -> Report:
        return self._client.remove_service(vip, dry_run=dry_run)

    def add_backends(self, vip: Vip, backends: Iterable[Backend], *, dry_run: bool = False) -> Report:
        return self._client.add_backends(vip, backends, dry_run=dry_run)

    def remove_backends(self, vip: Vip, backends: Iterable[Backend], *, dry_run: bool = False) -> Report:
        return self._client.remove_backends(vip, backends, dry_run=dry_run)

    def drain_backends(self, vip: Vip, backends: Iterable[Backend], *, dry_run: bool = False) -> Report:
        return self._client.drain_backends(vip, backends, dry_run=dry_run)

    def undrain_backends(self, vip: Vip, backends: Iterable[Backend], *, dry_run: bool = False) -> Report:
        return self._client.undrain_backends(vip, backends, dry_run=dry_run)

    def set_weights(self, vip: Vip, backends: Iterable[Backend], weight: int, *, dry_run: bool = False) -> Report:
        return self._client.set_weights(vip, backends, weight, dry_run=dry_run)

    def set_options(self, vip: Vip, options: Options, *, dry_run: bool = False) -> Report:
        """Of those that were read, only what differs: what others have changed meanwhile stays."""
        before = values(self._state.service(vip).options)
        changed = {name: value for name, value in values(options).items() if value != before[name]}
        return self._client.set_options(vip, changed, dry_run=dry_run)

    def set_server_ids(
        self, vip: Vip, backend: Backend, server_ids: tuple[str, ...], *, dry_run: bool = False
    ) -> Report:
        return self._client.set_server_ids(vip, backend, server_ids, dry_run=dry_run)

    def apply(
        self,
        services: Sequence[Service],
        *,
        own_addresses: bool = True,
        prune: bool = False,
        dry_run: bool = False,
    ) -> Report:
        """Nothing, if others have changed meanwhile what was read."""
        return self._client.apply(services, own_addresses=own_addresses, prune=prune, etag=self._etag, dry_run=dry_run)

    def status(self) -> Status:
        return self._client.status()
