"""Check paths for modes dr, ipip and gue: to the VIP, through the tunnel of the mode, to one given backend.

Enters: services and the network. Leaves: for each backend an address that stands for it on this host only, out of
NETWORK4 or NETWORK6: packets to it reach the backend like a client's packets to the VIP, and the backend answers this
host directly (xdp/bpf/check/check.bpf.c). This takes a veth pair with a route, and a program at tc ingress of each
interface towards backends; close() removes all of it, and the next start removes what a killed process has left. A pair
that was removed is created again.
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from errno import ENODEV
from ipaddress import IPv4Network, IPv6Network
from typing import Protocol

from pyroute2.ethtool.ioctl import IoctlEthtool

from lb.dataplane.members import address_words, numbered
from lb.errors import DataplaneError, NoRoute
from lb.hashing.ring import MEMBERS
from lb.health.checker import CheckPath, Direct, Key
from lb.host.events import Changes
from lb.model.forwarding import InstalledNextHop, NextHop
from lb.model.state import Backend, Mode, Service
from lb.model.vip import Address
from xdp import link, tc
from xdp.errors import NotSupported, XdpError
from xdp.netlink import NetlinkError, route_socket, translate
from xdp.object import CHECK_OBJECT, BpfObject, Program

NEAR, FAR = "xlb-check0", "xlb-check1"  # this host sends to the near end
NETWORK4 = IPv4Network("240.76.0.0/16")  # of 240.0.0.0/4, reserved since RFC 1112
NETWORK6 = IPv6Network("100:0:0:1:4c::/112")  # of the dummy prefix, RFC 9780
MTU = 1280  # small enough for every tunnel
IFF_NOARP = 0x80
NOWHERE = 0  # no interface's index


class Network(Protocol):
    """The part of lb.host.neighbours.Network used here."""

    def next_hops(self, addresses: Iterable[Address]) -> dict[Address, NextHop]: ...

    def addresses(self, name: str) -> list[Address]: ...


class RealPath:
    """Direct paths for mode nat, tunnel paths for all others. find() raises DataplaneError."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._numbers: dict[Key, int] = {}
        self._taken: tuple[InstalledNextHop, ...] = ()  # also those without a route
        self._links: _CheckLinks | None = None

    def find(self, services: Sequence[Service]) -> Mapping[Key, CheckPath]:
        translated = [s for s in services if s.mode is Mode.NAT]
        direct = [s for s in services if s.mode is not Mode.NAT]
        return {**Direct().find(translated), **self._real(direct)}

    def concerned(self, changes: Changes) -> bool:
        """MAC addresses do not matter: the kernel resolves the neighbours of these packets."""
        return bool(replace(changes, neighbours={}).concerned(self._taken))

    def close(self) -> None:
        self._taken = ()
        if self._links:
            self._links.close()
            self._links = None

    def _real(self, services: Sequence[Service]) -> dict[Key, CheckPath]:
        if not services:
            self.close()
            return {}
        if self._links and not self._links.is_intact:
            self.close()
        self._links = self._links or _CheckLinks()
        hops, faults = self._hops({b.address for s in services for b in s.backends})
        self._taken = (
            *(InstalledNextHop(address, hop.ifindex, None) for address, hop in hops.items()),
            *(InstalledNextHop(address, NOWHERE, None) for address in faults),
            *(InstalledNextHop(network.network_address, self._links.near, None) for network in (NETWORK4, NETWORK6)),
        )
        self._links.listen_on({hop.ifindex for hop in hops.values()})
        backends = {(s.vip, str(b)): (s, b) for s in services for b in s.backends}
        if len(backends) > len(MEMBERS):
            raise DataplaneError(
                f"health checks: {len(backends)} backends in modes other than nat: at most {len(MEMBERS)}"
            )
        self._numbers = numbered(self._numbers, list(backends))
        vips = {service.vip.address for service in services}
        return {
            key: self._path(self._numbers[key], service, backend, hops[backend.address], vips)
            if backend.address in hops
            else CheckPath(backend.address, fault=faults[backend.address])
            for key, (service, backend) in backends.items()
        }

    def _hops(self, addresses: Collection[Address]) -> tuple[dict[Address, NextHop], dict[Address, str]]:
        """Next hops of those with a route, and the errors of the others."""
        try:
            return self._network.next_hops(addresses), {}
        except NoRoute:
            pass
        hops: dict[Address, NextHop] = {}
        faults: dict[Address, str] = {}
        for address in addresses:
            try:
                hops |= self._network.next_hops([address])
            except NoRoute as error:
                faults[address] = str(error)
        return hops, faults

    def _path(
        self, number: int, service: Service, backend: Backend, hop: NextHop, vips: Collection[Address]
    ) -> CheckPath:
        assert self._links
        own = self._own_address(service.vip.address.version, hop, vips)
        if own is None:
            return CheckPath(
                backend.address,
                fault=f"{hop.interface}: has no IPv{service.vip.address.version} address to send checks from",
            )
        self._links.set_target(number, service, backend, hop)
        network = NETWORK4 if service.vip.address.version == 4 else NETWORK6
        return CheckPath(network[number], own)

    def _own_address(self, version: int, hop: NextHop, vips: Collection[Address]) -> Address | None:
        """Source address in the VIP's family, to which the backend replies."""
        if hop.source.version == version:
            return hop.source
        usable = (a for a in self._network.addresses(hop.interface) if a.version == version and not a.is_link_local)
        return next((address for address in usable if address not in vips), None)


