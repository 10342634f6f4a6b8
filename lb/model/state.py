"""The desired state, without kernel state.

Enters: text of the command line and of lb.toml (`10.0.0.1:80/tcp`, `10.0.0.11:8080@3`). Leaves: frozen values that are
valid by construction, and new states made from old ones. No access to files, network or kernel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import combinations, pairwise

from lb.errors import AlreadyExists, InvalidInput, NotFound
from lb.hashing.maglev import RING_SIZES, is_prime, nearest_primes
from lb.model.health_check import Kind
from lb.model.options import DEFAULTS, Network, Options
from lb.model.vip import Address, Protocol, Vip, join_port, split_port

MAX_WEIGHT = 65535  # as ipvsadm's
DEFAULT_RING_SIZE = 16381
DEFAULT_FLOW_TIMEOUT_S = 3600
SLOTS_PER_BACKEND = 10  # below this, Maglev's shares are off by tens of percent


class Mode(StrEnum):
    """How packets reach a backend, in the terms of IPVS."""

    NAT = "nat"
    DR = "dr"
    IPIP = "ipip"
    GUE = "gue"

    @property
    def is_tunnel(self) -> bool:
        return self in (Mode.IPIP, Mode.GUE)


class XdpMode(StrEnum):
    """Where the program runs: in the driver, in the kernel's generic path, or in the first of the
    two that works."""

    AUTO = "auto"
    NATIVE = "native"
    GENERIC = "generic"


@dataclass(frozen=True, slots=True)
class Backend:
    """A server behind a service: `ADDR[:PORT][@WEIGHT]`. Port 0 stands for the port the client
    asked for: in a service with a port, that port. server_ids: what names it in QUIC connection IDs, each
    `CONFIG:HEX`, the config rotation codepoint (0 to 6) and the ID of 1 to 15 bytes. down: health checks have found it
    dead; only lb.model.conditions says so, of what is in force: never desired, never stored."""

    address: Address
    port: int = 0
    weight: int = 1
    draining: bool = False
    server_ids: tuple[str, ...] = ()
    down: bool = False
    _text: str = field(init=False, repr=False, compare=False)  # an address takes long to write and to hash

    def __post_init__(self) -> None:
        object.__setattr__(self, "_text", join_port(self.address, self.port))
        object.__setattr__(self, "server_ids", tuple(sorted(set(map(_server_id, self.server_ids)))))
        if not 0 <= self.weight <= MAX_WEIGHT:
            raise InvalidInput(f"backend {self}: weight {self.weight}: out of range 0 to {MAX_WEIGHT}")
        if self.address.is_unspecified or self.address.is_multicast or self.address.is_loopback:
            raise InvalidInput(f"backend {self}: not a unicast address of another host")

    @classmethod
    def parse(cls, text: str, default_port: int = 0) -> Backend:
        where, at, weight = text.partition("@")
        address, port = split_port(where, f"backend {text}")
        if at and not (weight.isascii() and weight.isdigit()):
            raise InvalidInput(f"backend {text}: weight {weight or '(empty)'}: not a number from 0 to {MAX_WEIGHT}")
        return cls(address, default_port if port is None else port, int(weight) if at else 1)

    def __str__(self) -> str:
        return self._text

    def __hash__(self) -> int:
        return hash(self._text)

    @property
    def ring_weight(self) -> int:
        """Its share of new connections: none while it drains or is down."""
        return 0 if self.draining or self.down else self.weight

    @property
    def sort_key(self) -> tuple[int, int, int]:
        return self.address.version, int(self.address), self.port


def _server_id(text: str) -> str:
    match = re.fullmatch(r"([0-6]):((?:[0-9a-fA-F]{2}){1,15})", text)
    if match is None:
        raise InvalidInput(f"server id {text or '(empty)'}: not CONFIG:HEX: 0 to 6, a colon, 1 to 15 bytes in hex")
    return f"{match[1]}:{match[2].lower()}"


def check_ring_size(size: int) -> None:
    if size not in RING_SIZES:
        raise InvalidInput(f"ring size {size}: out of range {RING_SIZES[0]} to {RING_SIZES[-1]}")
    if not is_prime(size):
        below, above = nearest_primes(size)
        raise InvalidInput(f"ring size {size}: not a prime: the nearest are {below} and {above}")


@dataclass(frozen=True, slots=True)
class Service:
    """A VIP, the way its packets travel, and its backends in the order of their addresses."""

    vip: Vip
    mode: Mode = Mode.NAT
    backends: tuple[Backend, ...] = ()
    ring_size: int = DEFAULT_RING_SIZE
    flow_timeout_s: int = DEFAULT_FLOW_TIMEOUT_S
    options: Options = DEFAULTS

    def __post_init__(self) -> None:
        check_ring_size(self.ring_size)
        self._check_options()
        if not 1 <= self.flow_timeout_s <= 7 * 86400:
            raise InvalidInput(f"{self.vip}: flow timeout {self.flow_timeout_s} s: out of range 1 s to 7 days")
        if self.options.affinity_s > self.flow_timeout_s:
            raise InvalidInput(
                f"{self.vip}: affinity {self.options.affinity_s} s: longer than the flow timeout,"
                f" {self.flow_timeout_s} s"
            )
        in_full = map(self._in_full, self.backends)
        object.__setattr__(self, "backends", tuple(sorted(in_full, key=lambda b: b.sort_key)))
        self._check_backends()

    def _in_full(self, backend: Backend) -> Backend:
        """`10.0.0.11` in a service on port 80 is the same backend as `10.0.0.11:80`."""
        return backend if backend.port else replace(backend, port=self.vip.fixed_port)

    @property
    def quic_lengths(self) -> dict[int, int]:
        """Config rotation codepoint -> bytes of its server IDs."""
        ids = (server_id.split(":") for backend in self.backends for server_id in backend.server_ids)
        return {int(config): len(text) // 2 for config, text in ids}

    def _check_options(self) -> None:
        options, plain = self.options, DEFAULTS
        if options == plain and not self.vip.set:  # as most are
            return
        for name, wrong, why in (
            ("second chance", options.second_chance and self.mode is not Mode.GUE, "needs mode gue"),
            ("outer checksum", options.outer_checksum and self.mode is not Mode.GUE, "needs mode gue"),
            ("gue port", options.gue_port != plain.gue_port and self.mode is not Mode.GUE, "needs mode gue"),
            ("tunnel source", options.tunnel_sources and not self.mode.is_tunnel, "needs mode ipip or gue"),
            ("mss", options.mss and self.vip.protocol is not Protocol.TCP, "needs a TCP service"),
            ("syn limit", options.syn_limit and self.vip.protocol is not Protocol.TCP, "needs a TCP service"),
            (
                "syn limit per source",
                options.syn_limit_of_source and self.vip.protocol is not Protocol.TCP,
                "needs a TCP service",
            ),
            ("sources", self.vip.set and not options.sources, "missing: a member set requires source prefixes"),
            (
                "sources",
                any(prefix.version != self.vip.address.version for prefix in options.sources),
                f"not all IPv{self.vip.address.version}",
            ),
            ("echo", options.echo and not self.vip.is_one_address, "needs a VIP of one address"),
            ("slow start", options.slow_start_s and not options.health, "needs a health check"),
            ("fail closed", options.fail_closed and not options.health, "needs a health check"),
            *self._faults_of_health_check(),
        ):
            if wrong:
                raise InvalidInput(f"{self.vip}: {name}: {why}")

    def _faults_of_health_check(self) -> Iterator[tuple[str, object, str]]:
        check = self.options.health
        if check is None or check.kind is Kind.SCRIPT:
            return
        in_full = all(self._in_full(backend).port for backend in self.backends)
        yield "health", not (check.port or in_full), "port missing: give port=N"
        through_vip = self.mode is not Mode.NAT
        yield (
            "health",
            through_vip and not self.vip.is_one_address,
            "needs a VIP of one address or mode nat, or kind script",
        )

    def _check_backends(self) -> None:
        self._check_server_ids()
        for backend in self.backends:
            self._check_backend(backend)
        for one, other in pairwise(self.backends):
            if one.sort_key == other.sort_key:
                raise AlreadyExists(f"backend {one}: already in service {self.vip}")
        if len(self.backends) * SLOTS_PER_BACKEND > self.ring_size:
            raise InvalidInput(
                f"{self.vip}: ring size {self.ring_size}: too small for {len(self.backends)}"
                f" backends: at least {SLOTS_PER_BACKEND} slots each"
            )

    def _check_server_ids(self) -> None:
        owners: dict[str, Backend] = {}
        lengths = self.quic_lengths
        for backend, server_id in ((b, i) for b in self.backends for i in b.server_ids):
            if self.vip.protocol is not Protocol.UDP:
                raise InvalidInput(f"backend {backend}: server id {server_id}: needs a UDP service")
            if owners.setdefault(server_id, backend) is not backend:
                raise InvalidInput(f"backend {backend}: server id {server_id}: already used by {owners[server_id]}")
            config, text = server_id.split(":")
            if len(text) // 2 != lengths[int(config)]:
                raise InvalidInput(
                    f"backend {backend}: server id {server_id}: length differs from other IDs of config {config}"
                )

    def _check_backend(self, backend: Backend) -> None:
        if backend.address.version != self.vip.address.version and not self.mode.is_tunnel:
            raise InvalidInput(
                f"backend {backend}: mode {self.mode} needs an IPv{self.vip.address.version} backend for {self.vip}"
            )
        if self.vip.holds(backend.address):
            raise InvalidInput(f"backend {backend}: is the VIP's own address")
        if self.mode is not Mode.NAT and backend.port != self.vip.fixed_port:
            raise InvalidInput(
                f"backend {backend}: mode {self.mode} does not translate ports: leave the port out"
                + (f" or use {self.vip.port}" if self.vip.fixed_port else "")
            )

    def __str__(self) -> str:
        return str(self.vip)

    def backend(self, name: Backend) -> Backend:
        """The service's own entry with `name`'s address and port."""
        wanted = self._in_full(name)
        for backend in self.backends:
            if backend.sort_key == wanted.sort_key:
                return backend
        raise NotFound(f"backend {wanted}: not in service {self.vip}")

    def with_backend(self, backend: Backend) -> Service:
        return replace(self, backends=(*self.backends, backend))

    def without_backend(self, name: Backend) -> Service:
        gone = self.backend(name)
        return replace(self, backends=tuple(b for b in self.backends if b is not gone))

    def changing_backend(self, name: Backend, change: Callable[[Backend], Backend]) -> Service:
        old = self.backend(name)
        return replace(self, backends=tuple(change(b) if b is old else b for b in self.backends))


def _check_together(services: tuple[Service, ...]) -> None:
    """What no service alone can see: sets without their VIP, sources that two sets claim, ranges that cross."""
    unusual = [s for s in services if s.vip.set or not s.vip.is_exact]
    if not unusual:
        return
    vips = {service.vip for service in services}
    for service in unusual:
        if service.vip.set and service.vip.own not in vips:
            raise InvalidInput(f"vip {service.vip}: member set of {service.vip.own}, which does not exist")
    _check_sources([s for s in unusual if s.vip.set])
    _check_ranges([s.vip for s in unusual if not s.vip.set])


def _check_sources(sets: list[Service]) -> None:
    owners: dict[tuple[Vip, Network], Service] = {}
    for service, prefix in ((s, p) for s in sets for p in s.options.sources):
        if (owner := owners.setdefault((service.vip.own, prefix), service)) is not service:
            raise InvalidInput(f"vip {service.vip}: source {prefix}: already used by {owner.vip}")


def _check_ranges(vips: list[Vip]) -> None:
    """Ranges of one prefix may lie in one another, but not cross."""
    alike: dict[tuple[Network, Protocol], list[Vip]] = {}
    for vip in vips:
        alike.setdefault((vip.network, vip.protocol), []).append(vip)
    for group in alike.values():
        for one, other in combinations(group, 2):
            if _cross(one.ports, other.ports):
                raise InvalidInput(f"vip {other}: port range overlaps {one}")


def _cross(one: range, other: range) -> bool:
    first, second = sorted((one, other), key=lambda ports: ports.start)
    return first.start < second.start < first.stop < second.stop


def no_such_service(vip: Vip) -> NotFound:
    return NotFound(f"vip {vip}: no such service: see xdp-lb vip list")


@dataclass(frozen=True, slots=True)
class Interface:
    """An interface that the balancer is attached to, and its configured mode. replies_only: nobody named it, nat
    replies arrive there: no VIP address is put on it."""

    name: str
    xdp_mode: XdpMode = XdpMode.AUTO
    replies_only: bool = False


@dataclass(frozen=True, slots=True)
class OwnAddress:
    """A VIP that xdp-lb itself puts on an interface at attach, and takes off again at detach.
    `interface` is its home (lb.control.vip_addresses), also while that is detached; empty until there has been one."""

    interface: str
    address: Address


@dataclass(frozen=True, slots=True)
class State:
    """All that is desired in one network namespace. Services keep the order of their VIPs, own
    addresses theirs, interfaces that in which they were attached."""

    services: tuple[Service, ...] = ()
    interfaces: tuple[Interface, ...] = ()
    own_addresses: tuple[OwnAddress, ...] = ()

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.services, key=lambda s: s.vip.sort_key))
        for one, other in pairwise(ordered):
            if one.vip == other.vip:
                raise AlreadyExists(f"vip {one.vip}: already exists")
        object.__setattr__(self, "services", ordered)
        _check_together(ordered)
        own = tuple(sorted(self.own_addresses, key=lambda o: (o.address.version, int(o.address))))
        object.__setattr__(self, "own_addresses", own)

    def service(self, vip: Vip) -> Service:
        for service in self.services:
            if service.vip == vip:
                return service
        raise no_such_service(vip)

    def interface(self, name: str) -> Interface | None:
        return next((i for i in self.interfaces if i.name == name), None)

    def with_interface(self, interface: Interface) -> State:
        """With `interface` last, or in the place of the one of its name."""
        by_name = {i.name: i for i in self.interfaces} | {interface.name: interface}
        return replace(self, interfaces=tuple(by_name.values()))

    def without_interface(self, name: str) -> State:
        return replace(self, interfaces=tuple(i for i in self.interfaces if i.name != name))

    def with_service(self, service: Service) -> State:
        return replace(self, services=(*self.services, service))

    def without_service(self, vip: Vip) -> State:
        gone = self.service(vip)
        for service in self.services:
            if service.vip.set and service.vip.own == vip:
                raise InvalidInput(f"vip {vip}: has the member set {service.vip}: remove it first")
        return replace(self, services=tuple(s for s in self.services if s is not gone))

    def replacing_service(self, service: Service) -> State:
        """The same state with `service` in the place of the one that has its VIP."""
        old = self.service(service.vip)
        return replace(self, services=tuple(service if s is old else s for s in self.services))
