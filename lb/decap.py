"""Decapsulation on a backend: what is configured, what was done, and what has been counted.

Enters: interfaces and the destinations whose tunnel packets end here. Leaves: the programs attached,
if wanted also VIPs on the loopback and the ARP settings that go with them, and a report. What was
done to the host is remembered, and `detach` takes back exactly that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import TYPE_CHECKING

from lb.errors import InvalidInput
from lb.model import Interface
from lb.paths import Paths
from lb.report import Attachment
from lb.vip import Address

if TYPE_CHECKING:
    from lb.decap_dataplane import KernelDecap
    from lb.decap_host import DecapHost

Prefix = IPv4Network | IPv6Network


def prefix_text(prefix: Prefix) -> str:
    """As it was given: a single address has no length."""
    return str(prefix.network_address) if is_address(prefix) else str(prefix)


def is_address(prefix: Prefix) -> bool:
    return prefix.prefixlen == prefix.max_prefixlen


@dataclass(frozen=True, slots=True)
class DecapConfig:
    """What is decapsulated: inner `destinations`, from outer `sources` (none: from any). Raises InvalidInput."""

    destinations: tuple[Prefix, ...]
    sources: tuple[Prefix, ...]
    gue_port: int

    def __post_init__(self) -> None:
        for prefix in self.destinations:
            _check_destination(prefix)
        if not 0 < self.gue_port <= 65535:
            raise InvalidInput(f"gue port {self.gue_port}: out of range 1 to 65535")

    @property
    def addresses(self) -> list[Address]:
        """The destinations that are one address."""
        return [prefix.network_address for prefix in self.destinations if is_address(prefix)]

    @property
    def has_several_destinations(self) -> bool:
        """In one family: more than one address, or a prefix."""
        versions = [prefix.version for prefix in self.destinations]
        return len(self.addresses) < len(versions) or len(set(versions)) < len(versions)


def _check_destination(prefix: Prefix) -> None:
    first = prefix.network_address
    if first.is_multicast or first.is_loopback or first.is_unspecified:
        raise InvalidInput(f"vip {prefix_text(prefix)}: cannot be a VIP: give addresses that clients connect to")


@dataclass(frozen=True, slots=True)
class TunnelCounters:
    """`bytes` are those of the inner packets."""

    packets: int
    bytes: int


@dataclass(frozen=True, slots=True)
class DecapStatistics:
    """`tunnels`: kind (ipip_4_in_6: IPv4 in IPv6) -> what was decapsulated; `reasons`: name -> packets."""

    tunnels: Mapping[str, TunnelCounters]
    reasons: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class DecapStatus:
    """`config` and `statistics` are None while nothing is attached."""

    netns: str
    interfaces: tuple[Attachment, ...]
    config: DecapConfig | None
    statistics: DecapStatistics | None


@dataclass(frozen=True, slots=True)
class DecapReport:
    attached: tuple[Attachment, ...] = ()
    detached: tuple[str, ...] = ()
    config: DecapConfig | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class Decap:
    """The decapsulation of one network namespace. Changes are to be made with its lock held."""

    def __init__(self, kernel: KernelDecap, host: DecapHost, netns: str) -> None:
        self._kernel, self._host, self._netns = kernel, host, netns

    def attach(self, interfaces: Sequence[Interface], config: DecapConfig, *, setup_vip: bool) -> DecapReport:
        """Decapsulate on these interfaces and on those that do already, by this configuration from now on.

        All or nothing: raises LbError with everything as it was.
        """
        own = self._host.own_addresses([each.name for each in interfaces])
        notes = self._host.set_up(config.addresses) if setup_vip else []
        try:
            attached = self._kernel.attach(interfaces, config, own)
        except BaseException:
            self._host.undo()
            raise
        self._host.commit(config.addresses)
        warnings = [
            *(each.warning for each in attached if each.warning),
            *self._host.warnings(config.destinations, [each.interface for each in attached]),
        ]
        return DecapReport(tuple(attached), config=config, notes=tuple(notes), warnings=tuple(warnings))

    def detach(self, names: Sequence[str] = ()) -> DecapReport:
        """End it on these interfaces, or on all; with the last one goes what was done to the host."""
        running = self._kernel.attachments()
        gone = [name for name in running if name in names or not names]
        for name in gone:
            self._kernel.detach(name)
        notes: list[str] = []
        if len(gone) == len(running):
            self._kernel.unload()
            notes = self._host.take_back()
        return DecapReport(detached=tuple(gone), notes=tuple(notes))

    def status(self) -> DecapStatus:
        interfaces = tuple(self._kernel.attachments().values())
        config, statistics = self._kernel.read()
        return DecapStatus(self._netns, interfaces, config, statistics)


@contextmanager
def open_decap(paths: Paths, *, write: bool) -> Iterator[Decap]:
    """The decapsulation of this network namespace; `write` takes the lock of its changes."""
    from lb.capabilities import check_may_change
    from lb.decap_dataplane import KernelDecap, route_socket
    from lb.decap_host import DecapHost
    from lb.store import writer_lock

    place = paths.run_dir / "decap" / paths.netns
    if write:
        check_may_change()
    with writer_lock(place.with_name(f"{place.name}.lock"), paths.netns) if write else nullcontext():
        host = DecapHost(route_socket, place.with_name(f"{place.name}.json"))
        yield Decap(KernelDecap.open(paths), host, paths.netns)
