"""Interfaces of this host: indexes, MAC addresses, who carries an address."""

from __future__ import annotations

import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lb.errors import InvalidInput
from lb.model.vip import Address, parse_address
from xdp.netlink import NetlinkError, route_socket

_UNICAST = 1  # RTN_UNICAST, <linux/rtnetlink.h>
_UNKNOWN_MAC = bytes.fromhex("020000000001")
_WITH_ETHERNET_HEADER = (1, 772)  # ARPHRD_ETHER, ARPHRD_LOOPBACK


def ifindex_of(name: str) -> int | None:
    try:
        return socket.if_nametoindex(name)
    except (OSError, ValueError):  # of a name with a zero in it
        return None


def check_interface(name: str) -> None:
    """Raises InvalidInput for an interface that is not there, or whose packets have no Ethernet header."""
    if ifindex_of(name) is None:
        raise InvalidInput(f"interface {name}: does not exist")
    with suppress(OSError):
        if int(_about(name, "type").read_text()) not in _WITH_ETHERNET_HEADER:
            raise InvalidInput(f"interface {name}: not an Ethernet interface: filter rules require one")


def own_mac(name: str) -> bytes:
    """Of an interface; zeros where it has none, or is not there."""
    try:
        return bytes.fromhex(_about(name, "address").read_text().strip().replace(":", ""))
    except (OSError, ValueError):
        return bytes(6)


def _about(interface: str, what: str) -> Path:
    return Path("/sys/class/net", interface, what)


def carriers(own: Address, other: Address) -> set[str]:
    """The interfaces that packets between an address of this host and another one come and go on, and those below them.

    Empty where the kernel knows neither.
    """
    found = {name for name in (_owner(own), _way_to(other)) if name}
    waiting = list(found)
    while waiting:
        for path in Path("/sys/class/net", waiting.pop()).glob("lower_*"):
            name = path.name.removeprefix("lower_")
            if name not in found:
                found.add(name)
                waiting.append(name)
    return found


def _owner(address: Address) -> str | None:
    with route_socket() as ipr:
        for message in ipr.get_addr(address=str(address)):
            return _name(message["index"])
    return None


def _way_to(address: Address) -> str | None:
    with route_socket() as ipr:
        try:
            (route,) = ipr.route("get", dst=str(address))
        except NetlinkError:
            return None
        return _name(route.get_attr("RTA_OIF"))


@dataclass(frozen=True, slots=True)
class NextHop:
    """The gateway, or the host itself; a MAC address that is not known yet is a made-up one."""

    address: Address
    mac: bytes


def next_hop_to(address: Address) -> NextHop | None:
    """None where the kernel knows no way, or one without a neighbour: through itself or a tunnel."""
    with route_socket() as ipr:
        try:
            (route,) = ipr.route("get", dst=str(address))
        except NetlinkError:
            return None
        gateway, ifindex = route.get_attr("RTA_GATEWAY"), route.get_attr("RTA_OIF")
        if route["type"] != _UNICAST or route.get_attr("RTA_VIA") is not None:
            return None
        hop = parse_address(gateway) if gateway else address
        known = (entry.get_attr("NDA_LLADDR") for entry in ipr.get_neighbours(ifindex=ifindex, dst=str(hop)))
        mac = next(filter(None, known), None)
        return NextHop(hop, bytes.fromhex(mac.replace(":", "")) if mac else _UNKNOWN_MAC)


def _name(ifindex: int | None) -> str | None:
    with suppress(OSError):
        return socket.if_indextoname(ifindex) if ifindex else None
    return None
