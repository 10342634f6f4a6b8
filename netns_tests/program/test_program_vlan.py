"""What the program does with one frame after another: VLAN tags are set aside and come back, whatever becomes of it."""

from __future__ import annotations

import pytest
from scapy.layers.inet import ICMP, IP
from scapy.layers.inet6 import ICMPv6EchoRequest
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw

from netns_tests.oracle import packets
from netns_tests.oracle.model import Count, Outcome, Slot
from netns_tests.oracle.packets import Verdict
from netns_tests.oracle.table import (
    MEMBER_PORT,
    V4,
    V6,
    Balancer,
    Family,
    both_families,
    both_protocols,
    from_client,
    on_one_cpu,
    passed,
    segment,
)
from netns_tests.oracle.wire import address

every_mode = pytest.mark.parametrize("mode", ["nat", "dr", "ipip", "gue"])
tags = pytest.mark.parametrize(
    "tag",
    [
        pytest.param([Dot1Q(vlan=7)], id="802.1Q"),
        pytest.param([Dot1Q(vlan=7, prio=5, dei=1)], id="802.1Q with a priority"),
        pytest.param([Dot1AD(vlan=7)], id="802.1ad"),
        pytest.param([Dot1AD(vlan=7), Dot1Q(vlan=8)], id="QinQ"),
        pytest.param([Dot1Q(vlan=7), Dot1Q(vlan=8)], id="802.1Q twice"),
    ],
)


def tagged(frame: bytes, tag: list[Packet]) -> bytes:
    """Between the addresses and the type of the frame."""
    types: dict[type[Packet], bytes] = {Dot1Q: b"\x81\x00", Dot1AD: b"\x88\xa8"}
    return frame[:12] + b"".join(types[type(each)] + bytes(each)[:2] for each in tag) + frame[12:]


def same_but_tagged(outcome: Outcome, tag: list[Packet]) -> Outcome:
    return Outcome(outcome.verdict, outcome.reason, tagged(outcome.frame, tag))


@both_families
@every_mode
@both_protocols
@tags
def test_a_tagged_request_leaves_as_an_untagged_one_with_its_tags(
    balancer: Balancer, family: Family, mode: str, protocol: str, tag: list[Packet]
) -> None:
    balancer.serve(balancer.service(family, protocol, mode=mode))
    request = family.request(from_client(protocol))
    with on_one_cpu():  # each has seen SYNs of its own
        untagged = balancer.send(request)
        assert untagged.reason == "FORWARDED"
        assert balancer.send(tagged(request, tag)) == same_but_tagged(untagged, tag)
    opened = balancer.program.count(1).connections
    again = int(protocol == "tcp")  # it is the same SYN, tags or not
    assert balancer.program.count(1) == Count(2, 2 * len(request), connections=opened, repeated_syns=again)


@both_families
@tags
def test_a_tagged_reply_keeps_its_tags(balancer: Balancer, family: Family, tag: list[Packet]) -> None:
    balancer.serve(balancer.service(family))
    port = balancer.opened(family.request(from_client()))
    reply = family.from_member(segment("tcp", MEMBER_PORT, port, "SA"))
    untagged = balancer.answer(reply)
    assert untagged.reason == "FORWARDED"
    assert balancer.answer(tagged(reply, tag)) == same_but_tagged(untagged, tag)


@both_families
@every_mode
@tags
def test_what_is_dropped_or_left_to_the_host_is_the_frame_that_came(
    balancer: Balancer, family: Family, mode: str, tag: list[Packet]
) -> None:
    balancer.serve(balancer.service(family, mode=mode, slots=[Slot(0)]))
    for frame in (
        family.request(from_client()),
        family.request(segment("tcp", packets.CLIENT_PORT, 81)),
        family.request(from_client())[:40],
    ):
        untagged = balancer.send(frame)
        assert untagged.verdict in (Verdict.DROP, Verdict.PASS)
        assert balancer.send(tagged(frame, tag)) == same_but_tagged(untagged, tag)


@both_families
@tags
def test_the_answer_to_what_has_come_too_far_comes_back_on_the_senders_vlan(
    balancer: Balancer, family: Family, tag: list[Packet]
) -> None:
    balancer.serve(balancer.service(family, mode="dr"))
    request = family.request(from_client(), hops=1)
    untagged = balancer.send(request)
    assert untagged.reason == "ANSWERED_TTL_EXPIRED"
    assert balancer.send(tagged(request, tag)) == same_but_tagged(untagged, tag)


@both_families
@tags
def test_the_answer_to_what_is_too_big_comes_back_on_the_senders_vlan(
    balancer: Balancer, family: Family, tag: list[Packet]
) -> None:
    balancer.serve(balancer.service(family, mode="ipip"))
    request = family.request(from_client(payload=bytes(1460)))
    untagged = balancer.send(request)
    assert untagged.reason == "ANSWERED_TOO_BIG"
    assert balancer.send(tagged(request, tag)) == same_but_tagged(untagged, tag)


@both_families
@tags
def test_an_echo_request_is_answered_on_its_vlan(balancer: Balancer, family: Family, tag: list[Packet]) -> None:
    balancer.serve(echo=[address(family.vip)])
    echo = ICMP(id=1, seq=2) if family.version == 4 else ICMPv6EchoRequest(id=1, seq=2, data=b"ping")
    request = family.request(echo / Raw(b"ping") if family.version == 4 else echo)
    untagged = balancer.send(request)
    assert untagged.reason == "ANSWERED_ECHO"
    assert balancer.send(tagged(request, tag)) == same_but_tagged(untagged, tag)


def left_alone() -> dict[str, bytes]:
    request = V4.request(from_client())
    return {
        "arp": tagged(packets.frame(ARP(pdst=packets.VIP4)), [Dot1Q(vlan=7)]),
        "a third tag": tagged(tagged(request, [Dot1Q(vlan=9)]), [Dot1AD(vlan=7), Dot1Q(vlan=8)]),
        "nothing but tags": tagged(request, [Dot1AD(vlan=7), Dot1Q(vlan=8)])[:22],
        "a tag cut off": tagged(request, [Dot1Q(vlan=7)])[:15],
        "next to nothing behind a tag": tagged(request, [Dot1Q(vlan=7)])[:31],
    }


@pytest.mark.parametrize("frame", left_alone().values(), ids=left_alone())
def test_tagged_frames_that_no_service_can_use_are_the_hosts(balancer: Balancer, frame: bytes) -> None:
    balancer.serve(balancer.service(mode="dr"))
    assert balancer.send(frame) == passed("PASS_NOT_IP", frame)


def test_a_priority_tag_without_a_vlan_is_kept_too(balancer: Balancer) -> None:
    balancer.serve(balancer.service(V6, mode="dr"))
    outcome = balancer.send(tagged(V6.request(from_client()), [Dot1Q(vlan=0, prio=7)]))
    assert outcome.reason == "FORWARDED"
    assert outcome.frame[12:18] == bytes.fromhex("8100e00086dd")
    assert IP not in Ether(outcome.frame)
