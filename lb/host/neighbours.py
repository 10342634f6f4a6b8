"""The host's network as the balancer needs it: ways to backends, and addresses of interfaces.

Enters: backend addresses, and a factory of rtnetlink sockets (pyroute2's IPRoute), which speak for
the current network namespace. Leaves: next hops with both MAC addresses; VIPs put on interfaces.

A neighbour on the way to a backend becomes a managed entry (NTF_EXT_MANAGED, Linux 5.16): the
kernel itself resolves it, asks again while it is silent and confirms it now and then, with no
process of ours running and no packet of the host's own stack to cause it. That holds for resolved
neighbours too, since packets that XDP forwards confirm nothing. Entries that the operator or
another program keeps (permanent or managed) are left alone; ours carry PROTOCOL, by which `release`
finds them.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from errno import EACCES, EADDRNOTAVAIL, EEXIST, EINVAL, ENOENT
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, Any

from pyroute2.netlink.exceptions import NetlinkError

from lb.errors import DataplaneError, NoRoute, NotFound
from lb.host.announce import Announcer
from lb.model.forwarding import NextHop
from lb.model.state import OwnAddress
from lb.model.vip import Address, Subnet

if TYPE_CHECKING:
    from pyroute2.iproute.linux import IPRoute

ANSWER_TIMEOUT_S = 1.2  # the kernel asks a second time after one second
FOLLOWED_TIMEOUT_S = 0.2  # for a process that hears of answers that come later
ASKED_ONE_BY_ONE = 8
PROTOCOL = 0x4C  # NDA_PROTOCOL of our entries: a number that no routing daemon has registered

# include/uapi/linux: neighbour.h, rtnetlink.h, if_addr.h, if_arp.h
NTF_USE = 0x01
NTF_EXT_MANAGED = 0x01
NUD_REACHABLE, NUD_STALE, NUD_DELAY, NUD_PROBE = 0x02, 0x04, 0x08, 0x10
NUD_FAILED, NUD_NOARP, NUD_PERMANENT = 0x20, 0x40, 0x80
RTMGRP_NEIGH = 0x04
RTN_UNICAST, RTN_LOCAL = 1, 2
RT_SCOPE_UNIVERSE = 0
IFA_F_SECONDARY, IFA_F_NODAD, IFA_F_DEPRECATED, IFA_F_NOPREFIXROUTE = 0x01, 0x02, 0x20, 0x200
ARPHRD_ETHER = 1

_ANSWERED = NUD_REACHABLE | NUD_STALE | NUD_DELAY | NUD_PROBE | NUD_NOARP | NUD_PERMANENT
_FIXED = NUD_NOARP | NUD_PERMANENT

_NO_ROUTE_WORDS = {EINVAL: "blackhole route", EACCES: "prohibit route"}


@dataclass(frozen=True, slots=True)
class _Neighbour:
    """A host on a link: the gateway to a backend, or the backend itself."""

    ifindex: int
    address: Address


@dataclass(frozen=True, slots=True)
class _Route:
    neighbour: _Neighbour
    source: Address
    on_link: bool
    mtu: int | None  # of the route itself


@dataclass(frozen=True, slots=True)
class _Link:
    name: str
    mac: bytes
    mtu: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """One line of the neighbour table. `mac` is None while the neighbour has not answered."""

    mac: bytes | None
    fixed: bool
    managed: bool
    ours: bool


_Table = dict[_Neighbour, _Entry]


def open_route_socket() -> IPRoute:
    """Imports what few commands need."""
    from xdp.netlink import route_socket

    return route_socket()


class Network:
    """Routes, neighbours and addresses of the current network namespace.

    Each call opens a socket of its own, so that an object may outlive changes of the namespace.
    """

    def __init__(
        self,
        open_socket: Callable[[], IPRoute] = open_route_socket,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
        *,
        in_daemon: bool = False,
    ) -> None:
        self._open_socket, self._answer_timeout_s = open_socket, answer_timeout_s
        self._announcer = Announcer(self.addresses, in_background=in_daemon)

    def next_hops(self, addresses: Iterable[Address], *, probe: bool = False) -> dict[Address, NextHop]:
        """Where the frames for each backend go.

        Neighbours not kept yet, and with `probe` all that are ours, have to answer anew, within
        `answer_timeout_s` all together. The silent ones have the MAC address known before, or
        `dst_mac` None. Raises NoRoute, naming the backend, and DataplaneError where the kernel
        refuses an entry.
        """
        with self._open_socket() as ipr:
            routes = {address: _route(ipr, address) for address in addresses}
            links = _ethernet_links(ipr, routes)
            macs = _resolve(ipr, {route.neighbour for route in routes.values()}, self._answer_timeout_s, probe)
        return {
            address: _next_hop(route, links[route.neighbour.ifindex], macs[route.neighbour])
            for address, route in routes.items()
        }

    def release(self, addresses: Collection[Address] | None = None) -> None:
        """Let go of the neighbour entries that next_hops made: of these backends, or (None) of all.

        A gateway's entry may serve other backends: it goes with all of them.
        """
        with self._open_socket() as ipr:
            for neighbour, entry in _entries_behind(ipr, addresses).items():
                if entry.ours and (addresses is None or neighbour.address in addresses):
                    _delete(ipr, neighbour)

    def interface_exists(self, name: str) -> bool:
        return _index(name) is not None

    def addresses(self, name: str) -> list[Address]:
        """An interface's addresses, those first that serve and send globally. Raises NotFound."""
        index = _index(name)
        if index is None:
            raise _no_interface(name)
        with self._open_socket() as ipr:
            messages = sorted(ipr.get_addr(index=index), key=_address_rank)
        return [_address(message) for message in messages]

    def subnets(self) -> dict[str, list[Subnet]]:
        """Interface -> the subnets of its addresses, none for a host address."""
        found: dict[str, list[Subnet]] = {}
        with self._open_socket() as ipr:
            messages = list(ipr.get_addr())
        for message in messages:
            subnet = ip_network((message.get_attr("IFA_ADDRESS"), message["prefixlen"]), strict=False)
            name = _name(message["index"])
            if name and subnet.num_addresses > 1:
                found.setdefault(name, []).append(subnet)
        return found

    def owner(self, address: Address) -> str | None:
        """The local interface that has the address."""
        with self._open_socket() as ipr:
            for message in ipr.get_addr(family=_family(address)):
                if _address(message) == address:
                    return socket.if_indextoname(message["index"])
        return None

    def add_address(self, name: str, address: Address) -> None:
        """Put a VIP on an interface, as a host address that never becomes a source by itself.

        Idempotent. Raises NotFound without the interface, DataplaneError where the kernel refuses.
        """
        index = _index(name)
        if index is None:
            raise _no_interface(name)
        with (
            self._open_socket() as ipr,
            _refusals(f"vip address {address}: cannot be added to {name}", but=EEXIST),
        ):
            ipr.addr("add", index=index, **_host_address(address), **_address_options(address))

    def remove_address(self, name: str, address: Address) -> None:
        """Take a VIP off again; no error where it is gone. Raises DataplaneError."""
        index = _index(name)
        if index is None:
            return
        with (
            self._open_socket() as ipr,
            _refusals(f"vip address {address}: cannot be removed from {name}", but=EADDRNOTAVAIL),
        ):
            ipr.addr("del", index=index, **_host_address(address))

    def announce(self, addresses: Iterable[OwnAddress]) -> list[str]:
        """Tell the links of VIPs put on interfaces: why it was not possible. In the daemon only once, and
        `repeat_announcements` goes on."""
        return self._announcer.announce(addresses)

    def repeat_announcements(self) -> list[str]:
        return self._announcer.repeat()


