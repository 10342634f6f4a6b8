"""Virtual addresses in text and as values (pure).

Enters: text forms such as `10.0.0.1:80/tcp` and `[2001:db8::/64]:8000-8999/udp`. Leaves: a frozen Vip that is valid by
construction, or InvalidInput with one line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from lb.errors import InvalidInput
from lb.model.options import Network, is_unicast

Address = IPv4Address | IPv6Address
Subnet = Network  # of an interface

# `ADDR`, `ADDR/24`, `V6`, `[V6]`, `[V6/64]` or `[V6]/64`, and what may follow.
VIP = re.compile(
    r"(?:\[(?P<v6>[^]/]*)(?:/(?P<inner>[0-9]{1,4})\]|\](?:/(?P<outer>[0-9]{1,4}))?)|(?P<bare>[^/@]*:[^/@]*:[^/@]*)"
    r"|(?P<v4>[^:/@\[\]]*)(?:/(?P<length4>[0-9]{1,4}))?)"
    r"(?::(?P<port>[^-/@]*)(?:-(?P<last>[^/@]*))?)?(?:/(?P<protocol>[^@]*))?(?:@(?P<set>.*))?"
)
SET_NAME = re.compile(r"[a-z][a-z0-9_.-]{0,38}")


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
            raise InvalidInput(f"protocol {text}: unknown: use tcp or udp") from None


@lru_cache(1 << 16)  # the same machines stand behind many services
def parse_address(text: str) -> Address:
    try:
        address = ip_address(text)
    except ValueError:
        raise InvalidInput(f"address {text or '(empty)'}: not an IPv4 or IPv6 address") from None
    if isinstance(address, IPv6Address) and address.scope_id:
        raise InvalidInput(f"address {text}: zones are not supported")
    return address


def parse_port(text: str, whole: str) -> int:
    if text.isascii() and text.isdigit() and len(text) <= 5 and int(text) <= 65535:
        return int(text)
    raise InvalidInput(f"{whole}: port {text or '(empty)'}: not a number from 0 to 65535")


def split_port(text: str, whole: str) -> tuple[Address, int | None]:
    """`ADDR`, `ADDR:PORT`, `V6`, `[V6]` or `[V6]:PORT` -> address, port."""
    match = re.fullmatch(r"\[([^\]]*)\](?::(.*))?", text)
    match = match or re.fullmatch(r"([^:]*)(?::([^:]*))?", text)
    host, port = match.groups() if match else (text, None)
    address = parse_address(host)
    return address, None if port is None else parse_port(port, whole)


def _prefix_length(text: str | None, address: Address, whole: str) -> int:
    length = address.max_prefixlen if text is None else int(text)
    if not 1 <= length <= address.max_prefixlen:
        raise InvalidInput(f"{whole}: prefix length {length}: not from 1 to {address.max_prefixlen}")
    if int(address) & ((1 << (address.max_prefixlen - length)) - 1):
        raise InvalidInput(f"{whole}: prefix {address}/{length}: has host bits set")
    return length


def join_port(address: Address, port: int) -> str:
    return f"[{address}]:{port}" if isinstance(address, IPv6Address) else f"{address}:{port}"


@dataclass(frozen=True, slots=True)
class Vip:
    """A virtual service address: `ADDR[/LENGTH]:PORT[-PORT][/PROTO][@SET]`.

    Port 0 stands for every port. Of two VIPs that a packet fits, the one with the longer prefix has it, then the one
    with fewer ports. SET names a set of members of the same VIP, for clients from certain prefixes."""

    address: Address
    port: int
    protocol: Protocol = Protocol.TCP
    last_port: int = -1  # the port, where it is not given
    prefix_length: int = -1  # the whole address, where it is not given
    set: str = ""
    sort_key: tuple[int, int, int, int, int, int, str] = field(init=False, repr=False, compare=False)
    _hash: int = field(init=False, repr=False, compare=False)  # an address takes long to hash, and a VIP is a key

    def __post_init__(self) -> None:
        if self.last_port < 0:
            object.__setattr__(self, "last_port", self.port)
        if self.prefix_length < 0:
            object.__setattr__(self, "prefix_length", self.address.max_prefixlen)
        key = (
            self.address.version,
            int(self.address),
            self.prefix_length,
            self.port,
            self.last_port,
            int(self.protocol),
            self.set,
        )
        object.__setattr__(self, "sort_key", key)
        object.__setattr__(self, "_hash", hash(key))
        if self.address.is_unspecified or self.address.is_multicast or self.address.is_loopback:
            raise InvalidInput(f"vip {self}: not a unicast address")
        if not self.is_one_address and not is_unicast(self.network):
            raise InvalidInput(f"vip {self}: contains non-unicast addresses")
        if self.last_port != self.port and not 0 < self.port < self.last_port:
            raise InvalidInput(f"vip {self}: ports {self.port}-{self.last_port}: not a port range within 1 to 65535")
        if self.set and not re.fullmatch(SET_NAME, self.set):
            raise InvalidInput(
                f"vip {self}: set {self.set}: invalid name: use up to 39 of a-z, 0-9, _ . -, a letter first"
            )

    @classmethod
    def parse(cls, text: str) -> Vip:
        match = re.fullmatch(VIP, text)
        if match is None or match["set"] == "":
            raise InvalidInput(f"vip {text}: not ADDR[/LENGTH]:PORT[-PORT][/PROTO][@SET]")
        address = parse_address(match["v6"] or match["bare"] or match["v4"])
        length = _prefix_length(match["inner"] or match["outer"] or match["length4"], address, f"vip {text}")
        if match["port"] is None:
            whole = cls(address, 80, prefix_length=length)
            raise InvalidInput(f"vip {text}: a port is missing: write {whole} (port 0: any)")
        first = parse_port(match["port"], f"vip {text}")
        last = first if match["last"] is None else parse_port(match["last"], f"vip {text}")
        protocol = Protocol.TCP if match["protocol"] is None else Protocol.parse(match["protocol"])
        return cls(address, first, protocol, last, length, match["set"] or "")

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        address = str(self.address) if self.is_one_address else f"{self.address}/{self.prefix_length}"
        where = f"[{address}]" if self.address.version == 6 else address
        ports = str(self.port) if self.port == self.last_port else f"{self.port}-{self.last_port}"
        return f"{where}:{ports}/{self.protocol.label}" + (f"@{self.set}" if self.set else "")

    @property
    def is_one_address(self) -> bool:
        return self.prefix_length == self.address.max_prefixlen

    @property
    def is_exact(self) -> bool:
        """One address and one port, which a single lookup finds."""
        return self.is_one_address and self.port == self.last_port != 0

    @property
    def network(self) -> Network:
        return ip_network((self.address, self.prefix_length))

    def holds(self, address: Address) -> bool:
        if self.is_one_address:  # as most: a network takes long to make
            return address == self.address
        return address.version == self.address.version and address in self.network

    @property
    def ports(self) -> range:
        return range(65536) if self.port == 0 else range(self.port, self.last_port + 1)

    @property
    def fixed_port(self) -> int:
        """That of every packet; 0 where they may differ."""
        return self.port if self.port == self.last_port else 0

    @property
    def own(self) -> Vip:
        """The VIP that this one is a set of members of; itself, where it is none."""
        return replace(self, set="") if self.set else self
