"""The SSH or API connection that a change was requested on, and its frames.

Enters: for a command over SSH the environment, its own or that of an ancestor process (sudo removes SSH_CONNECTION);
for a request over TCP the ends of its connection. Leaves: Ethernet frames of the connection in both directions, to test
filter rules with.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv6Address
from pathlib import Path
from typing import TYPE_CHECKING, Self

from lb.errors import LbError
from lb.model.vip import Address, parse_address

if TYPE_CHECKING:
    pass

VARIABLE = "SSH_CONNECTION"

_SYN, _ACK, _PUSH = 0x02, 0x10, 0x08
_PAYLOADS = (b"", bytes(36), bytes(1448))  # an acknowledgement, a key pressed, a screenful
_UNKNOWN_MAC = bytes.fromhex("020000000001")


@dataclass(frozen=True, slots=True)
class Connection:
    client: Address
    client_port: int
    server: Address
    server_port: int

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """As SSH_CONNECTION: client address and port, server address and port (sshd(8)). None for anything else."""
        words = text.split()
        with suppress(LbError, ValueError):
            client, client_port, server, server_port = words
            ports = int(client_port), int(server_port)
            if all(0 < port <= 0xFFFF for port in ports):
                return cls(_address(client), ports[0], _address(server), ports[1])
        return None

    @property
    def text(self) -> str:
        """What `parse` reads."""
        return f"{self.client} {self.client_port} {self.server} {self.server_port}"

    def refusal(self, what: str = "") -> str:
        """How a change that would end it is refused; `what`: what else it would drop, and so end it."""
        return f"would drop {what}the connection from {self} of this request: use force=true to override"

    def __str__(self) -> str:
        return f"{self.client} port {self.client_port}"

    def frames(
        self, *, to_server: bool, own_mac: bytes = _UNKNOWN_MAC, peer_mac: bytes | None = None
    ) -> Iterator[bytes]:
        """The opening, then packets of several lengths. `own_mac` is this host's address, `peer_mac` that of the next
        hop."""
        ends = (self.client, self.client_port), (self.server, self.server_port)
        (source, source_port), (destination, port) = ends if to_server else ends[::-1]
        peer = peer_mac or _UNKNOWN_MAC
        macs = own_mac + peer if to_server else peer + own_mac
        opening = _SYN if to_server else _SYN | _ACK
        segments = [(opening, b""), *((_ACK | (_PUSH if payload else 0), payload) for payload in _PAYLOADS)]
        for flags, payload in segments:
            tcp = struct.pack(">HHIIBBHHH", source_port, port, 1, 1, 5 << 4, flags, 0xFFFF, 0, 0) + payload
            yield macs + _packet(source, destination, tcp)


class SshConnection(Connection):
    """That a command is typed in."""

    __slots__ = ()

    def refusal(self, what: str = "") -> str:
        return f"would drop {what}the SSH connection from {self} that runs this command: use --force to override"


def _address(text: str) -> Address:
    """Without a zone; an IPv4 client of a socket for both families is one of IPv4."""
    address = parse_address(text.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _packet(source: Address, destination: Address, tcp: bytes) -> bytes:
    """EtherType, IP header and the segment; its checksum is not checked."""
    ends = source.packed + destination.packed
    if source.version == 6:
        return struct.pack(">HIHBB", 0x86DD, 6 << 28, len(tcp), 6, 64) + ends + tcp
    header = struct.pack(">BBHHHBBH", 0x45, 0x10, 20 + len(tcp), 1, 0x4000, 64, 6, 0) + ends
    total = sum(struct.unpack(">10H", header))
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return struct.pack(">H", 0x0800) + header[:10] + struct.pack(">H", checksum) + header[12:] + tcp


def ssh_connection(environment: Mapping[str, str] = os.environ, proc: Path = Path("/proc")) -> SshConnection | None:
    """By the environment, else by that of the nearest ancestor that has the variable."""
    if text := environment.get(VARIABLE):
        return SshConnection.parse(text)
    for pid in _ancestors(proc):
        with suppress(OSError):
            for entry in (proc / str(pid) / "environ").read_bytes().split(b"\0"):
                name, _, value = entry.partition(b"=")
                if name == VARIABLE.encode() and value:
                    return SshConnection.parse(value.decode(errors="replace"))
    return None


def _ancestors(proc: Path) -> Iterator[int]:
    """Our parent, its parent, and so on."""
    pid = os.getppid()
    while pid > 0:
        yield pid
        try:
            stat = (proc / str(pid) / "stat").read_text()
        except OSError:
            return
        pid = int(stat[stat.rindex(")") + 1 :].split()[1])


SSH_HEADER = "SSH-Connection"
