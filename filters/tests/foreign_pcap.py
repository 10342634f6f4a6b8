"""Capture files as others write them, byte by byte: draft-ietf-opsawg-pcap and draft-ietf-opsawg-pcapng."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from filters.tests.packets import FRAMES

MICRO, NANO, KUZNETZOV = 0xA1B2C3D4, 0xA1B23C4D, 0xA1B2CD34
ETHERNET, RAW = 1, 101
T = 1_700_000_000
FIRST, SECOND = FRAMES["udp"], FRAMES["tcp syn"]

Expected = tuple[int, int, bytes]
"""Seconds (32 bits), nanoseconds, what was captured."""


@dataclass(frozen=True, slots=True)
class Pcap:
    """`order` is struct's."""

    order: str
    magic: int = MICRO
    link_type: int = ETHERNET
    snaplen: int = 65535
    version: tuple[int, int] = (2, 4)

    def file(self, *records: bytes) -> bytes:
        head = struct.pack(f"{self.order}IHHiIII", self.magic, *self.version, 0, 0, self.snaplen, self.link_type)
        return head + b"".join(records)

    def record(
        self, seconds: int, fraction: int, data: bytes, length: int | None = None, caplen: int | None = None
    ) -> bytes:
        """Kuznetzov's have an interface, a protocol and a packet type behind the lengths."""
        more = bytes(8) if self.magic == KUZNETZOV else b""
        sizes = len(data) if caplen is None else caplen, len(data) if length is None else length
        return struct.pack(f"{self.order}IIII", seconds, fraction, *sizes) + more + data


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of the pcapng format; `order` is struct's. Times are in the units of the interface."""

    order: str

    def pack(self, form: str, *values: int) -> bytes:
        return struct.pack(self.order + form, *values)

    def option(self, code: int, value: bytes) -> bytes:
        return self.pack("HH", code, len(value)) + _padded(value)

    def block(self, kind: int, body: bytes, *options: bytes) -> bytes:
        body = _padded(body) + (b"".join((*options, self.option(0, b""))) if options else b"")
        size = self.pack("I", len(body) + 12)
        return self.pack("I", kind) + size + body + size

    def section(self, *options: bytes) -> bytes:
        return self.block(0x0A0D0D0A, self.pack("IHHq", 0x1A2B3C4D, 1, 0, -1), *options)

    def interface(self, *options: bytes, link_type: int = ETHERNET, snaplen: int = 0) -> bytes:
        return self.block(1, self.pack("HHI", link_type, 0, snaplen), *options)

    def resolution(self, value: int) -> bytes:
        return self.option(9, bytes([value]))

    def offset(self, seconds: int) -> bytes:
        return self.option(14, self.pack("q", seconds))

    def packet(self, time: int, data: bytes, *options: bytes, interface: int = 0, caplen: int | None = None) -> bytes:
        size = len(data) if caplen is None else caplen
        head = self.pack("IIIII", interface, time >> 32, time & 0xFFFFFFFF, size, size)
        return self.block(6, head + data, *options)

    def simple_packet(self, data: bytes) -> bytes:
        return self.block(3, self.pack("I", len(data)) + data)

    def obsolete_packet(self, time: int, data: bytes, *options: bytes) -> bytes:
        head = self.pack("HHIIII", 0, 0xFFFF, time >> 32, time & 0xFFFFFFFF, len(data), len(data))
        return self.block(2, head + data, *options)


def _padded(data: bytes) -> bytes:
    return data.ljust(len(data) + 3 & ~3, b"\0")


def _blocks_of_all_kinds(b: Blocks) -> bytes:
    """Whoever wants packets passes over what is none, known or not."""
    return b"".join(
        (
            b.section(b.option(1, b"a comment"), b.option(2, b"hardware"), b.option(4, b"application")),
            b.block(10, b.pack("II", 0x544C534B, 6) + b"secret"),
            b.interface(b.option(2, b"eth0"), b.option(3, b"odd"), b.option(11, b"\0udp"), b.option(12, b"Linux")),
            b.block(4, b.pack("HH", 1, 9) + _padded(b"\x0a\0\0\1name\0") + b.pack("HH", 0, 0)),
            b.simple_packet(FIRST),
            b.obsolete_packet(T * 10**6 + 1, SECOND, b.option(2, b.pack("I", 2))),
            b.block(0xBAD, b.pack("I", 32473) + b"custom"),
            b.block(0x40000BAD, b.pack("I", 32473)),
            b.block(9, b"journal"),
            b.block(0x7FFFFFFF, b""),
            b.packet(T * 10**6 + 2, FIRST, b.option(2, b.pack("I", 1)), b.option(1, b"one"), b.option(1, b"two")),
            b.block(5, b.pack("III", 0, 0, 0), b.option(4, b.pack("Q", 5))),
            b.packet(T * 10**6 + 3, SECOND[:33]),
        )
    )


def _two(time: int, *options: bytes, b: Blocks) -> bytes:
    """Two packets of one interface, the second a tick later."""
    return b.section() + b.interface(*options) + b.packet(time, FIRST) + b.packet(time + 1, SECOND)


def _several_interfaces(b: Blocks) -> bytes:
    interfaces = b.interface(), b.interface(b.resolution(9), b.option(2, b"b")), b.interface(b.resolution(0x80 | 10))
    times = T * 10**6 + 5, T * 10**9 + 5, T * 2**10 + 512
    packets = (b.packet(time, FIRST, interface=number) for number, time in enumerate(times))
    return b.section() + b"".join(interfaces) + b"".join(packets)


def _several_sections(b: Blocks) -> bytes:
    return _two(T * 10**9, b.resolution(9), b=b) + _two(T * 10**3, b.resolution(3), b=b)


