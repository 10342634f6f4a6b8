"""ring.so against its oracle, the pure Python of lb.hashing.maglev, lb.hashing.ring and lb.hashing.flow_hash."""

from __future__ import annotations

import ctypes
from array import array
from inspect import unwrap
from ipaddress import ip_network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lb.hashing import flow_query, maglev, native, recorded, ring

WORD = st.integers(0, 2**32 - 1)
MEMBER = st.integers(0, ring.MEMBERS[-1])
WEIGHT = st.integers(1, maglev.WEIGHTS[-1]) | st.sampled_from([1, 2, 65534, 65535])


def test_the_library_is_built() -> None:
    assert native.library, "lb/hashing/native/ring.so: run make build"


@st.composite
def rings(draw: st.DrawFn, *elements: st.SearchStrategy[int]) -> tuple[list[int], ...]:
    """A list for each kind of element, all of one length."""
    size = draw(st.integers(0, 300))
    return tuple(draw(st.lists(element, min_size=size, max_size=size)) for element in elements)


def backends(weights: list[int], size: int) -> tuple[list[int], list[tuple[int, int]], list[int], int]:
    """The arguments of `claims`; labels that are not in order."""
    names = [f"10.{i >> 8}.{i & 255}.1:80" for i in range(len(weights))]
    labels = [65535 - 7 * i for i in range(len(weights))]
    return weights, [maglev.permutation(name, size) for name in names], labels, size


@settings(deadline=None)
@given(
    weights=st.lists(WEIGHT, min_size=1, max_size=40) | st.lists(st.just(1), min_size=1, max_size=300),
    size=st.sampled_from([2, 7, 251, 257, 1009, 4099]),
)
def test_claims_are_those_of_the_oracle(weights: list[int], size: int) -> None:
    asked = backends(weights, size)
    assert native.claims(*asked) == unwrap(maglev.claims)(*asked)


@pytest.mark.parametrize("size", [16381, 65537, maglev.RING_SIZES[-1]])
@pytest.mark.parametrize(
    "weights",
    [[1], [1] * 100, [65535] * 3, [65535, 1], [65535, 65534, 1], [*range(1, 101)], [*range(65535, 65435, -1)]],
    ids=["one", "equal", "largest", "extremes", "beside", "rising", "nearly-equal"],
)
def test_claims_of_large_rings_are_those_of_the_oracle(weights: list[int], size: int) -> None:
    asked = backends(weights, size)
    assert native.claims(*asked) == unwrap(maglev.claims)(*asked)


def test_a_thousand_weights_on_the_largest_ring_are_claimed_as_by_the_oracle() -> None:
    asked = backends([1 + i * 7919 % 65535 for i in range(1000)], maglev.RING_SIZES[-1])
    assert native.claims(*asked) == unwrap(maglev.claims)(*asked)


