"""The balancer's surroundings in memory: a dataplane and a network for tests, without a kernel.

Enters: what the balancer writes. Leaves: the plans that the kernel's rings would give, since
members and slot words are really kept, by lb.hashing.maglev and lb.hashing.ring. Each write passes a Fuse, which a
test sets to blow at a chosen one, in the middle of a change.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network, ip_address, ip_interface

from lb.dataplane.members import numbered
from lb.errors import DataplaneError, NoRoute
from lb.hashing import maglev, ring
from lb.model.forwarding import (
    NONE_OPEN,
    UNKNOWN,
    Attachment,
    Counters,
    InstalledNextHop,
    NextHop,
    OpenConnections,
    Statistics,
)
from lb.model.state import Backend, Interface, Mode, OwnAddress, Service, XdpMode
from lb.model.vip import Address, Vip


def refuse() -> None:
    raise DataplaneError("memory: the write is refused: the fuse has blown")


@dataclass
class Fuse:
    """Counts the writes of all doubles that share it."""

    writes: int = 0
    _blows: range = range(0)
    _blow: Callable[[], None] = refuse

    def fail_after(self, writes: int, *, times: int = 1, blow: Callable[[], None] = refuse) -> None:
        """Let `writes` more writes through, then `blow` instead of each of the next `times`."""
        self._blows = range(self.writes + writes, self.writes + writes + times)
        self._blow = blow

    def mend(self) -> None:
        self._blows = range(0)
        self._blow = refuse

    def burn(self) -> None:
        """To be called before each write."""
        self.writes += 1
        if self.writes - 1 in self._blows:
            self._blow()


@dataclass
class MemoryRing:
    """One service as the maps hold it: members by id, and slot words that name them."""

    mode: Mode
    words: array[int]
    ids: dict[Backend, int] = field(default_factory=dict)  # keys by `_key`
    hops: dict[int, NextHop] = field(default_factory=dict)

    @property
    def currents(self) -> list[Backend | None]:
        """Slot -> the backend that new flows go to."""
        backends = {member: backend for backend, member in self.ids.items()}
        return [backends.get(ring.current_member(word)) for word in self.words]

    def numbers(self, service: Service) -> dict[Backend, int]:
        """The member ids that the backends of `service` have or get."""
        return numbered(self.ids, [_key(b) for b in service.backends])


def _key(backend: Backend) -> Backend:
    """A member is an address and a port, whatever its weight."""
    return Backend(backend.address, backend.port)


def _empty_ring(service: Service) -> MemoryRing:
    return MemoryRing(service.mode, array("I", bytes(4 * service.ring_size)))


def _words(held: MemoryRing, service: Service) -> array[int]:
    """The words that follow those of `held`, whose members include all of `service`."""
    members = [held.ids[_key(b)] for b in service.backends]
    weights = {str(b): b.ring_weight for b in service.backends}
    wanted = maglev.table(weights, service.ring_size, members) or array("H", bytes(2 * service.ring_size))
    alive = frozenset(held.ids[_key(b)] for b in service.backends if not b.down)
    return ring.transition(held.words, wanted, alive)


@dataclass
class MemoryDataplane:
    """`foreign` names the interfaces on which someone else's program runs."""

    fuse: Fuse = field(default_factory=Fuse)
    foreign: set[str] = field(default_factory=set)
    rings: dict[Vip, MemoryRing] = field(default_factory=dict)
    counters: dict[tuple[Vip, Backend], Counters] = field(default_factory=dict)
    opened: dict[tuple[Vip, str], OpenConnections] = field(default_factory=dict)  # open connections, by backend
    reasons: dict[str, int] = field(default_factory=dict)
    published: set[Vip] = field(default_factory=set)
    outdated: str = ""
    overdue: set[Vip] = field(default_factory=set)  # their transitions have had their time
    _loaded: bool = False
    _generation: int = 0
    _attachments: dict[str, Attachment] = field(default_factory=dict)

    @property
    def loaded(self) -> bool:
        return self._loaded

    @property
    def generation(self) -> int:
        return self._generation

    @generation.setter
    def generation(self, value: int) -> None:
        self._need_loaded()
        self.fuse.burn()
        self._generation = value

    def _need_loaded(self) -> None:
        if not self._loaded:
            raise DataplaneError("memory: no program loaded: load it first")

    def load(self, services: Sequence[Service]) -> None:
        if not self._loaded:
            self.fuse.burn()
            self._loaded = True

    def upgrade(self) -> bool:
        if not self.outdated:
            return False
        self.fuse.burn()
        self.outdated = ""
        return True

    def unload(self) -> None:
        if self._attachments:
            raise DataplaneError("memory: programs are attached: detach them first")
        self.fuse.burn()
        self.forget()

    def forget(self) -> None:
        """What a reboot does."""
        self._loaded, self._generation = False, 0
        self.rings.clear()
        self.published.clear()
        self._attachments.clear()

    def attach(self, interface: Interface) -> Attachment:
        self._need_loaded()
        if interface.name in self.foreign:
            raise DataplaneError(f"{interface.name}: another XDP program is attached (id 7)")
        self.fuse.burn()
        mode = XdpMode.GENERIC if interface.xdp_mode is XdpMode.GENERIC else XdpMode.NATIVE
        attachment = Attachment(interface.name, mode.value, program_id=1)
        self._attachments[interface.name] = attachment
        return attachment

    def detach(self, name: str) -> None:
        if name in self._attachments:
            self.fuse.burn()
            del self._attachments[name]

    def attachments(self) -> Mapping[str, Attachment]:
        return dict(self._attachments)

    def put(self, service: Service, hops: Mapping[Address, NextHop]) -> ring.Plan:
        self._need_loaded()
        held = self._held(service)
        before = held.words[:]
        self._put_members(held, service, hops)
        self._put_words(held, _words(held, service))
        self._erase_members(held, service)
        return ring.plan(before, held.words)

    def _held(self, service: Service) -> MemoryRing:
        held = self._alike(service)
        if held:
            return held
        self.fuse.burn()
        self.rings[service.vip] = _empty_ring(service)
        return self.rings[service.vip]

    def _alike(self, service: Service) -> MemoryRing | None:
        """The ring in force; None also where it is of another mode or size."""
        held = self.rings.get(service.vip)
        if held and (held.mode, len(held.words)) == (service.mode, service.ring_size):
            return held
        return None

    def _put_members(self, held: MemoryRing, service: Service, hops: Mapping[Address, NextHop]) -> None:
        for key, number in held.numbers(service).items():
            hop = hops.get(key.address)
            if hop and held.hops.get(held.ids.get(key, 0)) != hop:
                self.fuse.burn()
                held.ids[key] = number
                held.hops[number] = hop

    def _put_words(self, held: MemoryRing, words: array[int]) -> None:
        for start, stop in ring.changed_runs(held.words, words):
            self.fuse.burn()
            held.words[start:stop] = words[start:stop]

    def _erase_members(self, held: MemoryRing, service: Service) -> None:
        for backend in held.ids.keys() - {_key(b) for b in service.backends}:
            self.fuse.burn()
            del held.hops[held.ids.pop(backend)]

    def program_ids(self) -> Mapping[str, int]:
        return dict.fromkeys(self.foreign, 7) | {name: each.program_id for name, each in self._attachments.items()}

    def restore_lookups(self, services: Sequence[Service]) -> list[str]:
        lost = self.published != {service.vip for service in services}
        self.publish(services)
        return ["lookups: changed by another process"] if lost else []

    def recover(self, interfaces: Collection[Interface]) -> None:
        pass

    def restore_pins(self) -> list[str]:
        return []

    def differences(self, service: Service) -> list[str]:
        held = self._alike(service)
        if held is None:
            return ["was missing"]
        if held.ids.keys() != {_key(b) for b in service.backends}:
            return ["backend entries were modified"]
        return [] if held.words == _words(held, service) else ["slots were modified"]

    def repair(self, service: Service, hops: Mapping[Address, NextHop]) -> ring.Plan:
        return self.put(service, hops)

    def follow(self, service: Service, hops: Mapping[Address, NextHop]) -> set[Address]:
        held = self.rings[service.vip]
        stale = {b: hops[b.address] for b, n in held.ids.items() if hops.get(b.address, held.hops[n]) != held.hops[n]}
        for backend, hop in stale.items():
            self.fuse.burn()
            held.hops[held.ids[backend]] = hop
        return {backend.address for backend in stale}

    def installed_next_hops(self) -> Iterator[InstalledNextHop]:
        for held in self.rings.values():
            for backend, number in held.ids.items():
                yield InstalledNextHop(backend.address, held.hops[number].ifindex, held.hops[number].dst_mac)

    def unknown(self, service: Service) -> set[Address]:
        held = self.rings.get(service.vip)
        known = {key for key, member in held.ids.items() if held.hops[member].dst_mac} if held else set()
        return {b.address for b in service.backends if _key(b) not in known}

    def publish(self, services: Sequence[Service]) -> None:
        self._need_loaded()
        published = {service.vip for service in services}
        if published != self.published:
            self.fuse.burn()
            self.published = published

    def due(self) -> list[Vip]:
        return [vip for vip in self.rings if vip in self.overdue]

    def settle(self, vip: Vip) -> None:
        held = self.rings.get(vip)
        if held and vip in self.overdue:
            self._put_words(held, ring.expire(held.words))
            self.overdue.discard(vip)

    def plan(self, service: Service) -> ring.Plan:
        held = self._alike(service) or _empty_ring(service)
        planned = MemoryRing(held.mode, held.words, held.ids | held.numbers(service))
        return ring.plan(held.words, _words(planned, service))

    def remove(self, vip: Vip) -> None:
        if vip in self.rings:
            self.fuse.burn()
            del self.rings[vip]

    def vips(self) -> set[Vip]:
        return set(self.rings)

    def statistics(self) -> Statistics:
        return Statistics(
            backends={
                vip: {b: self.counters.get((vip, b), Counters()) for b in held.ids} for vip, held in self.rings.items()
            },
            slots_in_transition={
                vip: sum(ring.previous_member(word) != 0 for word in held.words) for vip, held in self.rings.items()
            },
            reasons=dict(self.reasons),
        )

    def open_connections(self, services: Collection[Service]) -> dict[Vip, dict[str, OpenConnections]]:
        """Unknown in the other modes unless a test says otherwise."""
        return {
            each.vip: {
                str(b): self.opened.get((each.vip, str(b)), NONE_OPEN if each.mode is Mode.NAT else UNKNOWN)
                for b in each.backends
            }
            for each in services
            if each.vip in self.rings
        }


