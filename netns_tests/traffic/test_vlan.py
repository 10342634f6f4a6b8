"""Frames with VLAN tags on real interfaces: mode dr sends them on with their tags.

No kernel has to know VLAN devices for it: the frames are written by hand. The switch holds a tag beside its packets
and would hand it over that way; its ports are told to write it into the frame, as a network's wire has it.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw

from netns_tests.bed.sniffer import sniffing_the_way_to
from netns_tests.bed.topology import Bed, Host
from netns_tests.bed.traffic import FAMILIES

PORT = 5353
TAGS = {
    "no tag": [],
    "802.1Q": [Dot1Q(vlan=7, prio=5)],
    "802.1Q twice": [Dot1Q(vlan=7), Dot1Q(vlan=8, prio=3)],
    "QinQ": [Dot1AD(vlan=7), Dot1Q(vlan=8)],
}


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    with Bed(backends=1, one_arm=True) as b:
        for port in ("lb-eth0", "b1-eth0"):
            offloads = ["tx-vlan-hw-insert", "off", "tx-vlan-stag-hw-insert", "off"]
            b.switch.run(["ethtool", "-K", port, *offloads])
        b.xdp_lb("attach", "eth0", "--vip", f"{b.vip4}:{PORT}/udp", "--mode", "dr", "--backends", b.backends[0].ipv4)
        b.xdp_lb("vip", "add", f"[{b.vip6}]:{PORT}/udp", "--mode", "dr", "--backends", b.backends[0].ipv6)
        yield b


def mac(host: Host) -> str:
    return host.run(["cat", "/sys/class/net/eth0/address"]).stdout.strip()


def datagram(bed: Bed, family: str, hops: int) -> Packet:
    inside = UDP(sport=40000, dport=PORT) / Raw(b"tagged")
    if family == "ipv4":
        return IP(src=bed.client.ipv4, dst=bed.vip4, ttl=hops) / inside
    return IPv6(src=bed.client.ipv6, dst=bed.vip6, hlim=hops) / inside


def frame(source: Host, destination: Host, tags: list[Packet], packet: Packet) -> bytes:
    built: Packet = Ether(src=mac(source), dst=mac(destination))
    for layer in (*tags, packet):
        built = built / layer
    return bytes(built)


def send(host: Host, raw_frame: bytes) -> None:
    with host.entered(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
        wire.bind(("eth0", 0))
        wire.send(raw_frame)


@pytest.mark.parametrize("tags", TAGS.values(), ids=TAGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tags_stay_on_the_way_to_the_backend(bed: Bed, family: str, tags: list[Packet]) -> None:
    (backend,) = bed.backends
    with sniffing_the_way_to(bed, backend) as sniffer:
        send(bed.client, frame(bed.client, bed.lb, tags, datagram(bed, family, hops=64)))
        (sent_on,) = sniffer.wait_for(1, lambda each: bytes(each) if b"tagged" in bytes(each) else None, "frame")
    assert sent_on == frame(bed.lb, backend, tags, datagram(bed, family, hops=63))
