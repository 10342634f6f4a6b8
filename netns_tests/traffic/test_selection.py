"""Who gets a connection, and whether it is let in: the options of a service, with real clients at several addresses."""

from __future__ import annotations

import contextlib
import http.client
import socket
import time
from collections.abc import Iterator
from itertools import product

import pytest
from scapy.layers.inet import TCP
from scapy.packet import Packet

from netns_tests.bed.servers import start_http
from netns_tests.bed.sniffer import sniffing
from netns_tests.bed.topology import Bed, Host
from netns_tests.bed.traffic import HttpConnection, addresses, bracketed, service_status, status
from netns_tests.bed.tunnelled import end_tunnels_on

PORTS = range(8000, 8005)
WIDE = {"ipv4": "10.94.0.0/28", "ipv6": "fd94::/124"}
NEAR = {"ipv4": "10.99.1.128/25", "ipv6": "fd99:1::8000/113"}
NEAR_CLIENTS = {"ipv4": [f"10.99.1.{n}" for n in range(129, 149)], "ipv6": [f"fd99:1::80{n}" for n in range(10, 30)]}
# Options are about clients and services, not about headers: each mode once, each family twice.
every_mode = pytest.mark.parametrize(
    ("mode", "family"), [("nat", "ipv4"), ("dr", "ipv6"), ("ipip", "ipv4"), ("gue", "ipv6")]
)
two_modes = pytest.mark.parametrize(("mode", "family"), [("nat", "ipv4"), ("gue", "ipv6")])


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    """Three backends that are ready for every mode and for all addresses of WIDE; the client has more than one."""
    with Bed(backends=3, one_arm=True) as b:
        for backend in b.backends:
            start_http(b, backend, [80, *PORTS])
            end_tunnels_on(b, backend, "--vip", ",".join([b.vip4, b.vip6, *WIDE.values()]), "--setup-vip")
            for family, prefix in WIDE.items():
                backend.run(["ip", f"-{family[-1]}", "route", "replace", "local", prefix, "dev", "lo"])
        for family, prefix in WIDE.items():
            gateway = addresses([b.lb], family)[0]
            b.client.run(["ip", f"-{family[-1]}", "route", "add", prefix, "via", gateway])
            for address in NEAR_CLIENTS[family]:
                add_address(b.client, address)
        b.xdp_lb("attach", "eth0", "--vip", f"{b.vip4}:1", "--backends", b.backends[0].ipv4)
        b.xdp_lb("vip", "add", f"[{b.vip6}]:1", "--backends", b.backends[0].ipv6)
        yield b


def add_address(host: Host, address: str) -> None:
    with host.netlink() as ip:
        (index,) = ip.link_lookup(ifname="eth0")
        ip.addr("add", index=index, address=address, prefixlen=64 if ":" in address else 24)


@contextlib.contextmanager
def served(bed: Bed, vip: str, *words: str) -> Iterator[str]:
    """The VIP while it is."""
    bed.xdp_lb("vip", "add", vip, *words)
    try:
        yield vip
    finally:
        bed.xdp_lb("vip", "remove", vip)


def vip_of(bed: Bed, family: str) -> str:
    return bed.vip4 if family == "ipv4" else bed.vip6


def web(bed: Bed, family: str) -> str:
    return f"{bracketed(vip_of(bed, family))}:80/tcp"


def asked(host: Host, address: str, port: int = 80, source: str = "", timeout_s: float = 5) -> str:
    """The backend that answers a connection of its own, from this address of the host. OSError if none does."""
    with host.entered():
        connection = socket.create_connection((address, port), timeout_s, (source, 0))
    asking = http.client.HTTPConnection(address, port)
    asking.sock = connection
    with contextlib.closing(asking):
        asking.request("GET", "/")
        return str(asking.getresponse().headers["X-Backend"])


# Affinity


@every_mode
def test_each_client_stays_on_one_backend_also_when_one_is_added(bed: Bed, mode: str, family: str) -> None:
    *first_two, third = addresses(bed.backends, family)
    clients = NEAR_CLIENTS[family]

    def who_answers() -> dict[str, set[str]]:
        return {client: {asked(bed.client, vip_of(bed, family), source=client) for _ in range(4)} for client in clients}

    words = ("--mode", mode, "--affinity", "600", "--backends", ",".join(first_two))
    with served(bed, web(bed, family), *words) as vip:
        before = who_answers()
        assert all(len(labels) == 1 for labels in before.values())
        assert set.union(*before.values()) == {"b1", "b2"}
        bed.xdp_lb("backend", "add", vip, third)
        assert who_answers() == before


# Sources


@two_modes
def test_clients_of_a_prefix_go_to_the_backends_of_its_set(bed: Bed, mode: str, family: str) -> None:
    first, *others = addresses(bed.backends, family)
    own, address = addresses([bed.client], family)[0], vip_of(bed, family)
    with served(bed, web(bed, family), "--mode", mode, "--backends", first) as vip:
        near = f"{vip}@near"
        with served(bed, near, "--mode", mode, "--source", NEAR[family], "--backends", ",".join(others)):
            assert {asked(bed.client, address, source=own) for _ in range(10)} == {"b1"}
            answered = {asked(bed.client, address, source=client) for client in NEAR_CLIENTS[family]}
            assert answered == {"b2", "b3"}
        assert asked(bed.client, address, source=NEAR_CLIENTS[family][0]) == "b1"


