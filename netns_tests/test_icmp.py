"""ICMP errors about translated packets reach the client as if they were about its own.

The client's socket tells: the kernel hands it an error only where the packet quoted in it is one
that the socket has sent.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterator

import pytest

from netns_tests.servers import start_udp_echo
from netns_tests.topology import Bed, Host
from netns_tests.traffic import FAMILIES, Way, addresses, bracketed

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
