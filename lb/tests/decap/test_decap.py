"""What decapsulation may be configured to do: words in, networks or one line of refusal out."""

from __future__ import annotations

import pytest

from lb.decap.values import DecapConfig, prefix_text
from lb.errors import InvalidInput
from lb.model.options import parse_network


def config(*destinations: str, gue_port: int = 6080) -> DecapConfig:
    return DecapConfig(tuple(parse_network(text, "vip") for text in destinations), (), gue_port)


@pytest.mark.parametrize("text", ["10.0.0.1", "10.0.0.0/24", "2001:db8::1", "2001:db8::/64"])
def test_prefix_is_written_as_it_was_given(text: str) -> None:
    assert prefix_text(parse_network(text, "vip")) == text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "vip (empty): not an IPv4 or IPv6 prefix"),
        ("10.0.0", "vip 10.0.0: not an IPv4 or IPv6 prefix"),
        ("10.0.0.1:80", "vip 10.0.0.1:80: not an IPv4 or IPv6 prefix"),
        ("10.0.0.1/33", "vip 10.0.0.1/33: not an IPv4 or IPv6 prefix"),
        ("10.0.0.1/24", "vip 10.0.0.1/24: has host bits set: write 10.0.0.0/24"),
        ("2001:db8::1/64", "vip 2001:db8::1/64: has host bits set: write 2001:db8::/64"),
        ("127.0.0.1", "vip 127.0.0.1: not a valid VIP: use an address that clients connect to"),
        ("224.0.0.0/8", "vip 224.0.0.0/8: not a valid VIP: use an address that clients connect to"),
        ("0.0.0.0/0", "vip 0.0.0.0/0: not a valid VIP: use an address that clients connect to"),
        ("::/0", "vip ::/0: not a valid VIP: use an address that clients connect to"),
        ("::1", "vip ::1: not a valid VIP: use an address that clients connect to"),
    ],
)
def test_what_cannot_be_a_vip_is_refused_in_one_line(text: str, why: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        config(text)
    assert str(refusal.value) == why


@pytest.mark.parametrize("port", [-1, 0, 65536])
def test_port_of_gue_is_a_port(port: int) -> None:
    with pytest.raises(InvalidInput, match=f"gue port {port}: out of range 1 to 65535"):
        config("10.0.0.1", gue_port=port)


@pytest.mark.parametrize(
    ("destinations", "several"),
    [
        (["10.0.0.1"], False),
        (["10.0.0.1", "2001:db8::1"], False),
        (["10.0.0.1", "10.0.0.2"], True),
        (["2001:db8::1", "10.0.0.1", "2001:db8::2"], True),
        (["10.0.0.0/31"], True),
        (["10.0.0.1", "2001:db8::/127"], True),
    ],
)
def test_one_address_of_each_family_is_not_several(destinations: list[str], several: bool) -> None:
    assert config(*destinations).has_several_destinations is several
