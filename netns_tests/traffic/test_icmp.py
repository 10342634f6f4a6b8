"""ICMP errors reach those whose packets they are about, and pings of a VIP are answered.

Errors about translated packets reach the client as if they were about its own. The client's socket
tells: the kernel hands it an error only where the packet quoted in it is one that the socket has sent.
Errors about a backend's packets reach that backend, whatever the mode; its kernel acts on them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from itertools import product

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPerror, TCPerror
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6PacketTooBig,
    ICMPv6ParamProblem,
    ICMPv6TimeExceeded,
    IPerror6,
    IPv6,
)
from scapy.packet import Packet, Raw

from netns_tests.bed import lanes
from netns_tests.bed.lanes import ECHO_PORT, HTTP_PORT, LANES, Lane
from netns_tests.bed.servers import start_udp_echo
from netns_tests.bed.sniffer import sniffing
from netns_tests.bed.topology import Bed, Host, wait_until
from netns_tests.bed.traffic import FAMILIES, Way, addresses, bracketed, connections, status, udp_flows

both_families = pytest.mark.parametrize("family", FAMILIES)

# Beyond the router: an address that b1 has on its loopback.
FAR = {"ipv4": "10.99.3.1", "ipv6": "fd99:3::1"}


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    """The echo on port 5353 of each VIP, nobody on 5355, and on 7000 b1 behind the router."""
    with Bed(backends=1, router=True) as b:
        put_behind_the_router(b)
        start_udp_echo(b.backends[0], 5353)
        start_udp_echo(b.backends[0], 7000)
        b.xdp_lb("attach", "eth0", "--vip", f"{b.vip4}:80", "--backends", b.backends[0].ipv4)
        for family in FAMILIES:
            vip, (near,) = bracketed(Way(b, "nat", family).vip), addresses(b.backends, family)
            b.xdp_lb("vip", "add", f"{vip}:5353/udp", "--backends", near)
            b.xdp_lb("vip", "add", f"{vip}:5355/udp", "--backends", near)
            b.xdp_lb("vip", "add", f"{vip}:7000/udp", "--backends", FAR[family])
        yield b


def put_behind_the_router(bed: Bed) -> None:
    assert bed.router is not None
    bed.router.sysctl("net.ipv4.icmp_ratelimit", 0)  # its redirects would count
    (backend,) = bed.backends
    with backend.netlink() as ip:
        ip.addr("add", index=1, address=FAR["ipv4"], prefixlen=32)
        ip.addr("add", index=1, address=FAR["ipv6"], prefixlen=128)
    for host, gateway in ((bed.router, backend), (bed.lb, bed.router)):
        # The second interface of router and balancer is the one on the backends' network.
        near = gateway.interfaces[-1]
        with host.netlink() as ip:
            ip.route("add", dst=f"{FAR['ipv4']}/32", gateway=near.ipv4)
            ip.route("add", dst=f"{FAR['ipv6']}/128", gateway=near.ipv6)


def ask(client: Host, address: str, port: int, hops: int = 64) -> bytes:
    """One datagram and its answer; OSError for the ICMP error that comes instead."""
    family, level, hop_limit, report_errors = (
        (socket.AF_INET6, socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, 25)  # IPV6_RECVERR
        if ":" in address
        else (socket.AF_INET, socket.IPPROTO_IP, socket.IP_TTL, 11)  # IP_RECVERR
    )
    with client.entered():
        asking = socket.socket(family, socket.SOCK_DGRAM)
    with asking:
        asking.setsockopt(level, hop_limit, hops)
        asking.setsockopt(level, report_errors, 1)
        asking.settimeout(3)
        asking.connect((address, port))
        asking.send(b"?")
        return asking.recv(100)


@both_families
def test_closed_port_of_a_backend_refuses_the_clients_datagram(bed: Bed, family: str) -> None:
    with pytest.raises(ConnectionRefusedError):
        ask(bed.client, Way(bed, "nat", family).vip, 5355)


@both_families
def test_datagram_that_dies_behind_the_balancer_is_reported_to_the_client(bed: Bed, family: str) -> None:
    vip = Way(bed, "nat", family).vip
    assert ask(bed.client, vip, 7000) == b"b1 ?"
    with pytest.raises(OSError, match=re.escape(os.strerror(errno.EHOSTUNREACH))):
        ask(bed.client, vip, 7000, hops=2)  # the balancer is the first, the router the second


@both_families
def test_balancer_takes_one_hop(bed: Bed, family: str) -> None:
    assert ask(bed.client, Way(bed, "nat", family).vip, 5353, hops=2) == b"b1 ?"


# About a backend's packets

ERRORS: dict[str, list[Packet]] = {
    "ipv4": [ICMP(type=3, code=1), ICMP(type=3, code=4, nexthopmtu=1400), ICMP(type=11), ICMP(type=12, ptr=8)],
    "ipv6": [ICMPv6DestUnreach(code=3), ICMPv6PacketTooBig(mtu=1400), ICMPv6TimeExceeded(), ICMPv6ParamProblem(ptr=7)],
}
LEARNT_MTU = 1400
LABELS = ("b1", "b2", "b3")


@dataclass(frozen=True)
class Flow:
    """`port`: the client's."""

    protocol: str
    port: int
    backend: str


