"""The one writer of store and dataplane: from the state in force to the state that is asked for.

Enters: an operator's wish, in values of lb.model. Leaves: a Report of what became of it. A change
goes validate -> plan -> open the store's transaction -> dataplane -> commit -> acknowledge:

- Before the first write to the dataplane its generation becomes 0, after the commit that of the
  store. Where the two differ, a change was cut short (or the host has booted), and the next change
  writes everything, not only what differs.
- VIP addresses are taken off before the commit and put on after it, so that the store knows of
  every address that may be on an interface.
- An error on the way puts the old state back, in the store and in the dataplane.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from lb.capabilities import check_may_change
from lb.conditions import Condition, Conditions, differing, in_force
from lb.errors import AlreadyExists, DataplaneError, InvalidInput, LbError, NoRoute, NotFound
from lb.filter_guard import FilterGuard
from lb.host_events import WayInForce
from lb.model import Backend, Interface, Mode, OwnAddress, Service, State
from lb.options import Options
from lb.paths import DEFAULT_NETNS, Paths
from lb.report import (
    Attachment,
    BackendStatus,
    Change,
    Counters,
    InterfaceStatus,
    NextHop,
    Report,
    ServiceStatus,
    Statistics,
    Status,
)
from lb.ring import Plan
from lb.store import Store, writer_lock
from lb.vip import Address, Vip

T = TypeVar("T")

REPAIRED = "the kernel did not hold what is stored: everything is written anew"
UNCHECKED = "health checks run only while xdp-lb serve does"
ABSENT = "interface {0}: does not exist: nothing is served there: xdp-lb detach {0} forgets it"


class Dataplane(Protocol):
    """Programs and maps. All of it may be repeated: what is so already is not done again. Raises
    DataplaneError."""

    @property
    def loaded(self) -> bool:
        """Programs and maps are in the kernel, by this process or an earlier one."""

    @property
    def generation(self) -> int:
        """That of the store which the kernel has applied completely; 0 if there is none."""

    @generation.setter
    def generation(self, value: int) -> None: ...

    def load(self, services: Sequence[Service]) -> None:
        """Have programs, and maps with room for `services` beside those that are there."""

    def unload(self) -> None:
        """Give them up, after the last detach."""

    def attach(self, interface: Interface) -> Attachment:
        """Run the program there, in the place of an older one of ours, never of someone else's."""

    def detach(self, name: str) -> None: ...

    def attachments(self) -> Mapping[str, Attachment]:
        """Interface name -> our program there."""

    def put(self, service: Service, hops: Mapping[Address, NextHop]) -> Plan:
        """Create or change one service: members, then slots, then erasures. `hops` may leave out all but `unknown`."""

    def unknown(self, service: Service) -> Set[Address]:
        """The addresses of backends that are new, or whose next hop is not known yet."""

    def publish(self, services: Sequence[Service]) -> None:
        """Have packets find `services`, all of which were put, and no others."""

    def programs(self) -> Mapping[str, int]:
        """Interface name -> the id of the XDP program there, ours or not."""

    def restore_lookups(self, services: Sequence[Service]) -> list[str]:
        """`publish`, also where others have changed what was published: sentences of what they had."""

    def differences(self, service: Service) -> list[str]:
        """What others have changed of a service that was put, but for its next hops; nothing is written."""

    def repair(self, service: Service, hops: Mapping[Address, NextHop]) -> Plan:
        """As `put`, where `differences` were found; `hops` of all backends that have one."""

    def follow(self, service: Service, hops: Mapping[Address, NextHop]) -> Set[Address]:
        """Have packets take these next hops: the backends whose next hop was another."""

    def ways(self) -> Iterable[WayInForce]:
        """Those of all members."""

    def plan(self, service: Service) -> Plan:
        """What `put` would do to the ring; nothing is written."""

    def remove(self, vip: Vip) -> None: ...

    def vips(self) -> Set[Vip]: ...

    def statistics(self) -> Statistics: ...


class Guard(Protocol):
    """Filter rules in front, which stay in force wherever the balancer comes or goes. All may be repeated."""

    def alone(self) -> AbstractContextManager[None]:
        """Nobody else changes the rules meanwhile: for as long as a change takes."""

    def make_way(self, name: str) -> None:
        """To be called before the balancer is attached to an interface."""

    def take_over(self, name: str) -> None:
        """To be called before it is detached."""

    def repair(self) -> tuple[list[str], list[str]]:
        """Put rules in force where others have taken them out: sentences of that, and why it cannot be."""


