"""Changes of the host's network, from rtnetlink.

Enters: notifications of links, addresses, neighbours, routes, rules and nexthop objects in the current network
namespace. Leaves: Changes, collected for a short time after the first notification; `concerned` gives the backends
whose next hop may have changed. lb.host.neighbours asks the kernel for the new one.

A neighbour table that is being filled or flushed sends thousands of notifications at once, so they are parsed here
field by field: pyroute2 would take a hundred times as long. Most carry no change: an entry goes through its states with
the same MAC address, and a link repeats its whole state for any detail.
"""

from __future__ import annotations

import asyncio
import select
import socket
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

from lb.model.forwarding import InstalledNextHop
from lb.model.vip import Address

SETTLE_S = 0.1
BUFFER_SIZE = 32 << 20  # of bytes; a notification takes up to 1.3 KB of them
DUMP_TIMEOUT_MS = 5000
AT_ONCE = 1 << 16  # bytes

# include/uapi/linux: socket.h, netlink.h, rtnetlink.h, if_link.h, neighbour.h, if.h
SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, SO_RCVBUFFORCE = 270, 1, 33
NLM_F_REQUEST, NLM_F_DUMP = 0x1, 0x300
NLMSG_ERROR, NLMSG_DONE = 2, 3
RTNLGRP_LINK, RTNLGRP_NEIGH, RTNLGRP_NEXTHOP = 1, 3, 32
GROUPS_OF_IPV4 = (5, 7, 8)  # RTNLGRP_IPV4_IFADDR, _ROUTE, _RULE
GROUPS_OF_IPV6 = (9, 11, 19)
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR = 20, 21
RTM_NEWROUTE, RTM_DELROUTE = 24, 25
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
RTM_F_CLONED = 0x200
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_XDP = 1, 3, 4, 43
NDA_DST, NDA_LLADDR = 1, 2
RTA_DST = 1
RUNNING = 1 | 1 << 16  # IFF_UP, IFF_LOWER_UP
ANSWERED = 0x02 | 0x04 | 0x08 | 0x10 | 0x40 | 0x80  # NUD_REACHABLE, _STALE, _DELAY, _PROBE, _NOARP, _PERMANENT

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_ATTRIBUTE = struct.Struct("=HH")
_LINK = struct.Struct("=BxHiII")  # struct ifinfomsg
_NEIGHBOUR = struct.Struct("=BxxxiHBB")  # struct ndmsg
_ADDRESS = struct.Struct("=BBBBI")  # struct ifaddrmsg
_ROUTE = struct.Struct("=BBBBBBBBI")  # struct rtmsg
_TYPE_MASK = 0x3FFF  # without NLA_F_NESTED, NLA_F_NET_BYTEORDER
_BITS = {socket.AF_INET: 32, socket.AF_INET6: 128}


@dataclass
class Changes:
    """links: indices of those added, removed or changed, or whose addresses were. up: names of those that have come up.
    neighbours: (ifindex, packed
    address) -> previous MAC address or None. prefixes: (bits of the family, length) -> networks, shifted right by
    the host bits. everything: the changes are unknown."""

    everything: bool = False
    links: set[int] = field(default_factory=set)
    up: set[str] = field(default_factory=set)
    neighbours: dict[tuple[int, bytes], bytes | None] = field(default_factory=dict)
    prefixes: dict[tuple[int, int], set[int]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.everything or self.links or self.neighbours or self.prefixes)

    def concerned(self, hops: Iterable[InstalledNextHop]) -> set[Address]:
        """Backends whose next hop may have changed. One behind a gateway is matched by the gateway's MAC address, or by
        an unresolved neighbour on that link."""
        if self.everything:
            return {hop.address for hop in hops}
        addresses = {address for _, address in self.neighbours}
        macs: set[tuple[int, bytes | None]] = {(ifindex, mac) for (ifindex, _), mac in self.neighbours.items()}
        macs |= {(ifindex, None) for ifindex, _ in self.neighbours}
        return {
            hop.address
            for hop in hops
            if hop.ifindex in self.links
            or (hop.ifindex, hop.mac) in macs
            or hop.address.packed in addresses
            or self._is_rerouted(hop.address)
        }

    def _is_rerouted(self, address: Address) -> bool:
        bits, number = address.max_prefixlen, int(address)
        return any(
            number >> (bits - length) in networks
            for (family_bits, length), networks in self.prefixes.items()
            if family_bits == bits
        )