class _CheckLinks:
    """The programs, the veth pair, and the interfaces that replies are received on."""

    def __init__(self) -> None:
        self._resources = ExitStack()
        self._listening: dict[int, link.Link | tc.Held] = {}
        with ExitStack() as undo, _translated():
            self._resources = undo
            self.near, far = self._make_pair()
            self._load()
            tc.release_left(self._object.program("check_in").name)
            undo.enter_context(_hold(far, self._object.program("check_out")))
            self._resources = undo.pop_all()

    def _make_pair(self) -> tuple[int, int]:
        """Replaces a stale one."""
        with route_socket() as ipr:
            _remove_pair()
            ipr.link("add", ifname=NEAR, kind="veth", peer={"ifname": FAR})
            self._resources.callback(_remove_pair)
            near, far = map(socket.if_nametoindex, (NEAR, FAR))
            for index in (near, far):
                ipr.link("set", index=index, mtu=MTU, flags=IFF_NOARP, change=IFF_NOARP)
                ipr.link("set", index=index, state="up")
            _compute_checksums(NEAR)
            for network in (NETWORK4, NETWORK6):
                ipr.route("add", dst=str(network), oif=near)
        return near, far

    @property
    def is_intact(self) -> bool:
        """Whether the routes still lead to the veth pair."""
        with route_socket() as ipr:
            try:
                paths = [ipr.route("get", dst=str(network[1]))[0] for network in (NETWORK4, NETWORK6)]
            except NetlinkError:  # no route
                return False
        return all(path.get_attr("RTA_OIF") == self.near for path in paths)

    def _load(self) -> None:
        self._object = self._resources.enter_context(BpfObject.open(CHECK_OBJECT))
        words = address_words(NETWORK6.network_address)
        self._object.configure(
            "check_config",
            network4=int(NETWORK4.network_address),
            network6=tuple(words[:3]),  # type: ignore[arg-type]  # an array of the struct takes one
            ifindex=self.near,
            mac=tuple(_mac(self.near)),  # type: ignore[arg-type]
        )
        self._object.load()
        self._targets = self._object.map("check_targets")
        self._modes = self._object.types.enum("check_mode")

    def listen_on(self, interfaces: Collection[int]) -> None:
        with _translated():
            for index in self._listening.keys() - set(interfaces):
                self._listening.pop(index).close()
            for index in set(interfaces) - self._listening.keys():
                self._listening[index] = _hold(index, self._object.program("check_in"))

    def set_target(self, number: int, service: Service, backend: Backend, hop: NextHop) -> None:
        """Map this number to the backend."""
        target = self._targets.value_type()
        varied = service.options.tunnel_source(backend.address.version)
        target.vip[:] = address_words(service.vip.address)
        target.backend[:] = address_words(backend.address)
        target.source[:] = address_words(varied.network_address if varied else hop.source)
        target.ifindex = hop.ifindex
        target.gue_port = service.options.gue_port
        target.outer_checksum = service.options.outer_checksum
        target.mode = self._modes[f"CHECK_{service.mode.name}"]
        target.family = socket.AF_INET if backend.address.version == 4 else socket.AF_INET6
        with _translated():
            self._targets[number] = target

    def close(self) -> None:
        for held in self._listening.values():
            held.close()
        self._listening.clear()
        self._resources.close()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except NetlinkError as error:
        raise DataplaneError(str(translate(error, f"health checks: {NEAR}"))) from error
    except (XdpError, OSError) as error:
        raise DataplaneError(f"health checks: {error}") from error


def _hold(index: int, program: Program) -> link.Link | tc.Held:
    """For the lifetime of this process; before Linux 6.6, until it detaches it."""
    try:
        return link.hold_at_tc(index, program.fd, egress=False)
    except NotSupported:
        return tc.hold(index, program.fd, program.id, program.name, egress=False)


def _mac(index: int) -> bytes:
    with route_socket() as ipr:
        return bytes.fromhex(ipr.link("get", index=index)[0].get_attr("IFLA_ADDRESS").replace(":", ""))


def _remove_pair() -> None:
    with route_socket() as ipr:
        for index in ipr.link_lookup(ifname=NEAR):
            try:
                ipr.link("del", index=index)
            except NetlinkError as error:
                if error.code != ENODEV:
                    raise


def _compute_checksums(name: str) -> None:
    """A NIC only computes inner checksums if it knows the tunnel."""
    with closing(IoctlEthtool(name)) as ethtool:
        ethtool.set_offload_flag("tx-checksumming", False)
