"""lb.toml -> services, or one line that names file, service and key."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

import pytest

from lb.errors import InvalidInput
from lb.formats import config
from lb.model.health_check import HealthCheck
from lb.model.options import Options, parse_network
from lb.model.state import Backend, Mode, Service
from lb.model.vip import Vip

WHOLE = """
[[service]]
vip = "10.0.0.2:443/tcp"
mode = "dr"
ring_size = 65537
flow_timeout = 60
backends = ["10.0.0.11"]

[[service]]
vip = "10.0.0.1:80"
backends = [
    "10.0.0.11",
    "10.0.0.12:8080@3",
    {address = "10.0.0.13:80", weight = 2, drain = true},
]
"""


def backend(address: str, port: int, weight: int = 1, draining: bool = False) -> Backend:
    return Backend(ip_address(address), port, weight, draining)


def test_every_key_is_read_and_every_default_filled_in() -> None:
    assert config.parse(WHOLE).services == (
        Service(
            Vip.parse("10.0.0.2:443/tcp"),
            Mode.DR,
            (backend("10.0.0.11", 443),),
            ring_size=65537,
            flow_timeout_s=60,
        ),
        Service(
            Vip.parse("10.0.0.1:80/tcp"),
            Mode.NAT,
            (
                backend("10.0.0.11", 80),
                backend("10.0.0.12", 8080, 3),
                backend("10.0.0.13", 80, 2, draining=True),
            ),
            ring_size=16381,
            flow_timeout_s=3600,
        ),
    )


def test_every_option_is_read() -> None:
    (service,) = config.parse("""
[[service]]
vip = "10.0.0.1:443"
mode = "gue"
affinity = 300
sources = ["10.0.0.0/8", "192.0.2.7"]
syn_limit = 1000
syn_limit_of_source = 10
mss = 1400
echo = true
tunnel_source = ["198.18.0.0/16", "2001:db8:1::/64"]
gue_port = 6081
outer_checksum = true
second_chance = true
health = "http /healthz interval=1s"
slow_start = 30
fail_closed = true
vip_address = false
""").services
    assert service.mode is Mode.GUE
    assert service.options == Options(
        affinity_s=300,
        sources=(parse_network("10.0.0.0/8"), parse_network("192.0.2.7/32")),
        syn_limit=1000,
        syn_limit_of_source=10,
        mss=1400,
        echo=True,
        tunnel_sources=(parse_network("198.18.0.0/16"), parse_network("2001:db8:1::/64")),
        gue_port=6081,
        outer_checksum=True,
        second_chance=True,
        health=HealthCheck.parse("http /healthz interval=1s"),
        slow_start_s=30,
        fail_closed=True,
        vip_address=False,
    )


def test_server_ids_are_read_of_a_backend_with_a_table() -> None:
    (service,) = config.parse(
        '[[service]]\nvip = "10.0.0.1:443/udp"\n'
        'backends = [{address = "10.0.0.11", server_ids = ["1:0A0B", "0:0a"]}, "10.0.0.12"]'
    ).services
    assert [b.server_ids for b in service.backends] == [("0:0a", "1:0a0b"), ()]


def test_a_set_is_a_service_beside_that_of_its_vip() -> None:
    own, members = config.parse(
        '[[service]]\nvip = "10.0.0.0/24:8000-8999"\n'
        '[[service]]\nvip = "10.0.0.0/24:8000-8999@eu"\nmode = "ipip"\nsources = ["10.7.0.0/16"]'
    ).services
    assert (members.vip.own, members.vip.set, members.mode) == (own.vip, "eu", Mode.IPIP)


def test_weights_and_drains_that_the_file_gives_are_known() -> None:
    vip = Vip.parse("10.0.0.1:80")
    given = config.parse(
        """
