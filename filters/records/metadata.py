"""Metadata of a captured packet: where it was seen, and the verdict on it.

Enters: a packet at a hook. Leaves: a PacketMetadata of 20 bytes, in the host's byte order, between the header of the
packet's record and its bytes. Both lengths in the header include it, so code that only moves records can ignore it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from filters.records.pcap import Span, offsets, unpacked

NO_ACTION = 0xFFFFFFFF
# enum xdp_action, <linux/bpf.h>
ACTIONS = ("XDP_ABORTED", "XDP_DROP", "XDP_PASS", "XDP_TX", "XDP_REDIRECT")


class CapturePoint(IntEnum):
    """Where a packet was seen; FILE: in a capture file written by another program."""

    XDP, XDP_EXIT, TC_IN, TC_OUT, FILE = range(5)

    @property
    def words(self) -> str:
        """As --at takes it."""
        return self.name.lower().replace("_", "-")

    @property
    def direction(self) -> str | None:
        """Of the packet, relative to the interface; `action` has the verdict of XDP."""
        return {CapturePoint.FILE: None, CapturePoint.TC_OUT: "out"}.get(self, "in")


class PacketMetadata(ctypes.Structure):
    """`action`: enum xdp_action, NO_ACTION where there is none; `reason`: the balancer's, 0 for none; `egress`: the
    interface it sends the packet to."""

    _fields_ = tuple((name, ctypes.c_uint32) for name in ("ifindex", "point", "action", "reason", "egress"))


METADATA_SIZE = ctypes.sizeof(PacketMetadata)
FILE_METADATA = bytes(PacketMetadata(point=CapturePoint.FILE, action=NO_ACTION))


@dataclass(frozen=True, slots=True)
class CapturedPacket:
    """The packet of a record: `data` is what was captured of `length` bytes."""

    seconds: int
    fraction: int
    length: int
    metadata: PacketMetadata
    data: memoryview


def captured_packets(span: Span) -> Iterator[CapturedPacket]:
    """The packets of records with metadata."""
    view = memoryview(span)
    for at, seconds, fraction in offsets(span):
        packet, length = unpacked(view, at)
        metadata = PacketMetadata.from_buffer_copy(packet)
        yield CapturedPacket(seconds, fraction, length - METADATA_SIZE & 0xFFFFFFFF, metadata, packet[METADATA_SIZE:])


def action_words(action: int) -> str | None:
    if action == NO_ACTION:
        return None
    return ACTIONS[action] if action < len(ACTIONS) else f"XDP_{action}"
