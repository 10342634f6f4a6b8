"""Announcements as frames, and when they are sent."""

from __future__ import annotations

import time
from collections.abc import Collection
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6NDOptDstLLAddr, IPv6
from scapy.layers.l2 import ARP, Ether

from lb.host.announce import INTERVAL_S, Announcer, gratuitous_arp, unsolicited_advertisement
from lb.model.state import OwnAddress
from lb.model.vip import Address

MAC = "02:00:00:00:00:07"
VIP4, VIP6 = IPv4Address("10.0.0.100"), IPv6Address("2001:db8::100")
ON4, ON6 = OwnAddress("eth0", VIP4), OwnAddress("eth1", VIP6)


def test_gratuitous_arp_is_a_broadcast_request_for_its_own_address() -> None:
    request = ARP(op="who-has", hwsrc=MAC, psrc=str(VIP4), hwdst="00:00:00:00:00:00", pdst=str(VIP4))
    assert gratuitous_arp(bytes.fromhex(MAC.replace(":", "")), VIP4) == bytes(
        Ether(src=MAC, dst="ff:ff:ff:ff:ff:ff") / request
    )


@pytest.mark.parametrize("router", [False, True])
def test_unsolicited_advertisement_overrides_what_all_nodes_know(router: bool) -> None:
    advertisement = ICMPv6ND_NA(R=int(router), S=0, O=1, tgt=str(VIP6)) / ICMPv6NDOptDstLLAddr(lladdr=MAC)
    assert unsolicited_advertisement(bytes.fromhex(MAC.replace(":", "")), VIP6, router=router) == bytes(
        Ether(src=MAC, dst="33:33:00:00:00:01") / IPv6(src=str(VIP6), dst="ff02::1", hlim=255) / advertisement
    )


class Recorded(Announcer):
    def __init__(self, *, in_background: bool) -> None:
        self.held: list[Address] = [VIP4, VIP6]
        super().__init__(lambda _: self.held, in_background=in_background)
        self.sent: list[tuple[str, list[str]]] = []

    def _transmit(self, name: str, addresses: Collection[Address]) -> None:
        self.sent.append((name, sorted(map(str, addresses))))


def test_a_command_sends_each_announcement_three_times_before_it_ends() -> None:
    announcer = Recorded(in_background=False)
    assert announcer.announce([ON4, ON6]) == []
    assert announcer.sent == [("eth0", [str(VIP4)]), ("eth1", [str(VIP6)])] * 3
    assert announcer.announce([]) == []
    assert len(announcer.sent) == 6


def test_the_daemon_sends_the_second_and_the_third_when_they_are_due(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    announcer = Recorded(in_background=True)
    announcer.announce([ON4])
    announcer.repeat()
    assert len(announcer.sent) == 1
    for expected in (2, 3, 3):
        now += INTERVAL_S
        announcer.repeat()
        assert len(announcer.sent) == expected


def test_an_address_that_has_left_its_interface_is_not_announced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    announcer = Recorded(in_background=True)
    announcer.announce([ON4])
    announcer.held.remove(VIP4)
    now += INTERVAL_S
    announcer.repeat()
    assert announcer.sent == [("eth0", [str(VIP4)]), ("eth0", [])]


@pytest.mark.parametrize("in_background", [False, True])
def test_what_cannot_be_sent_is_said_once_by_interface(monkeypatch: pytest.MonkeyPatch, in_background: bool) -> None:
    announcer = Recorded(in_background=in_background)

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(announcer, "_transmit", refuse)
    other = OwnAddress("eth0", ip_address("10.0.0.101"))
    assert announcer.announce([ON4, other]) == [
        "eth0: VIP addresses not announced (gratuitous ARP, unsolicited NA): Operation not permitted:"
        " run with CAP_NET_RAW"
    ]
    assert announcer.repeat() == []
