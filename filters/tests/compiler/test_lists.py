"""Long lists in expressions: a search answers as libpcap's comparisons do, and what is no list stays as it is."""

from __future__ import annotations

import struct
from functools import cache
from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.compiler import cbpf, lists
from filters.compiler.cbpf import Instruction
from filters.compiler.expr import compile_expression
from filters.compiler.hook import TC_IN, XDP_FRAGS, Hook
from filters.errors import ExpressionError
from filters.selftest.selftest import check
from filters.tests.libpcap import bpf_filter
from filters.tests.strategies import FUZZ


def hosts(words: str, count: int = 20, first: int = 0) -> str:
    return " or ".join(f"{words} 10.0.{n // 16}.{n % 16}" for n in range(first, first + count))


def ports(words: str, count: int = 20, first: int = 1) -> str:
    return " or ".join(f"{words} {first + 3 * n}" for n in range(count))


LISTS = [
    hosts("src host"),
    hosts("host", 200),
    hosts("src"),
    hosts("ip dst host"),
    ports("port"),
    ports("tcp dst port"),
    "port " + " or ".join(str(3 * n + 1) for n in range(20)),
    " or ".join(f"net 10.0.{n}.0/24" for n in range(1, 90, 5)),
    " or ".join(f"src net 10.0.{n // 16}.{n % 16 & ~3}/{30 + n % 3}" for n in range(60)),
    " or ".join(f"dst net 10.0.{n}" for n in range(0, 44, 2)),
    f"{hosts('src')} || {hosts('dst')}",
    f"{hosts('src host')} or {ports('udp port')} or icmp",
    f"tcp and ({hosts('src host')} or {ports('dst port')}) and not ({hosts('dst host', first=8)})",
    f"not ({hosts('host')}) and udp",
    f"({hosts('host')}) or tcp[13] & (tcp-syn|tcp-ack) != 0",
    f"vlan 5 and ({hosts('host')})",
]
LISTS_NEXT_TO_WORDS_THAT_BIND = [
    f"udp and {hosts('src host')}",  # from the left: (udp and the first) or the others
    f"not {hosts('src host')}",
    f"{hosts('src host')} and udp or {hosts('dst host')}",
    f"{hosts('host')} or 10.0.9.9",
    f"{ports('port', 15)} or 6000 and tcp",
]
NO_LISTS = [
    hosts("host", 10),
    " or ".join(f"ip6 host 2001:db8::{n:x}" for n in range(20)),
    " or ".join(f"ip proto {n}" for n in range(1, 20)),
    f"{hosts('src or dst host')}",
]

ADDRESSES = st.integers(0, 700).map(lambda n: (10 << 24) + (n // 16 << 8) + n % 16)
PORTS = st.integers(1, 70)


@FUZZ
@given(
    expression=st.sampled_from(LISTS + LISTS_NEXT_TO_WORDS_THAT_BIND + NO_LISTS),
    ethertype=st.sampled_from([0x0800, 0x0800, 0x0800, 0x0806, 0x86DD]),
    ends=st.tuples(ADDRESSES, ADDRESSES),
    protocol=st.sampled_from([6, 17, 1]),
    port_pair=st.tuples(PORTS, PORTS),
    tagged=st.booleans(),
)
def test_list_accepts_what_libpcap_accepts(
    expression: str, ethertype: int, ends: tuple[int, int], protocol: int, port_pair: tuple[int, int], tagged: bool
) -> None:
    tcp = struct.pack(">HH", *port_pair) + bytes(9) + b"\x02" + bytes(8)
    ip = struct.pack(">BBHHHBBHII", 0x45, 0, 40, 1, 0, 64, protocol, 0, *ends) + tcp
    tag = struct.pack(">HH", 0x8100, 5) if tagged else b""
    frame = bytes(12) + tag + struct.pack(">H", ethertype) + ip
    assert bpf_filter(searching(expression), frame) == bpf_filter(plain(expression), frame)


@cache
def searching(expression: str) -> tuple[Instruction, ...]:
    return compile_expression(expression)


@cache
def plain(expression: str) -> tuple[Instruction, ...]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lists, "SHORTEST", 1 << 20)
        return compile_expression(expression)


@pytest.mark.parametrize("expression", LISTS)
def test_list_becomes_a_search_that_the_kernel_can_hold(expression: str) -> None:
    instructions = compile_expression(expression)
    assert instructions != plain(expression)
    assert cbpf.decode(cbpf.encode(instructions)) == instructions
    cbpf.check(instructions, 1 << 16)


@pytest.mark.parametrize("expression", NO_LISTS)
def test_what_is_no_list_is_compiled_as_it_stands(expression: str) -> None:
    assert compile_expression(expression) == plain(expression)


@pytest.mark.parametrize("hook", [XDP_FRAGS, TC_IN], ids=str)
@pytest.mark.parametrize("expression", LISTS)
def test_search_is_translated(expression: str, hook: Hook) -> None:
    check(compile_expression(expression), hook)


@pytest.mark.parametrize(
    "expression",
    [
        " or ".join(f"src host 10.{n >> 8}.{n & 255}.7" for n in range(3000)),
        " or ".join(f"port {20 * n + 1}" for n in range(3000)),
        " or ".join(f"net 10.{n >> 8}.{n & 255}.0/24" for n in range(3000)),
    ],
    ids=["hosts", "ports", "nets"],
)
def test_3000_terms_are_one_filter(expression: str) -> None:
    check(compile_expression(expression), XDP_FRAGS)


@pytest.mark.parametrize("wrong", ["src host 10.0.0.256", "net 10.0.0.1/24", "port 70000", "host 10.0.0.0/24"])
def test_term_that_libpcap_refuses_is_refused_in_a_list(wrong: str) -> None:
    with pytest.raises(ExpressionError):
        compile_expression(f"{hosts('src host')} or {wrong} or {hosts('src host')}")


def test_values_that_stand_for_lists_differ_from_each_other() -> None:
    made = [lists._List("src net", f"/{length}") for length in (8, 8, 16, 24, 32)]
    lists._choose(made)
    values = [value for each in made for value in each.standing_for]
    assert len(set(values)) == len(values)
    assert all(IPv4Address(value) for value in values)
