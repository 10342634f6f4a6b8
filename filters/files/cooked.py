"""Packets of several interfaces for a decoder: the frame's Ethernet header becomes one of Linux' cooked v2.

Enters: records with metadata, times in nanoseconds. Leaves: plain records of LINKTYPE_LINUX_SLL2, in which each packet
names its interface and direction, as tcpdump captures them on `any`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from filters.records.metadata import CapturedPacket, CapturePoint, captured_packets
from filters.records.pcap import Sink, Span, record

LINK_TYPE = 276  # LINKTYPE_LINUX_SLL2

_HEADER = struct.Struct(">HHIHBB8s")  # protocol, zero, interface, ARPHRD_, type, length of the address, address
_ETHERNET_SIZE, _TYPE_AT, _SMALLEST_TYPE = 14, 12, 0x600
_ARPHRD_ETHER, _NO_TYPE_BUT_LENGTH = 1, 4  # LINUX_SLL_P_802_2
_TO_US, _BROADCAST, _MULTICAST, _TO_OTHERS, _OUTGOING = range(5)  # PACKET_HOST, <linux/if_packet.h>


class Cooked:
    """A Sink for records with metadata, in front of one for cooked packets."""

    def __init__(self, sink: Sink, names: dict[int, str], *, nano: bool) -> None:
        self._sink, self._names, self._nano = sink, names, nano
        self._mac = cache(self._read_mac)

    def write(self, spans: Sequence[Span]) -> None:
        self._sink.write([b"".join(map(self._record, captured_packets(span))) for span in spans])

    def check(self) -> None:
        self._sink.check()

    def close(self) -> None:
        self._sink.close()

    def _record(self, packet: CapturedPacket) -> bytes:
        fraction = packet.fraction if self._nano else packet.fraction // 1000
        frame = bytes(packet.data)
        header = self._header(frame, packet)
        more = len(header) - _ETHERNET_SIZE
        return record(packet.seconds, fraction, header + frame[_ETHERNET_SIZE:], packet.length + more)

    def _header(self, frame: bytes, packet: CapturedPacket) -> bytes:
        """Of a frame cut within its header what is missing counts as zeros."""
        kind = int.from_bytes(frame[_TYPE_AT:_ETHERNET_SIZE], "big")
        protocol = kind if kind >= _SMALLEST_TYPE else _NO_TYPE_BUT_LENGTH
        ifindex = packet.metadata.ifindex
        return _HEADER.pack(protocol, 0, ifindex, _ARPHRD_ETHER, self._packet_type(frame, packet), 6, frame[6:12])

    def _packet_type(self, frame: bytes, packet: CapturedPacket) -> int:
        if CapturePoint(packet.metadata.point).direction == "out":
            return _OUTGOING
        destination = frame[:6]
        if destination == b"\xff" * 6:
            return _BROADCAST
        if frame[:1] and frame[0] & 1:
            return _MULTICAST
        return _TO_US if destination == self._mac(packet.metadata.ifindex) else _TO_OTHERS

    def _read_mac(self, ifindex: int) -> bytes:
        try:
            text = Path("/sys/class/net", self._names.get(ifindex, ""), "address").read_text()
            return bytes.fromhex(text.strip().replace(":", ""))
        except (OSError, ValueError):
            return b""
