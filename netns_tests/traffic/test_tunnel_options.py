"""What a tunnel may be told: outer sources that vary, a checksum, a port. Seen on the wire, and by those who end it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Sequence
from ipaddress import ip_address, ip_network

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.packet import Packet

from netns_tests.bed.servers import start_http
from netns_tests.bed.sniffer import sniffing_the_way_to
from netns_tests.bed.topology import Bed, Host
from netns_tests.bed.traffic import FAMILIES, addresses, bracketed, connections
from netns_tests.bed.tunnelled import end_tunnels_on

GUE_HEADER = {"ipv4": b"\x00\x04\x00\x00", "ipv6": b"\x00\x29\x00\x00"}  # no flags; protocol 4 or 41 inside
SOURCES = {"ipv4": "10.95.0.0/20", "ipv6": "fd95::/112"}
families = pytest.mark.parametrize("family", FAMILIES)
# Where client and headers need no combining.
mixed = pytest.mark.parametrize(
    ("family", "outer"), [("ipv4", "ipv6"), ("ipv6", "ipv4")], ids=["ipv4-in-ipv6", "ipv6-in-ipv4"]
)
outers = pytest.mark.parametrize("outer", FAMILIES, ids=lambda outer: f"in-{outer}")


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    """b1 ends tunnels, b2 does not."""
    with Bed(backends=2, one_arm=True) as b:
        start_http(b, b.backends[0])
        end_tunnels(b)
        b.xdp_lb("attach", "eth0", "--vip", f"{b.vip4}:1", "--backends", b.backends[0].ipv4)
        b.xdp_lb("vip", "add", f"[{b.vip6}]:1", "--backends", b.backends[0].ipv6)
        yield b


def end_tunnels(bed: Bed, *words: str) -> None:
    end_tunnels_on(bed, bed.backends[0], "--vip", f"{bed.vip4},{bed.vip6}", "--setup-vip", *words)


@contextlib.contextmanager
def served(bed: Bed, vip: str, mode: str, backend: str, *words: str) -> Iterator[None]:
    bed.xdp_lb("vip", "add", vip, "--mode", mode, "--backends", backend, *words)
    try:
        yield
    finally:
        bed.xdp_lb("vip", "remove", vip)


def vip_of(bed: Bed, family: str) -> str:
    return bed.vip4 if family == "ipv4" else bed.vip6


def answering(bed: Bed, family: str) -> list[str]:
    """Who answers 50 connections."""
    with connections(bed, vip_of(bed, family), count=50) as opened:
        return [connection.ask() for connection in opened]


def outer_packet(packet: Packet) -> Packet | None:
    """What a tunnel's frame holds; None for other frames."""
    ip = packet.payload
    protocol = ip.proto if isinstance(ip, IP) else ip.nh if isinstance(ip, IPv6) else None
    return ip if protocol in (4, 41, 17) else None


@mixed
@pytest.mark.parametrize("mode", ["ipip", "gue"])
def test_outer_sources_vary_within_their_prefix(bed: Bed, mode: str, family: str, outer: str) -> None:
    vip = f"{bracketed(vip_of(bed, family))}:80"
    (backend, _) = addresses(bed.backends, outer)
    with (
        served(bed, vip, mode, backend, "--tunnel-source", ",".join(SOURCES.values())),
        sniffing_the_way_to(bed, bed.backends[0]) as sniffer,
    ):
        assert answering(bed, family) == ["b1"] * 50
        sources = {each.src for each in sniffer.wait_for(200, outer_packet, "packets in the tunnel")}
    assert all(ip_address(source) in ip_network(SOURCES[outer]) for source in sources)
    assert len(sources) > 25  # 50 flows, 4,096 addresses or more


@contextlib.contextmanager
def gue_port_of_backend(bed: Bed, port: int) -> Iterator[None]:
    end_tunnels(bed, "--gue-port", str(port))
    try:
        yield
    finally:
        end_tunnels(bed)


@mixed
def test_gue_goes_to_its_port_from_ports_that_follow_the_flow(bed: Bed, family: str, outer: str) -> None:
    vip = f"{bracketed(vip_of(bed, family))}:80"
    (backend, _) = addresses(bed.backends, outer)
    with (
        gue_port_of_backend(bed, 7777),
        served(bed, vip, "gue", backend, "--gue-port", "7777"),
        sniffing_the_way_to(bed, bed.backends[0]) as sniffer,
    ):
        assert answering(bed, family) == ["b1"] * 50
        ports = {(each[UDP].sport, each[UDP].dport) for each in sniffer.wait_for(200, outer_packet, "packets")}
    assert {destination for _, destination in ports} == {7777}
    assert len(ports) > 25
    assert min(source for source, _ in ports) >= 0xC000


# Without decapsulation a socket of the kernel's own has the tunnel's packets


@contextlib.contextmanager
def tunnel_socket(host: Host, outer: str) -> Iterator[socket.socket]:
    with host.entered():
        ending = socket.socket(socket.AF_INET6 if outer == "ipv6" else socket.AF_INET, socket.SOCK_DGRAM)
    with ending:
        ending.settimeout(5)
        ending.bind(("", 6080))
        yield ending


def send_datagrams(bed: Bed, vip: str, payloads: Sequence[bytes]) -> None:
    with bed.client.entered():
        asking = socket.socket(socket.AF_INET6 if ":" in vip else socket.AF_INET, socket.SOCK_DGRAM)
    with asking:
        for payload in payloads:
            asking.sendto(payload, (vip, 5353))


def inner_datagram(message: bytes, family: str) -> bytes:
    """What the tunnel carries, its headers as right as scapy would have made them; its payload."""
    header, packet = message[:4], message[4:]
    assert header == GUE_HEADER[family]
    inner = IP(packet) if family == "ipv4" else IPv6(packet)
    again = inner.copy()
    del again[UDP].chksum
    assert bytes(again) == packet
    return bytes(inner[UDP].payload)


@families
@outers
def test_kernel_accepts_the_outer_checksum(bed: Bed, family: str, outer: str) -> None:
    (_, backend), vip = addresses(bed.backends, outer), vip_of(bed, family)
    payloads = [bytes([number]) * size for number, size in enumerate((0, 1, 2, 3, 18, 999, 1400), start=1)]
    with (
        served(bed, f"{bracketed(vip)}:5353/udp", "gue", backend, "--outer-checksum"),
        tunnel_socket(bed.backends[1], outer) as ending,
        sniffing_the_way_to(bed, bed.backends[1]) as sniffer,
    ):
        send_datagrams(bed, vip, payloads)
        assert [inner_datagram(ending.recv(2000), family) for _ in payloads] == payloads
        assert all(each[UDP].chksum for each in sniffer.wait_for(len(payloads), outer_packet, "packets"))


@mixed
def test_no_outer_checksum_unless_asked_for(bed: Bed, family: str, outer: str) -> None:
    (_, backend), vip = addresses(bed.backends, outer), vip_of(bed, family)
    with (
        served(bed, f"{bracketed(vip)}:5353/udp", "gue", backend),
        sniffing_the_way_to(bed, bed.backends[1]) as sniffer,
    ):
        send_datagrams(bed, vip, [b"?"])
        assert [each[UDP].chksum for each in sniffer.wait_for(1, outer_packet, "packet")] == [0]
