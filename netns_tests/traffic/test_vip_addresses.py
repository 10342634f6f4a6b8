"""The addresses of VIPs on the balancer's interfaces: where they are put, and that clients find them there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
from scapy.layers.inet6 import ICMPv6ND_NA
from scapy.layers.l2 import ARP
from scapy.packet import Packet

from netns_tests.bed.daemon import end, start
from netns_tests.bed.servers import start_http
from netns_tests.bed.sniffer import sniffing
from netns_tests.bed.topology import FRONT, Bed, wait_until
from netns_tests.bed.traffic import curl


@pytest.fixture
def bed() -> Iterator[Bed]:
    """Clients on eth0, one backend behind eth1; eth0 alone is named to attach."""
    with Bed(backends=1) as made:
        start_http(made, made.backends[0])
        made.xdp_lb("attach", "eth0", "--vip", f"{made.vip4}:80", "--backends", made.backends[0].ipv4)
        made.xdp_lb("vip", "add", f"[{made.vip6}]:80", "--backends", made.backends[0].ipv6)
        yield made


def carriers(bed: Bed) -> set[str]:
    """The interfaces that have a VIP's address."""
    links = json.loads(bed.lb.run(["ip", "-j", "address"]).stdout)
    return {
        link["ifname"] for link in links for address in link["addr_info"] if address["local"] in (bed.vip4, bed.vip6)
    }


def answers(bed: Bed) -> list[str]:
    """What a client gets that knows no MAC address of the VIPs."""
    bed.client.run(["ip", "neigh", "flush", "all"])
    bed.client.run(["ip", "-6", "neigh", "flush", "all"])
    return [curl(bed.client, f"http://{host}/") for host in (bed.vip4, f"[{bed.vip6}]")]


def detach_and_attach(bed: Bed) -> None:
    bed.xdp_lb("detach", "eth0")
    assert carriers(bed) == set()
    bed.xdp_lb("attach", "eth0")


def rename(bed: Bed) -> None:
    """IPv6 addresses go when a link is down."""
    for words in ("set eth0 down", "set eth0 name wan0", "set wan0 up"):
        bed.lb.run(["ip", "link", *words.split()])
    bed.lb.run(["ip", "-6", "addr", "add", f"{bed.lb.ipv6}/64", "dev", "wan0", "nodad"])
    bed.xdp_lb("attach", "wan0")
    bed.xdp_lb("detach", "eth0")


@pytest.mark.parametrize(("change", "home"), [(detach_and_attach, "eth0"), (rename, "wan0")])
def test_vip_addresses_stay_where_clients_are(bed: Bed, change: Callable[[Bed], None], home: str) -> None:
    bed.lb.sysctl("net.ipv4.conf.all.arp_ignore", 1)
    change(bed)
    assert carriers(bed) == {home}
    assert answers(bed) == ["b1", "b1"]


# Announcements


def announced(packet: Packet) -> str | None:
    """The address that a gratuitous ARP request or an unsolicited neighbour advertisement is about."""
    if ARP in packet and packet[ARP].op == 1 and packet[ARP].psrc == packet[ARP].pdst:
        return str(packet[ARP].psrc)
    if ICMPv6ND_NA in packet and (packet[ICMPv6ND_NA].S, packet[ICMPv6ND_NA].O) == (0, 1):
        return str(packet[ICMPv6ND_NA].tgt)
    return None


def each_three_times(bed: Bed) -> list[str]:
    return sorted([bed.vip4, bed.vip6] * 3)


def test_a_client_follows_a_vip_that_was_another_hosts(bed: Bed) -> None:
    bed.xdp_lb("detach")
    other = bed._host("other", [FRONT], station=7)
    start_http(bed, other)
    bed._wait_for_links()
    addresses = (f"{bed.vip4}/32", f"{bed.vip6}/128")
    for address in addresses:
        other.run(["ip", "addr", "add", address, "dev", "eth0"])
    assert answers(bed) == ["other", "other"]
    for address in addresses:
        other.run(["ip", "addr", "del", address, "dev", "eth0"])
    with sniffing(bed.client, "eth0") as sniffer:
        bed.xdp_lb("attach", "eth0")
        assert [curl(bed.client, f"http://{host}/") for host in (bed.vip4, f"[{bed.vip6}]")] == ["b1", "b1"]
        assert sorted(sniffer.wait_for(6, announced, "announcements")) == each_three_times(bed)


def test_the_daemon_announces_at_its_start_and_when_the_link_comes_up(bed: Bed) -> None:
    with sniffing(bed.client, "eth0") as sniffer:
        daemon = start(bed)
        assert sorted(sniffer.wait_for(6, announced, "announcements")) == each_three_times(bed)
    bed.lb.run(["ip", "link", "set", "eth0", "down"])
    with sniffing(bed.client, "eth0") as sniffer:
        bed.lb.run(["ip", "link", "set", "eth0", "up"])
        wait_until(
            lambda: set(filter(None, map(announced, sniffer.packets()))) == {bed.vip4, bed.vip6}, "both announced"
        )
    end(daemon)