class HostEvents:
    """Of the current network namespace at creation. `neighbours`: also their notifications, by far the most."""

    def __init__(self, settle_s: float = SETTLE_S, *, neighbours: bool = True) -> None:
        self._settle_s, self._neighbours = settle_s, neighbours
        self._links: dict[int, tuple[object, ...]] = {}
        self._macs: dict[tuple[int, bytes], bytes] = {}
        self._changes = Changes()
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        try:
            self._subscribe()
            self._dump()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    async def next(self, timeout_s: float) -> Changes:
        """Changes since the last call, as soon as there are any; empty after the timeout."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self._changes:
                    await self._readable()
                    await asyncio.sleep(self._settle_s)
                    self._drain()
        changes, self._changes = self._changes, Changes()
        return changes

    async def _readable(self) -> None:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._socket, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(self._socket)

    # The socket

    def _subscribe(self) -> None:
        with suppress(OSError):  # not permitted: bursts overrun it more often, and everything is checked
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_SIZE)
        self._socket.bind((0, 0))
        of_neighbours = (RTNLGRP_NEIGH,) if self._neighbours else ()
        for group in (RTNLGRP_LINK, *of_neighbours, RTNLGRP_NEXTHOP, *GROUPS_OF_IPV4, *GROUPS_OF_IPV6):
            self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
        self._socket.setblocking(False)

    def _dump(self) -> None:
        """Read the current state, to detect changes against it."""
        self._links.clear()
        self._macs.clear()
        of_neighbours = ((RTM_GETNEIGH, _NEIGHBOUR.pack(0, 0, 0, 0, 0)),) if self._neighbours else ()
        for kind, body in ((RTM_GETLINK, _LINK.pack(0, 0, 0, 0, 0)), *of_neighbours):
            header = _HEADER.pack(_HEADER.size + len(body), kind, NLM_F_REQUEST | NLM_F_DUMP, 0, 0)
            self._socket.send(header + body)
            self._drain_until_done()
        self._changes = Changes()

    def _drain_until_done(self) -> None:
        readable = select.poll()
        readable.register(self._socket, select.POLLIN)
        while readable.poll(DUMP_TIMEOUT_MS):
            with suppress(OSError):  # buffer overrun: the next notification of an entry counts as a change
                if not self._take(self._socket.recv(AT_ONCE)):
                    return

    def _drain(self) -> None:
        try:
            while True:
                self._take(self._socket.recv(AT_ONCE))
        except BlockingIOError:
            return
        except OSError:  # ENOBUFS: notifications are lost
            self._dump()
            self._changes.everything = True

    def _take(self, data: bytes) -> bool:
        """False at the end of a dump."""
        at = 0
        while at + _HEADER.size <= len(data):
            length, kind, _, _, _ = _HEADER.unpack_from(data, at)
            if kind in (NLMSG_DONE, NLMSG_ERROR):
                return False
            self._message(kind, data[at + _HEADER.size : at + length])
            at += length + 3 & ~3
        return True

    # Messages

    def _message(self, kind: int, body: bytes) -> None:
        if kind in (RTM_NEWNEIGH, RTM_DELNEIGH):
            self._neighbour(body, gone=kind == RTM_DELNEIGH)
        elif kind in (RTM_NEWLINK, RTM_DELLINK):
            self._link(body, gone=kind == RTM_DELLINK)
        elif kind in (RTM_NEWADDR, RTM_DELADDR):
            self._changes.links.add(_ADDRESS.unpack_from(body)[-1])
        elif kind in (RTM_NEWROUTE, RTM_DELROUTE):
            self._route(body)
        else:  # rules and nexthop objects may affect any route
            self._changes.everything = True

    def _neighbour(self, body: bytes, *, gone: bool) -> None:
        """An entry that stops answering is no change: there is no other MAC address."""
        family, ifindex, state, _, _ = _NEIGHBOUR.unpack_from(body)
        found = dict(_attributes(body, _NEIGHBOUR.size))
        if family not in _BITS or NDA_DST not in found:
            return
        key = ifindex, found[NDA_DST]
        before, now = self._macs.get(key), found.get(NDA_LLADDR)
        if gone:
            self._macs.pop(key, None)
        elif not now or not state & ANSWERED or now == before:
            return
        else:
            self._macs[key] = now
        self._changes.neighbours.setdefault(key, before)

    def _link(self, body: bytes, *, gone: bool) -> None:
        family, _, ifindex, flags, _ = _LINK.unpack_from(body)
        if family != socket.AF_UNSPEC:  # from a bridge, about its ports
            return
        found = dict(_attributes(body, _LINK.size))
        running, names = flags & RUNNING, (IFLA_IFNAME, IFLA_ADDRESS, IFLA_MTU, IFLA_XDP)
        state = (running, *map(found.get, names))
        before = self._links.get(ifindex, (0,))
        if gone:
            self._links.pop(ifindex, None)
        elif before == state:
            return
        else:
            self._links[ifindex] = state
            if running == RUNNING != before[0]:
                self._changes.up.add(found[IFLA_IFNAME].rstrip(b"\0").decode())
        self._changes.links.add(ifindex)

    def _route(self, body: bytes) -> None:
        family, length, _, _, _, _, _, _, flags = _ROUTE.unpack_from(body)
        if family not in _BITS or flags & RTM_F_CLONED:
            return
        bits = _BITS[family]
        network = int.from_bytes(dict(_attributes(body, _ROUTE.size)).get(RTA_DST, b""), "big")
        self._changes.prefixes.setdefault((bits, length), set()).add(network >> (bits - length))


def _attributes(body: bytes, start: int) -> Iterator[tuple[int, bytes]]:
    """struct rtattr: type and value of each."""
    at = start
    while at + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _TYPE_MASK, body[at + _ATTRIBUTE.size : at + length]
        at += length + 3 & ~3
