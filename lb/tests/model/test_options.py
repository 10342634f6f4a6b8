"""What a service may ask for: values that make sense, and their way through JSON and back."""

from __future__ import annotations

import json
from ipaddress import ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lb.errors import InvalidInput
from lb.formats import option_text
from lb.model.health_check import HealthCheck
from lb.model.options import DEFAULTS, FIELDS, Options, changed_values, from_values, parse_network, values

RATES = st.integers(0, 1_000_000_000)
PREFIXES = st.one_of(
    st.builds(
        lambda n, bits: ip_network((n >> bits << bits, 32 - bits)), st.integers(0, 2**32 - 1), st.integers(0, 31)
    ),
    st.builds(
        lambda n, bits: ip_network((n >> bits << bits, 128 - bits)), st.integers(2**96, 2**128 - 1), st.integers(0, 64)
    ),
)
CHECKS = st.sampled_from(
    ["tcp", "http /healthz interval=1s", "udp send=0x00ff expect=pong", "script timeout=5s /bin/true a=b"]
).map(HealthCheck.parse)
EACH = st.builds(
    Options,
    affinity_s=st.integers(0, 7 * 86400),
    sources=st.lists(PREFIXES, max_size=4).map(tuple),
    syn_limit=RATES,
    syn_limit_of_source=RATES,
    mss=st.just(0) | st.integers(88, 65495),
    echo=st.booleans(),
    tunnel_sources=st.sampled_from([(), ("198.18.0.0/16",), ("2001:db8::/64",), ("198.18.0.0/16", "fd00::/96")]).map(
        lambda texts: tuple(map(ip_network, texts))
    ),
    gue_port=st.integers(1, 65535),
    outer_checksum=st.booleans(),
    second_chance=st.booleans(),
    health=st.none() | CHECKS,
    slow_start_s=st.integers(0, 3600),
    fail_closed=st.booleans(),
    vip_address=st.booleans(),
)


@given(EACH)
def test_options_are_the_same_after_json(options: Options) -> None:
    assert from_values(json.loads(json.dumps(values(options)))) == options
    assert from_values(json.loads(json.dumps(changed_values(options)))) == options


@given(EACH)
def test_what_is_not_named_is_the_default(options: Options) -> None:
    named = changed_values(options)
    assert all(getattr(options, field) == getattr(DEFAULTS, field) for field in FIELDS if field not in named)
    assert len(option_text.phrases(options)) == len(named)


def test_the_keys_in_json_are_these() -> None:
    assert values(Options(sources=(parse_network("10.0.0.0/8"),))) == {
        "affinity_s": 0,
        "sources": ["10.0.0.0/8"],
        "syn_limit": 0,
        "syn_limit_of_source": 0,
        "mss": 0,
        "echo": False,
        "tunnel_sources": [],
        "gue_port": 6080,
        "outer_checksum": False,
        "second_chance": False,
        "health": "",
        "slow_start_s": 0,
        "fail_closed": False,
        "vip_address": True,
    }
    assert changed_values(DEFAULTS) == {}


