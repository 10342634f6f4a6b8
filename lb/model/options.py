"""Options of a service beyond VIP, mode and backends (pure).

Enters: numbers and prefixes. Leaves: Options that are valid by construction, and their values as in JSON;
lb.model.state checks that they suit the service.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any

from lb.errors import InvalidInput
from lb.model.health_check import HealthCheck

Network = IPv4Network | IPv6Network

GUE_PORT = 6080  # IANA
MSS_RANGE = range(88, 65496)  # RFC 9293's least IPv4 packet, less its headers, to what the field can sensibly say
LONGEST_AFFINITY_S = 7 * 86400
LONGEST_SLOW_START_S = 3600
MAX_SYNS_PER_S = 1_000_000_000  # the limiter counts in nanoseconds
# "This network", loopback, multicast, and what is reserved above it, in IPv4 and in IPv6.
NOT_UNICAST = tuple(map(ip_network, ("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/3", "::/127", "ff00::/8")))


def parse_network(text: str, what: str = "prefix") -> Network:
    """`192.0.2.0/24`, or an address alone. Raises InvalidInput, which names `what`, also for host bits that are set."""
    try:
        return ip_network(text)
    except ValueError:
        raise InvalidInput(f"{what} {text or '(empty)'}: {_fault(text)}") from None


def _fault(text: str) -> str:
    try:
        return f"has host bits set: write {ip_network(text, strict=False)}"
    except ValueError:
        return "not an IPv4 or IPv6 prefix"


def is_unicast(prefix: Network) -> bool:
    return not any(prefix.version == other.version and prefix.overlaps(other) for other in NOT_UNICAST)


def _ordered(prefixes: Iterable[Network]) -> tuple[Network, ...]:
    """Each once: two ways to write the same are the same options."""
    return tuple(sorted(set(prefixes), key=lambda p: (p.version, int(p.network_address), p.prefixlen)))


def _check(what: str, value: int, allowed: range, off: int | None = 0) -> None:
    if value != off and value not in allowed:
        raise InvalidInput(f"{what} {value}: out of range {allowed[0]} to {allowed[-1]}")


@dataclass(frozen=True, slots=True)
class Options:
    """affinity_s: a client's connections go to one backend until it has been silent so long; 0: each for itself.
    sources: of a VIP's own service, the clients allowed, none: all; of a member set, the clients that it is for.
    syn_limit, syn_limit_of_source: connection openings a second, in all and of one /24 or /64; 0: any number.
    mss: SYNs carry no larger TCP maximum segment size; 0: as they come.
    echo: echo requests to the VIP's address are answered by the balancer.
    tunnel_sources: outer source addresses of mode ipip and gue vary within them, by flow; one a family at most.
    outer_checksum: a UDP checksum in mode gue.
    second_chance: mode gue names the slot's other backend during transitions, for xdp-lb decap to ask.
    health: how backends are checked while the daemon runs; None: not at all.
    slow_start_s: so long a backend that has come back takes to get its whole share; 0: at once.
    fail_closed: with all backends down packets are dropped, else served as if all were up.
    vip_address: the VIP is put on an interface where no interface has it; off: it is routed to this host."""

    affinity_s: int = 0
    sources: tuple[Network, ...] = ()
    syn_limit: int = 0
    syn_limit_of_source: int = 0
    mss: int = 0
    echo: bool = False
    tunnel_sources: tuple[Network, ...] = ()
    gue_port: int = GUE_PORT
    outer_checksum: bool = False
    second_chance: bool = False
    health: HealthCheck | None = None
    slow_start_s: int = 0
    fail_closed: bool = False
    vip_address: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", _ordered(self.sources))
        object.__setattr__(self, "tunnel_sources", _ordered(self.tunnel_sources))
        _check("affinity", self.affinity_s, range(1, LONGEST_AFFINITY_S + 1))
        _check("syn limit", self.syn_limit, range(1, MAX_SYNS_PER_S + 1))
        _check("syn limit per source", self.syn_limit_of_source, range(1, MAX_SYNS_PER_S + 1))
        _check("mss", self.mss, MSS_RANGE)
        _check("slow start", self.slow_start_s, range(1, LONGEST_SLOW_START_S + 1))
        _check("gue port", self.gue_port, range(1, 65536), off=None)
        if len({prefix.version for prefix in self.tunnel_sources}) < len(self.tunnel_sources):
            raise InvalidInput("tunnel source: two prefixes of one address family: give one per family")
        for prefix in self.tunnel_sources:
            _check_varies(prefix)

    def tunnel_source(self, version: int) -> Network | None:
        return next((prefix for prefix in self.tunnel_sources if prefix.version == version), None)


def _check_varies(prefix: Network) -> None:
    if not is_unicast(prefix):
        raise InvalidInput(f"tunnel source {prefix}: not unicast")


DEFAULTS = Options()
FIELDS = tuple(field.name for field in fields(Options))
PREFIX_FIELDS = ("sources", "tunnel_sources")


def values(options: Options) -> dict[str, Any]:
    """Field -> its value, with prefixes and the health check as text (none: empty): what JSON can hold."""
    found = {name: getattr(options, name) for name in FIELDS}
    prefixes = {name: [str(prefix) for prefix in found[name]] for name in PREFIX_FIELDS}
    return found | prefixes | {"health": str(options.health or "")}


def changed_values(options: Options) -> dict[str, Any]:
    """Those of `values` that are not the defaults."""
    plain = values(DEFAULTS)
    return {name: value for name, value in values(options).items() if value != plain[name]}


def from_values(found: Mapping[str, Any]) -> Options:
    """The way back; what is left out has its default. Raises InvalidInput, also for a name that is no field."""
    for name in found.keys() - set(FIELDS):
        raise InvalidInput(f"option {name}: unknown")
    prefixes = {name: tuple(map(parse_network, found[name])) for name in PREFIX_FIELDS if name in found}
    health = {"health": HealthCheck.parse(found["health"])} if found.get("health") else {"health": None}
    return Options(**{**found, **prefixes, **health})
