"""A prepared change: what differs between two states, and the notes and warnings about it (pure).

Enters: the state in force and the desired one. Leaves: a ChangeSet that lb.control.writer carries out, and
its Report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from lb.errors import NoRoute
from lb.hashing.ring import Plan
from lb.model.forwarding import NONE_OPEN, UNKNOWN, Attachment, NextHop, OpenConnections
from lb.model.report import Change, Report
from lb.model.state import Backend, Interface, Mode, OwnAddress, Service, State
from lb.model.vip import Address, Vip

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ending:
    """The open connections that a change ends: those of each service, and all. None: no backend goes out of service."""

    by_vip: Mapping[Vip, OpenConnections] = field(default_factory=dict)
    total: OpenConnections | None = None


NOTHING_ENDS = Ending()


@dataclass(frozen=True, slots=True)
class ChangeSet:
    """A prepared change, ready to be carried out."""

    before: State
    goal: State
    services: tuple[Service, ...] = ()  # to be put
    hops: Mapping[Address, NextHop] = field(default_factory=dict)
    interfaces: tuple[Interface, ...] = ()  # to be attached
    addresses_on: tuple[OwnAddress, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    ending: Ending = NOTHING_ENDS

    @property
    def moves_programs(self) -> bool:
        """Whether the balancer comes to an interface or leaves one."""
        before, goal = self.before.interfaces, self.goal.interfaces
        return bool(self.interfaces) or before != goal or not goal

    @property
    def addresses_off(self) -> tuple[OwnAddress, ...]:
        return differing(addresses_in_force(self.goal), addresses_in_force(self.before))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the dataplane answered."""

    plans: Mapping[Vip, Plan]
    attached: tuple[Attachment, ...] = ()
    warnings: tuple[str, ...] = ()


def differing(before: Sequence[T], after: Sequence[T]) -> tuple[T, ...]:
    """What of `after` is new or changed."""
    known = set(before)
    return tuple(one for one in after if one not in known)


def changed(before: Iterable[Service], after: Iterable[Service]) -> tuple[Service, ...]:
    """What of `after` is new or changed: states share the services that do not change, so most are the very same."""
    known = {service.vip: service for service in before}
    return tuple(s for s in after if (old := known.get(s.vip)) is not s and old != s)


def check_on_link(service: Service, hops: Mapping[Address, NextHop]) -> None:
    for backend in service.backends:
        if error := off_link(service, backend, hops):
            raise error


def off_link(service: Service, backend: Backend, hops: Mapping[Address, NextHop]) -> NoRoute | None:
    hop = hops.get(backend.address)
    if service.mode is not Mode.DR or hop is None or hop.on_link:
        return None
    return NoRoute(
        f"backend {backend}: mode dr needs a backend on a directly connected network,"
        " not behind a gateway: use ipip or nat"
    )


def reply_interfaces(services: Iterable[Service], hops: Mapping[Address, NextHop]) -> dict[str, list[Backend]]:
    """Interface -> the backends whose nat replies come in there."""
    found: dict[str, list[Backend]] = {}
    for service in services:
        for backend in service.backends if service.mode is Mode.NAT else ():
            if backend.address not in hops:  # known from before, and its interface with it
                continue
            found.setdefault(hops[backend.address].interface, []).append(backend)
    return found


def with_reply_interfaces(
    goal: State, services: Iterable[Service], hops: Mapping[Address, NextHop]
) -> tuple[State, list[str]]:
    """The program has to run where nat replies come in: `goal` with those interfaces, and notes."""
    notes = []
    for name, backends in reply_interfaces(services, hops).items():
        if goal.interface(name) is None:
            goal = goal.with_interface(Interface(name, replies_only=True))
            notes.append(f"{name}: also attached: nat replies of {some(backends)} arrive there")
    return goal, notes


def some(backends: Sequence[Backend]) -> str:
    """A few addresses."""
    return few(list(dict.fromkeys(str(backend.address) for backend in backends)))


def few(names: Sequence[str]) -> str:
    """The first of these, for a line that stays a line."""
    rest = [f"{len(names) - 2} more"] if len(names) > 2 else []
    *first, last = [*names[:2], *rest]
    return f"{', '.join(first)} and {last}" if first else last


