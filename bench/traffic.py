"""Clients' packets to a VIP: the template and the order of flows that bench/traffic.h makes packets from.

In come addresses and a kind of packet; out go frames, and the `traffic` variable of a loaded object set to them.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

PACKETS = ("ack", "syn", "udp")
FLAGS = {"ack": "A", "syn": "S"}  # TCP's
CLIENTS = {4: "10.0.0.0", 6: "2001:2:0:3::"}  # the first of as many as needed
ETHERNET_HEADER_SIZE = 14
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
LAST_WORD = {4: 0, 6: 3}  # of an address, as structs hold it

IN_ORDER = (1, 1)
SHUFFLED = (1664525, 1013904223)  # multiplier and increment, with a full period for every power of two


@dataclass(frozen=True)
class Target:
    """Where packets go: frames from one MAC address to another, packets to `address` and `port`."""

    address: str
    port: int
    source_mac: str
    destination_mac: str

    @property
    def family(self) -> int:
        return ip_address(self.address).version

    def frame(self, packet: str, client: str, size: int) -> bytes:
        """A packet of one of PACKETS from a client's port 0, without payload, padded to `size` bytes."""
        ip = IP if self.family == 4 else IPv6
        made = Ether(src=self.source_mac, dst=self.destination_mac) / ip(src=client, dst=self.address)
        made /= UDP(sport=0, dport=self.port) if packet == "udp" else TCP(sport=0, dport=self.port, flags=FLAGS[packet])
        return bytes(made).ljust(size, b"\0")


def aim(traffic: Any, frame: bytes, flows: int, order: tuple[int, int]) -> None:
    """From now on packets like `frame`, each from the next of `flows` clients, a power of two, from CLIENTS on."""
    packet = frame[ETHERNET_HEADER_SIZE:]
    family = packet[0] >> 4
    ctypes.memmove(traffic.macs, frame, ctypes.sizeof(traffic.macs))
    ctypes.memmove(traffic.packet, packet, min(len(packet), ctypes.sizeof(traffic.packet)))
    traffic.family = FAMILIES[family]
    traffic.client = words(CLIENTS[family])[LAST_WORD[family]]
    traffic.multiplier, traffic.increment = order
    traffic.flow, traffic.sent, traffic.mask = 0, 0, flows - 1


def words(address: str) -> tuple[int, ...]:
    """The four 32-bit words of an address, as structs hold it; IPv4 is word 0."""
    return struct.unpack("!4I", ip_address(address).packed.ljust(16, b"\0"))
