"""The second chance: a packet whose flow is not this backend's goes on to the one that the tunnel names.

First one packet at a time, in a network namespace whose sockets are the test's; then with real
backends, and a client whose kernel speaks TCP through tunnels that the test chooses for each packet.
"""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Iterator

import pytest
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6
from scapy.packet import Packet, Raw

from netns_tests.bed.servers import start_http
from netns_tests.bed.topology import Bed, Host
from netns_tests.bed.tunnelled import Tunnels, decap_status, end_tunnels_on
from netns_tests.oracle.packets import (
    BACKEND4,
    BACKEND6,
    CLIENT4,
    CLIENT6,
    LB_MAC,
    VIP4,
    VIP6,
    Verdict,
    frame,
    ip4,
    ip6,
)
from netns_tests.oracle.packets import tcp as segment
from netns_tests.oracle.packets import udp as datagram
from netns_tests.oracle.tunnels import (
    FAMILIES,
    MARK,
    Loaded,
    gue,
    inner_packet,
    loaded,
    outer_header,
    second_chance,
    tagged,
)

OTHER = {4: BACKEND4[1], 6: BACKEND6[1]}
IP_FREEBIND, IPV6_FREEBIND = 15, 78
SYN, ACK, RST = "S", "A", "R"
families = pytest.mark.parametrize(("outer", "other", "inner"), list(itertools.product(FAMILIES, repeat=3)))


# One packet at a time


@pytest.fixture(scope="module")
def alone() -> Iterator[Host]:
    """A namespace in which nothing listens but on port 81 of the VIPs."""
    host = Host(f"xlb-decap-{threading.get_native_id()}", "alone")
    host.create()
    try:
        with listener(host, VIP4), listener(host, VIP6):
            yield host
    finally:
        host.close()


def listener(host: Host, address: str) -> socket.socket:
    family, level, freebind = (
        (socket.AF_INET6, socket.IPPROTO_IPV6, IPV6_FREEBIND)
        if ":" in address
        else (socket.AF_INET, socket.IPPROTO_IP, IP_FREEBIND)
    )
    with host.entered():
        listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(level, freebind, 1)
    listening.bind((address, 81))
    listening.listen()
    return listening


@pytest.fixture
def decap(alone: Host) -> Iterator[Loaded]:
    with alone.entered(), loaded(VIP4, VIP6) as made:
        yield made


def chance(inner: Packet, outer: int = 4, other: int = 4) -> bytes:
    return frame(
        outer_header(outer, **{"tos" if outer == 4 else "tc": 0x68}), gue(inner, private=second_chance(OTHER[other]))
    )


def sent_on(inner: Packet, other: int) -> bytes:
    """What goes to the other member: no private data; of the old outer headers DSCP, ECN and UDP ports."""
    header = (
        IP(src=BACKEND4[0], dst=OTHER[4], tos=0x68, id=0, flags="DF", ttl=64)
        if other == 4
        else IPv6(src=BACKEND6[0], dst=OTHER[6], tc=0x68, hlim=64)
    )
    return frame(header, gue(inner), src_mac=MARK, dst_mac=LB_MAC)


@families
def test_segment_of_an_unknown_flow_is_rebuilt_for_the_other_member(
    decap: Loaded, outer: int, other: int, inner: int
) -> None:
    packet = inner_packet(inner)
    expected = (Verdict.PASS, ["SENT_TO_OTHER_MEMBER"], sent_on(packet, other))
    assert decap.run(chance(packet, outer, other)) == expected


def to_listener(flags: str, version: int) -> Packet:
    ip = ip4(CLIENT4, VIP4) if version == 4 else ip6(CLIENT6, VIP6)
    return ip / segment(dport=81, flags=flags)


KEPT = {
    "syn to a listener": to_listener("S", 4),
    "syn to an ipv6 listener": to_listener("S", 6),
    "udp": ip4() / datagram(),
    "ipv6 udp": ip6() / datagram(),
    "first fragment": ip4(flags="MF") / segment(flags="A"),
    "later fragment": ip4(frag=2) / segment(flags="A"),
    "cut off tcp header": ip4(proto=6) / Raw(b"x" * 19),
    "cut off ipv6 tcp header": ip6(nh=6) / Raw(b"x" * 19),
}


@pytest.mark.parametrize("inner", KEPT.values(), ids=KEPT)
def test_what_a_socket_here_may_want_or_none_can_is_kept(decap: Loaded, inner: Packet) -> None:
    version = inner.version
    expected = (Verdict.PASS, [f"GUE_{version}_IN_4", "NOTED_SECOND_CHANCE_KEPT"], frame(inner))
    assert decap.run(chance(inner)) == expected


@pytest.mark.parametrize("flags", ["A", "PA", "FA", "R", "SA"])
@pytest.mark.parametrize("version", FAMILIES)
def test_listener_alone_keeps_no_segment_of_an_open_connection(decap: Loaded, version: int, flags: str) -> None:
    assert decap.run(chance(to_listener(flags, version)))[1] == ["SENT_TO_OTHER_MEMBER"]


def test_tagged_packet_is_kept_since_its_way_out_is_not_known(decap: Loaded) -> None:
    packet = inner_packet(4)
    came = tagged(1, outer_header(4) / gue(packet, private=second_chance(OTHER[4])))
    assert decap.run(came) == (Verdict.PASS, ["GUE_4_IN_4", "NOTED_SECOND_CHANCE_KEPT"], tagged(1, packet))


