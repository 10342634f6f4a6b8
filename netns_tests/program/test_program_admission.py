"""What the program does with one frame after another: limits on connection openings, and a lower MSS in SYNs."""

from __future__ import annotations

from typing import Any

import pytest
from scapy.layers.inet import TCP
from scapy.packet import Raw

from netns_tests.oracle import packets
from netns_tests.oracle.model import Service
from netns_tests.oracle.table import (
    V4,
    Balancer,
    Family,
    both_families,
    dropped,
    from_client,
    redirected,
    segment,
    with_hops,
    with_macs,
)

NEIGHBOURS = {4: "192.0.2.99", 6: "2001:db8:1::99"}  # of the client, in its prefix
STRANGERS = {4: "198.51.100.200", 6: "2001:db8:7::1"}
every_mode = pytest.mark.parametrize("mode", ["nat", "dr", "ipip", "gue"])


def opening(family: Family, sport: int, source: str = "", flags: str = "S") -> bytes:
    header = family.header(source or family.client, family.vip)
    return packets.frame(header, segment("tcp", sport, packets.SERVICE_PORT, flags))


def admitted(balancer: Balancer, family: Family, count: int, source: str = "", flags: str = "S") -> int:
    """How many of so many openings at once go through."""
    frames = [opening(family, 1000 + n, source, flags) for n in range(count)]
    return sum(balancer.send(frame).reason == "FORWARDED" for frame in frames)


# Limits


@both_families
@every_mode
@pytest.mark.parametrize("limit", ["syn_limit", "syn_limit_of_source"])
def test_a_second_has_so_many_openings_and_no_more(balancer: Balancer, family: Family, mode: str, limit: str) -> None:
    limited: dict[str, Any] = {limit: 3}
    balancer.serve(balancer.service(family, mode=mode, **limited))
    assert admitted(balancer, family, 10) == 3
    late = opening(family, 5)
    reason = "DROP_SYN_LIMIT_OF_SOURCE" if limit == "syn_limit_of_source" else "DROP_SYN_LIMIT"
    assert balancer.send(late) == dropped(reason, late)


@both_families
@pytest.mark.parametrize("limit", ["syn_limit", "syn_limit_of_source"])
def test_openings_come_back_evenly_and_a_seconds_worth_at_most(balancer: Balancer, family: Family, limit: str) -> None:
    limited: dict[str, Any] = {limit: 4}
    balancer.serve(balancer.service(family, mode="dr", **limited))
    assert admitted(balancer, family, 10) == 4
    balancer.after(0.25)
    assert admitted(balancer, family, 10) == 1
    balancer.after(0.75)
    assert admitted(balancer, family, 10) == 3
    balancer.after(60)
    assert admitted(balancer, family, 10) == 4


@both_families
@pytest.mark.parametrize("flags", ["A", "SA", "PA", "FA"])
def test_what_opens_no_connection_is_not_limited(balancer: Balancer, family: Family, flags: str) -> None:
    balancer.serve(balancer.service(family, mode="dr", syn_limit=1, syn_limit_of_source=1))
    assert admitted(balancer, family, 1) == 1
    assert admitted(balancer, family, 10, flags=flags) == 10


@both_families
def test_clients_of_a_prefix_have_one_limit_and_others_their_own(balancer: Balancer, family: Family) -> None:
    """The prefix of an IPv4 client has 24 bits, that of an IPv6 client 64."""
    balancer.serve(balancer.service(family, mode="dr", syn_limit_of_source=3))
    assert admitted(balancer, family, 10) == 3
    assert admitted(balancer, family, 10, NEIGHBOURS[family.version]) == 0
    assert admitted(balancer, family, 10, STRANGERS[family.version]) == 3


@both_families
def test_what_its_source_may_not_open_does_not_count_for_the_service(balancer: Balancer, family: Family) -> None:
    balancer.serve(balancer.service(family, mode="dr", syn_limit=5, syn_limit_of_source=3))
    assert admitted(balancer, family, 100) == 3
    assert admitted(balancer, family, 100, STRANGERS[family.version]) == 2


@both_families
def test_services_have_limits_of_their_own(balancer: Balancer, family: Family) -> None:
    def limited(**fields: Any) -> Service:
        return balancer.service(family, mode="dr", syn_limit=2, syn_limit_of_source=2, **fields)

    balancer.serve(limited(port=443), limited())
    https = packets.frame(family.header(family.client, family.vip), segment("tcp", 1, 443))
    assert [balancer.send(https).reason for _ in range(3)] == ["FORWARDED"] * 2 + ["DROP_SYN_LIMIT_OF_SOURCE"]
    assert admitted(balancer, family, 10) == 2


def test_a_limit_of_a_thousand_million_is_none(balancer: Balancer) -> None:
    balancer.serve(balancer.service(mode="dr", syn_limit=1_000_000_000, syn_limit_of_source=1_000_000_000))
    assert admitted(balancer, V4, 100) == 100


# The maximum segment size