def test_the_order_of_prefixes_does_not_matter_nor_that_one_is_repeated() -> None:
    texts = ("192.0.2.0/24", "2001:db8::/32", "10.0.0.0/8", "10.0.0.0/16", "10.0.0.0/8")
    prefixes = tuple(map(parse_network, texts))
    assert Options(sources=prefixes) == Options(sources=prefixes[::-1])
    assert [str(prefix) for prefix in Options(sources=prefixes).sources] == [
        "10.0.0.0/8",
        "10.0.0.0/16",
        "192.0.2.0/24",
        "2001:db8::/32",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "prefix (empty): not an IPv4 or IPv6 prefix"),
        ("web", "prefix web: not an IPv4 or IPv6 prefix"),
        ("10.0.0.0/33", "prefix 10.0.0.0/33: not an IPv4 or IPv6 prefix"),
        ("10.0.0.1/8", "prefix 10.0.0.1/8: has host bits set: write 10.0.0.0/8"),
        ("2001:db8::1/32", "prefix 2001:db8::1/32: has host bits set: write 2001:db8::/32"),
    ],
)
def test_what_is_no_prefix_is_named(text: str, line: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_network(text)
    assert str(caught.value) == line


def test_an_address_is_a_prefix_of_one() -> None:
    assert parse_network("192.0.2.7") == ip_network("192.0.2.7/32")


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"affinity_s": -1}, "affinity -1: out of range 1 to 604800"),
        ({"affinity_s": 604801}, "affinity 604801: out of range 1 to 604800"),
        ({"syn_limit": -5}, "syn limit -5: out of range 1 to 1000000000"),
        ({"syn_limit_of_source": 10**9 + 1}, "syn limit per source 1000000001: out of range 1 to 1000000000"),
        ({"mss": 87}, "mss 87: out of range 88 to 65495"),
        ({"mss": 65496}, "mss 65496: out of range 88 to 65495"),
        ({"gue_port": 0}, "gue port 0: out of range 1 to 65535"),
        ({"gue_port": 65536}, "gue port 65536: out of range 1 to 65535"),
        ({"tunnel_sources": ("0.0.0.0/0",)}, "tunnel source 0.0.0.0/0: not unicast"),
        ({"tunnel_sources": ("127.0.0.0/16",)}, "tunnel source 127.0.0.0/16: not unicast"),
        ({"tunnel_sources": ("239.0.0.0/8",)}, "tunnel source 239.0.0.0/8: not unicast"),
        ({"tunnel_sources": ("255.255.255.255/32",)}, "tunnel source 255.255.255.255/32: not unicast"),
        ({"tunnel_sources": ("::1/128",)}, "tunnel source ::1/128: not unicast"),
        ({"tunnel_sources": ("ff02::/16",)}, "tunnel source ff02::/16: not unicast"),
        (
            {"tunnel_sources": ("198.18.0.0/16", "198.19.0.0/16")},
            "tunnel source: two prefixes of one address family: give one per family",
        ),
        ({"shoe_size": 47}, "option shoe_size: unknown"),
    ],
)
def test_a_value_that_makes_no_sense_is_named(wrong: dict[str, Any], line: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        from_values(wrong)
    assert str(caught.value) == line


def test_the_tunnel_source_is_that_of_the_outer_family() -> None:
    four, six = parse_network("198.18.0.0/16"), parse_network("2001:db8::/64")
    assert [Options(tunnel_sources=(six, four)).tunnel_source(version) for version in (4, 6)] == [four, six]
    assert Options(tunnel_sources=(six,)).tunnel_source(4) is None


def test_only_what_is_not_the_default_is_worth_a_word() -> None:
    assert option_text.phrases(DEFAULTS) == []
    options = Options(affinity_s=300, syn_limit=1000, mss=1400, echo=True, sources=(parse_network("10.0.0.0/8"),))
    assert option_text.phrases(options) == [
        "affinity 300 s",
        "sources 10.0.0.0/8",
        "syn limit 1000/s",
        "mss 1400",
        "echo on",
    ]


def test_what_turned_into_what_is_told() -> None:
    before = Options(affinity_s=300, tunnel_sources=(parse_network("198.18.0.0/16"),), second_chance=True)
    after = Options(mss=1400, gue_port=6081, sources=(parse_network("10.0.0.0/8"), parse_network("192.0.2.0/24")))
    assert option_text.turns(before, after) == [
        "affinity 300 s -> off",
        "sources any -> 10.0.0.0/8 192.0.2.0/24",
        "mss off -> 1400",
        "tunnel source 198.18.0.0/16 -> own",
        "gue port 6080 -> 6081",
        "second chance on -> off",
    ]
    assert option_text.turns(after, after) == []