@pytest.mark.parametrize(("outer", "other"), [(4, 6), (6, 4)])
def test_host_without_an_address_of_the_other_members_family_drops(alone: Host, outer: int, other: int) -> None:
    with alone.entered(), loaded(VIP4, VIP6, own=False) as decap:
        assert decap.run(chance(inner_packet(4), outer, other))[:2] == (Verdict.DROP, ["DROP_NO_OWN_ADDRESS"])
        assert decap.run(chance(inner_packet(4), outer, outer))[1] == ["SENT_TO_OTHER_MEMBER"]


def test_spoofed_packet_has_no_second_chance(decap: Loaded) -> None:
    packet = chance(inner_packet(4, src="127.0.0.1"))
    assert decap.run(packet)[:2] == (Verdict.DROP, ["DROP_SOURCE_LOOPBACK"])


# Real backends


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    """Two backends that end tunnels, and have never heard of each other; none of them routes."""
    with Bed(backends=2, one_arm=True) as b:
        for backend in b.backends:
            start_http(b, backend)
            end_tunnels_on(b, backend, "--vip", f"{b.vip4},{b.vip6}", "--setup-vip")
        yield b


@pytest.fixture
def tunnels(bed: Bed) -> Iterator[Tunnels]:
    with Tunnels(bed.client, bed.vip4, bed.vip6) as made:
        yield made


def vip(bed: Bed, version: int) -> str:
    return bed.vip4 if version == 4 else bed.vip6


def address(host: Host, version: int) -> str:
    return host.ipv4 if version == 4 else host.ipv6


@pytest.mark.parametrize("kind", ["ipip", "gue"])
@pytest.mark.parametrize(("outer", "inner"), list(itertools.product(FAMILIES, FAMILIES)))
def test_web_server_is_reached_through_a_tunnel_without_a_tunnel_device(
    bed: Bed, tunnels: Tunnels, kind: str, outer: int, inner: int
) -> None:
    backend = bed.backends[0]
    before = decapsulated(bed, backend, f"{kind}_{inner}_in_{outer}")
    tunnels.lead_to(address(backend, outer), kind=kind)
    with tunnels.connection(vip(bed, inner)) as http:
        assert answering(http) == "b1"
    assert decapsulated(bed, backend, f"{kind}_{inner}_in_{outer}") - before >= 4  # SYN, ACK, request, FIN or ACK


def decapsulated(bed: Bed, backend: Host, kind: str) -> int:
    return int(decap_status(bed, backend)["tunnels"][kind]["packets"])


def answering(connection: socket.socket) -> str:
    """Ask over an open connection; the label of the host that answers."""
    connection.sendall(b"GET / HTTP/1.1\r\nHost: vip\r\n\r\n")
    answer = b""
    while b"\r\n\r\n" not in answer or not answer.endswith(b"\n"):
        answer += connection.recv(4096)
    return answer.split()[-1].decode()


@families
def test_open_connection_is_answered_by_its_backend_through_another_one(
    bed: Bed, tunnels: Tunnels, outer: int, other: int, inner: int
) -> None:
    first, second = bed.backends
    before = decap_status(bed, second)["sent_to_other_member"]
    tunnels.lead_to(address(first, other))
    with tunnels.connection(vip(bed, inner)) as http:
        assert answering(http) == "b1"
        tunnels.lead_to(address(second, outer), previous=address(first, other))
        assert [answering(http) for _ in range(3)] == ["b1"] * 3
    assert decap_status(bed, second)["sent_to_other_member"] - before >= 3


@pytest.mark.parametrize("inner", FAMILIES)
def test_connection_is_reset_where_there_is_no_second_chance(bed: Bed, tunnels: Tunnels, inner: int) -> None:
    first, second = bed.backends
    tunnels.lead_to(first.ipv4)
    with tunnels.connection(vip(bed, inner)) as http:
        assert answering(http) == "b1"
        tunnels.lead_to(second.ipv4)
        with pytest.raises(ConnectionResetError):
            answering(http)


@pytest.mark.parametrize("inner", FAMILIES)
def test_new_connection_stays_with_the_member_it_comes_to(bed: Bed, tunnels: Tunnels, inner: int) -> None:
    first, second = bed.backends
    before = decap_status(bed, second)["noted"]["noted_second_chance_kept"]
    tunnels.lead_to(second.ipv4, previous=first.ipv4)
    with tunnels.connection(vip(bed, inner)) as http:
        assert [answering(http) for _ in range(3)] == ["b2"] * 3
    assert decap_status(bed, second)["noted"]["noted_second_chance_kept"] - before >= 5


@pytest.mark.parametrize("inner", FAMILIES)
def test_answer_to_a_syn_cookie_stays_though_no_socket_knows_it(bed: Bed, tunnels: Tunnels, inner: int) -> None:
    first, second = bed.backends
    second.sysctl("net.ipv4.tcp_syncookies", 2)  # always
    before = syn_cookies_received(second)
    tunnels.lead_to(second.ipv4, previous=first.ipv4)
    with tunnels.connection(vip(bed, inner)) as http:
        assert answering(http) == "b2"
    assert syn_cookies_received(second) - before == 1
    second.sysctl("net.ipv4.tcp_syncookies", 1)


def syn_cookies_received(host: Host) -> int:
    """SyncookiesRecv of the TcpExt lines: names in one, values in the next."""
    lines = host.run(["cat", "/proc/net/netstat"]).stdout.splitlines()
    names, values = (line.split() for line in lines[:2])
    return int(values[names.index("SyncookiesRecv")])