InterfaceAddress = IPv4Interface | IPv6Interface


class MemoryNetwork:
    """Interfaces with addresses (`{"eth0": ["10.0.0.254/24"]}`), and default gateways. Every
    neighbour answers, with a MAC address that is made from its IP address."""

    def __init__(
        self,
        interfaces: Mapping[str, Iterable[str]],
        gateways: Iterable[str] = (),
        fuse: Fuse | None = None,
    ) -> None:
        self.fuse = fuse or Fuse()
        self.held: dict[str, list[InterfaceAddress]] = {
            name: [ip_interface(text) for text in texts] for name, texts in interfaces.items()
        }
        self.gateways = [ip_address(text) for text in gateways]
        self.neighbours: set[Address] = set()  # kept until released
        self.queries = 0
        self.announced: list[OwnAddress] = []

    def next_hops(self, addresses: Iterable[Address], *, probe: bool = False) -> dict[Address, NextHop]:
        self.queries += 1
        hops = {address: self._next_hop(address) for address in addresses}
        self.neighbours |= hops.keys()
        return hops

    def release(self, addresses: Collection[Address] | None = None) -> None:
        self.neighbours -= self.neighbours if addresses is None else set(addresses)

    def _next_hop(self, address: Address) -> NextHop:
        if self.owner(address):
            raise NoRoute(f"backend {address}: is an address of this host")
        on_link = self._on_link(address)
        if on_link:
            return self._hop(*on_link, via=address, on_link=True)
        for gateway in self.gateways:
            through = self._on_link(gateway)
            if through and gateway.version == address.version:
                return self._hop(*through, via=gateway, on_link=False)
        raise NoRoute(f"backend {address}: no route: add one")

    def _on_link(self, address: Address) -> tuple[str, Address] | None:
        """The interface whose network contains `address`, and its own address there."""
        for name, own_addresses in self.held.items():
            for own in own_addresses:
                if address in own.network:
                    return name, own.ip
        return None

    def _hop(self, name: str, source: Address, *, via: Address, on_link: bool) -> NextHop:
        index = list(self.held).index(name) + 1
        return NextHop(name, index, source, _mac(source), _mac(via), on_link)

    def interface_exists(self, name: str) -> bool:
        return name in self.held

    def addresses(self, name: str) -> list[Address]:
        return [own.ip for own in self.held.get(name, ())]

    def subnets(self) -> dict[str, list[IPv4Network | IPv6Network]]:
        return {
            name: [own.network for own in held if own.network.num_addresses > 1] for name, held in self.held.items()
        }

    def owner(self, address: Address) -> str | None:
        return next((name for name in self.held if address in self.addresses(name)), None)

    def add_address(self, name: str, address: Address) -> None:
        if address not in self.addresses(name):
            self.fuse.burn()
            self.held[name].append(ip_interface(address))

    def remove_address(self, name: str, address: Address) -> None:
        if address in self.addresses(name):
            self.fuse.burn()
            self.held[name] = [own for own in self.held[name] if own.ip != address]

    def announce(self, addresses: Iterable[OwnAddress]) -> list[str]:
        self.announced += addresses
        return []

    def repeat_announcements(self) -> list[str]:
        return []


def _mac(address: Address) -> bytes:
    return b"\x02\x00" + address.packed[-4:]
