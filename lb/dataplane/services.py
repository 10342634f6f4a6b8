"""Services in the kernel: one entry of the map `services` for each, under its number.

Enters: services and where they lie. Leaves: entries that say all that the programs, and the next process here, need to
know of a service. How packets get there is lb.dataplane.lookup_maps's.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Set
from ipaddress import ip_address
from typing import Any

from lb.dataplane.allocation import Allocation
from lb.dataplane.members import address_words
from lb.model.options import Options
from lb.model.state import Mode, Service
from lb.model.vip import Protocol, Vip

_ALLOCATION_FIELDS = (
    "number",
    "ring_base",
    "ring_size",
    "member_base",
    "member_count",
    "flow_timeout_s",
    "affinity_s",
    "changed_ns",
)
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}


class ServiceTable:
    """services: a live ctypes array of struct service. modes, options: the enums `mode` and `service_option`."""

    def __init__(self, services: Any, modes: Mapping[str, int], options: Mapping[str, int]) -> None:
        self._services = services
        self._struct = services._type_
        self._modes = {Mode(name.removeprefix("MODE_").lower()): value for name, value in modes.items()}
        self._mode_names = {value: mode for mode, value in self._modes.items()}
        self._options = options
        bits = {number: e.options & self._source_bits for number, e in enumerate(services)}
        self._of_sources = {number: each for number, each in bits.items() if each}

    def __iter__(self) -> Iterator[Allocation]:
        """Those in use."""
        for entry in self._services:
            if entry.in_use:
                yield self._allocation(entry)

    def _allocation(self, entry: Any) -> Allocation:
        size = 4 if entry.family == socket.AF_INET else 16
        vip = Vip(
            ip_address(bytes(entry.address)[:size]),
            entry.first_port,
            Protocol(entry.protocol),
            entry.last_port,
            entry.prefix_length,
            bytes(entry.set).rstrip(b"\0").decode(),
        )
        mode = self._mode_names[entry.mode]
        return Allocation(vip=vip, mode=mode, **{name: getattr(entry, name) for name in _ALLOCATION_FIELDS})

    def write(self, allocation: Allocation, service: Service) -> None:
        """All but the bits of `set_sources`, which stay as they are."""
        self._services[allocation.number] = self._entry(allocation, service)

    def holds(self, allocation: Allocation, service: Service) -> bool:
        """Whether its entry is as it was written."""
        return bytes(self._services[allocation.number]) == bytes(self._entry(allocation, service))

    def _entry(self, allocation: Allocation, service: Service) -> Any:
        vip, options = allocation.vip, service.options
        entry = self._struct(
            mode=self._modes[allocation.mode],
            in_use=1,
            mss=options.mss,
            gue_port=options.gue_port,
            syn_limit=options.syn_limit,
            syn_limit_of_source=options.syn_limit_of_source,
            first_port=vip.port,
            last_port=vip.last_port,
            prefix_length=vip.prefix_length,
            family=_FAMILIES[vip.address.version],
            protocol=vip.protocol,
            **{name: getattr(allocation, name) for name in _ALLOCATION_FIELDS},
        )
        entry.options = self._bits(service) | self._of_sources.get(allocation.number, 0)
        entry.address[:] = address_words(vip.address)
        entry.set[: len(vip.set)] = vip.set.encode()
        for config, length in service.quic_lengths.items():
            entry.quic_lengths[config] = length
        return entry

    @property
    def _source_bits(self) -> int:
        return self._options["OPTION_SOURCES"] | self._options["OPTION_ONLY_SOURCES"]

    def _bits(self, service: Service) -> int:
        used = _options_used(service.options) | {"OPTION_QUIC": bool(service.quic_lengths)}
        return sum(self._options[name] for name, is_used in used.items() if is_used)

    def set_changed(self, allocation: Allocation) -> None:
        """The time of its last change alone."""
        self._services[allocation.number].changed_ns = allocation.changed_ns

    def set_sources(self, *, some: Set[int], only: Set[int]) -> None:
        """The numbers of the services whose clients are looked up, and of those that refuse who is not found."""
        bits = {
            number: self._options["OPTION_SOURCES"] | self._options["OPTION_ONLY_SOURCES"] * (number in only)
            for number in some
        }
        for number in self._of_sources.keys() | some:
            entry = self._services[number]
            entry.options = entry.options & ~self._source_bits | bits.get(number, 0)
        self._of_sources = bits

    def erase(self, allocation: Allocation) -> None:
        self._services[allocation.number] = self._struct()
        self._of_sources.pop(allocation.number, None)


def _options_used(options: Options) -> dict[str, bool]:
    return {
        "OPTION_SYN_LIMIT": bool(options.syn_limit),
        "OPTION_SYN_LIMIT_OF_SOURCE": bool(options.syn_limit_of_source),
        "OPTION_MSS": bool(options.mss),
        "OPTION_AFFINITY": bool(options.affinity_s),
        "OPTION_OUTER_CHECKSUM": options.outer_checksum,
        "OPTION_SECOND_CHANCE": options.second_chance,
    }
