"""ctypes objects as BCC makes them -> plain values."""

from __future__ import annotations

import ctypes
import re
from ipaddress import ip_address
from typing import Any

import pytest

from lb.errors import InvalidInput
from lb.stages.values import added, event, event_class, plain

FIELDS = [
    "source#struct in_addr",
    "six#struct in6_addr",
    "port#__be16",
    "mac#u8[6]",
    "id#u8[4]",
    "name#char[8]",
    "action#enum xdp_action",
    "is_new#bool",
    "counts#u16[2]",
    "delta#s64",
]


def filled() -> ctypes.Structure:
    made = event_class("packets", FIELDS)()
    ctypes.memmove(ctypes.addressof(made.source), ip_address("192.0.2.1").packed, 4)
    ctypes.memmove(ctypes.addressof(made.six), ip_address("2001:db8::1").packed, 16)
    made.port, made.action, made.is_new, made.delta = 80, 2, True, -5
    made.mac[:] = (2, 0, 0, 0, 0, 1)
    made.id[:] = (0xDE, 0xAD, 0, 1)
    made.name = b"eth0"
    made.counts[:] = (1, 2)
    return made  # type: ignore[no-any-return]


PLAIN = {
    "source": "192.0.2.1",
    "six": "2001:db8::1",
    "port": 80,
    "mac": "02:00:00:00:00:01",
    "id": "dead0001",
    "name": "eth0",
    "action": 2,
    "is_new": True,
    "counts": [1, 2],
    "delta": -5,
}


@pytest.mark.parametrize("more", [0, 7])
def test_an_event_is_decoded_by_its_fields(more: int) -> None:
    made = filled()
    memory = ctypes.create_string_buffer(bytes(made) + bytes(more), ctypes.sizeof(made) + more)
    assert event(type(made), ctypes.addressof(memory), len(memory)) == PLAIN


@pytest.mark.parametrize("difference", [-1, 8])
def test_an_event_of_another_size_is_shown_as_bytes(difference: int) -> None:
    kind = event_class("packets", ["number#u32"])
    memory = ctypes.create_string_buffer(bytes(range(1, 17)), 16)
    size = ctypes.sizeof(kind) + difference
    assert event(kind, ctypes.addressof(memory), size) == bytes(range(1, size + 1)).hex()


def test_a_field_of_an_unknown_type_is_named() -> None:
    with pytest.raises(InvalidInput, match=re.escape("packets: cannot show field who of type struct inner")):
        event_class("packets", ["number#u32", "who#struct inner[2]"])


class Key(ctypes.Structure):
    _fields_ = (("port", ctypes.c_uint16), ("__pad_1", ctypes.c_char * 6), ("slot", ctypes.c_uint64))


def test_padding_is_left_out() -> None:
    assert plain(Key(port=5, slot=6)) == {"port": 5, "slot": 6}


@pytest.mark.parametrize(("value", "expected"), [(ctypes.c_uint64(3), 3), (ctypes.c_char(b"x"), "x"), (7, 7)])
def test_numbers_and_characters_are_themselves(value: Any, expected: Any) -> None:
    assert plain(value) == expected


@pytest.mark.parametrize(
    ("values", "total"),
    [
        ([1, 2, 3], 6),
        ([{"packets": 1, "name": "a"}, {"packets": 5, "name": "b"}], {"packets": 6, "name": "a"}),
        ([[1, 2], [3, 4]], [4, 6]),
    ],
)
def test_values_of_cpus_are_added(values: list[Any], total: Any) -> None:
    assert added(values) == total
