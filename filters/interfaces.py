"""The interfaces that packets can be captured on, as libpcap lists them.

Enters: the current network namespace. Leaves: names, indexes, and the words of `tcpdump -D`.
"""

from __future__ import annotations

import ctypes
import fcntl
import socket
import struct
from ctypes import POINTER, c_char_p, c_uint32, c_void_p
from dataclasses import dataclass

from filters.compiler.expr import libpcap
from filters.errors import DumpError

ANY = "any"

# <pcap/pcap.h>
_LOOPBACK, _UP, _RUNNING, _WIRELESS = 1, 2, 4, 8
_FLAG_WORDS = {_UP: "Up", _RUNNING: "Running", _LOOPBACK: "Loopback", _WIRELESS: "Wireless"}
_CONNECTION, _NOT_APPLICABLE = 0x30, 0x30
_WIRED_WORDS = {0x00: "Connection status unknown", 0x10: "Connected", 0x20: "Disconnected"}
_WIRELESS_WORDS = {0x00: "Association status unknown", 0x10: "Associated", 0x20: "Not associated"}
_ERRBUF_SIZE = 256

# <linux/sockios.h>, <linux/if_arp.h>, <linux/if_packet.h>
_SIOCGIFHWADDR = 0x8927
_WITH_ETHERNET_HEADER = (1, 772)  # ARPHRD_ETHER, ARPHRD_LOOPBACK
_SOL_PACKET, _ADD_MEMBERSHIP, _MR_PROMISC = 263, 1, 1


class _Device(ctypes.Structure):
    """struct pcap_if, <pcap/pcap.h>."""


_Device._fields_ = (
    ("next", POINTER(_Device)),
    ("name", c_char_p),
    ("description", c_char_p),
    ("addresses", c_void_p),
    ("flags", c_uint32),
)


@dataclass(frozen=True, slots=True)
class Interface:
    """`flags`: PCAP_IF_ of <pcap/pcap.h>. `any` is one too, with index 0."""

    name: str
    flags: int = 0
    description: str = ""

    @property
    def index(self) -> int:
        return 0 if self.name == ANY else socket.if_nametoindex(self.name)

    @property
    def is_up(self) -> bool:
        return bool(self.flags & _UP)

    @property
    def is_loopback(self) -> bool:
        return bool(self.flags & _LOOPBACK)

    def __str__(self) -> str:
        """As `tcpdump -D`, behind the number."""
        words = [word for bit, word in _FLAG_WORDS.items() if self.flags & bit] or ["none"]
        connection = (_WIRELESS_WORDS if self.flags & _WIRELESS else _WIRED_WORDS).get(self.flags & _CONNECTION)
        description = f" ({self.description})" if self.description else ""
        return f"{self.name}{description} [{', '.join([*words, connection] if connection else words)}]"


def all_interfaces() -> list[Interface]:
    """In libpcap's order, without what is no network interface (USB, Bluetooth, netfilter)."""
    first, said = POINTER(_Device)(), ctypes.create_string_buffer(_ERRBUF_SIZE)
    if libpcap().pcap_findalldevs(ctypes.byref(first), said) != 0:
        raise DumpError(said.value.decode(errors="replace"))
    found, device = [], first
    while device:
        found.append(_interface(device.contents))
        device = device.contents.next
    libpcap().pcap_freealldevs(first)
    names = {ANY, *(name for _, name in socket.if_nameindex())}
    return [interface for interface in found if interface.name in names]


def _interface(device: _Device) -> Interface:
    return Interface(device.name.decode(), device.flags, (device.description or b"").decode(errors="replace"))


def chosen(names: tuple[str, ...]) -> list[Interface]:
    """By name or by number in the list; the first one for no name. Raises DumpError with tcpdump's words."""
    listed = all_interfaces()
    wanted = names or (_default(listed).name,)
    found = [interface for name in wanted for interface in _named(name, listed)]
    for interface in found:
        _check(interface)
    return list(dict.fromkeys(found))


def _default(listed: list[Interface]) -> Interface:
    candidates = [i for i in listed if i.is_up and i.name != ANY and _has_ethernet_header(i.name)]
    if not candidates:
        raise DumpError("no suitable device found")
    return min(candidates, key=lambda interface: interface.is_loopback)


def _named(name: str, listed: list[Interface]) -> list[Interface]:
    if name == ANY:
        return [i for i in listed if i.is_up and i.name != ANY and _has_ethernet_header(i.name)]
    for number, interface in enumerate(listed, 1):
        if name in (interface.name, str(number)):
            return [interface] if interface.name != ANY else _named(ANY, listed)
    if name.isdecimal():
        raise DumpError("Invalid adapter index")
    raise DumpError(f"{name}: No such device exists\n(No such device exists)")


def _check(interface: Interface) -> None:
    if not interface.is_up:
        raise DumpError(f"{interface.name}: That device is not up")
    if not _has_ethernet_header(interface.name):
        raise DumpError(f"{interface.name}: not an Ethernet interface: xdp-dump supports only Ethernet")


def _has_ethernet_header(name: str) -> bool:
    """struct ifreq: the name, then a struct sockaddr with the ARPHRD_ type in the place of the family."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        answer = fcntl.ioctl(control, _SIOCGIFHWADDR, struct.pack("16s24x", name.encode()))
    return struct.unpack_from("=H", answer, 16)[0] in _WITH_ETHERNET_HEADER


def netmask(interface: Interface) -> int:
    """Of its first IPv4 address, in network byte order, for compile_expression(); 0 where it has none."""
    network, mask = c_uint32(), c_uint32()
    said = ctypes.create_string_buffer(_ERRBUF_SIZE)
    libpcap().pcap_lookupnet(interface.name.encode(), ctypes.byref(network), ctypes.byref(mask), said)
    return mask.value


def promiscuous(interfaces: list[Interface]) -> socket.socket:
    """All packets of the wire come in, not only those for us, until the socket is closed."""
    holder = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    for interface in interfaces:
        request = struct.pack("=iHH8x", interface.index, _MR_PROMISC, 0)
        holder.setsockopt(_SOL_PACKET, _ADD_MEMBERSHIP, request)
    return holder