MSS = 1200
NOP, END, SACK_PERMITTED, WINDOW_SCALE = ("NOP", None), ("EOL", None), ("SAckOK", b""), ("WScale", 7)


def syn(family: Family, flags: str = "S", **fields: Any) -> bytes:
    return family.request(from_client(flags=flags, **fields))


def sent_on(family: Family, frame: bytes) -> Any:
    return redirected(with_macs(with_hops(frame, 63), packets.LB_MAC, packets.BACKEND_MACS[0]))


@both_families
@pytest.mark.parametrize(
    "before",
    [
        pytest.param([], id="first"),
        pytest.param([NOP], id="at an odd offset"),
        pytest.param([NOP, NOP], id="at an even offset"),
        pytest.param([SACK_PERMITTED, ("Timestamp", (1, 2)), NOP, WINDOW_SCALE], id="last"),
    ],
)
@pytest.mark.parametrize("payload", [b"", b"even", b"odd"])
def test_the_mss_of_a_syn_is_lowered_and_its_checksum_right(
    balancer: Balancer, family: Family, before: list[Any], payload: bytes
) -> None:
    balancer.serve(balancer.service(family, mode="dr", mss=MSS))
    asks, gets = (syn(family, options=[*before, ("MSS", mss)], payload=payload) for mss in (1460, MSS))
    assert balancer.send(asks) == sent_on(family, gets)


@both_families
@every_mode
def test_the_mss_is_lowered_in_every_mode(balancer: Balancer, family: Family, mode: str) -> None:
    asks, gets = (syn(family, options=[("MSS", mss)]) for mss in (65535, MSS))
    balancer.serve(balancer.service(family, mode=mode))
    expected = balancer.send(gets)
    balancer.change(mss=MSS)
    assert balancer.send(asks) == expected


@both_families
@pytest.mark.parametrize("mss", [1, 536, MSS])
def test_a_lower_mss_stays(balancer: Balancer, family: Family, mss: int) -> None:
    balancer.serve(balancer.service(family, mode="dr", mss=MSS))
    frame = syn(family, options=[("MSS", mss)])
    assert balancer.send(frame) == sent_on(family, frame)


@both_families
@pytest.mark.parametrize("flags", ["SA", "A", "PA"])
def test_only_what_opens_a_connection_has_its_mss_lowered(balancer: Balancer, family: Family, flags: str) -> None:
    balancer.serve(balancer.service(family, mode="dr", mss=MSS))
    frame = syn(family, flags, options=[("MSS", 1460)])
    assert balancer.send(frame) == sent_on(family, frame)


def syn_with(options: bytes, payload: bytes = b"payload") -> bytes:
    """Options as they are written; as many of them as the header's length has are options."""
    plain = TCP(sport=packets.CLIENT_PORT, dport=packets.SERVICE_PORT, flags="S", dataofs=5 + len(options) // 4)
    return V4.request(plain / Raw(options + payload))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(b"", id="none"),
        pytest.param(b"\1" * 40, id="nothing but padding"),
        pytest.param(b"\0\0\0\0\2\4\5\xb4", id="behind the end"),
        pytest.param(b"\7\0\2\4\5\xb4\1\1", id="behind an option of length 0"),
        pytest.param(b"\7\1\2\4\5\xb4\1\1", id="behind an option of length 1"),
        pytest.param(b"\2\3\5\xb4", id="of length 3"),
        pytest.param(b"\2\6\5\xb4\0\0\0\0", id="of length 6"),
        pytest.param(b"\7\xff\2\4\5\xb4\1\1", id="behind an option longer than the header"),
    ],
)
def test_a_syn_without_a_readable_mss_stays_as_it_is(balancer: Balancer, options: bytes) -> None:
    balancer.serve(balancer.service(mode="dr", mss=MSS))
    frame = syn_with(options)
    assert balancer.send(frame) == sent_on(V4, frame)


def test_an_mss_that_reaches_into_the_payload_is_not_written_over(balancer: Balancer) -> None:
    balancer.serve(balancer.service(mode="dr", mss=MSS))
    frame = syn_with(b"\1\2\4\5", payload=b"\xb4ayload")
    assert balancer.send(frame) == sent_on(V4, frame)


def test_a_wrong_checksum_stays_as_wrong_when_the_mss_is_lowered(balancer: Balancer) -> None:
    balancer.serve(balancer.service(mode="dr", mss=MSS))
    lowered = balancer.send(syn(V4, options=[("MSS", 1460)])).frame
    wrong_by_one = syn(V4, options=[("MSS", 1460)])
    check = packets.ETHERNET_HEADER_SIZE + 20 + 16
    wrong = (int.from_bytes(wrong_by_one[check : check + 2], "big") + 1) % 0xFFFF
    outcome = balancer.send(wrong_by_one[:check] + wrong.to_bytes(2, "big") + wrong_by_one[check + 2 :])
    right = int.from_bytes(lowered[check : check + 2], "big")
    assert int.from_bytes(outcome.frame[check : check + 2], "big") == (right + 1) % 0xFFFF