def _at(*nanoseconds: int) -> list[Expected]:
    return [(T, each, data) for each, data in zip(nanoseconds, (FIRST, SECOND) * 2, strict=False)]


_PCAPNG: dict[str, tuple[Callable[[Blocks], bytes], list[Expected]]] = {
    "microseconds": (lambda b: _two(T * 10**6 + 5, b=b), _at(5000, 6000)),
    "nanoseconds": (lambda b: _two(T * 10**9 + 5, b.resolution(9), b=b), _at(5, 6)),
    "picoseconds": (
        lambda b: _two(T // 100 * 10**12 + 5999, b.resolution(12), b=b),
        [
            (T // 100, 5, FIRST),
            (T // 100, 6, SECOND),
        ],
    ),
    "seconds": (lambda b: _two(T, b.resolution(0), b=b), [(T, 0, FIRST), (T + 1, 0, SECOND)]),
    "binary fractions": (lambda b: _two(T * 2**10 + 256, b.resolution(0x80 | 10), b=b), _at(250_000_000, 250_976_562)),
    "later clock": (lambda b: _two(5, b.offset(T), b=b), _at(5000, 6000)),
    "earlier clock": (lambda b: _two((T + 9) * 10**9, b.resolution(9), b.offset(-9), b=b), _at(0, 1)),
    "all kinds of blocks": (
        _blocks_of_all_kinds,
        [
            (0, 0, FIRST),
            (T, 1000, SECOND),
            (T, 2000, FIRST),
            (T, 3000, SECOND[:33]),
        ],
    ),
    "several interfaces": (_several_interfaces, [(T, 5000, FIRST), (T, 5, FIRST), (T, 500_000_000, FIRST)]),
    "several sections": (_several_sections, _at(0, 1, 0, 1_000_000)),
    "empty packet": (lambda b: b.section() + b.interface() + b.packet(T * 10**6, b""), [(T, 0, b"")]),
    "no packets": (lambda b: b.section() + b.interface(), []),
}
_PCAP = {
    "microseconds": (MICRO, _at(5000, 6000)),
    "nanoseconds": (NANO, _at(5, 6)),
    "Kuznetzov's": (KUZNETZOV, _at(5000, 6000)),
}


def _pcap(order: str, magic: int) -> bytes:
    pcap = Pcap(order, magic)
    return pcap.file(pcap.record(T, 5, FIRST), pcap.record(T, 6, SECOND))


def _longer_than_announced() -> bytes:
    pcap = Pcap("<", snaplen=20)
    return pcap.file(pcap.record(T, 5, FIRST), pcap.record(T, 6, SECOND))


_ORDERS = {"little": "<", "big": ">"}
FILES: dict[str, tuple[bytes, list[Expected]]] = {
    **{
        f"pcap {name} {endian}": (_pcap(order, magic), packets)
        for name, (magic, packets) in _PCAP.items()
        for endian, order in _ORDERS.items()
    },
    **{
        f"pcapng {name} {endian}": (made(Blocks(order)), packets)
        for name, (made, packets) in _PCAPNG.items()
        for endian, order in _ORDERS.items()
    },
    "pcap longer than announced": (_longer_than_announced(), [(T, 5000, FIRST[:20]), (T, 6000, SECOND[:20])]),
    "pcap after 2038": (Pcap("<").file(Pcap("<").record(2**32 - 1, 7, FIRST)), [(2**32 - 1, 7000, FIRST)]),
    "pcap five million microseconds": (
        Pcap("<").file(Pcap("<").record(T, 5_000_000, FIRST)),
        [(T, 5_000_000_000, FIRST)],
    ),
}
"""What each file is made of, and the packets in it."""

_LITTLE = Blocks("<")
_BEGUN = _LITTLE.section() + _LITTLE.interface() + _LITTLE.packet(T * 10**6, FIRST)
DAMAGED: dict[str, tuple[bytes, str]] = {
    "pcap cut": (_pcap("<", MICRO)[:-1], f"truncated dump file; tried to read {len(SECOND)} captured bytes, only got"),
    "pcap huge": (
        Pcap("<").file(Pcap("<").record(T, 0, FIRST), Pcap("<").record(T, 0, b"", caplen=0x7FFFFFFF)),
        "invalid packet capture length 2147483647, bigger than snaplen of 65535",
    ),
    "pcapng cut": (_BEGUN + _LITTLE.packet(0, FIRST)[:-1], "truncated pcapng dump file; tried to read"),
    "pcapng huge": (_BEGUN + _LITTLE.pack("II", 6, 0x7FFFFFFC), "pcapng block size 2147483644 > maximum 16777216"),
    "pcapng huge packet": (
        _BEGUN + _LITTLE.packet(0, FIRST, caplen=0xFFFFFFFF),
        "invalid packet capture length 4294967295, bigger than snaplen of 262144",
    ),
    "pcapng unknown interface": (_BEGUN + _LITTLE.packet(0, FIRST, interface=3), "a packet arrived on interface 3"),
    "pcapng other link type": (_BEGUN + _LITTLE.interface(link_type=RAW), "an interface has a type 101 different"),
    "pcapng other snaplen": (_BEGUN + _LITTLE.interface(snaplen=99), "an interface has a snapshot length 99 different"),
    "pcapng other endianness": (_BEGUN + Blocks(">").section(), "pcapng block size 469762048 > maximum"),
    "pcapng ends differ": (_BEGUN + _LITTLE.packet(0, FIRST)[:-4] + b"\1\0\0\0", "block total length in header and"),
}
"""Files with FIRST in front of what cannot be read, and what libpcap says of that."""
