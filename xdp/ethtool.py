"""What a network driver does to frames on its own, by the ethtool ioctl (include/uapi/linux/ethtool.h).

Enters: the name of an interface in the current network namespace. Leaves: its driver, the offloads that are on, and its
queues. An interface that is gone, or whose driver does not answer, gives the empty answer.
"""

from __future__ import annotations

import fcntl
import socket
import struct
from array import array
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass

from pyroute2.ethtool.ioctl import EthtoolError, IoctlEthtool

SIOCETHTOOL = 0x8946
ETHTOOL_GDRVINFO = 0x03
_DRIVER_INFO = struct.Struct("=I32s160x")  # struct ethtool_drvinfo: the command, the driver, and what is not read here

_TRANSMIT_CHECKSUMS = ("tx-checksum-ipv4", "tx-checksum-ipv6", "tx-checksum-ip-generic")


@dataclass(frozen=True, slots=True)
class Queues:
    """How many queues the interface receives and sends on now, and how many it could receive on."""

    rx: int
    tx: int
    most_rx: int
    combined: bool  # each of them receives and sends


@dataclass(frozen=True, slots=True)
class Offloads:
    """By the kernel's names (rx-lro, rx-gro-hw, rx-vlan-hw-parse; net/ethtool/common.c). What is in `fixed` stays as
    it is."""

    on: frozenset[str] = frozenset()
    fixed: frozenset[str] = frozenset()

    @property
    def leave_checksums_out(self) -> bool:
        """Whether frames are sent with checksums that a card is to fill in."""
        return not self.on.isdisjoint(_TRANSMIT_CHECKSUMS)

    @property
    def leave_vlan_tags_out(self) -> bool:
        """Whether frames are sent with their VLAN tag beside them, for a card to put in."""
        return "tx-vlan-hw-insert" in self.on


@contextmanager
def _asking(name: str) -> Iterator[IoctlEthtool]:
    with closing(IoctlEthtool(name)) as ethtool, suppress(EthtoolError, OSError):
        yield ethtool


def driver(name: str) -> str | None:
    """The kernel's name of the driver, such as virtio_net."""
    answer = array("B", _DRIVER_INFO.pack(ETHTOOL_GDRVINFO, b""))
    request = struct.pack("16sP16x", name.encode(), answer.buffer_info()[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control, suppress(OSError):
        fcntl.ioctl(control, SIOCETHTOOL, request)
    found: bytes = _DRIVER_INFO.unpack(answer)[1]
    return found.rstrip(b"\0").decode() or None


def offloads(name: str) -> Offloads:
    with _asking(name) as ethtool:
        features = ethtool.get_features()
        names = features.keys()
        return Offloads(
            on=frozenset(n for n in names if features.is_active(n)),
            fixed=frozenset(n for n in names if features.is_never_changed(n) or not features.is_available(n)),
        )
    return Offloads()


def queues(name: str) -> Queues | None:
    """None where the driver does not tell."""
    with _asking(name) as ethtool:
        now = ethtool.get_channels()
        return Queues(
            rx=now.rx_count + now.combined_count,
            tx=now.tx_count + now.combined_count,
            most_rx=max(now.max_rx, now.max_combined),
            combined=now.combined_count > 0,
        )
    return None