def _family(address: Address) -> int:
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


def _index(name: str) -> int | None:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return None


def _name(index: int) -> str | None:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return None


def _no_interface(name: str) -> NotFound:
    return NotFound(f"interface {name}: does not exist: see ip link")


@contextmanager
def _refusals(subject: str, but: int | None = None) -> Iterator[None]:
    """Within, refusals of the kernel become DataplaneErrors, but one that means: done already."""
    try:
        yield
    except (NetlinkError, OSError) as error:  # pyroute2 makes ENOBUFS, a full table, an OSError
        code, words = error.args
        if code != but:
            raise DataplaneError(f"{subject}: {words or os.strerror(code)}") from error


# Addresses


def _address(message: Any) -> Address:
    """The host's own: IFA_LOCAL, or IFA_ADDRESS, which holds the peer's where both are given."""
    return ip_address(message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS"))


def _address_rank(message: Any) -> tuple[bool, int]:
    flags = message.get_attr("IFA_FLAGS")
    return message["scope"] != RT_SCOPE_UNIVERSE, flags & (IFA_F_SECONDARY | IFA_F_DEPRECATED)


def _host_address(address: Address) -> dict[str, Any]:
    return {"address": str(address), "prefixlen": address.max_prefixlen}


def _address_options(address: Address) -> dict[str, Any]:
    """No duplicate detection (a VIP may move between balancers) and no route beside the local one.

    An IPv6 address is deprecated from birth: else RFC 6724's longest match would choose it as the
    source towards backends that resemble it. IPv4 prefers the older addresses by itself.
    """
    flags = IFA_F_NODAD | IFA_F_NOPREFIXROUTE
    return {"flags": flags, "preferred_lft": 0} if address.version == 6 else {"flags": flags}


# Routes


def _route(ipr: IPRoute, address: Address) -> _Route:
    try:
        message = ipr.route("get", dst=str(address))[0]
    except NetlinkError as error:
        words = _NO_ROUTE_WORDS.get(error.code, error.args[1])
        raise NoRoute(f"backend {address}: no route: {words}: see ip route get {address}") from error
    _check_type(address, message["type"])
    return _route_of(address, message)


def _check_type(address: Address, kind: int) -> None:
    if kind == RTN_LOCAL:
        raise NoRoute(f"backend {address}: is an address of this host: use another host's address")
    if kind != RTN_UNICAST:
        raise NoRoute(f"backend {address}: not a unicast route: see ip route get {address}")


def _route_of(address: Address, message: Any) -> _Route:
    source = message.get_attr("RTA_PREFSRC")
    if source is None or ip_address(source).is_unspecified:
        raise NoRoute(
            f"backend {address}: no source address: add an IPv{address.version} address to the interface towards it"
        )
    gateway = _gateway(message)
    return _Route(
        _Neighbour(message.get_attr("RTA_OIF"), gateway or address),
        ip_address(source),
        gateway is None,
        _route_mtu(message),
    )


def _route_mtu(message: Any) -> int | None:
    metrics = message.get_attr("RTA_METRICS")
    return metrics.get_attr("RTAX_MTU") if metrics else None


def _gateway(message: Any) -> Address | None:
    """RTA_VIA stands for a gateway of the other family (RFC 5549: IPv4 by way of IPv6)."""
    via = message.get_attr("RTA_VIA")
    gateway = via["addr"] if via else message.get_attr("RTA_GATEWAY")
    return ip_address(gateway) if gateway else None


def _ethernet_links(ipr: IPRoute, routes: dict[Address, _Route]) -> dict[int, _Link]:
    links: dict[int, _Link] = {}
    for address, route in routes.items():
        ifindex = route.neighbour.ifindex
        if ifindex not in links:
            links[ifindex] = _ethernet_link(ipr, ifindex, address)
    return links


def _ethernet_link(ipr: IPRoute, ifindex: int, address: Address) -> _Link:
    with _refusals(f"backend {address}: its interface {ifindex}"):
        message = ipr.link("get", index=ifindex)[0]
    name = message.get_attr("IFLA_IFNAME")
    if message["ifi_type"] != ARPHRD_ETHER:
        raise NoRoute(
            f"backend {address}: reached through {name}, which is not an Ethernet interface:"
            " use a backend behind an Ethernet interface"
        )
    return _Link(name, _mac(message.get_attr("IFLA_ADDRESS")), message.get_attr("IFLA_MTU"))


def _next_hop(route: _Route, link: _Link, dst_mac: bytes | None) -> NextHop:
    return NextHop(
        interface=link.name,
        ifindex=route.neighbour.ifindex,
        source=route.source,
        src_mac=link.mac,
        dst_mac=dst_mac,
        on_link=route.on_link,
        mtu=min(route.mtu or link.mtu, link.mtu),
    )


# Neighbours


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def _resolve(ipr: IPRoute, wanted: set[_Neighbour], timeout_s: float, probe: bool) -> dict[_Neighbour, bytes | None]:
    """The MAC address of each, None where nobody has ever answered.

    Only neighbours that the kernel starts to look for now are waited for: of one that it keeps
    already and that is silent, nothing more is learnt by waiting.
    """
    with _neighbour_events() as events:
        before = _entries_of(ipr, wanted)
        started = {n for n in wanted if not _kept(before.get(n)) or (probe and before[n].ours)}
        for neighbour in started:
            if neighbour in before:
                _forget(ipr, neighbour)
            _keep(ipr, neighbour)
        table = {n: entry for n, entry in before.items() if n not in started}
        deadline = time.monotonic() + timeout_s
        while any(_mac_in(table, n) is None for n in started) and _changed(events, deadline):
            table = _entries_of(ipr, wanted)
    return {neighbour: _mac_in(table, neighbour) or _mac_in(before, neighbour) for neighbour in wanted}


def _kept(entry: _Entry | None) -> bool:
    """Whether the kernel holds on to it already, for us or as someone else wants it."""
    return entry is not None and (entry.fixed or entry.managed)


def _mac_in(table: _Table, neighbour: _Neighbour) -> bytes | None:
    entry = table.get(neighbour)
    return entry.mac if entry else None


def _entries_of(ipr: IPRoute, wanted: set[_Neighbour]) -> _Table:
    """What the table says of these; a few are asked for one by one, as the whole table may be long."""
    if len(wanted) > ASKED_ONE_BY_ONE:
        return _table(ipr.neigh("dump"))
    return _table(message for neighbour in wanted for message in _asked(ipr, neighbour))


def _entries_behind(ipr: IPRoute, addresses: Collection[Address] | None) -> _Table:
    """At least all entries of these backends (None: of any), wherever their routes lead now."""
    if addresses is None or len(addresses) > ASKED_ONE_BY_ONE:
        return _table(ipr.neigh("dump"))
    try:
        ways = [_route(ipr, address) for address in addresses]
    except NoRoute:
        return _table(ipr.neigh("dump"))
    return _entries_of(ipr, {way.neighbour for way in ways if way.on_link})


def _asked(ipr: IPRoute, neighbour: _Neighbour) -> Iterable[Any]:
    try:
        messages: Iterable[Any] = ipr.neigh("get", dst=str(neighbour.address), ifindex=neighbour.ifindex)
    except NetlinkError as error:
        if error.code != ENOENT:
            raise
        return ()
    return messages


def _table(messages: Iterable[Any]) -> _Table:
    table: _Table = {}
    for message in messages:
        address = message.get_attr("NDA_DST")
        if message["family"] in (socket.AF_INET, socket.AF_INET6) and address:
            table[_Neighbour(message["ifindex"], ip_address(address))] = _entry(message)
    return table


def _entry(message: Any) -> _Entry:
    state, lladdr = message["state"], message.get_attr("NDA_LLADDR")
    managed = bool((message.get_attr("NDA_FLAGS_EXT") or 0) & NTF_EXT_MANAGED)
    return _Entry(
        mac=_mac(lladdr) if lladdr and state & _ANSWERED else None,
        fixed=bool(state & _FIXED),
        managed=managed,
        ours=managed and message.get_attr("NDA_PROTOCOL") == PROTOCOL,
    )


def _keep(ipr: IPRoute, neighbour: _Neighbour) -> None:
    """Have the kernel resolve and keep it; before 5.16 it heeds NTF_USE only: resolve once."""
    with _refusals(f"neighbour {neighbour.address}: cannot be resolved"):
        ipr.neigh(
            "replace",
            dst=str(neighbour.address),
            ifindex=neighbour.ifindex,
            state=0,
            flags=NTF_USE,
            flags_ext=NTF_EXT_MANAGED,
            protocol=PROTOCOL,
        )


def _forget(ipr: IPRoute, neighbour: _Neighbour) -> None:
    """Have the kernel ask the whole link again: for half a minute it would ask the MAC address that it knows alone,
    whoever has the IP address by now. Listeners see no entry go, as they would with a deletion."""
    with _refusals(f"neighbour {neighbour.address}: cannot be probed", but=ENOENT):
        ipr.neigh("change", dst=str(neighbour.address), ifindex=neighbour.ifindex, state=NUD_FAILED)


def _delete(ipr: IPRoute, neighbour: _Neighbour) -> None:
    with _refusals(f"neighbour {neighbour.address}: cannot be released", but=ENOENT):
        ipr.neigh("del", dst=str(neighbour.address), ifindex=neighbour.ifindex)


@contextmanager
def _neighbour_events() -> Iterator[socket.socket]:
    """A socket that becomes readable when the neighbour table changes."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as events:
        events.bind((0, RTMGRP_NEIGH))
        events.setblocking(False)
        yield events


def _changed(events: socket.socket, deadline: float) -> bool:
    """Wait for a change; False when the time is over. What has changed, the table tells."""
    readable = select.poll()
    readable.register(events, select.POLLIN)
    ready = readable.poll(max(0.0, deadline - time.monotonic()) * 1000)
    if ready:
        _drain(events)
    return bool(ready)


def _drain(events: socket.socket) -> None:
    """Until BlockingIOError, or ENOBUFS: more than the buffer held, which is a change as well."""
    with suppress(OSError):
        while events.recv(1 << 16):
            pass