@dataclass(frozen=True)
class Error:
    """As its receiver has it. `marker`: behind the quoted ports, the sequence number of TCP, the length of UDP."""

    type: int
    code: int
    rest: bytes
    quoted_source: bytes
    quoted_port: int
    marker: int


Errors = dict[str, Counter[Error]]


def quote(lane: Lane, flow: Flow, marker: int) -> bytes:
    """The IP header of what a backend has sent to the client, and the 8 bytes behind it."""
    client = lane.bed.client
    l4 = (
        TCP(sport=HTTP_PORT, dport=flow.port, seq=marker)
        if flow.protocol == "tcp"
        else UDP(sport=ECHO_PORT, dport=flow.port, len=marker)
    )
    if lane.family == "ipv4":
        return bytes(IP(src=lane.vip, dst=client.ipv4, len=1500) / l4)[:28]
    return bytes(IPv6(src=lane.vip, dst=client.ipv6, plen=1460) / l4)[:48]


def packed(address: str) -> bytes:
    return ip_address(address).packed


def send_error(router: Host, vip: str, error: Packet, quoted: bytes) -> None:
    """From the router, whose kernel adds the IP header and, to ICMPv6, the checksum."""
    family, protocol = (socket.AF_INET6, socket.IPPROTO_ICMPV6) if ":" in vip else (socket.AF_INET, socket.IPPROTO_ICMP)
    with router.entered(), socket.socket(family, socket.SOCK_RAW, protocol) as raw:
        raw.sendto(bytes(error / Raw(quoted)), (vip, 0))


def error_in(packet: Packet) -> Error | None:
    """None where it holds no error."""
    if packet.haslayer(IPerror):
        quoted, source = packet[IPerror], slice(12, 16)
    elif packet.haslayer(IPerror6):
        quoted, source = packet[IPerror6], slice(8, 24)
    else:
        return None
    icmp, data = bytes(quoted.underlayer), bytes(quoted)
    behind = data[source.stop + source.stop - source.start :]
    marker = int.from_bytes(behind[4:8] if quoted.haslayer(TCPerror) else behind[4:6])
    return Error(icmp[0], icmp[1], icmp[4:8], data[source], int.from_bytes(behind[:2]), marker)


@pytest.fixture
def lane(lanes_bed: Bed, request: pytest.FixtureRequest) -> Iterator[Lane]:
    yield Lane(lanes_bed, *request.param)
    for host in lanes_bed.backends:
        host.forget_mtus()


@contextlib.contextmanager
def flows_of(lane: Lane, count: int) -> Iterator[list[Flow]]:
    """So many open connections and as many datagrams' ports."""
    with (
        connections(lane.bed, lane.vip, count=count) as tcp,
        udp_flows(lane.bed, lane.vip, ECHO_PORT, count=count) as udp,
    ):
        yield [Flow("tcp", each.port, each.ask()) for each in tcp] + [
            Flow("udp", each.port, each.ask()) for each in udp
        ]


