"""The balancer's results: the report of a change, and the status from the kernel.

All values are frozen and plain, so that the command line, the JSON output and the API print the same facts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from operator import attrgetter

from lb.hashing.ring import Plan
from lb.model.conditions import Condition
from lb.model.forwarding import NONE_OPEN, UNKNOWN, Attachment, Counters, OpenConnections
from lb.model.state import Backend, Interface, Service, no_such_service
from lb.model.vip import Vip

_COUNTERS = [attrgetter(counter.name) for counter in fields(Counters)]


class ChangeKind(StrEnum):
    ADD = "add"
    CHANGE = "change"
    REMOVE = "remove"


@dataclass(frozen=True, slots=True)
class Change:
    """One service before and after (None: not there), what it does to the ring (None while nothing is attached), and
    the open connections that end (None: no backend goes out of service)."""

    vip: Vip
    before: Service | None
    after: Service | None
    plan: Plan | None = None
    ending: OpenConnections | None = None

    @property
    def kind(self) -> ChangeKind:
        if self.before is None:
            return ChangeKind.ADD
        return ChangeKind.REMOVE if self.after is None else ChangeKind.CHANGE


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of one command: the changes made (or, in a dry run, to be made), and sentences for the operator.
    ending: of all changes, or by detaching; None: no backend or interface goes out of service."""

    changes: tuple[Change, ...] = ()
    attached: tuple[Attachment, ...] = ()
    detached: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    dry_run: bool = False
    ending: OpenConnections | None = None

    @property
    def all_warnings(self) -> list[str]:
        """Each warning once, those of the interfaces included."""
        of_interfaces = (a.warning for a in self.attached if a.warning)
        return list(dict.fromkeys([*self.warnings, *of_interfaces]))


@dataclass(frozen=True, slots=True)
class BackendStatus:
    backend: Backend
    resolved: bool
    counters: Counters
    condition: Condition | None = None  # None: unchecked, or not checked yet
    open: OpenConnections = UNKNOWN

    @property
    def state(self) -> str:
        """active, draining or down."""
        if self.condition and self.condition.down:
            return "down"
        return "draining" if self.backend.draining else "active"

    @property
    def in_trouble(self) -> bool:
        """Down, or unresolved: packets for it are dropped."""
        return self.state == "down" or (self.state == "active" and not self.resolved)


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    service: Service
    slots_in_transition: int
    backends: tuple[BackendStatus, ...]

    @property
    def total(self) -> Counters:
        """The counters of all backends together."""
        return Counters(*(sum(map(counter, (b.counters for b in self.backends))) for counter in _COUNTERS))

    @property
    def takes_connections(self) -> bool:
        return any(b.backend.ring_weight for b in self.backends)

    @property
    def in_trouble(self) -> bool:
        return not self.takes_connections or any(b.in_trouble for b in self.backends)

    @property
    def open(self) -> OpenConnections:
        """The open connections of all backends together."""
        return sum((b.open for b in self.backends), NONE_OPEN)


@dataclass(frozen=True, slots=True)
class InterfaceStatus:
    interface: Interface
    attached: Attachment | None


@dataclass(frozen=True, slots=True)
class Status:
    netns: str
    loaded: bool
    interfaces: tuple[InterfaceStatus, ...]
    services: tuple[ServiceStatus, ...]
    drops: Mapping[str, int]
    passes: Mapping[str, int]
    answered: Mapping[str, int] = field(default_factory=dict)  # by the balancer itself
    noted: Mapping[str, int] = field(default_factory=dict)  # counted in addition to the verdict
    maps: Mapping[str, int] = field(default_factory=dict)  # bytes of kernel memory
    outdated: str = ""  # the version of xdp-lb that the program in force is of, where it is not the installed one
    config_fault: str = ""  # why the daemon's configuration file is not in force

    def of_service(self, vip: Vip) -> Status:
        """Of one service alone. Raises NotFound."""
        found = tuple(s for s in self.services if s.service.vip == vip)
        if not found:
            raise no_such_service(vip)
        return replace(self, services=found)

    def in_trouble(self) -> Status:
        """Of the services in trouble alone."""
        return replace(self, services=tuple(s for s in self.services if self.loaded and s.in_trouble))
