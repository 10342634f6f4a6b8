"""The desired state: what the operator asked for, and nothing about how the kernel holds it.

Enters: the text forms of the command line and of lb.toml (`10.0.0.1:80/tcp`, `10.0.0.11:8080@3`).
Leaves: frozen values that are valid by construction, and new states made from old ones. Nothing
here touches a file, the network or the kernel.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import pairwise

from lb.errors import AlreadyExists, InvalidInput, NotFound
from lb.maglev import RING_SIZES, is_prime, nearest_primes

Address = IPv4Address | IPv6Address

MAX_WEIGHT = 65535  # as ipvsadm's
DEFAULT_RING_SIZE = 16381
DEFAULT_FLOW_TIMEOUT_S = 3600
SLOTS_PER_BACKEND = 10  # below this, Maglev's shares are off by tens of percent


class Protocol(IntEnum):
    """The transport of a service: its value is the number in the IP header."""

    TCP = 6
    UDP = 17

    @property
    def label(self) -> str:
        return self.name.lower()

    @classmethod
    def parse(cls, text: str) -> Protocol:
        try:
            return cls[text.upper()]
        except KeyError:
            raise InvalidInput(f"protocol {text}: not known: use tcp or udp") from None


class Mode(StrEnum):
    """How packets reach a backend, in the terms of IPVS."""

    NAT = "nat"
    DR = "dr"


class XdpMode(StrEnum):
    """Where the program runs: in the driver, in the kernel's generic path, or in the first of the
    two that works."""

    AUTO = "auto"
    NATIVE = "native"
    GENERIC = "generic"


def parse_address(text: str) -> Address:
    try:
        address = ip_address(text)
    except ValueError:
        raise InvalidInput(f"address {text or '(empty)'}: not an IPv4 or IPv6 address") from None
    if isinstance(address, IPv6Address) and address.scope_id:
        raise InvalidInput(f"address {text}: zones are not supported")
    return address


def _parse_port(text: str, whole: str) -> int:
    if text.isascii() and text.isdigit() and int(text) <= 65535:
        return int(text)
    raise InvalidInput(f"{whole}: port {text or '(empty)'}: not a number from 0 to 65535")


def _split_port(text: str, whole: str) -> tuple[Address, int | None]:
    """`ADDR`, `ADDR:PORT`, `V6`, `[V6]` or `[V6]:PORT` -> address, port."""
    match = re.fullmatch(r"\[([^\]]*)\](?::(.*))?", text)
    match = match or re.fullmatch(r"([^:]*)(?::([^:]*))?", text)
    host, port = match.groups() if match else (text, None)
    address = parse_address(host)
    return address, None if port is None else _parse_port(port, whole)


def _join_port(address: Address, port: int) -> str:
    return f"[{address}]:{port}" if isinstance(address, IPv6Address) else f"{address}:{port}"


@dataclass(frozen=True, slots=True)
class Vip:
    """A virtual service address: `ADDR:PORT/PROTO`. Port 0 stands for every port that has no
    service of its own."""

    address: Address
    port: int
    protocol: Protocol = Protocol.TCP
    sort_key: tuple[int, int, int, int] = field(init=False, repr=False, compare=False)
    _hash: int = field(init=False, repr=False, compare=False)  # an address takes long to hash, and a VIP is a key

    def __post_init__(self) -> None:
        key = (self.address.version, int(self.address), self.port, int(self.protocol))
        object.__setattr__(self, "sort_key", key)
        object.__setattr__(self, "_hash", hash(key))
        if self.address.is_unspecified or self.address.is_multicast or self.address.is_loopback:
            raise InvalidInput(f"vip {self}: not a unicast address that can be served")

    @classmethod
    def parse(cls, text: str) -> Vip:
        where, slash, protocol = text.partition("/")
        address, port = _split_port(where, f"vip {text}")
        if port is None:
            raise InvalidInput(f"vip {text}: a port is missing: write {_join_port(address, 80)}/tcp (port 0: any)")
        return cls(address, port, Protocol.parse(protocol) if slash else Protocol.TCP)

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return f"{_join_port(self.address, self.port)}/{self.protocol.label}"


@dataclass(frozen=True, slots=True)
class Backend:
    """A server behind a service: `ADDR[:PORT][@WEIGHT]`. Port 0 stands for the port the client
    asked for: in a service with a port, that port."""

    address: Address
    port: int = 0
    weight: int = 1
    draining: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= MAX_WEIGHT:
            raise InvalidInput(f"backend {self}: weight {self.weight}: out of range 0 to {MAX_WEIGHT}")
        if self.address.is_unspecified or self.address.is_multicast or self.address.is_loopback:
            raise InvalidInput(f"backend {self}: not a unicast address of another host")

    @classmethod
    def parse(cls, text: str, default_port: int = 0) -> Backend:
        where, at, weight = text.partition("@")
        address, port = _split_port(where, f"backend {text}")
        if at and not (weight.isascii() and weight.isdigit()):
            raise InvalidInput(f"backend {text}: weight {weight or '(empty)'}: not a number from 0 to {MAX_WEIGHT}")
        return cls(address, default_port if port is None else port, int(weight) if at else 1)

    def __str__(self) -> str:
        return _join_port(self.address, self.port)

    @property
    def ring_weight(self) -> int:
        """Its share of new connections: none while it drains."""
        return 0 if self.draining else self.weight

    @property
    def sort_key(self) -> tuple[int, int, int]:
        return self.address.version, int(self.address), self.port


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

    def __post_init__(self) -> None:
        check_ring_size(self.ring_size)
        if not 1 <= self.flow_timeout_s <= 7 * 86400:
            raise InvalidInput(f"{self.vip}: flow timeout {self.flow_timeout_s} s: out of range 1 s to 7 days")
        in_full = map(self._in_full, self.backends)
        object.__setattr__(self, "backends", tuple(sorted(in_full, key=lambda b: b.sort_key)))
        self._check_backends()

    def _in_full(self, backend: Backend) -> Backend:
        """`10.0.0.11` in a service on port 80 is the same backend as `10.0.0.11:80`."""
        return backend if backend.port else replace(backend, port=self.vip.port)

    def _check_backends(self) -> None:
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

    def _check_backend(self, backend: Backend) -> None:
        if backend.address.version != self.vip.address.version:
            raise InvalidInput(
                f"backend {backend}: mode {self.mode} needs an IPv{self.vip.address.version} backend for {self.vip}"
            )
        if backend.address == self.vip.address:
            raise InvalidInput(f"backend {backend}: is the VIP's own address")
        if self.mode is Mode.DR and backend.port != self.vip.port:
            raise InvalidInput(f"backend {backend}: mode dr keeps the port: leave it out or say {self.vip.port}")

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


@dataclass(frozen=True, slots=True)
class Interface:
    """An interface that the balancer is attached to, and the mode the operator asked for."""

    name: str
    xdp_mode: XdpMode = XdpMode.AUTO


@dataclass(frozen=True, slots=True)
class OwnAddress:
    """A VIP that xdp-lb itself puts on an interface at attach, and takes off again at detach.
    `interface` is empty until there has been one to put it on."""

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
                raise AlreadyExists(f"vip {one.vip}: already served")
        object.__setattr__(self, "services", ordered)
        own = tuple(sorted(self.own_addresses, key=lambda o: (o.address.version, int(o.address))))
        object.__setattr__(self, "own_addresses", own)

    def service(self, vip: Vip) -> Service:
        for service in self.services:
            if service.vip == vip:
                return service
        raise NotFound(f"vip {vip}: not served: see xdp-lb vip list")

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
        return replace(self, services=tuple(s for s in self.services if s is not gone))

    def replacing_service(self, service: Service) -> State:
        """The same state with `service` in the place of the one that has its VIP."""
        old = self.service(service.vip)
        return replace(self, services=tuple(service if s is old else s for s in self.services))
