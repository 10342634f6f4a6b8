"""Which packets find which service: the contents of the maps that lead to it (pure).

Enters: services, their numbers, and the numbers of their members. Leaves: for each map, keys as the header names their
fields, and values. Everything follows from the services alone, so that what is in force can always be compared with it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network

from lb.dataplane.members import MemberKey, member_key
from lb.model.options import Network
from lb.model.state import Service
from lb.model.vip import Address, Protocol, Vip

ECHO = {4: socket.IPPROTO_ICMP, 6: socket.IPPROTO_ICMPV6}
NO_SERVICE = 0xFFFFFFFF
VIP_ADDRESS = 0xFFFFFFFE  # the value of a bare address, under port and protocol 0: no client has it
PORT_BITS = 16


@dataclass(frozen=True, slots=True)
class ServiceKey:
    address: Address
    port: int
    protocol: int


@dataclass(frozen=True, slots=True)
class NetworkKey:
    prefix_length: int
    address: Address


@dataclass(frozen=True, slots=True)
class RangeKey:
    prefix_length: int
    network: Address
    network_length: int
    protocol: int
    port: int


@dataclass(frozen=True, slots=True)
class SourceKey:
    prefix_length: int
    service: int
    address: Address


@dataclass(frozen=True, slots=True)
class QuicKey:
    service: int
    config: int
    server_id: bytes


Key = ServiceKey | NetworkKey | RangeKey | SourceKey | QuicKey
Entries = dict[Key, int]
Members = Callable[[Vip], Mapping[MemberKey, int]]  # of one service, their numbers

TABLES = (
    "services4",
    "services6",
    "networks4",
    "networks6",
    "ranges4",
    "ranges6",
    "sources4",
    "sources6",
    "quic_members",
)


def is_plain(service: Service) -> bool:
    """One VIP, found by one lookup, and nothing in other tables."""
    vip, options = service.vip, service.options
    return vip.is_exact and not (vip.set or options.echo or options.sources or service.quic_lengths)


def entries(services: Iterable[Service], numbers: Mapping[Vip, int], members: Members) -> dict[str, Entries]:
    """Map name -> key -> value, for all of TABLES. members: called for services with server IDs."""
    found: dict[str, Entries] = {name: {} for name in TABLES}
    wanted = list(services)
    own = [service.vip for service in wanted if not service.vip.set]
    for vip in (vip for vip in own if vip.is_exact):
        found[exact_table(vip)][service_key(vip)] = numbers[vip]
    for vip in (vip for vip in own if vip.is_one_address):
        found[exact_table(vip)][address_key(vip)] = VIP_ADDRESS
    _add_wide(found, [vip for vip in own if not vip.is_exact], numbers)
    for service in wanted:
        _add_sources(found, service, numbers)
        _add_quic(found, service, numbers[service.vip], members)
        _add_echo(found, service)
    return found


def exact_table(vip: Vip) -> str:
    return f"services{vip.address.version}"


def service_key(vip: Vip) -> ServiceKey:
    return ServiceKey(vip.address, vip.port, vip.protocol)


def address_key(vip: Vip) -> ServiceKey:
    return ServiceKey(vip.address, 0, 0)


def _add_echo(found: dict[str, Entries], service: Service) -> None:
    if service.options.echo:
        address = service.vip.address
        found[f"services{address.version}"][ServiceKey(address, 0, ECHO[address.version])] = NO_SERVICE


def _add_sources(found: dict[str, Entries], service: Service, numbers: Mapping[Vip, int]) -> None:
    """Under the number of the VIP's own service; where a set and the VIP itself name one prefix, the set has it."""
    table = found[f"sources{service.vip.address.version}"]
    own = numbers[service.vip.own]
    for prefix in service.options.sources:
        key = SourceKey(32 + prefix.prefixlen, own, prefix.network_address)
        if service.vip.set or key not in table:
            table[key] = numbers[service.vip]


def _add_quic(
    found: dict[str, Entries],
    service: Service,
    number: int,
    members: Members,
) -> None:
    if not service.quic_lengths:
        return
    held = members(service.vip)
    for backend, text in ((b, i) for b in service.backends for i in b.server_ids):
        config, server_id = text.split(":")
        key = QuicKey(number, int(config), bytes.fromhex(server_id))
        found["quic_members"][key] = held[member_key(backend)]


# VIP prefixes and port ranges


def _add_wide(found: dict[str, Entries], vips: Sequence[Vip], numbers: Mapping[Vip, int]) -> None:
    for network in {vip.network for vip in vips}:
        version = network.version
        found[f"networks{version}"][NetworkKey(network.prefixlen, network.network_address)] = network.prefixlen
        covering = [vip for vip in vips if _covers(vip.network, network)]
        for vip, port, length in _blocks_by_service(covering):
            fixed = network.max_prefixlen + 16  # the network, its length, the protocol
            key = RangeKey(fixed + length, network.network_address, network.prefixlen, vip.protocol, port)
            found[f"ranges{version}"][key] = numbers[vip]


def _covers(one: Network, other: Network) -> bool:
    if isinstance(one, IPv4Network) and isinstance(other, IPv4Network):
        return other.subnet_of(one)
    return isinstance(one, IPv6Network) and isinstance(other, IPv6Network) and other.subnet_of(one)


def _blocks_by_service(vips: Iterable[Vip]) -> Iterator[tuple[Vip, int, int]]:
    """Who has which ports: (vip, first port, prefix length). The longest prefix first, in it the narrowest range."""
    ordered = sorted(vips, key=lambda vip: (-vip.prefix_length, len(vip.ports)))
    for protocol in Protocol:
        free = [range(1 << PORT_BITS)]
        for vip in (vip for vip in ordered if vip.protocol == protocol):
            for part in _common(free, vip.ports):
                yield from ((vip, port, length) for port, length in port_blocks(part))
            free = _without(free, vip.ports)


def _common(parts: Iterable[range], ports: range) -> list[range]:
    cut = (range(max(part.start, ports.start), min(part.stop, ports.stop)) for part in parts)
    return [part for part in cut if part]


def _without(parts: Iterable[range], ports: range) -> list[range]:
    cut = []
    for part in parts:
        cut += [range(part.start, min(part.stop, ports.start)), range(max(part.start, ports.stop), part.stop)]
    return [part for part in cut if part]


def port_blocks(ports: range) -> Iterator[tuple[int, int]]:
    """The prefixes that make up a range: (first port, length in bits), at most 30 of them."""
    at = ports.start
    while at < ports.stop:
        size = at & -at or 1 << PORT_BITS
        while at + size > ports.stop:
            size //= 2
        yield at, PORT_BITS + 1 - size.bit_length()
        at += size