@contextlib.contextmanager
def received_errors(hosts: Sequence[Host]) -> Iterator[Callable[[], Errors]]:
    """What has come in since, host by host."""
    with contextlib.ExitStack() as stack:
        sniffers = {host.label: stack.enter_context(sniffing(host, "eth0")) for host in hosts}
        yield lambda: {label: Counter(filter(None, map(error_in, each.packets()))) for label, each in sniffers.items()}


def send_errors(lane: Lane, flows: Sequence[Flow]) -> Errors:
    """One of each kind about each flow; who should get them. In mode nat a backend has sent from its own address."""
    router = lane.bed.router
    assert router is not None
    own = dict(zip(LABELS, addresses(lane.bed.backends, lane.family), strict=True))
    expected: Errors = {label: Counter() for label in LABELS}
    for marker, (flow, error) in enumerate(product(flows, ERRORS[lane.family]), start=1000):
        send_error(router, lane.vip, error, quote(lane, flow, marker))
        source = packed(own[flow.backend] if lane.mode == "nat" else lane.vip)
        header, port = bytes(error), HTTP_PORT if flow.protocol == "tcp" else ECHO_PORT
        expected[flow.backend][Error(header[0], header[1], header[4:8], source, port, marker)] += 1
    return expected


@pytest.mark.parametrize("lane", LANES, ids=lanes.name, indirect=True)
def test_errors_about_a_flow_reach_its_backend_and_no_other(lane: Lane) -> None:
    backends = lane.bed.backends
    with flows_of(lane, 10) as flows, received_errors(backends) as received:
        expected = send_errors(lane, flows)
        count = sum(map(Counter.total, expected.values()))
        wait_until(lambda: sum(map(Counter.total, received().values())) >= count, f"{count} errors at the backends")
        assert received() == expected
        peer = client_of_backends(lane)
        learnt = {host.label for host in backends if host.learnt_mtu(peer) == LEARNT_MTU}
    # Without options or a window to go by, the kernel acts on what is about datagrams.
    assert learnt == {flow.backend for flow in flows if flow.protocol == "udp"}


def client_of_backends(lane: Lane) -> str:
    """Whom the backends answer."""
    host = lane.bed.lb if lane.mode == "nat" else lane.bed.client
    return host.interfaces[-1].ipv4 if lane.family == "ipv4" else host.interfaces[-1].ipv6


# Pings


@pytest.fixture(params=FAMILIES)
def routed_vip(bed: Bed, request: pytest.FixtureRequest) -> Iterator[str]:
    """A VIP that no host has: what answers for it is the program."""
    vip, length, gateway = ("10.96.0.1", 32, bed.lb.ipv4) if request.param == "ipv4" else ("fd96::1", 128, bed.lb.ipv6)
    with bed.client.netlink() as ip:
        ip.route("add", dst=f"{vip}/{length}", gateway=gateway)
    service = f"{bracketed(vip)}:80"
    backend = addresses(bed.backends, request.param)[0]
    bed.xdp_lb("vip", "add", service, "--no-vip-address", "--echo", "--backends", backend)
    yield vip
    bed.xdp_lb("vip", "remove", service)
    with bed.client.netlink() as ip:
        ip.route("del", dst=f"{vip}/{length}", gateway=gateway)


def test_vip_answers_pings_of_every_size_that_fits_a_packet_while_asked_to(bed: Bed, routed_vip: str) -> None:
    before = status(bed)["answered"]["answered_echo"]
    largest = 1500 - (40 if ":" in routed_vip else 20)
    assert all(bed.client.pings(routed_vip, size=size) for size in (8, 64, 1001, largest))
    assert status(bed)["answered"]["answered_echo"] - before == 4
    assert not bed.client.pings(routed_vip, timeout_s=0.3, size=8000)  # fragments are passed to the host
    bed.xdp_lb("vip", "set", f"{bracketed(routed_vip)}:80", "--no-echo")
    assert not bed.client.pings(routed_vip, timeout_s=0.3)


@both_families
def test_ping_in_fragments_is_answered_by_the_host_that_has_the_vip(bed: Bed, family: str) -> None:
    vip = Way(bed, "nat", family).vip
    bed.xdp_lb("vip", "set", f"{bracketed(vip)}:5353/udp", "--echo")
    assert bed.client.pings(vip, size=8000)
    bed.xdp_lb("vip", "set", f"{bracketed(vip)}:5353/udp", "--no-echo")