class NoGuard:
    """Where there are no filter rules."""

    def alone(self) -> AbstractContextManager[None]:
        return nullcontext()

    def make_way(self, name: str) -> None:
        pass

    def take_over(self, name: str) -> None:
        pass

    def repair(self) -> tuple[list[str], list[str]]:
        return [], []


class Network(Protocol):
    """The host's routes, neighbours and addresses."""

    def next_hops(self, addresses: Iterable[Address]) -> dict[Address, NextHop]:
        """Raises NoRoute for an address that is not reachable through an interface. The kernel
        keeps the neighbours on the way resolved from then on, until `release`."""

    def release(self, addresses: Collection[Address] | None = None) -> None:
        """Stop keeping the neighbours with these addresses, or (None) all of them."""

    def interface_exists(self, name: str) -> bool: ...

    def addresses(self, name: str) -> list[Address]:
        """Those of one interface, global scope first."""

    def owner(self, address: Address) -> str | None:
        """The local interface that has the address."""

    def add_address(self, name: str, address: Address) -> None: ...

    def remove_address(self, name: str, address: Address) -> None: ...


@dataclass(frozen=True, slots=True)
class Step:
    """A change that is thought through and can be carried out."""

    before: State
    goal: State
    services: tuple[Service, ...] = ()  # to be put
    hops: Mapping[Address, NextHop] = field(default_factory=dict)
    interfaces: tuple[Interface, ...] = ()  # to be attached
    addresses_on: tuple[OwnAddress, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def addresses_off(self) -> tuple[OwnAddress, ...]:
        return _differing(_addresses_in_force(self.goal), _addresses_in_force(self.before))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the dataplane answered."""

    plans: Mapping[Vip, Plan]
    attached: tuple[Attachment, ...] = ()


@dataclass(frozen=True, slots=True)
class _Met:
    """A service, what has been found of its backends, and what it is in force by that."""

    service: Service
    found: Mapping[str, Condition] | None
    met: Service


class Balancer:
    """`on_progress(done, total)` is called with the services that are written, of all to write."""

    def __init__(
        self,
        store: Store,
        dataplane: Dataplane,
        network: Network,
        netns: str = DEFAULT_NETNS,
        guard: Guard | None = None,
    ) -> None:
        self.network = network
        self.on_progress: Callable[[int, int], None] | None = None
        self.checks_run = False  # this process has a lb.checker.Checker
        self._store = store
        self._dataplane = dataplane
        self._guard = guard or NoGuard()
        self._netns = netns
        self._served = _Served()
        self._conditions: Conditions = {}
        self._met: dict[Vip, _Met] = {}
        self._refused: dict[str, tuple[int, str]] = {}  # interface -> whose program is there, and the kernel's words
        store.load()

    @property
    def state(self) -> State:
        """The desired state, as it is stored."""
        return self._store.state

    # What an operator can ask for. Each raises LbError, and then nothing has changed.

    def attach(
        self,
        interfaces: Sequence[Interface],
        services: Sequence[Service] = (),
        *,
        own_addresses: bool = True,
        dry_run: bool = False,
    ) -> Report:
        """Serve on `interfaces`, beside those attached already, `services` beside those stored.

        Everything is written anew, which also repairs what others have changed. `own_addresses`
        is about `services`; without them and False, about all that are stored.
        """
        goal = self.state
        for service in services:
            goal = _including(goal, service)
        for interface in interfaces:
            self._check_exists(interface)
            goal = goal.with_interface(interface)
        _check_something_to_serve(goal)
        named = services or (() if own_addresses else goal.services)
        goal = self._with_own_addresses(goal, named, own_addresses)
        return self._change(goal, everything=True, dry_run=dry_run)

    def detach(self, names: Sequence[str] = (), *, dry_run: bool = False) -> Report:
        """Serve on `names` no longer, or nowhere (no names). The services stay stored."""
        goal = self.state
        for name in names:
            if goal.interface(name) is None:
                raise NotFound(f"interface {name}: not attached: see xdp-lb status")
            goal = goal.without_interface(name)
        if names and goal.interfaces:
            self._check_replies(goal, names)
            return self._change(goal, dry_run=dry_run)
        return self._change(replace(goal, interfaces=()), dry_run=dry_run)

    def add_service(self, service: Service, *, own_address: bool = True, dry_run: bool = False) -> Report:
        goal = self.state.with_service(service)
        goal = self._with_own_addresses(goal, [service], own_address)
        return self._change(goal, dry_run=dry_run)

    def put_service(self, service: Service, *, own_address: bool | None = None, dry_run: bool = False) -> Report:
        """Have `service` served as it is given, also in the place of another at its VIP. `own_address` None: the VIP's
        address stays on an interface if it is on one."""
        others = tuple(s for s in self.state.services if s.vip != service.vip)
        goal = replace(self.state, services=(*others, service))
        if self.state.interfaces:
            _check_same_shape(self.state, goal)
        if own_address is not None:
            goal = self._with_own_addresses(goal, [service], own_address)
        return self._change(goal, dry_run=dry_run)

    def remove_service(self, vip: Vip, *, dry_run: bool = False) -> Report:
        return self._change(self.state.without_service(vip), dry_run=dry_run)

    def add_backends(self, vip: Vip, backends: Iterable[Backend], *, dry_run: bool = False) -> Report:
        service = self.state.service(vip)
        for backend in backends:
            service = service.with_backend(backend)
        return self._change_service(service, dry_run)

    def add_backend(self, vip: Vip, backend: Backend, *, dry_run: bool = False) -> Report:
        return self.add_backends(vip, [backend], dry_run=dry_run)

    def remove_backend(self, vip: Vip, backend: Backend, *, dry_run: bool = False) -> Report:
        """At once: its connections end. See `drain_backend`."""
        return self._change_service(self.state.service(vip).without_backend(backend), dry_run)

    def drain_backend(self, vip: Vip, backend: Backend, *, dry_run: bool = False) -> Report:
        """No new connections for it; those it has go on."""
        service = self.state.service(vip)
        drained = service.changing_backend(backend, lambda b: replace(b, draining=True))
        return self._change_service(drained, dry_run)

    def set_weight(self, vip: Vip, backend: Backend, weight: int, *, dry_run: bool = False) -> Report:
        """Also ends a drain."""
        service = self.state.service(vip)
        weighted = service.changing_backend(backend, lambda b: replace(b, weight=weight, draining=False))
        return self._change_service(weighted, dry_run)

    def set_options(self, vip: Vip, options: Options, *, dry_run: bool = False) -> Report:
        goal = self.state.replacing_service(replace(self.state.service(vip), options=options))
        if self.state.interfaces:
            _check_same_shape(self.state, goal)
        return self._change(goal, dry_run=dry_run)

    def set_server_ids(
        self, vip: Vip, backend: Backend, server_ids: tuple[str, ...], *, dry_run: bool = False
    ) -> Report:
        """What names the backend in QUIC connection IDs."""
        service = self.state.service(vip)
        named = service.changing_backend(backend, lambda b: replace(b, server_ids=server_ids))
        return self._change_service(named, dry_run)

    def apply(self, services: Sequence[Service], *, own_addresses: bool = True, dry_run: bool = False) -> Report:
        """Make `services` all that is served."""
        goal = replace(self.state, services=tuple(services))
        if self.state.interfaces:
            _check_same_shape(self.state, goal)
        goal = self._with_own_addresses(goal, goal.services, own_addresses)
        return self._change(goal, dry_run=dry_run)

    def set_conditions(self, conditions: Conditions) -> dict[Vip, Plan]:
        """Lay what health checks have found over the desired state, in the place of what they had found before. What
        differs is in force at once, without a change of what is stored. Raises DataplaneError; to be repeated then."""
        before = self._conditions
        self._conditions = {vip: before[vip] if before.get(vip) == each else each for vip, each in conditions.items()}
        try:
            return self._put_conditions(before)
        except BaseException:
            self._conditions = before
            raise

    def _put_conditions(self, before: Conditions) -> dict[Vip, Plan]:
        changed = differing(before, self._conditions)
        services = [service for service in self.state.services if service.vip in changed]
        met = [(in_force(service, before.get(service.vip)), self._in_force(service)) for service in services]
        wanted = [now for then, now in met if then != now]
        if not (wanted and self.state.interfaces):
            return {}
        if not self._in_step(self.state):
            return dict(self._execute(self._prepare(self.state, self.state, everything=True)).plans)
        self._dataplane.generation = 0
        plans = {service.vip: self._dataplane.put(service, {}) for service in wanted}
        self._dataplane.publish(self._all_in_force(self.state.services))
        self._dataplane.generation = self._store.generation
        return plans

    # What others have changed. Nothing is written where all is as it should be.

    def reconcile(self) -> Report:
        """Find and repair it, all at once. Raises LbError where everything has to be written anew, and cannot be."""
        found = [self.reconcile_host()]
        found += [self.reconcile_service(service.vip) for service in self.state.services]
        found.append(self.follow({b.address for service in self.state.services for b in service.backends}))
        return Report(
            attached=tuple(attachment for report in found for attachment in report.attached),
            notes=tuple(note for report in found for note in report.notes),
            warnings=tuple(dict.fromkeys(warning for report in found for warning in report.warnings)),
        )

    def reconcile_host(self) -> Report:
        """Programs on interfaces, filter rules, VIP addresses, and by what packets find services."""
        if self.state.interfaces and not self._in_step(self.state):
            return self._change(self.state)
        own = self._reconcile_own() if self.state.interfaces else Report()
        rules, unruly = self._guard.repair()
        return replace(own, notes=(*own.notes, *rules), warnings=(*own.warnings, *unruly))

    def _reconcile_own(self) -> Report:
        ours, running = self._dataplane.attachments(), self._dataplane.programs()
        missing = [i for i in self.state.interfaces if i.name not in ours]
        done = [self._attach_again(interface, running.get(interface.name)) for interface in missing]
        attached = tuple(each for each in done if isinstance(each, Attachment))
        notes = [f"{each.interface}: the program was not there: attached again" for each in attached]
        notes += self._dataplane.restore_lookups(self._all_in_force(self.state.services))
        notes += self._put_addresses_back()
        return Report(attached=attached, notes=tuple(notes), warnings=tuple(e for e in done if isinstance(e, str)))

    def _attach_again(self, interface: Interface, running: int | None) -> Attachment | str:
        """Or why it cannot be. Beside the same program of someone else's, it is not tried a second time."""
        if not self.network.interface_exists(interface.name):
            return ABSENT.format(interface.name)
        known, why = self._refused.get(interface.name, (None, ""))
        if running and running == known:
            return why
        try:
            with self._guard.alone():
                return self._attach(interface)
        except LbError as error:
            if running:
                self._refused[interface.name] = running, str(error)
            return str(error)

    def _put_addresses_back(self) -> Iterator[str]:
        wanted: dict[str, list[Address]] = {}
        for own in _addresses_in_force(self.state):
            wanted.setdefault(own.interface, []).append(own.address)
        for name in filter(self.network.interface_exists, wanted):
            held = set(self.network.addresses(name))
            for address in wanted[name]:
                if address not in held and self.network.owner(address) is None:
                    self.network.add_address(name, address)
                    yield f"{address}: was not on {name}: put there again"

    def reconcile_service(self, vip: Vip) -> Report:
        """Its entries, but for next hops, and its slots; nothing if there is no such service in force."""
        service = next((s for s in self.state.services if s.vip == vip), None)
        if service is None or not (self.state.interfaces and self._in_step(self.state)):
            return Report()
        wanted = self._in_force(service)
        found = self._dataplane.differences(wanted)
        if not found:
            return Report()
        hops, warnings = self._hops_that_are({b.address for b in service.backends})
        self._dataplane.generation = 0
        self._dataplane.repair(wanted, hops)
        self._dataplane.publish(self._all_in_force(self.state.services))
        self._dataplane.generation = self._store.generation
        notes = (f"vip {vip}: {each}: repaired" for each in found)
        return Report(notes=tuple(notes), warnings=tuple(warnings))

    def ways(self) -> Iterable[WayInForce]:
        """Where packets for each backend go, as the programs know it."""
        return self._dataplane.ways() if self._in_step(self.state) and self.state.interfaces else ()

    def follow(self, addresses: Collection[Address]) -> Report:
        """Have packets for these backends go where routes and neighbours lead by now. Where they lead nowhere, or not
        as the mode needs it, all stays as it was."""
        if not (self.state.interfaces and self._in_step(self.state)):
            return Report()
        found = ((service, [b for b in service.backends if b.address in addresses]) for service in self.state.services)
        concerned = {service.vip: backends for service, backends in found if backends}
        services = [service for service in self.state.services if service.vip in concerned]
        hops, warnings = self._hops_that_are({b.address for backends in concerned.values() for b in backends})
        changed: set[Address] = set()
        for service in services:
            lost = {b.address: str(error) for b in concerned[service.vip] if (error := _off_link(service, b, hops))}
            changed |= self._dataplane.follow(self._in_force(service), {a: h for a, h in hops.items() if a not in lost})
            warnings += lost.values()
        notes = [f"backend {address}: {_leads(hops[address])}" for address in sorted(changed, key=lambda a: a.packed)]
        goal, taken_along = _with_reply_interfaces(self.state, services, hops)
        report = self._change(goal) if goal != self.state else Report()
        return replace(report, notes=(*notes, *taken_along), warnings=(*warnings, *report.warnings))

    def _hops_that_are(self, addresses: Collection[Address]) -> tuple[dict[Address, NextHop], list[str]]:
        """Of all that can be reached; and why others cannot."""
        if not addresses:
            return {}, []
        with suppress(LbError):
            return self.network.next_hops(addresses), []
        hops: dict[Address, NextHop] = {}
        warnings: list[str] = []
        for address in addresses:
            try:
                hops |= self.network.next_hops([address])
            except LbError as error:
                warnings.append(str(error))
        return hops, warnings

    def status(self) -> Status:
        loaded = self._dataplane.loaded
        attachments = self._dataplane.attachments()
        statistics = self._dataplane.statistics() if loaded else Statistics()
        return Status(
            netns=self._netns,
            loaded=loaded,
            interfaces=tuple(InterfaceStatus(i, attachments.get(i.name)) for i in self.state.interfaces),
            services=tuple(
                _service_status(s, statistics, self._conditions.get(s.vip, {})) for s in self.state.services
            ),
            drops=_reasons(statistics, "drop_"),
            passes=_reasons(statistics, "pass_"),
            answered=_reasons(statistics, "answered_"),
            noted=_reasons(statistics, "noted_"),
        )

    # How a change is thought through

    def _change_service(self, service: Service, dry_run: bool) -> Report:
        return self._change(self.state.replacing_service(service), dry_run=dry_run)

    def _change(self, goal: State, *, everything: bool = False, dry_run: bool = False) -> Report:
        self._check_store_is_whole(goal)
        step = self._prepare(self.state, self._with_homes(goal), everything)
        if dry_run:
            self._release_unused(step.hops.keys())
            return _report(step, self._foresee(step), dry_run=True)
        if step.goal == step.before and not everything and self._in_step(step.goal):
            return _report(step, Outcome({}))
        return _report(step, self._execute(step))

    def _check_store_is_whole(self, goal: State) -> None:
        """Programs that the store knows nothing of are what a lost one has left: attach or detach has to come first."""
        lost = sorted(self._dataplane.attachments()) if not (goal.interfaces or self.state.interfaces) else []
        if lost and goal.services != self.state.services:
            names = " ".join(lost)
            raise DataplaneError(
                f"{names}: attached, but not in the store: xdp-lb attach {names} goes on, xdp-lb detach ends it"
            )

    def _in_force(self, service: Service) -> Service:
        """The very same as the last time, if nothing has changed: publish() takes that for a hint."""
        found = self._conditions.get(service.vip)
        known = self._met.get(service.vip)
        if known and known.service is service and known.found is found:
            return known.met
        met = in_force(service, found)
        self._met[service.vip] = _Met(service, found, met)
        return met

    def _all_in_force(self, services: Sequence[Service]) -> tuple[Service, ...]:
        return tuple(self._in_force(service) if service.vip in self._conditions else service for service in services)

    def _prepare(self, before: State, goal: State, everything: bool) -> Step:
        if not goal.interfaces:
            return Step(
                before,
                goal,
                notes=(
                    *_notes_of_storing(before, goal),
                    *_notes_of_addresses(before, goal),
                    *self._notes_of_checks(before, goal),
                ),
            )
        notes: list[str] = []
        if not everything and not self._in_step(before):
            everything = True
            notes += [REPAIRED] if before.interfaces else []
        known = State() if everything else before
        services = _changed(known.services, goal.services)
        hops = self._next_hops(services, anew=everything)
        goal, taken_along = _with_reply_interfaces(goal, services, hops)
        interfaces = _differing(known.interfaces, goal.interfaces)
        absent = [i for i in interfaces if not self.network.interface_exists(i.name)]
        return Step(
            before,
            goal,
            services,
            hops,
            tuple(i for i in interfaces if i not in absent),
            _differing(_addresses_in_force(known), _addresses_in_force(goal)),
            (*notes, *taken_along, *_notes_of_addresses(before, goal), *self._notes_of_checks(before, goal)),
            tuple(ABSENT.format(i.name) for i in absent),
        )

    def _next_hops(self, services: Sequence[Service], *, anew: bool) -> dict[Address, NextHop]:
        """One query for all that are not known yet, or for all. Raises NoRoute, also for a backend that mode dr cannot
        reach."""
        addresses: set[Address] = set()
        for service in services:
            addresses |= {b.address for b in service.backends} if anew else self._dataplane.unknown(service)
        hops = self.network.next_hops(addresses) if addresses else {}
        try:
            for service in services:
                _check_on_link(service, hops)
        except NoRoute:
            self._release_unused(addresses)
            raise
        return hops

    def _release_unused(self, addresses: Collection[Address]) -> None:
        """Of these neighbours, those that no served backend is behind; gateways with the last."""
        if not addresses:
            return
        used = self._served.addresses(self.state)
        unused = {address for address in addresses if not used[address]}
        if unused:
            self.network.release(unused if any(used.values()) else None)

    def _in_step(self, state: State) -> bool:
        """The kernel holds `state`, and so does the store."""
        if state != self.state:
            return False
        if not state.interfaces:
            return not self._dataplane.loaded and not self._dataplane.attachments()
        return self._dataplane.loaded and self._dataplane.generation == self._store.generation

    def _foresee(self, step: Step) -> Outcome:
        """What a dry run can say. Before the first attach there is no ring to move slots of."""
        asked = {i.name: i.xdp_mode.value for i in step.interfaces}
        return Outcome(
            {s.vip: self._dataplane.plan(self._in_force(s)) for s in step.services if self._dataplane.loaded},
            tuple(Attachment(name, mode, program_id=0) for name, mode in asked.items()),
        )

    def _notes_of_checks(self, before: State, goal: State) -> Iterator[str]:
        if not self.checks_run and any(s.options.health for s in _changed(before.services, goal.services)):
            yield UNCHECKED

    def _with_own_addresses(self, goal: State, services: Sequence[Service], own: bool) -> State:
        """Have the addresses of `services` put on an interface where nobody owns them, or not."""
        named = {service.vip.address for service in services if service.vip.is_one_address}
        if not own:
            return replace(goal, own_addresses=tuple(o for o in goal.own_addresses if o.address not in named))
        unknown = named - {o.address for o in goal.own_addresses}
        ours = (OwnAddress("", a) for a in unknown if self.network.owner(a) is None)
        return replace(goal, own_addresses=(*goal.own_addresses, *ours))

    def _with_homes(self, goal: State) -> State:
        """Each own address that is served has an attached interface, as far as there is one: the
        one it was on, else the first."""
        homes = [i.name for i in goal.interfaces if self.network.interface_exists(i.name)]
        served = {service.vip.address for service in goal.services}
        kept = [own for own in goal.own_addresses if own.address in served]
        if homes:
            kept = [o if o.interface in homes else replace(o, interface=homes[0]) for o in kept]
        return replace(goal, own_addresses=tuple(kept))

    def _check_exists(self, interface: Interface) -> None:
        if not self.network.interface_exists(interface.name):
            raise InvalidInput(f"interface {interface.name}: does not exist")

    def _check_replies(self, goal: State, names: Sequence[str]) -> None:
        """An interface that nat replies come in on cannot be detached alone."""
        with suppress(NoRoute):  # then no replies come in
            for name, backends in _reply_interfaces(goal.services, self._next_hops(goal.services, anew=True)).items():
                if name in names:
                    raise InvalidInput(
                        f"interface {name}: nat replies of {_some(backends)} come in there:"
                        " detach all interfaces, or remove those backends first"
                    )

    # How a change is carried out

    def _execute(self, step: Step) -> Outcome:
        with self._guard.alone():
            try:
                return self._carry_out(step)
            except BaseException as error:
                self._go_back(step, error)
                raise

    def _carry_out(self, step: Step) -> Outcome:
        with self._store.saving(step.goal):
            outcome = self._serve(step) if step.goal.interfaces else self._stop()
            for own in step.addresses_off:
                self.network.remove_address(own.interface, own.address)
        for own in step.addresses_on:
            self.network.add_address(own.interface, own.address)
        if step.goal.interfaces:
            self._dataplane.generation = self._store.generation
        self._release_unused(_backends_that_left(step.before, step.goal))
        return outcome

    def _go_back(self, step: Step, error: BaseException) -> None:
        if self._in_step(step.before):
            self._release_unused(step.hops.keys())
            return
        try:
            self._carry_out(self._prepare(step.goal, step.before, everything=True))
        except LbError as second:
            raise DataplaneError(
                f"{error}; nor could the old state be put back ({second}): the next change repairs what is in force"
            ) from error

    def _serve(self, step: Step) -> Outcome:
        if self._dataplane.loaded:
            self._dataplane.generation = 0
        self._dataplane.load(step.services)
        plans = self._put(step)
        self._dataplane.publish(self._all_in_force(step.goal.services))
        attached = tuple(self._attach(interface) for interface in step.interfaces)
        if step.interfaces or step.before.interfaces != step.goal.interfaces:
            self._detach_others(step.goal)
        for vip in self._dataplane.vips() - {service.vip for service in step.goal.services}:
            self._dataplane.remove(vip)
        return Outcome(plans, attached)

    def _detach_others(self, goal: State) -> None:
        for name in sorted(self._dataplane.attachments()):
            if goal.interface(name) is None:
                self._detach(name)

    def _attach(self, interface: Interface) -> Attachment:
        self._guard.make_way(interface.name)
        return self._dataplane.attach(interface)

    def _detach(self, name: str) -> None:
        self._guard.take_over(name)
        self._dataplane.detach(name)

    def _put(self, step: Step) -> dict[Vip, Plan]:
        plans = {}
        for done, service in enumerate(step.services, start=1):
            plans[service.vip] = self._dataplane.put(self._in_force(service), step.hops)
            if self.on_progress:
                self.on_progress(done, len(step.services))
        return plans

    def _stop(self) -> Outcome:
        if self._dataplane.loaded:
            self._dataplane.generation = 0
        for name in sorted(self._dataplane.attachments()):
            self._detach(name)
        if self._dataplane.loaded:
            self._dataplane.unload()
        return Outcome({})


def _differing(before: Sequence[T], after: Sequence[T]) -> tuple[T, ...]:
    """What of `after` is new or changed."""
    known = set(before)
    return tuple(one for one in after if one not in known)


def _changed(before: Iterable[Service], after: Iterable[Service]) -> tuple[Service, ...]:
    """What of `after` is new or changed: states share the services that do not change, so most are the very same."""
    known = {service.vip: service for service in before}
    return tuple(s for s in after if (old := known.get(s.vip)) is not s and old != s)


def _including(state: State, service: Service) -> State:
    """With `service`, which may be there already if it is the same."""
    if service in state.services:
        return state
    if any(service.vip == other.vip for other in state.services):
        raise AlreadyExists(
            f"vip {service.vip}: already served otherwise: change it with xdp-lb backend, or remove it first"
        )
    return state.with_service(service)


def _check_something_to_serve(goal: State) -> None:
    if not goal.services:
        raise InvalidInput("attach: nothing to serve: give --backends, or add a service first")
    if not goal.interfaces:
        raise InvalidInput("attach: no interface: name one, as in xdp-lb attach eth0")


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
                raise InvalidInput(f"vip {new.vip}: {name} cannot be changed while it is served: remove it first")


def _check_on_link(service: Service, hops: Mapping[Address, NextHop]) -> None:
    for backend in service.backends:
        if error := _off_link(service, backend, hops):
            raise error


def _off_link(service: Service, backend: Backend, hops: Mapping[Address, NextHop]) -> NoRoute | None:
    hop = hops.get(backend.address)
    if service.mode is not Mode.DR or hop is None or hop.on_link:
        return None
    return NoRoute(
        f"backend {backend}: mode dr needs a backend on a directly connected network,"
        " not behind a gateway: use ipip or nat"
    )


def _leads(hop: NextHop) -> str:
    to = hop.dst_mac.hex(":") if hop.dst_mac else "a neighbour that has not answered"
    return f"next hop is {to} on {hop.interface} now"


def _reply_interfaces(services: Iterable[Service], hops: Mapping[Address, NextHop]) -> dict[str, list[Backend]]:
    """Interface -> the backends whose nat replies come in there."""
    found: dict[str, list[Backend]] = {}
    for service in services:
        for backend in service.backends if service.mode is Mode.NAT else ():
            if backend.address not in hops:  # known from before, and its interface with it
                continue
            found.setdefault(hops[backend.address].interface, []).append(backend)
    return found


def _with_reply_interfaces(
    goal: State, services: Iterable[Service], hops: Mapping[Address, NextHop]
) -> tuple[State, list[str]]:
    """The program has to run where nat replies come in: `goal` with those interfaces, and notes."""
    notes = []
    for name, backends in _reply_interfaces(services, hops).items():
        if goal.interface(name) is None:
            goal = goal.with_interface(Interface(name))
            notes.append(f"{name}: attached too: nat replies of {_some(backends)} come in there")
    return goal, notes


def _some(backends: Sequence[Backend]) -> str:
    """A few addresses, for a line that stays a line."""
    addresses = list(dict.fromkeys(str(backend.address) for backend in backends))
    rest = [f"{len(addresses) - 2} more"] if len(addresses) > 2 else []
    *first, last = [*addresses[:2], *rest]
    return f"{', '.join(first)} and {last}" if first else last


def _backends_that_left(before: State, goal: State) -> set[Address]:
    """Addresses of services that changed or went; another service may still have them."""
    if not before.interfaces:
        return set()
    if not goal.interfaces:
        return {b.address for service in before.services for b in service.backends}
    left: set[Address] = set()
    new = {service.vip: service for service in goal.services}
    for old in _changed(goal.services, before.services):
        stay = {b.address for b in new[old.vip].backends} if old.vip in new else set()
        left |= {b.address for b in old.backends} - stay
    return left


class _Served:
    """How many services of a state have each backend address, brought up to date from one state to the next."""

    def __init__(self) -> None:
        self._services: tuple[Service, ...] = ()
        self._counts: Counter[Address] = Counter()

    def addresses(self, state: State) -> Counter[Address]:
        services = state.services if state.interfaces else ()
        for gone in _changed(services, self._services):
            self._counts.subtract(b.address for b in gone.backends)
        for new in _changed(self._services, services):
            self._counts.update(b.address for b in new.backends)
        self._services = services
        return self._counts


def _addresses_in_force(state: State) -> tuple[OwnAddress, ...]:
    """Those whose interface is attached."""
    return tuple(own for own in state.own_addresses if state.interface(own.interface))


def _notes_of_addresses(before: State, goal: State) -> Iterator[str]:
    old, new = _addresses_in_force(before), _addresses_in_force(goal)
    for own in _differing(old, new):
        yield f"{own.address}: put on {own.interface}, where no one had it"
    for own in _differing(new, old):
        yield f"{own.address}: taken off {own.interface}"


def _notes_of_storing(before: State, goal: State) -> Iterator[str]:
    if before.services != goal.services:
        yield "stored only: nothing is attached: xdp-lb attach IFACE puts it in force"


def _report(step: Step, outcome: Outcome, *, dry_run: bool = False) -> Report:
    return Report(
        changes=tuple(_changes(step, outcome.plans)),
        attached=outcome.attached,
        detached=tuple(i.name for i in step.before.interfaces if not step.goal.interface(i.name)),
        notes=step.notes,
        warnings=step.warnings,
        dry_run=dry_run,
    )


def _changes(step: Step, plans: Mapping[Vip, Plan]) -> Iterator[Change]:
    before, goal = step.before.services, step.goal.services
    old = {service.vip: service for service in _changed(goal, before)}
    new = {service.vip: service for service in _changed(before, goal)}
    for vip in sorted(old.keys() | new.keys(), key=lambda v: v.sort_key):
        yield Change(vip, old.get(vip), new.get(vip), plans.get(vip))


def _service_status(service: Service, statistics: Statistics, conditions: Mapping[str, Condition]) -> ServiceStatus:
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
            )
            for b in service.backends
        ),
    )


def _reasons(statistics: Statistics, prefix: str) -> dict[str, int]:
    return {name: n for name, n in statistics.reasons.items() if name.startswith(prefix)}


@contextmanager
def open_balancer(paths: Paths, *, write: bool = True) -> Iterator[Balancer]:
    """The balancer of one network namespace; to `write` is to hold its lock until the end.

    Raises Busy, StoreError, DataplaneError.
    """
    from lb.dataplane import KernelDataplane, route_socket  # what needs no kernel does without it
    from lb.neighbours import Network as KernelNetwork

    with ExitStack() as stack:
        if write:
            check_may_change()
            stack.enter_context(writer_lock(paths.lock, paths.netns))
        store = stack.enter_context(Store.open(paths.store, write))
        dataplane = KernelDataplane.open(paths)
        stack.callback(dataplane.close)
        guard = FilterGuard(paths, store, dataplane)
        yield Balancer(store, dataplane, KernelNetwork(route_socket), paths.netns, guard)
