"""The fields of frames, beside what scapy finds in them."""

from __future__ import annotations

from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet

from filters.files.fields import fields
from filters.tests.packets import FRAMES

ETHER = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
MACS = {"source": "02:00:00:00:00:01", "destination": "02:00:00:00:00:02"}
IP4 = {"version": 4, "source": "10.0.0.1", "destination": "10.0.0.2", "ttl": 7}
IP6 = {"version": 6, "source": "2001:db8::1", "destination": "2001:db8::2", "ttl": 64}


def ip4(**more: Any) -> Packet:
    return IP(src="10.0.0.1", dst="10.0.0.2", ttl=7, **more)


def ip6() -> Packet:
    return IPv6(src="2001:db8::1", dst="2001:db8::2")


PORTS = {"source_port": 5, "destination_port": 53}
CASES: list[tuple[Packet, dict[str, Any]]] = [
    (
        ip4() / TCP(sport=5, dport=53, flags="SA"),
        {"ip": IP4 | {"protocol": "tcp"}, "tcp": PORTS | {"flags": ["syn", "ack"]}},
    ),
    (ip4() / UDP(sport=5, dport=53), {"ip": IP4 | {"protocol": "udp"}, "udp": PORTS}),
    (ip4() / ICMP(type=3, code=4), {"ip": IP4 | {"protocol": "icmp"}, "icmp": {"type": 3, "code": 4}}),
    (ip4(proto=89), {"ip": IP4 | {"protocol": "89"}}),
    (
        ip4(flags="MF") / UDP(sport=5, dport=53),
        {"ip": IP4 | {"protocol": "udp", "fragment_offset": 0}, "udp": PORTS},
    ),
    (ip4(frag=185, proto=17) / b"rest", {"ip": IP4 | {"protocol": "udp", "fragment_offset": 1480}}),
    (ip6() / IPv6ExtHdrHopByHop() / UDP(sport=5, dport=53), {"ip": IP6 | {"protocol": "udp"}, "udp": PORTS}),
    (
        ip6() / IPv6ExtHdrFragment(offset=3, nh=6) / b"rest",
        {"ip": IP6 | {"protocol": "tcp", "fragment_offset": 24}},
    ),
]


@pytest.mark.parametrize(("packet", "expected"), CASES, ids=[packet.summary() for packet, _ in CASES])
def test_headers_have_their_fields(packet: Packet, expected: dict[str, Any]) -> None:
    kind = "0x86dd" if IPv6 in packet else "0x0800"
    assert fields(bytes(ETHER / packet)) == {"ether": MACS | {"type": kind}} | expected


def test_tags_are_told_from_the_outside_in() -> None:
    tagged = ETHER / Dot1Q(vlan=5, prio=3) / Dot1Q(vlan=6) / ip4(proto=89)
    tagged[Ether].type = 0x88A8
    assert fields(bytes(tagged)) == {
        "ether": MACS | {"type": "0x0800"},
        "vlan": [{"id": 5, "priority": 3}, {"id": 6, "priority": 0}],
        "ip": IP4 | {"protocol": "89"},
    }


def test_arp_says_who_asks_for_whom() -> None:
    arp = ARP(op=1, hwsrc="02:00:00:00:00:01", psrc="10.0.0.1", hwdst="00:00:00:00:00:00", pdst="10.0.0.2")
    assert fields(bytes(ETHER / arp))["arp"] == {
        "operation": "request",
        "sender": "02:00:00:00:00:01",
        "sender_ip": "10.0.0.1",
        "target": "00:00:00:00:00:00",
        "target_ip": "10.0.0.2",
    }


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES.keys())
def test_cut_frame_says_no_more_than_the_whole_one(frame: bytes) -> None:
    whole = fields(frame)
    for size in range(len(frame)):
        told = fields(memoryview(frame)[:size])
        assert told.keys() <= whole.keys()
        for transport in told.keys() & {"tcp", "udp", "sctp", "icmp", "icmp6"}:
            assert told[transport] == {key: whole[transport][key] for key in told[transport]}
