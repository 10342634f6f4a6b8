"""Frames of every protocol that pcap-filter(7) has a word for, by name. None is too short for BPF_PROG_TEST_RUN."""

from __future__ import annotations

from typing import Any

from scapy.contrib.geneve import GENEVE
from scapy.contrib.mpls import MPLS
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_RR
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.l2 import ARP, GRE, LLC, SNAP, STP, Dot1AD, Dot1Q, Dot3, Ether
from scapy.layers.ppp import PPP, PPPoE, PPPoED
from scapy.layers.sctp import SCTP, SCTPChunkData
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet, Raw

HOST, CLIENT = "10.1.2.3", "192.168.7.9"
HOST6, CLIENT6 = "2001:db8::3", "2001:db8:9::9"
HOST_MAC, CLIENT_MAC, BROADCAST = "02:00:00:00:00:01", "02:00:00:00:00:02", "ff:ff:ff:ff:ff:ff"
PAYLOAD = Raw(b"0123456789" * 4)


def ethernet(type: int | None = None, dst: str = HOST_MAC) -> Packet:
    return Ether(src=CLIENT_MAC, dst=dst) if type is None else Ether(src=CLIENT_MAC, dst=dst, type=type)


def ip(**fields: Any) -> Packet:
    return IP(**{"src": CLIENT, "dst": HOST, **fields})


def ip6(**fields: Any) -> Packet:
    return IPv6(**{"src": CLIENT6, "dst": HOST6, **fields})


DNS = UDP(sport=40000, dport=53) / PAYLOAD
HTTP = TCP(sport=40000, dport=80, flags="S")

_PACKETS: dict[str, Packet] = {
    "tcp syn": ethernet() / ip() / HTTP,
    "tcp ack with payload": ethernet() / ip() / TCP(sport=80, dport=40000, flags="A") / PAYLOAD,
    "tcp fin": ethernet() / ip(src=HOST, dst=CLIENT) / TCP(sport=443, dport=22, flags="FA"),
    "tcp with ip options": ethernet() / ip(options=[IPOption_RR(routers=[HOST])]) / HTTP,
    "udp": ethernet() / ip() / DNS,
    "udp to broadcast": ethernet(dst=BROADCAST) / ip(dst="255.255.255.255") / UDP(sport=68, dport=67) / PAYLOAD,
    "udp to multicast": ethernet(dst="01:00:5e:00:00:fb") / ip(dst="224.0.0.251", ttl=1) / UDP(sport=5353, dport=5353),
    "sctp": ethernet() / ip() / SCTP(sport=40000, dport=53) / SCTPChunkData(data=b"data"),
    "first fragment": ethernet() / ip(flags="MF") / DNS,
    "later fragment": ethernet() / ip(frag=100, proto=17) / PAYLOAD,
    "echo request": ethernet() / ip() / ICMP() / PAYLOAD,
    "port unreachable": ethernet() / ip() / ICMP(type=3, code=3) / ip(src=HOST, dst=CLIENT) / DNS,
    "gre": ethernet() / ip() / GRE() / ip(src="172.16.0.1", dst="172.16.0.2") / DNS,
    "ip in ip": ethernet() / ip() / ip(src="172.16.0.1", dst="172.16.0.2") / HTTP,
    "vrrp": ethernet() / ip(dst="224.0.0.18", proto=112) / PAYLOAD,
    "vxlan": ethernet() / ip() / UDP(sport=1, dport=4789) / VXLAN(vni=7) / ethernet() / ip() / DNS,
    "geneve": ethernet() / ip() / UDP(sport=1, dport=6081) / GENEVE(vni=5) / ethernet() / ip() / HTTP,
    "ipv6 tcp": ethernet() / ip6() / HTTP,
    "ipv6 udp": ethernet() / ip6() / DNS,
    "ipv6 echo": ethernet() / ip6() / ICMPv6EchoRequest(data=b"ping"),
    "ipv6 hop by hop": ethernet() / ip6() / IPv6ExtHdrHopByHop() / DNS,
    "ipv6 extension headers": ethernet()
    / ip6()
    / IPv6ExtHdrHopByHop()
    / IPv6ExtHdrRouting(addresses=[HOST6])
    / IPv6ExtHdrDestOpt()
    / HTTP,
    "ipv6 fragment": ethernet() / ip6() / IPv6ExtHdrFragment(m=1, id=7) / DNS,
    "vlan": ethernet() / Dot1Q(vlan=100) / ip() / DNS,
    "vlan ipv6": ethernet() / Dot1Q(vlan=100) / ip6() / HTTP,
    "qinq": ethernet(0x8100) / Dot1Q(vlan=100) / Dot1Q(vlan=200) / ip() / HTTP,
    "802.1ad": ethernet() / Dot1AD(vlan=7) / Dot1Q(vlan=100) / ip() / DNS,
    "mpls": ethernet() / MPLS(label=100000, s=1, ttl=5) / ip() / DNS,
    "two mpls labels": ethernet() / MPLS(label=5, s=0) / MPLS(label=1024, s=1) / ip6() / HTTP,
    "pppoe session": ethernet() / PPPoE(sessionid=0x27) / PPP(proto=0x21) / ip() / DNS,
    "pppoe session ipv6": ethernet() / PPPoE(sessionid=3) / PPP(proto=0x57) / ip6() / HTTP,
    "pppoe discovery": ethernet(dst=BROADCAST) / PPPoED(),
    "arp": ethernet(dst=BROADCAST) / ARP(psrc=CLIENT, pdst=HOST),
    "rarp": ethernet(0x8035, dst=BROADCAST) / ARP(op=3, psrc="0.0.0.0", pdst="0.0.0.0"),
    "lldp": ethernet(0x88CC) / PAYLOAD,
    "spanning tree": Dot3(src=CLIENT_MAC, dst="01:80:c2:00:00:00") / LLC() / STP(),
    "snap": Dot3(src=CLIENT_MAC, dst=HOST_MAC) / LLC(dsap=0xAA, ssap=0xAA, ctrl=3) / SNAP(code=0x809B) / PAYLOAD,
    "is-is": Dot3(src=CLIENT_MAC, dst=HOST_MAC) / LLC(dsap=0xFE, ssap=0xFE, ctrl=3) / Raw(b"\x83" + bytes(30)),
    "ethernet header alone": ethernet(0x0800),
    "large udp": ethernet() / ip() / UDP(sport=53, dport=40000) / Raw(bytes(range(256)) * 5),
}

WHOLE = {name: bytes(packet) for name, packet in _PACKETS.items()}
CUT = {
    f"{name}, cut to {size}": WHOLE[name][:size]
    for name in ("tcp with ip options", "ipv6 extension headers", "qinq", "pppoe session", "geneve", "vxlan")
    for size in (15, 23, 34, 35, 37, 38, 54, 58, 66)
    if size < len(WHOLE[name])
}
FRAMES = WHOLE | CUT
