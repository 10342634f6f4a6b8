"""From the state in force to another: store and dataplane are written here, and nowhere else.

Enters: the desired state of lb.model.state, and what health checks have found. Leaves: a Report. A change goes plan ->
open the store's transaction -> dataplane -> commit -> acknowledge:

- Before the first write to the dataplane its generation becomes 0, after the commit that of the
  store. Where the two differ, a change was cut short (or the host has booted), and the next change
  writes everything, not only what differs.
- VIP addresses are taken off before the commit and put on after it, so that the store knows of
  every address that may be on an interface.
- An error on the way puts the old state back, in the store and in the dataplane.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

from lb.control.change import (
    NOTHING_ENDS,
    BackendUse,
    ChangeSet,
    Ending,
    Outcome,
    addresses_in_force,
    backends_that_left,
    changed,
    check_on_link,
    differing,
    ending,
    leaving,
    notes_of_addresses,
    notes_of_storing,
    report,
    silent,
    with_reply_interfaces,
)
from lb.control.contracts import Dataplane, FilterHandover, Network
from lb.control.scripts import check_scripts
from lb.control.vip_addresses import check_new_vips, placed
from lb.errors import DataplaneError, LbError, NoRoute
from lb.hashing.ring import Plan
from lb.model.conditions import Condition, Conditions, in_force, left_behind, with_other_conditions
from lb.model.forwarding import Attachment, NextHop
from lb.model.report import Report
from lb.model.state import Interface, Service, State
from lb.model.vip import Address, Vip
from lb.store.store import Store

REPAIRED = "kernel state did not match the store: rewritten"
UNCHECKED = "health checks run only while xdp-lb serve is running"
ABSENT = "interface {0}: does not exist: not attached: run xdp-lb detach {0} to remove it from the store"


@dataclass(frozen=True, slots=True)
class _Effective:
    """A service, the conditions of its backends, and what is in force by both."""

    service: Service
    conditions: Mapping[str, Condition] | None
    effective: Service


class Writer:
    """`on_progress(done, total)` is called with the services that are written, of all to write. A method that changes
    something raises LbError, and then nothing has changed."""

    def __init__(
        self,
        store: Store,
        dataplane: Dataplane,
        network: Network,
        handover: FilterHandover,
        *,
        in_daemon: bool = False,
        conditions: Conditions | None = None,
    ) -> None:
        """`in_daemon`: tasks of this process check backends and follow their neighbours. `conditions`: what health
        checks have found so far."""
        self.store, self.dataplane, self.network, self.handover = store, dataplane, network, handover
        self.on_progress: Callable[[int, int], None] | None = None
        self.in_daemon = in_daemon
        self.conditions: Conditions = conditions or {}
        self._backend_use = BackendUse()
        self._effective: dict[Vip, _Effective] = {}

    @property
    def state(self) -> State:
        """The desired state, as it is stored."""
        return self.store.state

    def change(self, goal: State, *, everything: bool = False, dry_run: bool = False) -> Report:
        self._check_store_is_whole(goal)
        check_scripts(self.state, goal)
        check_new_vips(self.state, goal, self.network)
        change_set = self._prepare(self.state, placed(self.state, goal, self.network), everything)
        change_set = replace(change_set, ending=self._ending(change_set))
        if dry_run:
            self._release_unused(change_set.hops.keys())
            return report(change_set, self._predicted_outcome(change_set), dry_run=True)
        if change_set.goal == change_set.before and not everything and self.in_sync(change_set.goal):
            return report(change_set, Outcome({}))
        return report(change_set, self._execute(change_set))

    def set_conditions(self, conditions: Conditions) -> dict[Vip, Plan]:
        """Lay what health checks have found over the desired state, in the place of what they had found before. What
        differs is in force at once, without a change of what is stored. Raises DataplaneError; to be repeated then."""
        before = self.conditions
        self.conditions = {vip: before[vip] if before.get(vip) == each else each for vip, each in conditions.items()}
        try:
            return self._put_conditions(before)
        except BaseException:
            self.conditions = before
            raise

    def _put_conditions(self, before: Conditions) -> dict[Vip, Plan]:
        others = with_other_conditions(before, self.conditions)
        services = [service for service in self.state.services if service.vip in others]
        pairs = [(in_force(service, before.get(service.vip)), self.in_force(service)) for service in services]
        wanted = [new for old, new in pairs if old != new]
        if not (wanted and self.state.interfaces):
            return {}
        if not self.in_sync(self.state):
            return dict(self._execute(self._prepare(self.state, self.state, everything=True)).plans)
        with self.rewriting():
            return {service.vip: self.dataplane.put(service, {}) for service in wanted}

    def settle(self, vip: Vip) -> None:
        """Each slot is written as a whole: cut short, the next call ends the rest."""
        if self.in_sync(self.state):
            self.dataplane.settle(vip)

    @contextmanager
    def rewriting(self) -> Iterator[None]:
        """Services of the state in force may be put within. Cut short, the next change writes everything."""
        self.dataplane.generation = 0
        yield
        self.dataplane.publish(self.all_in_force(self.state.services))
        self.dataplane.generation = self.store.generation

    def in_force(self, service: Service) -> Service:
        """The very same as the last time, if nothing has changed: publish() takes that for a hint."""
        conditions = self.conditions.get(service.vip)
        known = self._effective.get(service.vip)
        if known and known.service is service and known.conditions is conditions:
            return known.effective
        effective = in_force(service, conditions)
        self._effective[service.vip] = _Effective(service, conditions, effective)
        return effective

    def all_in_force(self, services: Sequence[Service]) -> tuple[Service, ...]:
        return tuple(self.in_force(service) if service.vip in self.conditions else service for service in services)

    def in_sync(self, state: State) -> bool:
        """The kernel holds `state`, and so does the store."""
        if state != self.state:
            return False
        if not state.interfaces:
            return not self.dataplane.loaded and not self.dataplane.attachments()
        return self.dataplane.loaded and self.dataplane.generation == self.store.generation

    # Preparing a change

    def _check_store_is_whole(self, goal: State) -> None:
        """Programs that the store knows nothing of are what a lost one has left: attach or detach has to come first."""
        lost = sorted(self.dataplane.attachments()) if not (goal.interfaces or self.state.interfaces) else []
        if lost and goal.services != self.state.services:
            names = " ".join(lost)
            raise DataplaneError(
                f"{names}: attached, but not in the store: xdp-lb attach {names} to keep it, xdp-lb detach to remove it"
            )

    def _prepare(self, before: State, goal: State, everything: bool) -> ChangeSet:
        if not goal.interfaces:
            return ChangeSet(
                before,
                goal,
                notes=(
                    *notes_of_storing(before, goal),
                    *notes_of_addresses(before, goal),
                    *self._notes_of_checks(before, goal),
                ),
            )
        notes: list[str] = []
        if not everything and not self.in_sync(before):
            everything = True
            notes += [REPAIRED] if before.interfaces else []
        known = State() if everything else before
        services = changed(known.services, goal.services)
        hops = self.next_hops(services, anew=everything, probe=everything)
        goal, reply_notes = with_reply_interfaces(goal, services, hops)
        interfaces = differing(known.interfaces, goal.interfaces)
        absent = [i for i in interfaces if not self.network.interface_exists(i.name)]
        return ChangeSet(
            before,
            goal,
            services,
            hops,
            tuple(i for i in interfaces if i not in absent),
            differing(addresses_in_force(known), addresses_in_force(goal)),
            (
                *notes,
                *reply_notes,
                *notes_of_addresses(before, goal),
                *self._notes_of_checks(before, goal),
                *self._notes_of_conditions(services),
            ),
            (*(ABSENT.format(i.name) for i in absent), *silent(services, hops, followed=self.in_daemon)),
        )

    def next_hops(self, services: Sequence[Service], *, anew: bool, probe: bool = False) -> dict[Address, NextHop]:
        """One query for all that are not known yet, or for all; `probe`: who answered before has to answer again, as
        another machine may have its address by now. Raises NoRoute, also for a backend that mode dr cannot
        reach."""
        addresses: set[Address] = set()
        for service in services:
            addresses |= {b.address for b in service.backends} if anew else self.dataplane.unknown(service)
        hops = self.network.next_hops(addresses, probe=probe) if addresses else {}
        try:
            for service in services:
                check_on_link(service, hops)
        except NoRoute:
            self._release_unused(addresses)
            raise
        return hops

    def _release_unused(self, addresses: Collection[Address]) -> None:
        """Of these neighbours, those that no served backend is behind; gateways with the last."""
        if not addresses:
            return
        used = self._backend_use.addresses(self.state)
        unused = {address for address in addresses if not used[address]}
        if unused:
            self.network.release(unused if any(used.values()) else None)

    def _predicted_outcome(self, change_set: ChangeSet) -> Outcome:
        """What a dry run can say. Before the first attach there is no ring to move slots of."""
        modes = {i.name: i.xdp_mode.value for i in change_set.interfaces}
        return Outcome(
            {s.vip: self.dataplane.plan(self.in_force(s)) for s in change_set.services if self.dataplane.loaded},
            tuple(Attachment(name, mode, program_id=0) for name, mode in modes.items()),
        )

    def _ending(self, change_set: ChangeSet) -> Ending:
        """Counted before anything is written. What is not loaded has no connections."""
        before, goal = change_set.before, change_set.goal
        if not self.dataplane.loaded:
            return NOTHING_ENDS
        gone = leaving(before, goal)
        services = [self.in_force(service) for service in before.services if service.vip in gone]
        return ending(before, goal, gone, self.dataplane.open_connections(services) if services else {})

    def _notes_of_checks(self, before: State, goal: State) -> Iterator[str]:
        if not self.in_daemon and any(s.options.health for s in changed(before.services, goal.services)):
            yield UNCHECKED

    def _notes_of_conditions(self, services: Sequence[Service]) -> Iterator[str]:
        if not self.in_daemon:
            yield from filter(None, (left_behind(s, self.conditions.get(s.vip)) for s in services))

    # Carrying it out

    def _execute(self, change_set: ChangeSet) -> Outcome:
        self.dataplane.recover(change_set.before.interfaces)
        try:
            with self._without_filter_changes(change_set):
                return self._apply(change_set)
        except BaseException as error:
            self._roll_back(change_set, error)
            raise

    def _without_filter_changes(self, change_set: ChangeSet) -> AbstractContextManager[None]:
        """Changes of backends wait for nobody: filter rules, of which a large set takes seconds, are beside them."""
        return self.handover.alone() if change_set.moves_programs else nullcontext()

    def _apply(self, change_set: ChangeSet) -> Outcome:
        with self.store.saving(change_set.goal):
            outcome = self._serve(change_set) if change_set.goal.interfaces else self._stop()
            for own in change_set.addresses_off:
                self.network.remove_address(own.interface, own.address)
        for own in change_set.addresses_on:
            self.network.add_address(own.interface, own.address)
        unannounced = self.network.announce(change_set.addresses_on)
        if change_set.goal.interfaces:
            self.dataplane.generation = self.store.generation
        self._release_unused(backends_that_left(change_set.before, change_set.goal))
        return replace(outcome, warnings=tuple(unannounced))

    def _roll_back(self, change_set: ChangeSet, error: BaseException) -> None:
        if self.in_sync(change_set.before):
            self._release_unused(change_set.hops.keys())
            return
        try:
            back = self._prepare(change_set.goal, change_set.before, everything=True)
            with self._without_filter_changes(back):
                self._apply(back)
        except LbError as second:
            raise DataplaneError(
                f"{error}; rollback failed: {second}: the next change restores the kernel state"
            ) from error

    def _serve(self, change_set: ChangeSet) -> Outcome:
        if self.dataplane.loaded:
            self.dataplane.generation = 0
        self.dataplane.load(change_set.services)
        plans = self._put(change_set)
        self.dataplane.publish(self.all_in_force(change_set.goal.services))
        attached = tuple(self.attach(interface) for interface in change_set.interfaces)
        if change_set.interfaces or change_set.before.interfaces != change_set.goal.interfaces:
            self._detach_others(change_set.goal)
        for vip in self.dataplane.vips() - {service.vip for service in change_set.goal.services}:
            self.dataplane.remove(vip)
        return Outcome(plans, attached)

    def _detach_others(self, goal: State) -> None:
        for name in sorted(self.dataplane.attachments()):
            if goal.interface(name) is None:
                self._detach(name)

    def attach(self, interface: Interface) -> Attachment:
        self.handover.hand_over_to_balancer(interface.name)
        return self.dataplane.attach(interface)

    def _detach(self, name: str) -> None:
        self.handover.take_back(name)
        self.dataplane.detach(name)

    def _put(self, change_set: ChangeSet) -> dict[Vip, Plan]:
        plans = {}
        for done, service in enumerate(change_set.services, start=1):
            plans[service.vip] = self.dataplane.put(self.in_force(service), change_set.hops)
            if self.on_progress:
                self.on_progress(done, len(change_set.services))
        return plans

    def _stop(self) -> Outcome:
        if self.dataplane.loaded:
            self.dataplane.generation = 0
        for name in sorted(self.dataplane.attachments()):
            self._detach(name)
        if self.dataplane.loaded:
            self.dataplane.unload()
        return Outcome({})
