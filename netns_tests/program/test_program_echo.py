"""What the program does with one frame after another: echo requests, answered in the VIP's name."""

from __future__ import annotations

import pytest
from scapy.layers.inet import ICMP, IP
from scapy.layers.inet6 import ICMPv6EchoReply, ICMPv6EchoRequest, IPv6
from scapy.packet import Packet, Raw

from netns_tests.oracle import packets
from netns_tests.oracle.model import Outcome
from netns_tests.oracle.packets import Verdict
from netns_tests.oracle.table import V4, Balancer, Family, both_families, passed
from netns_tests.oracle.wire import address


def header(family: Family, src: str, dst: str, hops: int) -> Packet:
    """With the fields that a reply keeps."""
    if family.version == 4:
        return IP(src=src, dst=dst, ttl=hops, id=0x4321, tos=0xB8, flags="DF")
    return IPv6(src=src, dst=dst, hlim=hops, tc=0xB8, fl=0x54321)


def echo_request(family: Family, payload: bytes = b"payload", hops: int = 64, code: int = 0) -> bytes:
    ping = ICMP(type=8, code=code) if family.version == 4 else ICMPv6EchoRequest(code=code)
    ping.id, ping.seq = 77, 5
    return packets.frame(header(family, family.client, family.vip, hops), ping / Raw(payload))


def echo_reply(family: Family, payload: bytes = b"payload") -> bytes:
    pong = ICMP(type=0) if family.version == 4 else ICMPv6EchoReply()
    pong.id, pong.seq = 77, 5
    reply = header(family, family.vip, family.client, 64)
    return packets.frame(reply, pong / Raw(payload), src_mac=packets.LB_MAC, dst_mac=packets.CLIENT_MAC)


@both_families
@pytest.mark.parametrize("payload", [b"", b"odd", bytes(1400)], ids=["empty", "odd", "large"])
@pytest.mark.parametrize("hops", [1, 64, 255])
def test_an_echo_request_to_a_vip_is_answered(balancer: Balancer, family: Family, payload: bytes, hops: int) -> None:
    balancer.serve(balancer.service(family), echo=[address(family.vip)])
    answer = Outcome(Verdict.TX, "ANSWERED_ECHO", echo_reply(family, payload))
    assert balancer.send(echo_request(family, payload, hops)) == answer


@both_families
def test_an_echo_request_to_an_address_that_does_not_answer_is_the_hosts(balancer: Balancer, family: Family) -> None:
    request = echo_request(family)
    balancer.serve(balancer.service(family))
    assert balancer.send(request) == passed("PASS_ICMP", request)
    balancer.serve(balancer.service(family), echo=[address(family.router)])
    assert balancer.send(request) == passed("PASS_ICMP", request)


@both_families
def test_padding_behind_an_echo_request_stays(balancer: Balancer, family: Family) -> None:
    balancer.serve(echo=[address(family.vip)])
    assert balancer.send(echo_request(family) + b"\xff\x00\xaa").frame == echo_reply(family) + b"\xff\x00\xaa"


@both_families
def test_an_echo_request_with_a_code_is_the_hosts(balancer: Balancer, family: Family) -> None:
    balancer.serve(echo=[address(family.vip)])
    request = echo_request(family, code=1)
    assert balancer.send(request) == passed("PASS_ICMP", request)


@both_families
def test_an_echo_reply_to_the_vip_is_the_hosts(balancer: Balancer, family: Family) -> None:
    balancer.serve(echo=[address(family.vip), address(family.client)])
    reply = echo_reply(family)
    assert balancer.send(reply) == passed("PASS_ICMP", reply)


def test_a_wrong_checksum_stays_as_wrong_in_the_answer(balancer: Balancer) -> None:
    """Whether a request was damaged on its way, who sent it finds out."""
    balancer.serve(echo=[address(V4.vip)])
    request = echo_request(V4)
    at = packets.ETHERNET_HEADER_SIZE + 20 + 2
    wrong = (int.from_bytes(request[at : at + 2], "big") + 1) % 0xFFFF
    answer = balancer.send(request[:at] + wrong.to_bytes(2, "big") + request[at + 2 :]).frame
    right = int.from_bytes(echo_reply(V4)[at : at + 2], "big")
    assert int.from_bytes(answer[at : at + 2], "big") == (right + 1) % 0xFFFF


def test_a_fragment_of_an_echo_request_is_the_hosts(balancer: Balancer) -> None:
    balancer.serve(balancer.service(), echo=[address(V4.vip)])
    first = packets.frame(packets.ip4(flags="MF"), ICMP(type=8) / Raw(bytes(64)))
    assert balancer.send(first) == passed("PASS_NOT_A_SERVICE", first)
