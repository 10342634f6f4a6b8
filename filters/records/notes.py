"""What is known of a captured packet beside its bytes: where it was seen, and what became of it.

Enters: a packet at a hook. Leaves: a PacketMetadata of 20 bytes, in the host's byte order, between the header of the
packet's record and its bytes. Both lengths in the header count it, so that whoever only moves records need not know of
it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from filters.compiler import cbpf
from filters.records.pcap import Span, offsets, unpacked

NO_ACTION = 0xFFFFFFFF
# enum xdp_action, <linux/bpf.h>
ACTIONS = ("XDP_ABORTED", "XDP_DROP", "XDP_PASS", "XDP_TX", "XDP_REDIRECT")


class CapturePoint(IntEnum):
    """Where a packet was seen; FILE: in a file that somebody else has written."""

    XDP, XDP_EXIT, TC_IN, TC_OUT, FILE = range(5)

    @property
    def words(self) -> str:
        """As --at takes it."""
        return self.name.lower().replace("_", "-")

    @property
    def direction(self) -> str | None:
        """Of the packet, seen from the interface; what it becomes behind XDP the action says."""
        return {CapturePoint.FILE: None, CapturePoint.TC_OUT: "out"}.get(self, "in")


class PacketMetadata(ctypes.Structure):
    """`action` is an enum xdp_action, NO_ACTION where none has been taken; `reason` is the balancer's, 0 where it has
    not said any; `egress` is where it sends the packet."""

    _fields_ = tuple((name, ctypes.c_uint32) for name in ("ifindex", "place", "action", "reason", "egress"))


NOTE_SIZE = ctypes.sizeof(PacketMetadata)
OF_A_FILE = bytes(PacketMetadata(place=CapturePoint.FILE, action=NO_ACTION))


@dataclass(frozen=True, slots=True)
class Noted:
    """A packet of a record: `data` is what was captured of `length` bytes."""

    seconds: int
    fraction: int
    length: int
    note: PacketMetadata
    data: memoryview


def noted(span: Span) -> Iterator[Noted]:
    """The packets of records with notes."""
    view = memoryview(span)
    for at, seconds, fraction in offsets(span):
        packet, length = unpacked(view, at)
        note = PacketMetadata.from_buffer_copy(packet)
        yield Noted(seconds, fraction, length - NOTE_SIZE & cbpf.WORD, note, packet[NOTE_SIZE:])


def action_words(action: int) -> str | None:
    if action == NO_ACTION:
        return None
    return ACTIONS[action] if action < len(ACTIONS) else f"XDP_{action}"
