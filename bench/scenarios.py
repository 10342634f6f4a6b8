"""What bench dataplane measures: kinds of traffic, and the addresses in it.

In comes nothing; out go Scenarios, each with the case it is reported under and the packet it starts from.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

from bench.traffic import CLIENTS, Target

BACKENDS = 100
SERVICE_PORT = 80
TUNNELS = ("ipip", "gue")
CLIENT_MAC, BALANCER_MAC, BACKEND_MAC = "02:00:00:00:00:01", "02:00:00:00:00:02", "02:00:00:00:00:11"
FRAME_SIZES = {4: 54, 6: 74}  # of a TCP packet without payload; UDP is padded to it
IP_HEADER_SIZES = {4: 20, 6: 40}
GUE_SIZE = 12  # of UDP and GUE headers, without private data


@dataclass(frozen=True)
class Addresses:
    """RFC 2544 and RFC 5180; `backends` is the first of as many as needed, `tunnels` the first outer source."""

    vip: str
    balancer: str
    backends: str
    tunnels: str


ADDRESSES = {
    4: Addresses("198.19.0.1", "198.19.0.2", "198.18.0.1", "172.16.0.0"),
    6: Addresses("2001:2:0:1::1", "2001:2:0:1::2", "2001:2:0:2::1", "2001:2:0:4::"),
}
OUTER_SOURCE_BITS = 16  # of the tunnels' sources


@dataclass(frozen=True)
class Scenario:
    """One kind of traffic: `mode` of the service, `family` 4 or 6, `packet` ack, syn or udp.

    direction: request or reply.
    refresh: each packet finds the entry of its flow due for a refresh.
    transition: percent of the slots.
    outer: family of the tunnel's own header; None: that of the packet.
    outer_checksum, second_chance: what mode gue may be asked for.
    """

    mode: str
    family: int
    packet: str
    direction: str = "request"
    refresh: bool = False
    transition: int = 0
    backends: int = BACKENDS
    outer: int | None = None
    outer_checksum: bool = False
    second_chance: bool = False

    def case(self, flows: int) -> str:
        always = (
            f"mode={self.mode} family={self.family} packet={self.packet} flows={flows} transition={self.transition}"
        )
        sometimes = {
            "backends": self.backends if self.backends != BACKENDS else None,
            "outer": self.outer,
            "direction": "reply" if self.direction == "reply" else None,
            "refresh": int(self.refresh) or None,
            "outer_checksum": int(self.outer_checksum) or None,
            "second_chance": int(self.second_chance) or None,
        }
        return " ".join([always, *(f"{name}={value}" for name, value in sometimes.items() if value is not None)])

    @property
    def addresses(self) -> Addresses:
        return ADDRESSES[self.family]

    @property
    def is_tunnel(self) -> bool:
        return self.mode in TUNNELS

    @property
    def backend_family(self) -> int:
        return self.outer or self.family

    @property
    def overhead(self) -> int:
        """The least bytes that the tunnel puts in front of a packet; 0: there is none."""
        if not self.is_tunnel:
            return 0
        return IP_HEADER_SIZES[self.backend_family] + (GUE_SIZE if self.mode == "gue" else 0)

    @property
    def protocol(self) -> int:
        return socket.IPPROTO_UDP if self.packet == "udp" else socket.IPPROTO_TCP

    @property
    def recorded_in(self) -> str | None:
        """The table that a new flow enters."""
        if self.mode == "nat":
            return f"nat_flows{self.family}"
        return f"flows{self.family}" if self.transition else None

    def frame(self, packet: str) -> bytes:
        """The first client's packet to the VIP, without payload."""
        target = Target(self.addresses.vip, SERVICE_PORT, CLIENT_MAC, BALANCER_MAC)
        return target.frame(packet, CLIENTS[self.family], FRAME_SIZES[self.family])


# The first are measured with each number of flows, the others with the largest.
MAIN_SCENARIOS = (
    Scenario("nat", 4, "ack"),
    Scenario("dr", 4, "ack"),
    Scenario("ipip", 4, "ack"),
)
OTHER_SCENARIOS = (
    Scenario("dr", 4, "ack", transition=1),
    Scenario("dr", 4, "ack", transition=5),
    Scenario("dr", 4, "ack", transition=100),
    Scenario("nat", 6, "ack"),
    Scenario("nat", 4, "udp"),
    Scenario("nat", 4, "syn"),
    Scenario("nat", 4, "ack", direction="reply"),
    Scenario("nat", 4, "ack", refresh=True),
    Scenario("dr", 6, "ack"),
    Scenario("dr", 4, "udp"),
    Scenario("dr", 4, "syn"),
    Scenario("dr", 6, "ack", transition=100),
    Scenario("dr", 4, "udp", transition=100),
    Scenario("dr", 4, "syn", transition=100),
    Scenario("ipip", 4, "ack", transition=1),
    Scenario("ipip", 6, "ack"),
    Scenario("ipip", 4, "ack", outer=6),
    Scenario("ipip", 6, "ack", outer=4),
    Scenario("ipip", 4, "udp"),
    Scenario("ipip", 4, "syn"),
    Scenario("gue", 4, "ack"),
    Scenario("gue", 6, "ack"),
    Scenario("gue", 4, "ack", outer=6),
    Scenario("gue", 6, "ack", outer=4),
    Scenario("gue", 4, "udp"),
    Scenario("gue", 4, "syn"),
    Scenario("gue", 4, "ack", outer_checksum=True),
    Scenario("gue", 6, "ack", outer_checksum=True),
    Scenario("gue", 4, "ack", transition=1, second_chance=True),
    Scenario("gue", 6, "ack", transition=1, second_chance=True),
    Scenario("gue", 4, "ack", transition=100, second_chance=True),
)
