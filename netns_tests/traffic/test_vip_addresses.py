"""The addresses of VIPs on the balancer's interfaces: where they are put, and that clients find them there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from netns_tests.bed.servers import start_http
from netns_tests.bed.topology import Bed
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