@two_modes
def test_clients_that_are_not_allowed_get_no_answer_and_are_counted(bed: Bed, mode: str, family: str) -> None:
    first, *_ = addresses(bed.backends, family)
    own, address = addresses([bed.client], family)[0], vip_of(bed, family)
    with served(bed, web(bed, family), "--mode", mode, "--allow", NEAR[family], "--backends", first) as vip:
        before = status(bed)["drops"]["drop_source_not_allowed"]
        with pytest.raises(TimeoutError):
            asked(bed.client, address, source=own, timeout_s=0.3)
        assert status(bed)["drops"]["drop_source_not_allowed"] > before
        assert asked(bed.client, address, source=NEAR_CLIENTS[family][0]) == "b1"
        bed.xdp_lb("vip", "set", vip, "--allow", "any")
        assert asked(bed.client, address, source=own) == "b1"


# Limits

SYNS_PER_S = 5
OPENINGS = 40


def is_syn(packet: Packet) -> bool | None:
    return True if TCP in packet and packet[TCP].flags == "S" and packet[TCP].dport == 80 else None


def open_many(host: Host, address: str) -> list[socket.socket]:
    """Without waiting for answers."""
    with host.entered():
        opening = [socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) for _ in range(OPENINGS)]
    for each in opening:
        each.setblocking(False)
        each.connect_ex((address, 80))
    return opening


@pytest.mark.parametrize(("limit", "family"), [("syn_limit", "ipv4"), ("syn_limit_of_source", "ipv6")])
def test_openings_beyond_the_limit_are_dropped_and_counted(bed: Bed, limit: str, family: str) -> None:
    first, *_ = addresses(bed.backends, family)
    words = ("--mode", "gue", f"--{limit.replace('_', '-')}", str(SYNS_PER_S), "--backends", first)
    with served(bed, web(bed, family), *words) as vip:
        before, start = status(bed)["drops"][f"drop_{limit}"], time.monotonic()
        with (
            contextlib.closing(HttpConnection(bed.client, vip_of(bed, family))) as held,
            sniffing(bed.switch, "client-eth0") as sniffer,
        ):
            opening = open_many(bed.client, vip_of(bed, family))
            sniffer.wait_for(OPENINGS, is_syn, "SYNs")
            for each in opening:
                each.close()
            assert held.ask() == "b1"
            elapsed_s = time.monotonic() - start
            syns = 1 + len(sniffer.wait_for(OPENINGS, is_syn, "SYNs"))
        let_in = service_status(bed, vip)["connections"]
        assert SYNS_PER_S <= let_in <= SYNS_PER_S * (1 + elapsed_s) + 1
        assert status(bed)["drops"][f"drop_{limit}"] - before == syns - let_in


# What SYNs say

MSS = 1000


@every_mode
def test_backends_send_segments_no_larger_than_the_mss_allows(bed: Bed, mode: str, family: str) -> None:
    first, *_ = addresses(bed.backends, family)
    url = f"http://{bracketed(vip_of(bed, family))}/big"
    with (
        served(bed, web(bed, family), "--mode", mode, "--mss", str(MSS), "--backends", first),
        sniffing(bed.backends[0], "eth0") as comes_in,
        sniffing(bed.backends[0], "eth0", outgoing=True) as goes_out,
    ):
        bed.client.run(["curl", "-sSf", "-r", "0-99999", "-o", "/dev/null", url])
        (syn,) = [each[TCP] for each in comes_in.packets() if is_syn(each)]
        segments = [segment_bytes(each) for each in goes_out.packets() if TCP in each]
    assert dict(syn.options)["MSS"] == MSS
    assert max(segments) == MSS


def segment_bytes(packet: Packet) -> int:
    """Options and payload, which the MSS is about (RFC 6691)."""
    tcp = packet[TCP]
    return len(bytes(tcp)) - 20


# Many addresses, many ports


@every_mode
def test_every_address_of_a_prefix_and_every_port_of_a_range_is_served(bed: Bed, mode: str, family: str) -> None:
    start = WIDE[family].partition("/")[0].removesuffix("0" if family == "ipv4" else "")
    inside = list(product([f"{start}{last}" for last in ("1", "7", "14" if family == "ipv4" else "f")], PORTS[:-1]))
    vip = f"{bracketed(WIDE[family].partition('/')[0])}/{WIDE[family].partition('/')[2]}:{PORTS[0]}-{PORTS[-2]}"
    backends = ",".join(addresses(bed.backends, family))
    with served(bed, vip, "--no-vip-address", "--mode", mode, "--backends", backends):
        answers = [asked(bed.client, address, port) for address, port in inside for _ in range(2)]
        assert set(answers) == {"b1", "b2", "b3"}
        with pytest.raises(TimeoutError):
            asked(bed.client, inside[0][0], PORTS[-1], timeout_s=0.3)