[[service]]
vip = "10.0.0.1:80"
backends = [
    "10.0.0.11",
    "10.0.0.12:8080@1",
    {address = "10.0.0.13", weight = 1},
    {address = "10.0.0.14@2", drain = false},
    {address = "10.0.0.15"},
]
"""
    ).given
    assert {name: set(keys) for (of, name), keys in given.items() if of == vip} == {
        "10.0.0.11:80": set(),
        "10.0.0.12:8080": {"weight"},
        "10.0.0.13:80": {"weight"},
        "10.0.0.14:80": {"weight", "draining"},
        "10.0.0.15:80": set(),
    }


def test_an_empty_file_asks_for_nothing() -> None:
    assert config.parse("").services == ()


SERVICE = '[[service]]\nvip = "10.0.0.1:80"\n'
HERE = "lb.toml: service 10.0.0.1:80/tcp"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("vip = ", "lb.toml: not valid TOML: Invalid value (at end of document)"),
        ("[[services]]", "lb.toml: services: unknown key: known keys are service"),
        ("service = 3", "lb.toml: service: not a list of tables: write [[service]]"),
        ("[service]", "lb.toml: service: not a list of tables: write [[service]]"),
        ("service = [3]", "lb.toml: service: not a list of tables: write [[service]]"),
        ("[[service]]", "lb.toml: service: vip: missing"),
        (
            "[[service]]\nvip = 3",
            "lb.toml: service: vip: expected a string, got a whole number",
        ),
        (
            '[[service]]\nvip = "10.0.0.1"',
            "lb.toml: service: vip 10.0.0.1: a port is missing: write 10.0.0.1:80/tcp (port 0: any)",
        ),
        (
            SERVICE + "ring = 251",
            f"{HERE}: ring: unknown key: known keys are vip, mode, ring_size, flow_timeout, affinity, sources,"
            " syn_limit, syn_limit_of_source, mss, echo, tunnel_source, gue_port, outer_checksum, second_chance,"
            " health, slow_start, fail_closed, vip_address, backends",
        ),
        (SERVICE + 'mode = "tun"', f"{HERE}: mode tun: unknown: use nat, dr, ipip or gue"),
        (SERVICE + "mode = true", f"{HERE}: mode: expected a string, got true or false"),
        (
            SERVICE + "ring_size = 1000",
            f"{HERE}: ring size 1000: not a prime: the nearest are 997 and 1009",
        ),
        (
            SERVICE + "ring_size = true",
            f"{HERE}: ring_size: expected a whole number, got true or false",
        ),
        (
            SERVICE + "flow_timeout = 1.5",
            f"{HERE}: flow_timeout: expected a whole number, got a number with a fraction",
        ),
        (
            SERVICE + "flow_timeout = 2020-01-01",
            f"{HERE}: flow_timeout: expected a whole number, got a date or time",
        ),
        (
            SERVICE + 'backends = "10.0.0.11"',
            f"{HERE}: backends: expected a list, got a string",
        ),
        (
            SERVICE + "backends = [11]",
            f"{HERE}: backends: expected a string or a table, got a whole number",
        ),
        (
            SERVICE + 'backends = ["web1"]',
            f"{HERE}: address web1: not an IPv4 or IPv6 address",
        ),
        (
            SERVICE + 'backends = ["10.0.0.11", "10.0.0.11:80"]',
            f"{HERE}: backend 10.0.0.11:80: already in service 10.0.0.1:80/tcp",
        ),
        (SERVICE + "backends = [{weight = 2}]", f"{HERE}: backend: address: missing"),
        (
            SERVICE + 'backends = [{address = "10.0.0.11", weigth = 2}]',
            f"{HERE}: backend 10.0.0.11: weigth: unknown key: known keys are address, weight, drain, server_ids",
        ),
        (
            SERVICE + 'backends = [{address = "10.0.0.11", drain = 1}]',
            f"{HERE}: backend 10.0.0.11: drain: expected true or false, got a whole number",
        ),
        (
            SERVICE + 'backends = [{address = "10.0.0.11", weight = -1}]',
            f"{HERE}: backend 10.0.0.11:0: weight -1: out of range 0 to 65535",
        ),
        (
            SERVICE + 'backends = [{address = "10.0.0.11@2", weight = 3}]',
            f"{HERE}: backend 10.0.0.11@2: weight: given twice: leave one of them out",
        ),
        (SERVICE + "affinity = true", f"{HERE}: affinity: expected a whole number, got true or false"),
        (SERVICE + "affinity = -1", f"{HERE}: affinity -1: out of range 1 to 604800"),
        (
            SERVICE + "affinity_s = 1",
            f"{HERE}: affinity_s: unknown key: known keys are {', '.join(config.SERVICE_KEYS)}",
        ),
        (SERVICE + 'sources = "10.0.0.0/8"', f"{HERE}: sources: expected a list, got a string"),
        (SERVICE + "sources = [10]", f"{HERE}: sources: expected a string, got a whole number"),
        (
            SERVICE + 'sources = ["10.0.0.1/8"]',
            f"{HERE}: sources: prefix 10.0.0.1/8: has host bits set: write 10.0.0.0/8",
        ),
        (SERVICE + 'sources = ["2001:db8::/32"]', f"{HERE}: sources: not all IPv4"),
        (SERVICE + "syn_limit = 1_000_000_001", f"{HERE}: syn limit 1000000001: out of range 1 to 1000000000"),
        (SERVICE + "syn_limit_of_source = -1", f"{HERE}: syn limit per source -1: out of range 1 to 1000000000"),
        (SERVICE + "mss = 87", f"{HERE}: mss 87: out of range 88 to 65495"),
        (SERVICE + "echo = 1", f"{HERE}: echo: expected true or false, got a whole number"),
        (
            SERVICE + 'mode = "dr"\ntunnel_source = ["198.18.0.0/16"]',
            f"{HERE}: tunnel source: needs mode ipip or gue",
        ),
        (SERVICE + 'tunnel_source = ["lo"]', f"{HERE}: tunnel_source: prefix lo: not an IPv4 or IPv6 prefix"),
        (SERVICE + 'tunnel_source = ["192.0.0.0/2"]', f"{HERE}: tunnel source 192.0.0.0/2: not unicast"),
        (
            SERVICE + 'tunnel_source = ["198.18.0.0/16", "198.19.0.0/16"]',
            f"{HERE}: tunnel source: two prefixes of one address family: give one per family",
        ),
        (SERVICE + "gue_port = 0", f"{HERE}: gue port 0: out of range 1 to 65535"),
        (SERVICE + 'mode = "ipip"\ngue_port = 6081', f"{HERE}: gue port: needs mode gue"),
        (SERVICE + "outer_checksum = true", f"{HERE}: outer checksum: needs mode gue"),
        (SERVICE + 'health = "ping"', f"{HERE}: health check ping: unknown: use tcp, http, https, udp or script"),
        (SERVICE + "second_chance = true", f"{HERE}: second chance: needs mode gue"),
        (
            SERVICE + 'backends = [{address = "10.0.0.11", server_ids = "0:aa"}]',
            f"{HERE}: backend 10.0.0.11: server_ids: expected a list, got a string",
        ),
        (
            SERVICE + 'backends = [{address = "10.0.0.11", server_ids = ["7:aa"]}]',
            f"{HERE}: server id 7:aa: not CONFIG:HEX: 0 to 6, a colon, 1 to 15 bytes in hex",
        ),
        (
            SERVICE + 'backends = [{address = "10.0.0.11", server_ids = ["0:aa"]}]',
            f"{HERE}: backend 10.0.0.11:80: server id 0:aa: needs a UDP service",
        ),
        (
            '[[service]]\nvip = "10.0.0.1:80@eu"',
            "lb.toml: service 10.0.0.1:80/tcp@eu: sources: missing: a member set requires source prefixes",
        ),
        (SERVICE + SERVICE, f"{HERE}: vip: given twice"),
    ],
)
def test_a_mistake_is_named_with_file_service_and_key(text: str, line: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        config.parse(text)
    assert str(caught.value) == line


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"missing\.toml: No such file or directory"):
        config.read(tmp_path / "missing.toml")
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9")
    with pytest.raises(InvalidInput, match=r"latin\.toml: not UTF-8 text"):
        config.read(tmp_path / "latin.toml")


def test_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "lb.toml").write_text(WHOLE)
    assert config.read(tmp_path / "lb.toml") == config.parse(WHOLE)