def silent(services: Iterable[Service], hops: Mapping[Address, NextHop], *, followed: bool) -> Iterator[str]:
    """Warnings of backends that there is no MAC address to send to."""
    found: dict[tuple[str, bool], list[Backend]] = {}
    for service in services:
        for backend in service.backends:
            if (hop := hops.get(backend.address)) and hop.dst_mac is None:
                found.setdefault((hop.interface, hop.on_link), []).append(backend)
    for (interface, on_link), backends in found.items():
        whom = some(backends) if on_link else f"the gateway to {some(backends)}"
        until = "it replies" if followed else "xdp-lb attach or xdp-lb serve sees a reply"
        yield f"{interface}: no ARP/ND reply from {whom}: packets for it are dropped until {until}"


def leaving(before: State, goal: State) -> dict[Vip, list[str]]:
    """The names of the backends that go out of service at once, whatever is open there, by VIP."""
    if not before.interfaces:
        return {}
    new = {service.vip: service for service in goal.services} if goal.interfaces else {}
    gone: dict[Vip, list[str]] = {}
    for old in changed(goal.services if goal.interfaces else (), before.services):
        stay = {str(b) for b in new[old.vip].backends} if old.vip in new else set()
        if names := [name for b in old.backends if (name := str(b)) not in stay]:
            gone[old.vip] = names
    return gone


def ending(
    before: State, goal: State, gone: Mapping[Vip, Sequence[str]], open_now: Mapping[Vip, Mapping[str, OpenConnections]]
) -> Ending:
    """Of the backends `gone`. What comes through an interface that alone is detached is not counted by interface."""
    by_vip = {
        vip: sum((open_now.get(vip, {}).get(name, UNKNOWN) for name in names), NONE_OPEN) for vip, names in gone.items()
    }
    detached = any(goal.interface(each.name) is None for each in before.interfaces)
    if detached and goal.interfaces:
        return Ending(by_vip, UNKNOWN)
    return Ending(by_vip, sum(by_vip.values(), NONE_OPEN) if by_vip else None)


def backends_that_left(before: State, goal: State) -> set[Address]:
    """Addresses of services that changed or went; another service may still have them."""
    if not before.interfaces:
        return set()
    if not goal.interfaces:
        return {b.address for service in before.services for b in service.backends}
    left: set[Address] = set()
    new = {service.vip: service for service in goal.services}
    for old in changed(goal.services, before.services):
        stay = {b.address for b in new[old.vip].backends} if old.vip in new else set()
        left |= {b.address for b in old.backends} - stay
    return left


class BackendUse:
    """How many services of a state have each backend address, brought up to date from one state to the next."""

    def __init__(self) -> None:
        self._services: tuple[Service, ...] = ()
        self._counts: Counter[Address] = Counter()

    def addresses(self, state: State) -> Counter[Address]:
        services = state.services if state.interfaces else ()
        for gone in changed(services, self._services):
            self._counts.subtract(b.address for b in gone.backends)
        for new in changed(self._services, services):
            self._counts.update(b.address for b in new.backends)
        self._services = services
        return self._counts


def addresses_in_force(state: State) -> tuple[OwnAddress, ...]:
    """Those whose interface is attached."""
    return tuple(own for own in state.own_addresses if state.interface(own.interface))


def notes_of_addresses(before: State, goal: State) -> Iterator[str]:
    old, new = addresses_in_force(before), addresses_in_force(goal)
    for own in differing(old, new):
        yield f"{own.address}: added to {own.interface}"
    for own in differing(new, old):
        back = goal.interfaces and own in goal.own_addresses
        yield f"{own.address}: removed from {own.interface}" + (f" until xdp-lb attach {own.interface}" if back else "")


def notes_of_storing(before: State, goal: State) -> Iterator[str]:
    if before.services != goal.services:
        yield "stored, not active: no interface attached: run xdp-lb attach IFACE"


def report(change_set: ChangeSet, outcome: Outcome, *, dry_run: bool = False) -> Report:
    return Report(
        changes=tuple(_changes(change_set, outcome.plans)),
        attached=outcome.attached,
        detached=tuple(i.name for i in change_set.before.interfaces if not change_set.goal.interface(i.name)),
        notes=change_set.notes,
        warnings=(*change_set.warnings, *outcome.warnings),
        dry_run=dry_run,
        ending=change_set.ending.total,
    )


def _changes(change_set: ChangeSet, plans: Mapping[Vip, Plan]) -> Iterator[Change]:
    before, goal = change_set.before.services, change_set.goal.services
    old = {service.vip: service for service in changed(goal, before)}
    new = {service.vip: service for service in changed(before, goal)}
    for vip in sorted(old.keys() | new.keys(), key=lambda v: v.sort_key):
        yield Change(vip, old.get(vip), new.get(vip), plans.get(vip), change_set.ending.by_vip.get(vip))
