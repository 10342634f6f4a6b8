"""How packets are forwarded, as values: next hops, attachments, counters."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from lb.model.state import Backend
from lb.model.vip import Address, Vip


@dataclass(frozen=True, slots=True)
class InstalledNextHop:
    """Where the programs send what is for a backend: MAC addresses are six bytes, None = the FIB is asked."""

    address: Address
    ifindex: int
    mac: bytes | None


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


@dataclass(frozen=True, slots=True)
class OpenConnections:
    """How many connections are open at one moment, of one backend or of several together. number: None where it is
    unknown. estimated: from recorded flows, of which the silent and the evicted ones are missing."""

    number: int | None = None
    estimated: bool = False

    def __add__(self, other: OpenConnections) -> OpenConnections:
        if self.number is None or other.number is None:
            return UNKNOWN
        return OpenConnections(self.number + other.number, self.estimated or other.estimated)


UNKNOWN = OpenConnections()
NONE_OPEN = OpenConnections(0)


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
