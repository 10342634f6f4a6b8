"""Next hops and addresses, against a real kernel: a namespace for the balancer, one for its peers.

The two are joined by one veth pair: `near` here, `far` there. The peers answer for the addresses
that `far` is given; the kernel of the first namespace has to find them.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
from pyroute2 import netns
from pyroute2.iproute.linux import IPRoute

from lb.errors import DataplaneError, NoRoute, NotFound
from lb.host.neighbours import FOLLOWED_TIMEOUT_S, NTF_EXT_MANAGED, PROTOCOL, Network
from lb.model.forwarding import NextHop

SELF4, SELF6 = ip_address("10.0.0.1"), ip_address("fd00::1")
BACKEND4, BACKEND6 = ip_address("10.0.0.11"), ip_address("fd00::11")
SILENT4, SILENT6 = ip_address("10.0.0.99"), ip_address("fd00::99")
GATEWAY4, GATEWAY6 = ip_address("10.0.0.254"), ip_address("fe80::254")
ROUTED4, ROUTED6 = ip_address("10.9.0.11"), ip_address("fd00:9::11")
NUD_REACHABLE, NUD_PERMANENT = 0x02, 0x80
IFA_F_NODAD = 0x02
NTF_USE = 0x01


def open_socket() -> IPRoute:
    return IPRoute(ext_ack=True, groups=0)


@dataclass(frozen=True)
class Bed:
    here: IPRoute
    there: IPRoute
    near: int
    far: int
    near_mac: bytes
    far_mac: bytes

    def answer_for(self, address: Any) -> None:
        options = {"flags": IFA_F_NODAD} if address.version == 6 else {}
        prefix_length = 64 if address.version == 6 else 24
        self.there.addr("add", index=self.far, address=str(address), prefixlen=prefix_length, **options)

    def hop(self, source: Any, *, answered: bool = True, on_link: bool = True) -> NextHop:
        dst_mac = self.far_mac if answered else None
        return NextHop("near", self.near, source, self.near_mac, dst_mac, on_link)

    def kept(self) -> set[Any]:
        """The neighbours that the kernel keeps on our behalf."""
        return {
            ip_address(entry.get_attr("NDA_DST"))
            for entry in self.here.neigh("dump")
            if entry.get_attr("NDA_FLAGS_EXT") == NTF_EXT_MANAGED and entry.get_attr("NDA_PROTOCOL") == PROTOCOL
        }


@pytest.fixture
def bed() -> Iterator[Bed]:
    names = f"lb-neighbours-{os.getpid()}-here", f"lb-neighbours-{os.getpid()}-there"
    with ExitStack() as cleanup:
        for name in names:
            netns.create(name)
            cleanup.callback(netns.remove, name)
        netns.pushns(names[0])
        cleanup.callback(netns.popns)
        here, there = (cleanup.enter_context(IPRoute(netns=name, groups=0)) for name in names)
        yield wire(here, there, names[1])


def wire(here: IPRoute, there: IPRoute, there_name: str) -> Bed:
    # While its link-local address is under duplicate detection, a host discovers no neighbour.
    Path("/proc/sys/net/ipv6/conf/default/accept_dad").write_text("0")
    here.link("add", ifname="near", kind="veth", peer={"ifname": "far", "net_ns_fd": there_name})
    near, far = here.link_lookup(ifname="near")[0], there.link_lookup(ifname="far")[0]
    here.addr("add", index=near, address=str(SELF4), prefixlen=24)
    here.addr("add", index=near, address=str(SELF6), prefixlen=64, flags=IFA_F_NODAD)
    there.link("set", index=far, state="up")
    here.link("set", index=near, state="up")
    result = Bed(here, there, near, far, mac_of(here, near), mac_of(there, far))
    for address in (BACKEND4, BACKEND6, GATEWAY4, GATEWAY6):
        result.answer_for(address)
    return result


def mac_of(ipr: IPRoute, index: int) -> bytes:
    text = ipr.link("get", index=index)[0].get_attr("IFLA_ADDRESS")
    return bytes.fromhex(text.replace(":", ""))


@pytest.fixture
def network(bed: Bed) -> Network:
    return Network(open_socket, FOLLOWED_TIMEOUT_S)


def wait_for(condition: Callable[[], bool]) -> None:
    """Until the condition holds: looked at again whenever the neighbour table changes, for 10 s."""
    deadline = time.monotonic() + 10
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as events:
        events.bind((0, 0x04))
        events.settimeout(10)
        while not condition():
            assert time.monotonic() < deadline
            events.recv(1 << 16)


def test_backend_on_the_link_is_its_own_next_hop(bed: Bed, network: Network) -> None:
    assert network.next_hops([BACKEND4, BACKEND6]) == {
        BACKEND4: bed.hop(SELF4),
        BACKEND6: bed.hop(SELF6),
    }


def test_backend_behind_a_gateway_is_reached_by_the_gateways_mac(bed: Bed, network: Network) -> None:
    bed.here.route("add", dst="10.9.0.0/16", gateway=str(GATEWAY4))
    bed.here.route("add", dst="fd00:9::/64", gateway=str(GATEWAY6), oif=bed.near)
    assert network.next_hops([ROUTED4, ROUTED6]) == {
        ROUTED4: bed.hop(SELF4, on_link=False),
        ROUTED6: bed.hop(SELF6, on_link=False),
    }
    assert bed.kept() == {GATEWAY4, GATEWAY6}


def test_ipv4_backend_behind_an_ipv6_gateway_is_reached(bed: Bed, network: Network) -> None:
    bed.here.route(
        "add",
        dst="10.9.0.0/16",
        via={"family": socket.AF_INET6, "addr": str(GATEWAY6)},
        oif=bed.near,
    )
    assert network.next_hops([ROUTED4]) == {ROUTED4: bed.hop(SELF4, on_link=False)}


def test_silent_neighbour_holds_nobody_up_and_has_no_mac(bed: Bed, network: Network) -> None:
    assert network.next_hops([BACKEND4, SILENT4, SILENT6]) == {
        BACKEND4: bed.hop(SELF4),
        SILENT4: bed.hop(SELF4, answered=False),
        SILENT6: bed.hop(SELF6, answered=False),
    }


def test_silent_neighbour_is_waited_for_once(bed: Bed, network: Network) -> None:
    network.next_hops([SILENT4])
    began = time.monotonic()
    assert Network(open_socket, answer_timeout_s=60).next_hops([SILENT4]) == {SILENT4: bed.hop(SELF4, answered=False)}
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(("address", "source"), [(SILENT4, SELF4), (SILENT6, SELF6)], ids=str)
def test_neighbour_that_appears_later_is_found_by_the_kernel_alone(
    bed: Bed, network: Network, address: Any, source: Any
) -> None:
    assert network.next_hops([address]) == {address: bed.hop(source, answered=False)}
    bed.answer_for(address)
    wait_for(lambda: network.next_hops([address]) == {address: bed.hop(source)})


def test_neighbour_that_answers_the_second_request_is_waited_for(bed: Bed) -> None:
    answers = Timer(0.5, bed.answer_for, [SILENT4])
    answers.start()
    assert Network(open_socket, answer_timeout_s=20).next_hops([SILENT4]) == {SILENT4: bed.hop(SELF4)}
    answers.join()


def replace_far(bed: Bed) -> bytes:
    """Another machine has the addresses of `far`, without a word."""
    bed.there.link("set", index=bed.far, address="02:00:00:00:00:77")
    return bytes.fromhex("020000000077")


@pytest.mark.parametrize("known", ["kept", "used by the host"])
def test_replaced_neighbour_is_found_at_once(bed: Bed, network: Network, known: str) -> None:
    if known == "kept":
        network.next_hops([BACKEND4, BACKEND6])
    else:
        for address in (BACKEND4, BACKEND6):
            bed.here.neigh("add", dst=str(address), ifindex=bed.near, lladdr=bed.far_mac.hex(":"), state=NUD_REACHABLE)
    mac = replace_far(bed)
    hops = Network(open_socket, answer_timeout_s=20).next_hops([BACKEND4, BACKEND6], probe=True)
    assert {hop.dst_mac for hop in hops.values()} == {mac}
    assert bed.kept() == {BACKEND4, BACKEND6}


def test_neighbour_that_is_silent_when_probed_keeps_its_mac(bed: Bed, network: Network) -> None:
    known = network.next_hops([BACKEND4, BACKEND6])
    bed.there.addr("del", index=bed.far, address=str(BACKEND4), prefixlen=24)
    bed.there.addr("del", index=bed.far, address=str(BACKEND6), prefixlen=64)
    assert network.next_hops([BACKEND4, BACKEND6], probe=True) == known


def test_neighbours_that_others_keep_are_not_probed(bed: Bed, network: Network) -> None:
    mac = "02:00:00:00:00:99"
    bed.here.neigh("add", dst=str(BACKEND4), ifindex=bed.near, lladdr=mac, state=NUD_PERMANENT)
    assert network.next_hops([BACKEND4], probe=True)[BACKEND4].dst_mac == bytes.fromhex("020000000099")


def test_neighbours_are_kept_whether_or_not_they_answered(bed: Bed, network: Network) -> None:
    bed.here.neigh("replace", dst=str(BACKEND4), ifindex=bed.near, state=0, flags=NTF_USE)
    network.next_hops([BACKEND4, BACKEND6, SILENT4])
    assert bed.kept() == {BACKEND4, BACKEND6, SILENT4}


def test_released_neighbours_leave_nothing_behind(bed: Bed, network: Network) -> None:
    bed.here.route("add", dst="10.9.0.0/16", gateway=str(GATEWAY4))
    network.next_hops([BACKEND4, BACKEND6, ROUTED4, SILENT4])
    network.release([BACKEND4, ROUTED4, SILENT4])
    assert bed.kept() == {BACKEND6, GATEWAY4}
    for _ in range(2):
        network.release()
        assert bed.kept() == set()


def test_permanent_neighbour_of_the_operator_is_used_and_left_alone(bed: Bed, network: Network) -> None:
    mac = "02:00:00:00:00:99"
    bed.here.neigh("add", dst=str(SILENT4), ifindex=bed.near, lladdr=mac, state=NUD_PERMANENT)
    assert network.next_hops([SILENT4])[SILENT4].dst_mac == bytes.fromhex("020000000099")
    network.release()
    (entry,) = bed.here.neigh("dump", dst=str(SILENT4))
    assert (entry["state"], entry.get_attr("NDA_LLADDR")) == (NUD_PERMANENT, mac)


def test_managed_neighbour_of_another_program_is_left_alone(bed: Bed, network: Network) -> None:
    theirs = {"dst": str(BACKEND4), "ifindex": bed.near, "flags_ext": NTF_EXT_MANAGED}
    bed.here.neigh("add", state=0, **theirs)
    wait_for(lambda: network.next_hops([BACKEND4]) == {BACKEND4: bed.hop(SELF4)})
    network.release()
    (entry,) = bed.here.neigh("dump", dst=str(BACKEND4))
    assert entry.get_attr("NDA_FLAGS_EXT") == NTF_EXT_MANAGED
    assert entry.get_attr("NDA_PROTOCOL") is None


def open_socket_to_a_full_table() -> IPRoute:
    """As with more neighbours than gc_thresh3, which a namespace cannot set for itself."""
    ipr = open_socket()
    neigh = ipr.neigh

    def full(command: str, **attributes: Any) -> Any:
        if command == "replace":
            raise OSError(errno.ENOBUFS, None)
        return neigh(command, **attributes)

    ipr.neigh = full
    return ipr


@pytest.mark.usefixtures("bed")
def test_full_neighbour_table_is_reported() -> None:
    with pytest.raises(DataplaneError) as refusal:
        Network(open_socket_to_a_full_table).next_hops([BACKEND4])
    assert str(refusal.value) == (f"neighbour {BACKEND4}: cannot be resolved: No buffer space available")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("unreachable", "No route to host"),
        ("blackhole", "blackhole route"),
        ("prohibit", "prohibit route"),
    ],
)
@pytest.mark.parametrize(("backend", "net"), [(ROUTED4, "10.9.0.0/16"), (ROUTED6, "fd00:9::/64")], ids=str)
def test_route_that_refuses_is_no_route(
    bed: Bed, network: Network, backend: Any, net: str, kind: str, words: str
) -> None:
    bed.here.route("add", dst=net, type=kind)
    with pytest.raises(NoRoute) as refusal:
        network.next_hops([backend])
    assert str(refusal.value) == (f"backend {backend}: no route: {words}: see ip route get {backend}")


@pytest.mark.parametrize("backend", [ROUTED4, ROUTED6], ids=str)
def test_backend_that_no_route_covers_is_named(network: Network, backend: Any) -> None:
    with pytest.raises(NoRoute, match=f"^backend {backend}: no route: Network is unreachable"):
        network.next_hops([backend])


@pytest.mark.parametrize("backend", [SELF4, SELF6], ids=str)
def test_backend_on_this_host_is_refused(network: Network, backend: Any) -> None:
    with pytest.raises(NoRoute, match=f"^backend {backend}: is an address of this host"):
        network.next_hops([backend])


def test_broadcast_address_is_no_backend(network: Network) -> None:
    with pytest.raises(NoRoute, match=r"^backend 10\.0\.0\.255: not a unicast route"):
        network.next_hops([ip_address("10.0.0.255")])


def test_backend_behind_a_tunnel_device_is_refused(bed: Bed, network: Network) -> None:
    bed.here.link("add", ifname="tun0", kind="tuntap", mode="tun", state="up")
    tun = bed.here.link_lookup(ifname="tun0")[0]
    bed.here.link("set", index=tun, state="up")
    bed.here.addr("add", index=tun, address="10.8.0.1", prefixlen=24)
    with pytest.raises(
        NoRoute, match=r"^backend 10\.8\.0\.2: reached through tun0, which is not an Ethernet interface"
    ):
        network.next_hops([ip_address("10.8.0.2")])


def test_host_without_an_address_of_its_own_is_told_so(bed: Bed, network: Network) -> None:
    bed.here.flush_addr(index=bed.near, family=socket.AF_INET)
    bed.here.route("add", dst="10.9.0.0/16", oif=bed.near, scope=253)
    with pytest.raises(NoRoute, match=f"^backend {ROUTED4}: no source address: "):
        network.next_hops([ROUTED4])


def test_unknown_interface_is_named(network: Network) -> None:
    assert network.interface_exists("near")
    assert not network.interface_exists("eth9")
    assert not network.interface_exists("a-name-longer-than-a-kernel-takes")
    with pytest.raises(NotFound, match=r"^interface eth9: does not exist"):
        network.addresses("eth9")
    with pytest.raises(NotFound, match=r"^interface eth9: does not exist"):
        network.add_address("eth9", SILENT4)


def test_addresses_come_global_first_and_a_vip_after_the_hosts_own(bed: Bed, network: Network) -> None:
    network.add_address("near", SILENT6)
    *usable, link_local = network.addresses("near")
    assert usable == [SELF4, SELF6, SILENT6]
    assert link_local.is_link_local


def test_subnets_are_those_of_the_hosts_addresses_without_vips(network: Network) -> None:
    network.add_address("near", SILENT4)
    network.add_address("near", SILENT6)
    subnets = network.subnets()["near"]
    assert {str(subnet) for subnet in subnets} == {"10.0.0.0/24", "fd00::/64", "fe80::/64"}


@pytest.mark.parametrize("vip", [SILENT4, SILENT6], ids=str)
def test_vip_is_put_on_an_interface_and_taken_off_again(network: Network, vip: Any) -> None:
    assert network.owner(vip) is None
    for _ in range(2):
        network.add_address("near", vip)
        assert network.owner(vip) == "near"
        assert network.addresses("near").count(vip) == 1
    for _ in range(2):
        network.remove_address("near", vip)
        assert network.owner(vip) is None
    network.remove_address("eth9", vip)


def test_vip_answers_at_once_and_adds_no_route_but_the_local_one(bed: Bed, network: Network) -> None:
    before = {str(route) for route in main_routes(bed.here)}
    network.add_address("near", SILENT4)
    network.add_address("near", SILENT6)
    assert {str(route) for route in main_routes(bed.here)} == before
    (vip,) = (a for a in bed.here.get_addr() if a.get_attr("IFA_ADDRESS") == str(SILENT6))
    assert not vip.get_attr("IFA_FLAGS") & 0x40  # IFA_F_TENTATIVE


def main_routes(ipr: IPRoute) -> list[tuple[Any, ...]]:
    return [
        (route["dst_len"], route.get_attr("RTA_DST"), route.get_attr("RTA_OIF")) for route in ipr.get_routes(table=254)
    ]


def test_vip_that_resembles_a_backend_does_not_become_the_source(bed: Bed, network: Network) -> None:
    network.add_address("near", ip_address("fd00::10"))
    network.add_address("near", ip_address("10.0.0.10"))
    assert network.next_hops([BACKEND4, BACKEND6]) == {
        BACKEND4: bed.hop(SELF4),
        BACKEND6: bed.hop(SELF6),
    }


def test_refusal_of_an_address_carries_the_kernels_words(bed: Bed, network: Network) -> None:
    Path("/proc/sys/net/ipv6/conf/near/disable_ipv6").write_text("1")
    with pytest.raises(DataplaneError, match=f"^vip address {SILENT6}: cannot be added to near: "):
        network.add_address("near", SILENT6)
