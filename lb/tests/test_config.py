"""lb.toml -> services, or one line that names file, service and key."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

import pytest

from lb import config
from lb.errors import InvalidInput
from lb.model import Backend, Mode, Service, Vip

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
    assert config.parse(WHOLE) == [
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
    ]


def test_an_empty_file_asks_for_nothing() -> None:
    assert config.parse("") == []


SERVICE = '[[service]]\nvip = "10.0.0.1:80"\n'
HERE = "lb.toml: service 10.0.0.1:80/tcp"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("vip = ", "lb.toml: not valid TOML: Invalid value (at end of document)"),
        ("[[services]]", "lb.toml: services: no such key: there are service"),
        ("service = 3", "lb.toml: service: not a list of tables: write [[service]]"),
        ("[service]", "lb.toml: service: not a list of tables: write [[service]]"),
        ("service = [3]", "lb.toml: service: not a list of tables: write [[service]]"),
        ("[[service]]", "lb.toml: service: vip: missing"),
        (
            "[[service]]\nvip = 3",
            "lb.toml: service: vip: a whole number where a string is expected",
        ),
        (
            '[[service]]\nvip = "10.0.0.1"',
            "lb.toml: service: vip 10.0.0.1: a port is missing: write 10.0.0.1:80/tcp (port 0: any)",
        ),
        (
            SERVICE + "ring = 251",
            f"{HERE}: ring: no such key: there are vip, mode, ring_size, flow_timeout, backends",
        ),
        (SERVICE + 'mode = "tun"', f"{HERE}: mode tun: not known: use nat or dr"),
        (SERVICE + "mode = true", f"{HERE}: mode: true or false where a string is expected"),
        (
            SERVICE + "ring_size = 1000",
            f"{HERE}: ring size 1000: not a prime: the nearest are 997 and 1009",
        ),
        (
            SERVICE + "ring_size = true",
            f"{HERE}: ring_size: true or false where a whole number is expected",
        ),
        (
            SERVICE + "flow_timeout = 1.5",
            f"{HERE}: flow_timeout: a number with a fraction where a whole number is expected",
        ),
        (
            SERVICE + "flow_timeout = 2020-01-01",
            f"{HERE}: flow_timeout: a date or time where a whole number is expected",
        ),
        (
            SERVICE + 'backends = "10.0.0.11"',
            f"{HERE}: backends: a string where a list is expected",
        ),
        (
            SERVICE + "backends = [11]",
            f"{HERE}: backends: a whole number where a string or a table is expected",
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
            f"{HERE}: backend 10.0.0.11: weigth: no such key: there are address, weight, drain",
        ),
        (
            SERVICE + 'backends = [{address = "10.0.0.11", drain = 1}]',
            f"{HERE}: backend 10.0.0.11: drain: a whole number where true or false is expected",
        ),
        (
            SERVICE + 'backends = [{address = "10.0.0.11", weight = -1}]',
            f"{HERE}: backend 10.0.0.11:0: weight -1: out of range 0 to 65535",
        ),
        (
            SERVICE + 'backends = [{address = "10.0.0.11@2", weight = 3}]',
            f"{HERE}: backend 10.0.0.11@2: weight: given twice: leave one of them out",
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
    with pytest.raises(InvalidInput, match=r"latin\.toml: not a text in UTF-8"):
        config.read(tmp_path / "latin.toml")


def test_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "lb.toml").write_text(WHOLE)
    assert config.read(tmp_path / "lb.toml") == config.parse(WHOLE)
