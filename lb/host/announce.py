"""Announcements of VIP addresses, so that clients and routers replace the MAC address that they know.

Enters: an interface and addresses that have just been put on it, or whose link has come up. Leaves: for each a
gratuitous ARP request (RFC 5227, 3) or an unsolicited neighbour advertisement with the override flag (RFC 4861, 7.2.6),
PASSES times. The kernel sends neither for an address that is added, and a single frame may be lost.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from lb.errors import NotFound
from lb.model.state import OwnAddress
from lb.model.vip import Address

PASSES = 3  # MAX_NEIGHBOR_ADVERTISEMENT, RFC 4861
INTERVAL_S = 1.0  # its RetransTimer
SHORT_INTERVAL_S = 0.05  # for a command, which ends

ARPHRD_ETHER = 1
ETH_P_IP, ETH_P_ARP, ETH_P_IPV6 = 0x0800, 0x0806, 0x86DD
ARPOP_REQUEST = 1
NEIGHBOUR_ADVERTISEMENT, TARGET_LINK_LAYER_ADDRESS = 136, 2
ROUTER, OVERRIDE = 1 << 31, 1 << 29
ALL_NODES = IPv6Address("ff02::1")
ALL_NODES_MAC = bytes.fromhex("333300000001")
BROADCAST_MAC = b"\xff" * 6


def gratuitous_arp(mac: bytes, address: IPv4Address) -> bytes:
    """The request form: replies are ignored by hosts that did not ask."""
    arp = struct.pack("!HHBBH", ARPHRD_ETHER, ETH_P_IP, len(mac), len(address.packed), ARPOP_REQUEST)
    return _ethernet(BROADCAST_MAC, mac, ETH_P_ARP) + arp + mac + address.packed + bytes(6) + address.packed


def unsolicited_advertisement(mac: bytes, address: IPv6Address, *, router: bool) -> bytes:
    flags = OVERRIDE | (ROUTER if router else 0)
    option = struct.pack("!BB", TARGET_LINK_LAYER_ADDRESS, 1) + mac
    body = struct.pack("!I", flags) + address.packed + option
    message = struct.pack("!BBH", NEIGHBOUR_ADVERTISEMENT, 0, 0) + body
    pseudo_header = address.packed + ALL_NODES.packed + struct.pack("!II", len(message), socket.IPPROTO_ICMPV6)
    checksum = _checksum(pseudo_header + message)
    header = struct.pack("!IHBB", 6 << 28, len(message), socket.IPPROTO_ICMPV6, 255) + address.packed + ALL_NODES.packed
    advertisement = struct.pack("!BBH", NEIGHBOUR_ADVERTISEMENT, 0, checksum) + body
    return _ethernet(ALL_NODES_MAC, mac, ETH_P_IPV6) + header + advertisement


def _ethernet(destination: bytes, source: bytes, ethertype: int) -> bytes:
    return destination + source + ethertype.to_bytes(2)


def _checksum(data: bytes) -> int:
    """RFC 1071; the length is even."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@dataclass
class _Due:
    passes: int
    at: float  # time.monotonic()


class Announcer:
    """`held` gives the addresses of an interface: what has left it is not announced again. in_background: the owner
    calls `repeat` about once a second; else all passes are made at once, with short gaps."""

    def __init__(self, held: Callable[[str], Collection[Address]], *, in_background: bool = False) -> None:
        self._held, self._in_background = held, in_background
        self._due: dict[OwnAddress, _Due] = {}

    def announce(self, addresses: Iterable[OwnAddress]) -> list[str]:
        """Why it was not possible, by interface."""
        now = time.monotonic()
        self._due |= {own: _Due(PASSES, now) for own in addresses}
        failed = self.repeat()
        while self._due and not self._in_background:
            time.sleep(SHORT_INTERVAL_S)
            failed += self.repeat()
        return failed

    def repeat(self) -> list[str]:
        """Send what is due, once."""
        now = time.monotonic()
        due: dict[str, list[Address]] = {}
        for own, each in list(self._due.items()):
            if each.at <= now:
                due.setdefault(own.interface, []).append(own.address)
                self._advance(own, each, now)
        return [failure for name, addresses in due.items() if (failure := self._send(name, addresses))]

    def _advance(self, own: OwnAddress, due: _Due, now: float) -> None:
        due.passes -= 1
        due.at = now + (INTERVAL_S if self._in_background else 0)
        if not due.passes:
            del self._due[own]

    def _send(self, name: str, addresses: Collection[Address]) -> str | None:
        try:
            held = set(self._held(name))
            self._transmit(name, [address for address in addresses if address in held])
        except NotFound:  # the interface has gone
            return None
        except OSError as error:
            self._due = {own: each for own, each in self._due.items() if own.interface != name}
            cure = "run with CAP_NET_RAW" if isinstance(error, PermissionError) else f"see ip link show {name}"
            return f"{name}: VIP addresses not announced (gratuitous ARP, unsolicited NA): {error.strerror}: {cure}"
        return None

    def _transmit(self, name: str, addresses: Collection[Address]) -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as link:
            link.bind((name, 0))
            _, _, _, hardware, mac = link.getsockname()
            if hardware != ARPHRD_ETHER:
                return
            router = _forwards_ipv6(name)
            for address in addresses:
                link.send(_frame(mac, address, router=router))


def _frame(mac: bytes, address: Address, *, router: bool) -> bytes:
    if isinstance(address, IPv4Address):
        return gratuitous_arp(mac, address)
    return unsolicited_advertisement(mac, address, router=router)


def _forwards_ipv6(name: str) -> bool:
    """What the kernel's own advertisements say of this host."""
    with suppress(OSError):
        return Path("/proc/sys/net/ipv6/conf", name, "forwarding").read_text().strip() != "0"
    return False