@settings(deadline=None)
@given(weights=st.dictionaries(st.text(max_size=8), st.just(0) | WEIGHT, max_size=30))
def test_tables_with_weights_of_zero_are_those_of_the_oracle(weights: dict[str, int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", None)
        expected = maglev.table(weights, 1009)
    assert maglev.table(weights, 1009) == expected


@settings(deadline=None)
@given(words_and_table=rings(WORD | MEMBER, MEMBER), alive=st.frozensets(st.integers(-2, 40000)), data=st.data())
def test_transitions_are_those_of_the_oracle(
    words_and_table: tuple[list[int], list[int]], alive: frozenset[int], data: st.DataObject
) -> None:
    words, table = array("I", words_and_table[0]), words_and_table[1]
    known = {*table, *map(ring.current_member, words), *map(ring.previous_member, words)}
    living = alive | data.draw(st.frozensets(st.sampled_from(sorted(known)))) if known else alive
    assert native.transition(words, table, living) == unwrap(ring.transition)(words, table, living)


@pytest.mark.parametrize("member", [-1, 32768, 65535, 65536])
def test_a_member_out_of_range_is_left_to_the_oracle(member: int) -> None:
    with pytest.raises(ValueError, match=rf"member {member}: not in"):
        ring.transition(array("I", [0, 0]), [1, member], {1})


@settings(deadline=None)
@given(words=st.lists(WORD), tracked=st.frozensets(st.integers(0, 200)))
def test_expiries_are_those_of_the_oracle(words: list[int], tracked: frozenset[int]) -> None:
    before = array("I", words)
    assert native.expire(before, tracked) == unwrap(ring.expire)(before, tracked)


@settings(deadline=None)
@given(old_and_new=rings(WORD, WORD) | rings(st.integers(0, 3), st.integers(0, 3)), gap=st.integers(1, 5))
def test_costs_and_runs_are_those_of_the_oracle(old_and_new: tuple[list[int], list[int]], gap: int) -> None:
    old, new = (array("I", words) for words in old_and_new)
    assert native.costs(old, new) == unwrap(ring.costs)(old, new)
    assert native.runs(old, new, gap) == unwrap(ring.runs)(old, new, gap)


@pytest.mark.parametrize("function", [ring.plan, ring.changed_runs])
def test_words_of_different_lengths_are_refused(function: Any) -> None:
    with pytest.raises(ValueError, match="zip"):
        function(array("I", [1]), array("I", [1, 2]))


class Flow(ctypes.Structure):
    _fields_ = (
        ("seen_ns", ctypes.c_uint64),
        ("uid", ctypes.c_uint32),
        ("member", ctypes.c_uint16),
        ("closing", ctypes.c_uint16),
    )


def key_type(words: int) -> type[ctypes.BigEndianStructure]:
    class Key(ctypes.BigEndianStructure):
        _fields_ = (
            ("source_port", ctypes.c_uint16),
            ("destination_port", ctypes.c_uint16),
            ("protocol", ctypes.c_uint8),
            ("zero", ctypes.c_uint8 * 3),
            ("address", ctypes.c_uint32 * (2 * words)),
        )

    return Key


KEYS = {words: key_type(words) for words in (1, 4)}
VIPS = {4: [bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])], 16: [bytes(15) + b"\1", bytes(15) + b"\2"]}


@st.composite
def flow_tables(draw: st.DrawFn, size: int) -> tuple[Any, Any]:
    """Entries of one family, of few services and times; addresses have `size` bytes."""
    entries = draw(
        st.lists(
            st.tuples(
                st.integers(0, 65535),
                st.sampled_from([80, 443]),
                st.sampled_from([6, 17]),
                st.binary(min_size=size, max_size=size),
                st.sampled_from(VIPS[size]),
                st.integers(0, 3),
            )
        )
    )
    raw = b"".join(
        source_port.to_bytes(2, "big") + port.to_bytes(2, "big") + bytes([protocol, 0, 0, 0]) + source + vip
        for source_port, port, protocol, source, vip, _ in entries
    )
    keys = (KEYS[size // 4] * len(entries)).from_buffer_copy(raw)
    return keys, (Flow * len(entries))(*(Flow(seen_ns=seen_ns) for *_, seen_ns in entries))


@settings(deadline=None)
@given(
    data=st.data(),
    ports=st.sampled_from([range(65536), range(80, 81), range(80, 444)]),
    prefix_bits_off=st.sampled_from([0, 0, 8, 20]),
    protocol=st.sampled_from([6, 17]),
    oldest_ns=st.integers(-1, 3),
    seed=st.integers(0, 2**64 - 1),
    ring_size=st.sampled_from([251, 16381, 131071]),
)
@pytest.mark.parametrize("size", [4, 16], ids=["ipv4", "ipv6"])
def test_slots_of_recorded_flows_are_those_of_the_oracle(
    size: int,
    data: st.DataObject,
    ports: range,
    prefix_bits_off: int,
    protocol: int,
    oldest_ns: int,
    seed: int,
    ring_size: int,
) -> None:
    keys, flows = data.draw(flow_tables(size))
    length = 8 * size - prefix_bits_off
    first = ip_network(
        (int.from_bytes(VIPS[size][0], "big") if size == 4 else VIPS[size][0], length), strict=False
    ).network_address.packed
    sought = flow_query.FlowQuery(first, length, ports, protocol, oldest_ns, seed, ring_size)
    expected = unwrap(recorded.recorded_slots)(keys, flows, sought)
    assert native.recorded_slots(keys, flows, sought) == expected
