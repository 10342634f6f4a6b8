"""Words of the operator -> values, and what no value may be."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest

from lb.errors import AlreadyExists, InvalidInput, NotFound
from lb.model.options import Options, parse_network
from lb.model.state import Backend, Interface, Mode, OwnAddress, Service, State, XdpMode
from lb.model.vip import Protocol, Vip

WEB = Vip.parse("10.0.0.1:80/tcp")
WEB_NEAR = Vip.parse("10.0.0.1:80/tcp@near")


def service(*backends: str, vip: str = "10.0.0.1:80", mode: Mode = Mode.NAT) -> Service:
    return Service(Vip.parse(vip), mode, tuple(map(Backend.parse, backends)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("10.0.0.1:80/tcp", "10.0.0.1:80/tcp"),
        ("10.0.0.1:80", "10.0.0.1:80/tcp"),
        ("10.0.0.1:53/UDP", "10.0.0.1:53/udp"),
        ("10.0.0.1:0/tcp", "10.0.0.1:0/tcp"),
        ("[2001:db8::1]:443/tcp", "[2001:db8::1]:443/tcp"),
        ("[2001:0db8:0::1]:443", "[2001:db8::1]:443/tcp"),
    ],
)
def test_a_vip_is_said_as_it_is_written(text: str, said: str) -> None:
    assert str(Vip.parse(text)) == said
    assert Vip.parse(said) == Vip.parse(text)


@pytest.mark.parametrize(
    ("text", "said", "weight"),
    [
        ("10.0.0.11", "10.0.0.11:0", 1),
        ("10.0.0.11:8080", "10.0.0.11:8080", 1),
        ("10.0.0.11:8080@3", "10.0.0.11:8080", 3),
        ("10.0.0.11@0", "10.0.0.11:0", 0),
        ("2001:db8::11", "[2001:db8::11]:0", 1),
        ("[2001:db8::11]@65535", "[2001:db8::11]:0", 65535),
        ("[2001:db8::11]:80@2", "[2001:db8::11]:80", 2),
    ],
)
def test_a_backend_is_read_with_port_and_weight(text: str, said: str, weight: int) -> None:
    backend = Backend.parse(text)
    assert (str(backend), backend.weight) == (said, weight)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("10.0.0.1", "vip 10.0.0.1: a port is missing: write 10.0.0.1:80/tcp (port 0: any)"),
        ("2001:db8::1", "vip 2001:db8::1: a port is missing: write [2001:db8::1]:80/tcp"),
        ("10.0.0.256:80", "address 10.0.0.256: not an IPv4 or IPv6 address"),
        ("10.0.0.1:70000", "vip 10.0.0.1:70000: port 70000: not a number from 0 to 65535"),
        ("10.0.0.1:", "vip 10.0.0.1:: port (empty): not a number"),
        ("10.0.0.1:+80", "vip 10.0.0.1:+80: port +80: not a number"),
        ("10.0.0.1:80/sctp", "protocol sctp: unknown: use tcp or udp"),
        ("10.0.0.1:80/", "protocol : unknown"),
        ("[fe80::1%eth0]:80", "address fe80::1%eth0: zones are not supported"),
        ("127.0.0.1:80", "vip 127.0.0.1:80/tcp: not a unicast address"),
        ("0.0.0.0:80", "vip 0.0.0.0:80/tcp: not a unicast address"),
        ("224.0.0.1:80", "vip 224.0.0.1:80/tcp: not a unicast address"),
        ("", "address (empty): not an IPv4 or IPv6 address"),
        ("[2001:db8::1:80", "address [2001:db8::1:80: not an IPv4 or IPv6 address"),
    ],
)
def test_a_malformed_vip_is_refused_by_name(text: str, line: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Vip.parse(text)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("10.0.0.11@65536", "backend 10.0.0.11:0: weight 65536: out of range 0 to 65535"),
        ("10.0.0.11@-1", "backend 10.0.0.11@-1: weight -1: not a number from 0 to 65535"),
        ("10.0.0.11@", "backend 10.0.0.11@: weight (empty): not a number"),
        ("web1", "address web1: not an IPv4 or IPv6 address"),
        ("127.0.0.1", "backend 127.0.0.1:0: not a unicast address of another host"),
        ("10.0.0.11:http", "backend 10.0.0.11:http: port http: not a number"),
    ],
)
def test_a_malformed_backend_is_refused_by_name(text: str, line: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Backend.parse(text)
    assert str(caught.value).startswith(line)


def test_a_backend_without_a_port_has_the_port_of_its_service() -> None:
    assert [str(b) for b in service("10.0.0.11").backends] == ["10.0.0.11:80"]
    assert [str(b) for b in service("10.0.0.11", vip="10.0.0.1:0").backends] == ["10.0.0.11:0"]


def test_a_backend_is_found_with_and_without_the_port_of_its_service() -> None:
    web = service("10.0.0.11@3")
    assert web.backend(Backend.parse("10.0.0.11")).weight == 3
    assert web.backend(Backend.parse("10.0.0.11:80")).weight == 3
    with pytest.raises(NotFound, match=r"backend 10\.0\.0\.11:81: not in service 10\.0\.0\.1:80"):
        web.backend(Backend.parse("10.0.0.11:81"))


def test_the_same_backend_twice_is_refused_however_it_is_written() -> None:
    with pytest.raises(AlreadyExists, match=r"backend 10\.0\.0\.11:80: already in service"):
        service("10.0.0.11", "10.0.0.11:80@2")


def test_the_order_of_backends_does_not_matter() -> None:
    assert service("10.0.0.12", "10.0.0.11") == service("10.0.0.11", "10.0.0.12")


def test_mode_dr_takes_a_backend_without_a_port_and_refuses_another_port() -> None:
    assert service("10.0.0.11", "10.0.0.12:80", mode=Mode.DR)
    with pytest.raises(InvalidInput, match=r"mode dr does not translate ports: leave the port out or use 80"):
        service("10.0.0.11:8080", mode=Mode.DR)


@pytest.mark.parametrize("mode", [Mode.IPIP, Mode.GUE])
def test_a_tunnel_takes_backends_of_both_families(mode: Mode) -> None:
    assert [str(b) for b in service("2001:db8::11", "10.0.0.11", mode=mode).backends] == [
        "10.0.0.11:80",
        "[2001:db8::11]:80",
    ]
    assert service("10.0.0.11", vip="[2001:db8::1]:80", mode=mode)


def test_a_backend_of_a_range_has_no_port_of_its_own_but_in_nat() -> None:
    assert [str(b) for b in service("10.0.0.11", vip="10.0.0.1:80-90", mode=Mode.DR).backends] == ["10.0.0.11:0"]
    assert [str(b) for b in service("10.0.0.11:8080", vip="10.0.0.1:80-90").backends] == ["10.0.0.11:8080"]
    with pytest.raises(
        InvalidInput, match=r"backend 10\.0\.0\.11:80: mode dr does not translate ports: leave the port out$"
    ):
        service("10.0.0.11:80", vip="10.0.0.1:80-90", mode=Mode.DR)


def test_a_backend_within_the_prefix_of_the_vip_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"backend 10\.0\.0\.11:80: is the VIP's own address"):
        service("10.0.0.11", vip="10.0.0.0/24:80")
    assert service("10.0.1.11", vip="10.0.0.0/24:80")


PREFIX = parse_network("10.7.0.0/16")


@pytest.mark.parametrize(
    ("vip", "mode", "options", "line"),
    [
        ("10.0.0.1:80", Mode.IPIP, {"second_chance": True}, "second chance: needs mode gue"),
        ("10.0.0.1:80", Mode.IPIP, {"outer_checksum": True}, "outer checksum: needs mode gue"),
        ("10.0.0.1:80", Mode.DR, {"gue_port": 6081}, "gue port: needs mode gue"),
        ("10.0.0.1:80", Mode.NAT, {"tunnel_sources": (PREFIX,)}, "tunnel source: needs mode ipip or gue"),
        ("10.0.0.1:53/udp", Mode.NAT, {"mss": 1400}, "mss: needs a TCP service"),
        ("10.0.0.1:53/udp", Mode.NAT, {"syn_limit": 1}, "syn limit: needs a TCP service"),
        ("10.0.0.1:53/udp", Mode.NAT, {"syn_limit_of_source": 1}, "syn limit per source: needs a TCP service"),
        ("10.0.0.1:80@eu", Mode.NAT, {}, "sources: missing: a member set requires source prefixes"),
        ("[2001:db8::1]:80", Mode.NAT, {"sources": (PREFIX,)}, "sources: not all IPv6"),
        ("10.0.0.0/24:80", Mode.NAT, {"echo": True}, "echo: needs a VIP of one address"),
    ],
)
def test_an_option_that_the_service_cannot_have_is_refused(
    vip: str, mode: Mode, options: dict[str, Any], line: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        Service(Vip.parse(vip), mode, options=Options(**options))
    assert str(caught.value) == f"{Vip.parse(vip)}: {line}"


def test_every_mode_takes_the_options_that_suit_it() -> None:
    plain = Options(affinity_s=60, sources=(PREFIX,), syn_limit=1, syn_limit_of_source=1, mss=1400, echo=True)
    tunnel = replace(plain, tunnel_sources=(PREFIX,))
    gue = replace(tunnel, gue_port=6081, outer_checksum=True, second_chance=True)
    for mode, options in ((Mode.NAT, plain), (Mode.DR, plain), (Mode.IPIP, tunnel), (Mode.GUE, gue)):
        assert Service(WEB, mode, options=options).options == options


def quic(*backends: tuple[str, ...], vip: str = "10.0.0.1:443/udp") -> Service:
    """Each backend with what names it."""
    return Service(
        Vip.parse(vip),
        backends=tuple(replace(Backend.parse(text), server_ids=tuple(ids)) for text, *ids in backends),
    )


def test_server_ids_have_one_form_and_order() -> None:
    (backend,) = quic(("10.0.0.11", "1:0B0C", "0:aa", "0:AA")).backends
    assert backend.server_ids == ("0:aa", "1:0b0c")


def test_the_lengths_of_server_ids_are_those_of_their_config() -> None:
    assert quic(("10.0.0.11", "0:aa", "6:" + "0b" * 15), ("10.0.0.12", "0:ab")).quic_lengths == {0: 1, 6: 15}
    assert quic(("10.0.0.11",)).quic_lengths == {}


@pytest.mark.parametrize("text", ["", "aa", "7:aa", "0:", "0:a", "0:zz", "00:aa", "0:" + "aa" * 16, "0:aa ", "-1:aa"])
def test_what_is_no_server_id_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"^server id .*: not CONFIG:HEX: 0 to 6, a colon, 1 to 15 bytes in hex$"):
        replace(Backend.parse("10.0.0.11"), server_ids=(text,))


@pytest.mark.parametrize(
    ("backends", "vip", "line"),
    [
        (
            [("10.0.0.11", "0:aa")],
            "10.0.0.1:443/tcp",
            "backend 10.0.0.11:443: server id 0:aa: needs a UDP service",
        ),
        (
            [("10.0.0.11", "0:aa"), ("10.0.0.12", "0:AA")],
            "10.0.0.1:443/udp",
            "backend 10.0.0.12:443: server id 0:aa: already used by 10.0.0.11:443",
        ),
        (
            [("10.0.0.11", "0:aabb"), ("10.0.0.12", "0:aa")],
            "10.0.0.1:443/udp",
            "backend 10.0.0.11:443: server id 0:aabb: length differs from other IDs of config 0",
        ),
    ],
)
def test_server_ids_that_cannot_be_told_apart_are_refused(backends: list[tuple[str, ...]], vip: str, line: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        quic(*backends, vip=vip)
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("backend", "line"),
    [
        ("2001:db8::11", "mode nat needs an IPv4 backend for 10.0.0.1:80/tcp"),
        ("10.0.0.1", "is the VIP's own address"),
    ],
)
def test_a_backend_that_the_service_cannot_use_is_refused(backend: str, line: str) -> None:
    with pytest.raises(InvalidInput, match=line):
        service(backend)


@pytest.mark.parametrize(
    ("size", "line"),
    [
        (100, "ring size 100: out of range 251 to 131071"),
        (131073, "ring size 131073: out of range 251 to 131071"),
        (1000, "ring size 1000: not a prime: the nearest are 997 and 1009"),
    ],
)
def test_a_ring_size_that_maglev_cannot_use_is_refused(size: int, line: str) -> None:
    with pytest.raises(InvalidInput, match=line):
        Service(WEB, ring_size=size)


def test_a_ring_too_small_for_its_backends_is_refused() -> None:
    backends = tuple(Backend(ip_address(f"10.0.1.{n}")) for n in range(1, 27))
    with pytest.raises(InvalidInput, match="ring size 251: too small for 26 backends: at least 10"):
        Service(WEB, backends=backends, ring_size=251)


@pytest.mark.parametrize("seconds", [0, 7 * 86400 + 1])
def test_a_flow_timeout_out_of_range_is_refused(seconds: int) -> None:
    with pytest.raises(InvalidInput, match=f"flow timeout {seconds} s: out of range"):
        Service(WEB, flow_timeout_s=seconds)


def test_an_affinity_that_outlasts_the_memory_of_flows_is_refused() -> None:
    assert Service(WEB, flow_timeout_s=60, options=Options(affinity_s=60))
    with pytest.raises(InvalidInput, match=r"affinity 61 s: longer than the flow timeout, 60 s"):
        Service(WEB, flow_timeout_s=60, options=Options(affinity_s=61))


def test_a_draining_backend_has_no_share_of_the_ring() -> None:
    assert Backend(ip_address("10.0.0.11"), weight=3).ring_weight == 3
    assert Backend(ip_address("10.0.0.11"), weight=3, draining=True).ring_weight == 0


def test_a_changed_backend_leaves_the_others_as_they_are() -> None:
    heavier = service("10.0.0.11", "10.0.0.12").changing_backend(
        Backend.parse("10.0.0.12"), lambda b: Backend(b.address, b.port, 9)
    )
    assert heavier == service("10.0.0.11", "10.0.0.12@9")
    assert heavier.without_backend(Backend.parse("10.0.0.12")) == service("10.0.0.11")


def test_services_stand_in_the_order_of_their_vips() -> None:
    texts = ["[2001:db8::1]:80", "10.0.0.10:80", "10.0.0.9:443", "10.0.0.9:80", "10.0.0.9:80/udp"]
    state = State(tuple(service(vip=text) for text in texts))
    assert [str(s) for s in state.services] == [
        "10.0.0.9:80/tcp",
        "10.0.0.9:80/udp",
        "10.0.0.9:443/tcp",
        "10.0.0.10:80/tcp",
        "[2001:db8::1]:80/tcp",
    ]


def test_a_vip_is_served_once_per_protocol() -> None:
    state = State((service(),))
    assert state.with_service(service(vip="10.0.0.1:80/udp"))
    with pytest.raises(AlreadyExists, match=r"vip 10\.0\.0\.1:80/tcp: already exists"):
        state.with_service(service("10.0.0.11"))


def members(vip: str, *sources: str) -> Service:
    return Service(Vip.parse(vip), options=Options(sources=tuple(map(parse_network, sources))))


def test_a_set_needs_its_vip() -> None:
    near = members("10.0.0.1:80@near", "10.7.0.0/16")
    assert State((service(), near)).services == (service(), near)
    with pytest.raises(InvalidInput) as caught:
        State((near,))
    assert str(caught.value) == "vip 10.0.0.1:80/tcp@near: member set of 10.0.0.1:80/tcp, which does not exist"


def test_a_vip_that_has_sets_is_not_removed_before_them() -> None:
    state = State((service(), members("10.0.0.1:80@near", "10.7.0.0/16")))
    with pytest.raises(InvalidInput) as caught:
        state.without_service(WEB)
    assert str(caught.value) == "vip 10.0.0.1:80/tcp: has the member set 10.0.0.1:80/tcp@near: remove it first"
    assert state.without_service(WEB_NEAR).without_service(WEB) == State()


def test_two_sets_cannot_be_for_the_same_clients() -> None:
    near, far = members("10.0.0.1:80@near", "10.7.0.0/16"), members("10.0.0.1:80@far", "10.8.0.0/16", "10.7.0.0/16")
    with pytest.raises(InvalidInput) as caught:
        State((service(), near, far))
    assert str(caught.value) == "vip 10.0.0.1:80/tcp@near: source 10.7.0.0/16: already used by 10.0.0.1:80/tcp@far"
    assert State((service(), near, members("10.0.0.1:80@far", "10.7.3.0/24")))


@pytest.mark.parametrize(
    ("one", "other"),
    [("10.0.0.1:80-90", "10.0.0.1:85-95"), ("10.0.0.0/24:80-90", "10.0.0.0/24:90-99")],
)
def test_ranges_of_ports_do_not_cross(one: str, other: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        State((service(vip=one), service(vip=other)))
    assert str(caught.value) == f"vip {other}/tcp: port range overlaps {one}/tcp"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("10.0.0.1:80-90", "10.0.0.1:82-84"),
        ("10.0.0.1:80-90", "10.0.0.1:80-84"),
        ("10.0.0.1:80-90", "10.0.0.1:85"),
        ("10.0.0.1:80-90", "10.0.0.1:0"),
        ("10.0.0.1:80-90", "10.0.0.1:91-99"),
        ("10.0.0.1:80-90", "10.0.0.1:85-95/udp"),
        ("10.0.0.1:80-90", "10.0.0.0/24:85-95"),
    ],
)
def test_ranges_may_lie_in_one_another_and_beside(one: str, other: str) -> None:
    assert len(State((service(vip=one), service(vip=other))).services) == 2


def test_an_unknown_vip_is_refused_by_name() -> None:
    with pytest.raises(NotFound, match=r"vip 10\.0\.0\.1:80/tcp: no such service: see xdp-lb vip list"):
        State().service(WEB)


def test_an_interface_attached_again_keeps_its_place() -> None:
    state = State(interfaces=(Interface("eth0"), Interface("eth1")))
    again = state.with_interface(Interface("eth0", XdpMode.GENERIC))
    assert again.interfaces == (Interface("eth0", XdpMode.GENERIC), Interface("eth1"))
    assert again.without_interface("eth0").interfaces == (Interface("eth1"),)


def test_states_are_equal_whatever_the_order_of_own_addresses() -> None:
    own = [OwnAddress("eth0", ip_address(text)) for text in ("2001:db8::1", "10.0.0.9", "10.0.0.10")]
    assert State(own_addresses=tuple(own)) == State(own_addresses=tuple(reversed(own)))


def test_a_protocol_is_its_number_in_the_ip_header() -> None:
    assert (Protocol.parse("tcp"), Protocol.parse("UDP")) == (6, 17)
