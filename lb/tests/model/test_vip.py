"""Virtual addresses: what is written is what is said, and what is none of them is refused by one line."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lb.errors import InvalidInput
from lb.model.vip import Protocol, Vip

IPV4 = st.integers(1 << 24, (127 << 24) - 1).map(IPv4Address)
IPV6 = st.integers(0x2000 << 112, (0x4000 << 112) - 1).map(IPv6Address)
PORTS = st.one_of(
    st.just((0, 0)),
    st.lists(st.integers(1, 65535), min_size=2, max_size=2).map(lambda ports: (min(ports), max(ports))),
)
SETS = st.just("") | st.from_regex(r"[a-z][a-z0-9_.-]{0,38}", fullmatch=True)


@st.composite
def vips(draw: st.DrawFn) -> Vip:
    address = draw(IPV4 | IPV6)
    length = draw(st.integers(8, address.max_prefixlen))
    first = ip_network((address, length), strict=False).network_address
    port, last_port = draw(PORTS)
    return Vip(first, port, draw(st.sampled_from(Protocol)), last_port, length, draw(SETS))


@given(vips())
def test_a_vip_is_read_as_it_is_said(vip: Vip) -> None:
    assert Vip.parse(str(vip)) == vip
    assert hash(Vip.parse(str(vip))) == hash(vip)


@given(st.text(alphabet="0123456789abcdef.:/[]@-% tcpu", max_size=40) | st.text(max_size=20))
@example("10.0.0.1:" + "9" * 5000)
@example("10.0.0.0/" + "9" * 5000 + ":80")
def test_whatever_is_written_is_a_vip_or_one_line(text: str) -> None:
    try:
        vip = Vip.parse(text)
    except InvalidInput:
        return
    assert Vip.parse(str(vip)) == vip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("10.0.0.0/24:80", "10.0.0.0/24:80/tcp"),
        ("10.0.0.1/32:80", "10.0.0.1:80/tcp"),
        ("[2001:db8::/64]:80/udp", "[2001:db8::/64]:80/udp"),
        ("[2001:db8::]/64:80/udp", "[2001:db8::/64]:80/udp"),
        ("10.0.0.1:8000-8999", "10.0.0.1:8000-8999/tcp"),
        ("10.0.0.1:80-80", "10.0.0.1:80/tcp"),
        ("10.0.0.0/8:0/udp", "10.0.0.0/8:0/udp"),
        ("10.0.0.1:80@eu", "10.0.0.1:80/tcp@eu"),
        ("[2001:db8::/64]:8000-8999/udp@eu.west-1", "[2001:db8::/64]:8000-8999/udp@eu.west-1"),
    ],
)
def test_prefixes_ranges_and_sets_have_one_form(text: str, said: str) -> None:
    assert str(Vip.parse(text)) == said


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("10.0.0.0/33:80", "vip 10.0.0.0/33:80: prefix length 33: not from 1 to 32"),
        ("10.0.0.0/0:80", "vip 10.0.0.0/0:80: prefix length 0: not from 1 to 32"),
        ("[2001:db8::/129]:80", "vip [2001:db8::/129]:80: prefix length 129: not from 1 to 128"),
        ("10.0.0.1/24:80", "vip 10.0.0.1/24:80: prefix 10.0.0.1/24: has host bits set"),
        ("192.0.0.0/2:80", "vip 192.0.0.0/2:80/tcp: contains non-unicast addresses"),
        ("10.0.0.0/24", "vip 10.0.0.0/24: a port is missing: write 10.0.0.0/24:80/tcp (port 0: any)"),
        ("[2001:db8::/64]", "vip [2001:db8::/64]: a port is missing: write [2001:db8::/64]:80/tcp (port 0: any)"),
        ("10.0.0.1:90-80", "vip 10.0.0.1:90-80/tcp: ports 90-80: not a port range within 1 to 65535"),
        ("10.0.0.1:0-80", "vip 10.0.0.1:0-80/tcp: ports 0-80: not a port range within 1 to 65535"),
        ("10.0.0.1:80-", "vip 10.0.0.1:80-: port (empty): not a number from 0 to 65535"),
        ("10.0.0.1:80-65536", "vip 10.0.0.1:80-65536: port 65536: not a number from 0 to 65535"),
        ("10.0.0.1:80@", "vip 10.0.0.1:80@: not ADDR[/LENGTH]:PORT[-PORT][/PROTO][@SET]"),
        (
            "10.0.0.1:80@EU",
            "vip 10.0.0.1:80/tcp@EU: set EU: invalid name: use up to 39 of a-z, 0-9, _ . -, a letter first",
        ),
    ],
)
def test_a_malformed_vip_is_refused_by_name(text: str, line: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Vip.parse(text)
    assert str(caught.value) == line


def test_a_vip_knows_how_wide_it_is() -> None:
    one, ports, every, addresses = map(Vip.parse, ("10.0.0.1:80", "10.0.0.1:80-81", "10.0.0.1:0", "10.0.0.0/24:80"))
    assert [v.is_exact for v in (one, ports, every, addresses)] == [True, False, False, False]
    assert [v.is_one_address for v in (one, ports, every, addresses)] == [True, True, True, False]
    assert [v.fixed_port for v in (one, ports, every, addresses)] == [80, 0, 0, 80]
    assert [len(v.ports) for v in (one, ports, every, addresses)] == [1, 2, 65536, 1]
    assert addresses.network == ip_network("10.0.0.0/24")


def test_a_set_stands_behind_its_vip_and_knows_it() -> None:
    own, near, far = map(Vip.parse, ("10.0.0.1:80", "10.0.0.1:80@near", "10.0.0.1:80@far"))
    assert near.own == far.own == own.own == own
    assert sorted([near, far, own], key=lambda v: v.sort_key) == [own, far, near]


def test_a_vip_made_of_values_is_that_of_its_text() -> None:
    assert Vip(ip_address("10.0.0.1"), 80) == Vip.parse("10.0.0.1:80/tcp")
