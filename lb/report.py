"""What the balancer answers: the outcome of a change, and the state of things as the kernel holds it.

All values are frozen and plain, so that the command line, the JSON output and (later) the API print the same facts.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from enum import StrEnum

from lb.conditions import Condition
from lb.model import Backend, Interface, Service
from lb.ring import Plan
from lb.vip import Address, Vip


@dataclass(frozen=True, slots=True)
class NextHop:
    """Where frames for one backend go. `dst_mac` is None while the neighbour does not answer: the FIB decides then."""

    interface: str
    ifindex: int
    source: Address  # the host's own address towards the backend: what nat puts into the source field
    src_mac: bytes
    dst_mac: bytes | None
    on_link: bool  # False: through a gateway, which mode dr cannot use
    mtu: int = 1500  # bytes of IP, by the route and its interface


@dataclass(frozen=True, slots=True)
class Attachment:
    """An interface that runs the program. `mode` is native or generic; `warning` says why it is not the better one."""

    interface: str
    mode: str
    program_id: int
    warning: str | None = None


@dataclass(frozen=True, slots=True)
class Counters:
    """Totals since the member was created, both directions; `connections` counts TCP SYNs and new UDP nat flows,
    `repeated_syns` those SYNs that clients sent again, having heard nothing."""

    packets: int = 0
    bytes: int = 0
    reply_packets: int = 0
    reply_bytes: int = 0
    connections: int = 0
    repeated_syns: int = 0


class ChangeKind(StrEnum):
    ADD = "add"
    CHANGE = "change"
    REMOVE = "remove"


@dataclass(frozen=True, slots=True)
class Change:
    """One service before and after (None: not there), and what it does to the ring (None while nothing is attached)."""

    vip: Vip
    before: Service | None
    after: Service | None
    plan: Plan | None = None

    @property
    def kind(self) -> ChangeKind:
        if self.before is None:
            return ChangeKind.ADD
        return ChangeKind.REMOVE if self.after is None else ChangeKind.CHANGE


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of one command: the changes made (or, in a dry run, to be made), and sentences for the operator."""

    changes: tuple[Change, ...] = ()
    attached: tuple[Attachment, ...] = ()
    detached: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class BackendStatus:
    backend: Backend
    resolved: bool
    counters: Counters
    condition: Condition | None = None  # None: nobody checks it, or not yet

    @property
    def state(self) -> str:
        """active, draining or down."""
        if self.condition and self.condition.down:
            return "down"
        return "draining" if self.backend.draining else "active"


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    service: Service
    slots_in_transition: int
    backends: tuple[BackendStatus, ...]


@dataclass(frozen=True, slots=True)
class InterfaceStatus:
    interface: Interface
    attached: Attachment | None


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the kernel counts. `reasons` maps the name of each reason that left the balancer without forwarding to
    its packets; names that start with `drop_` were dropped, with `pass_` handed to the host. `maps`: the bytes of
    kernel memory that each map takes."""

    backends: Mapping[Vip, Mapping[Backend, Counters]] = field(default_factory=dict)
    slots_in_transition: Mapping[Vip, int] = field(default_factory=dict)
    reasons: Mapping[str, int] = field(default_factory=dict)
    unresolved: Set[Address] = frozenset()  # backends whose neighbour has not answered
    maps: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Status:
    netns: str
    loaded: bool
    interfaces: tuple[InterfaceStatus, ...]
    services: tuple[ServiceStatus, ...]
    drops: Mapping[str, int]
    passes: Mapping[str, int]
    answered: Mapping[str, int] = field(default_factory=dict)  # by the balancer itself
    noted: Mapping[str, int] = field(default_factory=dict)  # counted beside what became of the packet
    maps: Mapping[str, int] = field(default_factory=dict)  # bytes of kernel memory
    outdated: str = ""  # the version of xdp-lb that the program in force is of, where it is not the installed one
