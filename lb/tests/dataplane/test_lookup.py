"""The tables that lead to services, against a plain search through all VIPs."""

from __future__ import annotations

from ipaddress import IPv4Address, ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lb.dataplane.lookup import (
    NO_SERVICE,
    VIP_ADDRESS,
    Entries,
    NetworkKey,
    QuicKey,
    RangeKey,
    ServiceKey,
    SourceKey,
    entries,
    is_plain,
    port_blocks,
)
from lb.dataplane.members import member_key
from lb.errors import InvalidInput
from lb.model.options import Options
from lb.model.state import Backend, Mode, Service, State
from lb.model.vip import Address, Protocol, Vip

SMALL = 251


def service(vip: str, *backends: Backend, mode: Mode = Mode.NAT, **options: Any) -> Service:
    return Service(Vip.parse(vip), mode, backends, SMALL, options=Options(**options))


def tables(*services: Service) -> dict[str, Entries]:
    numbers = {each.vip: number for number, each in enumerate(services)}
    members = {
        each.vip: {member_key(backend): number for number, backend in enumerate(each.backends, start=1)}
        for each in services
    }
    return entries(services, numbers, members.__getitem__)


def longest(table: Entries, address: Address, version: int) -> int | None:
    """The network's length, as the trie finds it."""
    lengths = (key.prefix_length for key in table if isinstance(key, NetworkKey) and _is_in(address, key))
    return max(lengths, default=None)


def _is_in(address: Address, key: NetworkKey) -> bool:
    return address in ip_network((key.address, key.prefix_length))


def found(made: dict[str, Entries], address: Address, port: int, protocol: int) -> int | None:
    """What the programs find: exactly, else by the two tries."""
    version = address.version
    exact = made[f"services{version}"].get(ServiceKey(address, port, protocol))
    if exact is not None:
        return exact
    length = longest(made[f"networks{version}"], address, version)
    if length is None:
        return None
    network = ip_network((address, length), strict=False).network_address
    fixed = address.max_prefixlen + 16
    hits = {
        key.prefix_length: number
        for key, number in made[f"ranges{version}"].items()
        if isinstance(key, RangeKey)
        and (key.network, key.network_length, key.protocol) == (network, length, protocol)
        and key.port >> 16 - (key.prefix_length - fixed) == port >> 16 - (key.prefix_length - fixed)
    }
    return hits[max(hits)] if hits else None


def expected(vips: list[Vip], address: Address, port: int, protocol: int) -> Vip | None:
    """The longest prefix, in it the narrowest range."""
    fitting = [v for v in vips if address in v.network and port in v.ports and v.protocol == protocol]
    return min(fitting, key=lambda vip: (-vip.prefix_length, len(vip.ports)), default=None)


addresses = st.integers(0, 15).map(lambda low: IPv4Address(0x0A000000 + low))
few_ports = st.integers(1, 40)


@st.composite
def vips(draw: st.DrawFn) -> Vip:
    length = draw(st.sampled_from([28, 29, 30, 31, 32]))
    network = ip_network((draw(addresses), length), strict=False)
    first, last = sorted((draw(few_ports), draw(few_ports)))
    first, last = draw(st.sampled_from([(first, last), (first, first), (0, 0)]))
    return Vip(network.network_address, first, draw(st.sampled_from(list(Protocol))), last, length)


@settings(deadline=None)
@given(st.lists(vips(), max_size=8, unique=True), st.lists(st.tuples(addresses, few_ports), min_size=1, max_size=30))
def test_each_packet_finds_the_service_with_the_longest_prefix_and_then_the_narrowest_range(
    asked: list[Vip], packets: list[tuple[IPv4Address, int]]
) -> None:
    services = [Service(vip, ring_size=SMALL) for vip in asked]
    try:
        State(tuple(services))
    except InvalidInput:  # ranges that cross
        return
    made = tables(*services)
    for address, port in packets:
        for protocol in Protocol:
            number = found(made, address, port, protocol)
            assert (None if number is None else asked[number]) == expected(asked, address, port, protocol)


@settings(deadline=None)
@given(st.integers(0, 65535), st.integers(0, 65535))
def test_blocks_of_ports_make_up_the_range_and_nothing_else(one: int, other: int) -> None:
    ports = range(min(one, other), max(one, other) + 1)
    blocks = list(port_blocks(ports))
    covered = [port for first, length in blocks for port in range(first, first + (1 << 16 - length))]
    assert covered == list(ports)
    assert len(blocks) <= 30
    assert all(first % (1 << 16 - length) == 0 for first, length in blocks)


WEB = {ServiceKey(ip_address("10.0.0.1"), 80, 6): 0, ServiceKey(ip_address("10.0.0.1"), 0, 0): VIP_ADDRESS}


def test_a_plain_service_has_the_entries_of_its_vip_and_of_its_address() -> None:
    made = tables(service("10.0.0.1:80/tcp"))
    assert made.pop("services4") == WEB
    assert not any(made.values())


def test_a_set_is_found_by_its_sources_alone_under_the_number_of_its_vip() -> None:
    made = tables(
        service("10.0.0.1:80/tcp", sources=(ip_network("192.0.2.0/24"),)),
        service("10.0.0.1:80/tcp@eu", sources=(ip_network("192.0.2.0/24"), ip_network("198.51.100.0/25"))),
    )
    assert made["services4"] == WEB
    assert made["sources4"] == {
        SourceKey(32 + 24, 0, ip_address("192.0.2.0")): 1,
        SourceKey(32 + 25, 0, ip_address("198.51.100.0")): 1,
    }


def test_echo_and_server_ids_have_their_entries() -> None:
    backend = Backend(ip_address("10.0.0.11"), server_ids=("0:0a", "2:0b0c"))
    made = tables(service("10.0.0.1:443/udp", backend, echo=True))
    assert made["services4"][ServiceKey(ip_address("10.0.0.1"), 0, 1)] == NO_SERVICE
    assert made["quic_members"] == {QuicKey(0, 0, b"\x0a"): 1, QuicKey(0, 2, b"\x0b\x0c"): 1}


@pytest.mark.parametrize("options", [{"echo": True}, {"sources": (ip_network("192.0.2.0/24"),)}])
def test_a_service_with_more_than_the_entry_of_its_vip_is_not_plain(options: dict[str, Any]) -> None:
    assert is_plain(service("10.0.0.1:80/tcp", mss=1400))
    assert not is_plain(service("10.0.0.1:80/tcp", **options))
    assert not is_plain(service("10.0.0.0/24:80/tcp"))
