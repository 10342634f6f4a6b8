"""Every mode, client family and outer family side by side, each at a VIP of its own.

Enters: a bed. Leaves: lanes, whose services answer on the same two ports. What a host learns about a VIP, such as the
MTU of the way there, it has learnt about one lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from netns_tests.bed.servers import start_http, start_udp_echo
from netns_tests.bed.topology import Bed, Host
from netns_tests.bed.traffic import FAMILIES, Way, addresses, apply, service_toml
from netns_tests.bed.tunnelled import end_tunnels_on

HTTP_PORT, ECHO_PORT = 80, 5353
OTHER_HTTP_PORT = 8080  # served by no lane: a test's own
FIRST_STATION = 101

# Mode, family of the client, family of the outer header (of the backend's address).
TUNNELS = list(product(("ipip", "gue"), FAMILIES, FAMILIES))
LANES = [*((mode, family, family) for mode, family in product(("nat", "dr"), FAMILIES)), *TUNNELS]

# What a tunnel takes of the MTU: the outer IP header and, for GUE, 8 bytes of UDP and 4 of its own.
OVERHEAD = {("ipip", "ipv4"): 20, ("ipip", "ipv6"): 40, ("gue", "ipv4"): 32, ("gue", "ipv6"): 52}


@dataclass(frozen=True)
class Lane(Way):
    """`outer`: the family of the backends' addresses; `web_port`: the VIP's for HTTP."""

    outer: str
    web_port: int = HTTP_PORT

    @property
    def vip(self) -> str:
        station = FIRST_STATION + LANES.index((self.mode, self.family, self.outer))
        network = self.bed.lb.interfaces[0].network
        return network.ipv4(station) if self.family == "ipv4" else network.ipv6(station)

    @property
    def http_port(self) -> int:
        return self.web_port

    @property
    def echo_port(self) -> int:
        return ECHO_PORT

    @property
    def tunnel_overhead(self) -> int:
        """Bytes that the outer headers take; 0 where there are none."""
        return OVERHEAD.get((self.mode, self.outer), 0)

    def backends(self, hosts: Sequence[Host]) -> list[str]:
        """Their addresses as this lane reaches them."""
        return addresses(hosts, self.outer)

    def services(self, backends: Sequence[Host]) -> list[str]:
        served = self.backends(backends)
        return [service_toml(vip, self.mode, served) for vip in (self.http_service, self.echo_service)]


def lanes(bed: Bed) -> list[Lane]:
    return [Lane(bed, *each) for each in LANES]


def name(lane: tuple[str, str, str]) -> str:
    """Of one of LANES, as the ID of a test."""
    mode, family, outer = lane
    return f"{mode}-{family}-in-{outer}" if lane in TUNNELS else f"{mode}-{family}"


def open_lanes(bed: Bed) -> None:
    """Servers on every backend, which ends the tunnels and owns the VIPs; all services attached."""
    owned = ",".join(lane.vip for lane in lanes(bed) if lane.mode != "nat")
    for backend in bed.backends:
        start_http(bed, backend, [HTTP_PORT, OTHER_HTTP_PORT])
        start_udp_echo(backend, ECHO_PORT)
        end_tunnels_on(bed, backend, "--vip", owned, "--setup-vip")
    apply(bed, *(service for lane in lanes(bed) for service in lane.services(bed.backends)))
    bed.xdp_lb("attach", "eth0")
