"""Configuration, counters and reports of decapsulation, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import TYPE_CHECKING

from lb.errors import InvalidInput
from lb.model.forwarding import Attachment
from lb.model.vip import Address

if TYPE_CHECKING:
    pass

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
        raise InvalidInput(f"vip {prefix_text(prefix)}: not a valid VIP: use an address that clients connect to")


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
