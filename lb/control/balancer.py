"""What an operator can do with the balancer, each operation from the stored state to another desired state.

Enters: an operation, in values of lb.model.state. Leaves: a Report of what it changed. Its arguments are checked here,
and a desired state made of them; lb.control.writer brings it about, and lb.control.repair keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from lb.control.change import reply_interfaces, some
from lb.control.contracts import Dataplane, FilterHandover, Network, NoFilters
from lb.control.open_count import OpenCount
from lb.control.prune import loss
from lb.control.repair import Repairs
from lb.control.vip_addresses import wanted_addresses, with_homes
from lb.control.writer import Writer
from lb.errors import AlreadyExists, InvalidInput, NoRoute, NotFound, PruneRequired
from lb.model.conditions import Condition, Conditions
from lb.model.forwarding import UNKNOWN, Counters, OpenConnections, Statistics
from lb.model.options import Options
from lb.model.report import BackendStatus, InterfaceStatus, Report, ServiceStatus, Status
from lb.model.state import Backend, Interface, OwnAddress, Service, State
from lb.model.vip import Vip
from lb.paths import DEFAULT_NETNS
from lb.store.store import Store

PRUNE = "would remove {}: use --prune (API: prune=true) to remove them"
UPGRADED = "program upgraded from xdp-lb {} to the installed version"


class Balancer:
    """Each method raises LbError, and then nothing has changed. `repairs` is for what others have changed."""

    def __init__(
        self,
        store: Store,
        dataplane: Dataplane,
        network: Network,
        netns: str = DEFAULT_NETNS,
        handover: FilterHandover | None = None,
        *,
        in_daemon: bool = False,
        conditions: Conditions | None = None,
    ) -> None:
        """`store`: loaded. `in_daemon`, `conditions`: see Writer."""
        self.writer = Writer(
            store, dataplane, network, handover or NoFilters(), in_daemon=in_daemon, conditions=conditions
        )
        self.repairs = Repairs(self.writer)
        self._open = OpenCount(lambda state: dataplane.open_connections(self.writer.all_in_force(state.services)))
        self.network = network
        self._netns = netns

    @property
    def state(self) -> State:
        """The desired state, as it is stored."""
        return self.writer.state

    @property
    def on_progress(self) -> Callable[[int, int], None] | None:
        """Called with the services that are written, of all to write."""
        return self.writer.on_progress

    @on_progress.setter
    def on_progress(self, call: Callable[[int, int], None] | None) -> None:
        self.writer.on_progress = call

    def attach(
        self,
        interfaces: Sequence[Interface],
        services: Sequence[Service] = (),
        *,
        own_addresses: bool = True,
        dry_run: bool = False,
    ) -> Report:
        """Serve on `interfaces`, beside those attached already, `services` beside those stored.

        Everything is written anew, which also repairs what others have changed. `own_addresses` False:
        as with the option vip_address off in `services`; without them, in all that are stored.
        """
        goal = self.state
        if not (services or own_addresses):
            goal = replace(goal, services=_asking(goal.services, own_addresses))
        services = _asking(services, own_addresses)
        for service in services:
            goal = _including(goal, service)
        for interface in interfaces:
            self._check_exists(interface)
            goal = goal.with_interface(interface)
        _check_something_to_serve(goal)
        goal = self._with_own_addresses(goal, services)
        goal = with_homes(goal, self.network, [interface.name for interface in interfaces])
        upgraded = Report() if dry_run else self.upgrade()
        report = self.writer.change(goal, everything=True, dry_run=dry_run)
        return replace(report, notes=(*upgraded.notes, *report.notes))

    @property
    def outdated(self) -> str:
        """The version of xdp-lb that the program in force is of, where it is not the installed one; else empty."""
        return self.writer.dataplane.outdated

    def upgrade(self) -> Report:
        """Have the installed program take over from one that is outdated, with all that its maps hold."""
        before = self.outdated
        with self.writer.handover.alone():
            done = self.writer.dataplane.upgrade()
        return Report(notes=(UPGRADED.format(before),) if done else ())

    def detach(self, names: Sequence[str] = (), *, dry_run: bool = False) -> Report:
        """Serve on `names` no longer, or nowhere (no names). The services stay stored."""
        goal = self.state
        for name in names:
            if goal.interface(name) is None:
                raise NotFound(f"interface {name}: not attached: see xdp-lb status")
            goal = goal.without_interface(name)
        if names and goal.interfaces:
            self._check_replies(goal, names)
            return self.writer.change(goal, dry_run=dry_run)
        return self.writer.change(replace(goal, interfaces=()), dry_run=dry_run)

    def add_service(self, service: Service, *, own_address: bool = True, dry_run: bool = False) -> Report:
        (service,) = _asking([service], own_address)
        goal = self._with_own_addresses(self.state.with_service(service), [service])
        return self.writer.change(goal, dry_run=dry_run)

    def put_service(self, service: Service, *, own_address: bool = True, dry_run: bool = False) -> Report:
        """Have `service` served as it is given, also in the place of another at its VIP."""
        (service,) = _asking([service], own_address)
        others = tuple(s for s in self.state.services if s.vip != service.vip)
        goal = replace(self.state, services=(*others, service))
        if self.state.interfaces:
            _check_same_shape(self.state, goal)
        goal = self._with_own_addresses(goal, [service])
        return self.writer.change(goal, dry_run=dry_run)

    def remove_service(self, vip: Vip, *, dry_run: bool = False) -> Report:
        return self.writer.change(self.state.without_service(vip), dry_run=dry_run)

    def add_backends(self, vip: Vip, backends: Iterable[Backend], *, dry_run: bool = False) -> Report:
        service = self.state.service(vip)
        for backend in backends:
            service = service.with_backend(backend)
        return self._change_service(service, dry_run)

    def add_backend(self, vip: Vip, backend: Backend, *, dry_run: bool = False) -> Report:
        return self.add_backends(vip, [backend], dry_run=dry_run)

    def remove_backends(self, vip: Vip, backends: Iterable[Backend], *, dry_run: bool = False) -> Report:
        """At once: their connections end. See `drain_backends`."""
        service = self.state.service(vip)
        for backend in _each_once(backends):
            service = service.without_backend(backend)
        return self._change_service(service, dry_run)

    def remove_backend(self, vip: Vip, backend: Backend, *, dry_run: bool = False) -> Report:
        return self.remove_backends(vip, [backend], dry_run=dry_run)

    def drain_backends(self, vip: Vip, backends: Iterable[Backend], *, dry_run: bool = False) -> Report:
        """No new connections for them; those they have go on."""
        return self._change_backends(vip, backends, dry_run, draining=True)

    def drain_backend(self, vip: Vip, backend: Backend, *, dry_run: bool = False) -> Report:
        return self.drain_backends(vip, [backend], dry_run=dry_run)

    def undrain_backends(self, vip: Vip, backends: Iterable[Backend], *, dry_run: bool = False) -> Report:
        """New connections again, by the weights they have."""
        return self._change_backends(vip, backends, dry_run, draining=False)

    def set_weights(self, vip: Vip, backends: Iterable[Backend], weight: int, *, dry_run: bool = False) -> Report:
        """Also ends a drain."""
        return self._change_backends(vip, backends, dry_run, weight=weight, draining=False)

    def set_weight(self, vip: Vip, backend: Backend, weight: int, *, dry_run: bool = False) -> Report:
        return self.set_weights(vip, [backend], weight, dry_run=dry_run)

    def set_options(self, vip: Vip, options: Options, *, dry_run: bool = False) -> Report:
        before = self.state.service(vip)
        goal = self.state.replacing_service(replace(before, options=options))
        if self.state.interfaces:
            _check_same_shape(self.state, goal)
        if options.vip_address != before.options.vip_address:
            goal = self._with_own_addresses(goal, [goal.service(vip)])
        return self.writer.change(goal, dry_run=dry_run)

    def set_server_ids(
        self, vip: Vip, backend: Backend, server_ids: tuple[str, ...], *, dry_run: bool = False
    ) -> Report:
        """What names the backend in QUIC connection IDs."""
        return self._change_backends(vip, [backend], dry_run, server_ids=server_ids)

    def apply(
        self,
        services: Sequence[Service],
        *,
        own_addresses: bool = True,
        prune: bool = False,
        dry_run: bool = False,
    ) -> Report:
        """Make `services` all that is served. Raises PruneRequired where that removes more than half of the services
        or backends, unless told to `prune`."""
        goal = replace(self.state, services=_asking(services, own_addresses))
        if self.state.interfaces:
            _check_same_shape(self.state, goal)
        lost = "" if prune else loss(self.state.services, goal.services)
        if lost and not dry_run:
            raise PruneRequired(PRUNE.format(lost), lost)
        goal = self._with_own_addresses(goal, goal.services)
        report = self.writer.change(goal, dry_run=dry_run)
        return replace(report, warnings=(PRUNE.format(lost), *report.warnings)) if lost else report

    def status(self) -> Status:
        loaded = self.writer.dataplane.loaded
        attachments = self.writer.dataplane.attachments()
        statistics = self.writer.dataplane.statistics() if loaded else Statistics()
        open_now = self._open.of(self.state) if loaded else {}
        return Status(
            netns=self._netns,
            loaded=loaded,
            interfaces=tuple(InterfaceStatus(i, attachments.get(i.name)) for i in self.state.interfaces),
            services=tuple(
                _service_status(s, statistics, self.writer.conditions.get(s.vip, {}), open_now.get(s.vip, {}))
                for s in self.state.services
            ),
            drops=_reasons(statistics, "drop_"),
            passes=_reasons(statistics, "pass_"),
            answered=_reasons(statistics, "answered_"),
            noted=_reasons(statistics, "noted_"),
            maps=statistics.maps,
            outdated=self.outdated if loaded else "",
        )

    def _change_backends(self, vip: Vip, backends: Iterable[Backend], dry_run: bool, **changes: Any) -> Report:
        service = self.state.service(vip)
        for backend in backends:
            service = service.changing_backend(backend, lambda b: replace(b, **changes))
        return self._change_service(service, dry_run)

    def _change_service(self, service: Service, dry_run: bool) -> Report:
        return self.writer.change(self.state.replacing_service(service), dry_run=dry_run)

    def _with_own_addresses(self, goal: State, services: Sequence[Service]) -> State:
        """Have the addresses that `services` want put on an interface where nobody owns them."""
        unknown = wanted_addresses(services) - {own.address for own in goal.own_addresses}
        ours = (OwnAddress("", a) for a in unknown if self.network.owner(a) is None)
        return replace(goal, own_addresses=(*goal.own_addresses, *ours))

    def _check_exists(self, interface: Interface) -> None:
        if not self.network.interface_exists(interface.name):
            raise InvalidInput(f"interface {interface.name}: does not exist")

    def _check_replies(self, goal: State, names: Sequence[str]) -> None:
        """An interface that nat replies come in on cannot be detached alone."""
        with suppress(NoRoute):  # then no replies come in
            for name, backends in reply_interfaces(
                goal.services, self.writer.next_hops(goal.services, anew=True)
            ).items():
                if name in names:
                    raise InvalidInput(
                        f"interface {name}: nat replies of {some(backends)} arrive there:"
                        " detach all interfaces or remove these backends first"
                    )


def _each_once(backends: Iterable[Backend]) -> Iterable[Backend]:
    return {str(backend): backend for backend in backends}.values()


def _asking(services: Sequence[Service], own_address: bool) -> tuple[Service, ...]:
    """With the option vip_address off, where there is to be no `own_address`."""
    if own_address:
        return tuple(services)
    return tuple(replace(s, options=replace(s.options, vip_address=False)) for s in services)


def _including(state: State, service: Service) -> State:
    """With `service`, which may be there already if it is the same."""
    if service in state.services:
        return state
    if any(service.vip == other.vip for other in state.services):
        raise AlreadyExists(
            f"vip {service.vip}: already exists with other settings: change it with xdp-lb backend, or remove it first"
        )
    return state.with_service(service)


def _check_something_to_serve(goal: State) -> None:
    if not goal.services:
        raise InvalidInput("attach: no services: give --backends or add a service first")
    if not goal.interfaces:
        raise InvalidInput("attach: no interface given: for example xdp-lb attach eth0")


def _check_same_shape(before: State, goal: State) -> None:
    """Mode and ring size hold as long as a VIP is served: its flows depend on them."""
    old = {service.vip: service for service in before.services}
    for new in goal.services:
        was = old.get(new.vip, new)
        for name, changes in (
            ("mode", was.mode != new.mode),
            ("ring size", was.ring_size != new.ring_size),
            ("affinity", bool(was.options.affinity_s) != bool(new.options.affinity_s)),
        ):
            if changes:
                raise InvalidInput(f"vip {new.vip}: {name} cannot be changed on an existing service: remove it first")


def _service_status(
    service: Service,
    statistics: Statistics,
    conditions: Mapping[str, Condition],
    open_now: Mapping[str, OpenConnections],
) -> ServiceStatus:
    # The kernel knows a backend by address and port, not by its weight.
    held = {str(b): c for b, c in statistics.backends.get(service.vip, {}).items()}
    return ServiceStatus(
        service,
        statistics.slots_in_transition.get(service.vip, 0),
        tuple(
            BackendStatus(
                b,
                resolved=str(b) in held and b.address not in statistics.unresolved,
                counters=held.get(str(b), Counters()),
                condition=conditions.get(str(b)),
                open=open_now.get(str(b), UNKNOWN),
            )
            for b in service.backends
        ),
    )


def _reasons(statistics: Statistics, prefix: str) -> dict[str, int]:
    return {name: n for name, n in statistics.reasons.items() if name.startswith(prefix)}
