"""The maps by which packets find services, brought in line with what lb.dataplane.lookup says they should hold.

Enters: services and numbers. Leaves: entries, new ones before those that go, so that at every moment each packet finds
the service that it had or the one that it gets.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from lb.dataplane.lookup import (
    NO_SERVICE,
    TABLES,
    VIP_ADDRESS,
    Key,
    Members,
    address_key,
    entries,
    exact_table,
    is_plain,
    service_key,
)
from lb.dataplane.members import address_words
from lb.model.state import Service
from lb.model.vip import Vip

MAX_EPOCHS = 2**32 - 1
VIP_FILTER_BITS = 12  # as in xdp/bpf/lb/config.h


class Table:
    """One map of u32 values, and what it holds; this process is the only writer."""

    def __init__(self, table: Any) -> None:
        self._map = table
        self.writes = 0

    @cached_property
    def held(self) -> dict[bytes, int]:
        return {bytes(key): value for key, value in self._map.items()}

    def key(self, key: Key) -> bytes:
        """As the map has it."""
        struct = self._map.key_type()
        for name in key.__slots__:
            value = getattr(key, name)
            if isinstance(value, IPv4Address):
                value = int(value)
            if isinstance(value, IPv6Address):
                getattr(struct, name)[:] = address_words(value)
            elif isinstance(value, bytes):
                getattr(struct, name)[: len(value)] = value
            else:
                setattr(struct, name, value)
        return bytes(struct)

    def reread(self) -> int:
        """How many entries others have changed since."""
        found = {bytes(key): value for key, value in self._map.items()}
        changed = len(dict(found.items() ^ self.held.items()))
        self.held = found
        return changed

    def add(self, wanted: Mapping[bytes, int]) -> None:
        for key, value in wanted.items():
            if self.held.get(key) != value:
                self._map[self._map.key_type.from_buffer_copy(key)] = value
                self.held[key] = value
                self.writes += 1

    def remove(self, keys: Iterable[bytes]) -> None:
        for key in list(keys):
            del self._map[self._map.key_type.from_buffer_copy(key)]
            del self.held[key]
            self.writes += 1


def vip_filter(addresses: Iterable[bytes]) -> list[int]:
    """What struct control has under this name: xdp/bpf/lb/source.h asks it before it looks a client's address up."""
    bits = [0] * (1 << VIP_FILTER_BITS - 6)
    for address in addresses:
        words = [int.from_bytes(address[at : at + 4], sys.byteorder) for at in range(0, len(address), 4)]
        word = words[0] if len(words) == 1 else words[1] ^ words[3]
        bit = (word * 0x9E3779B1 & 0xFFFFFFFF) >> 32 - VIP_FILTER_BITS
        bits[bit // 64] |= 1 << bit % 64
    return bits


@dataclass(frozen=True, slots=True)
class Plain:
    """A service that has but the entries of its VIP and of its address."""

    service: Service
    number: int
    keys: frozenset[bytes]


class LookupMaps:
    """All of the tables. `maps.map(name)` gives each, such as xdp.object.BpfObject. control: a live struct control.

    Services that have not changed since the last time cost next to nothing: there may be thousands."""

    def __init__(self, maps: Any, control: Any) -> None:
        self._control = control
        self._announced_writes = 0
        self._tables = {name: Table(maps.map(name)) for name in TABLES}
        self._plain: dict[Vip, Plain] = {}
        self._wanted: dict[str, set[bytes]] = {}

    def add(self, services: Iterable[Service], numbers: Mapping[Vip, int], members: Members) -> None:
        """What these services want, beside what is there; `prune` takes away the rest."""
        plain, unusual = {}, []
        for service in services:
            known = self._plain.get(service.vip)
            if known and known.service is service and known.number == numbers[service.vip]:
                plain[service.vip] = known
            elif is_plain(service):
                plain[service.vip] = self._add_plain(service, numbers[service.vip])
            else:
                unusual.append(service)
        self._plain = plain
        self._add_unusual(entries(unusual, numbers, members))

    def _add_plain(self, service: Service, number: int) -> Plain:
        table = self._tables[exact_table(service.vip)]
        entries = {table.key(service_key(service.vip)): number, table.key(address_key(service.vip)): VIP_ADDRESS}
        table.add(entries)
        return Plain(service, number, frozenset(entries))

    def _add_unusual(self, found: Mapping[str, Mapping[Key, int]]) -> None:
        for name, table in self._tables.items():
            wanted = {table.key(key): value for key, value in found[name].items()}
            table.add(wanted)
            self._wanted[name] = set(wanted)
        for vip, plain in self._plain.items():
            self._wanted[exact_table(vip)] |= plain.keys

    def prune(self) -> None:
        """Takes away what the last `add` did not want."""
        for name, table in self._tables.items():
            table.remove(table.held.keys() - self._wanted[name])

    def reread(self) -> int:
        """How many entries others have changed since: `add` and `prune` repair them."""
        changed = sum(table.reread() for table in self._tables.values())
        if changed:
            self._plain = {}
        return changed

    def forget(self, number: int) -> None:
        """A service goes before the next `prune`: nothing may lead to its number, which another one may get."""
        for name, table in self._tables.items():
            if name == "quic_members":
                table.remove([key for key in table.held if key.startswith(number.to_bytes(4, sys.byteorder))])
            elif not name.startswith("networks"):
                table.remove([key for key, value in table.held.items() if value == number])
        self._plain = {vip: plain for vip, plain in self._plain.items() if plain.number != number}

    def announce(self) -> None:
        """Tells the programs what they need not look for, and to forget what they know."""
        if self._exact_writes != self._announced_writes:
            self._announced_writes = self._exact_writes
            self._control.epoch = self._control.epoch % MAX_EPOCHS + 1
            self._control.vip_filter[:] = vip_filter(self._addresses)
        self._control.wide_services = self._wide_services
        self._control.echo_addresses = self._echo_addresses

    @property
    def _exact_writes(self) -> int:
        """How often the tables of which the programs keep copies have been written."""
        return sum(self._tables[f"services{version}"].writes for version in (4, 6))

    @property
    def _wide_services(self) -> int:
        """Whether a packet that no exact VIP fits may have a service all the same: nonzero."""
        return sum(len(self._tables[f"ranges{version}"].held) for version in (4, 6))

    @property
    def _addresses(self) -> Iterator[bytes]:
        """Of VIPs, as packets have them."""
        for version, size in ((4, 4), (6, 16)):
            held = self._tables[f"services{version}"].held
            yield from (key[:size] for key, value in held.items() if value == VIP_ADDRESS)

    @property
    def server_ids(self) -> int:
        return len(self._tables["quic_members"].held)

    @property
    def _echo_addresses(self) -> int:
        tables = (self._tables[f"services{version}"] for version in (4, 6))
        return sum(list(table.held.values()).count(NO_SERVICE) for table in tables)
