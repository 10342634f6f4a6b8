"""From the object's BTF to ctypes: the layouts that the C headers have, byte order included."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

from xdp.btf import Btf
from xdp.object import LB_OBJECT, BpfObject

MAPS_OF_FLOWS = ("flows4", "flows6", "nat_flows4", "nat_flows6", "nat_replies4", "nat_replies6")
HEADERS = LB_OBJECT.parent


@pytest.fixture(scope="module")
def obj() -> Iterator[BpfObject]:
    with BpfObject.open(LB_OBJECT) as opened:
        yield opened


@pytest.fixture(scope="module")
def types(obj: BpfObject) -> Btf:
    return obj.types


def holes(struct: type[ctypes.Structure]) -> list[str]:
    """Padding before, between and behind the fields, those of inner structs included."""
    found, at = [], 0
    for name, kind, *_ in struct._fields_:
        field = getattr(struct, name)
        if field.offset != at:
            found.append(f"{struct.__name__}: {field.offset - at} bytes before {name}")
        if issubclass(kind, ctypes.Structure):
            found += holes(kind)
        at = field.offset + field.size
    if at != ctypes.sizeof(struct):
        found.append(f"{struct.__name__}: {ctypes.sizeof(struct) - at} bytes at the end")
    return found


def test_no_map_key_has_padding(obj: BpfObject, types: Btf) -> None:
    """The kernel compares keys byte by byte."""
    keys = {pair[0] for name in obj.map_names if (pair := types.map_types(name)) and hasattr(pair[0], "_fields_")}
    assert {"service_key4", "range_key6", "quic_key", "flow_key"} < {key.__name__ for key in keys}
    assert [hole for key in keys for hole in holes(key)] == []


def test_member_has_no_padding_since_user_space_compares_members_byte_by_byte(types: Btf) -> None:
    assert holes(types.struct("member")) == []


def test_padding_is_found() -> None:
    class Inner(ctypes.Structure):
        _fields_ = (("a", ctypes.c_uint8), ("b", ctypes.c_uint32))

    class Outer(ctypes.Structure):
        _fields_ = (("first", ctypes.c_uint64), ("inner", Inner), ("last", ctypes.c_uint8))

    assert holes(Outer) == ["Inner: 3 bytes before b", "Outer: 7 bytes at the end"]


def test_ipv4_service_key_is_eight_bytes_and_a_member_is_a_cache_line(types: Btf) -> None:
    assert ctypes.sizeof(types.struct("service_key4")) == 8
    assert ctypes.sizeof(types.struct("member")) == ctypes.sizeof(types.struct("slot_words")) == 64


def test_byte_order_comes_from_the_header(types: Btf) -> None:
    key = types.struct("service_key4")(address=0x0A000001, port=80, protocol=6)
    assert bytes(key) == bytes.fromhex("0a000001 0050 06 00")
    flow = types.struct("flow_key")(source_port=0x1234)
    flow.address[0] = 0x0A000001
    assert bytes(flow)[:2] == b"\x12\x34"
    assert bytes(flow)[8:12] == b"\x0a\x00\x00\x01"


def test_host_order_stays_where_the_header_says_so(types: Btf) -> None:
    member = types.struct("member")(port=80, flags=1)
    port, flags = type(member).port.offset, type(member).flags.offset
    assert bytes(member)[port : port + 2] == b"\0\x50"
    assert bytes(member)[flags : flags + 2] == bytes(ctypes.c_uint16(1))


@pytest.mark.parametrize("struct", ["service", "service_key4", "member", "flow_key", "nat_reply", "control", "config"])
def test_misspelt_field_raises(types: Btf, struct: str) -> None:
    value = types.struct(struct)()
    with pytest.raises(AttributeError):
        value.prot = 1
    with pytest.raises(AttributeError):
        _ = value.prot


@pytest.mark.parametrize("name", ["services", "nat_flow4", "lb"])
def test_unknown_struct_is_a_key_error(types: Btf, name: str) -> None:
    with pytest.raises(KeyError):
        types.struct(name)


def test_enums_have_the_values_of_the_header(types: Btf) -> None:
    assert types.enum("mode") == {"MODE_NAT": 0, "MODE_DR": 1, "MODE_IPIP": 2, "MODE_GUE": 3}
    assert types.enum("member_flag") == {"MEMBER_ALIVE": 1, "MEMBER_RESOLVED": 2, "MEMBER_IP6": 4}
    assert types.enum("nat_state") == {
        "NAT_ESTABLISHED": 1,
        "NAT_CLIENT_FIN": 2,
        "NAT_BACKEND_FIN": 4,
        "NAT_RESET": 8,
    }


def test_reasons_are_named_in_the_order_of_the_header(types: Btf) -> None:
    reasons = types.enum("reason")
    assert list(reasons.values()) == list(range(len(reasons)))
    names = list(reasons)
    first_drop, first_note = reasons["DROP_MALFORMED"], reasons["NOTED_SYN_NOT_RECORDED"]
    assert all(name.startswith("DROP_") for name in names[first_drop:first_note])
    assert all(name.startswith("NOTED_") for name in names[first_note:-1])
    assert not any(name.startswith("DROP_") for name in names[:first_drop])
    assert names[-1] == "REASON_COUNT"


def test_every_reason_has_a_place_in_the_map(obj: BpfObject, types: Btf) -> None:
    assert "reasons" in obj.map_names
    assert types.enum("reason")["REASON_COUNT"] == len(types.enum("reason")) - 1


def test_maps_of_flows_are_keyed_by_family(types: Btf) -> None:
    for name in MAPS_OF_FLOWS:
        found = types.map_types(name)
        assert found is not None
        assert found[0].__name__ == ("flow_key4" if name.endswith("4") else "flow_key")


def test_what_is_no_map_has_no_types(types: Btf) -> None:
    assert types.map_types("no_such_map") is None


def test_section_has_its_variables_where_the_object_has_them(types: Btf) -> None:
    fields = [name for name, *_ in types.section(".rodata")._fields_]
    assert "config" in fields
    assert [name for name, *_ in types.section(".data")._fields_] == ["control"]


def test_every_struct_that_is_shared_with_user_space_is_known(types: Btf) -> None:
    """None of them may have been optimised out of the BTF unnoticed."""
    shared = [
        *HEADERS.glob("*_maps.h"),
        *(HEADERS / name for name in ("config.h", "names.h", "flow_types.h", "slot_word.h", "carry_counters.h")),
    ]
    lines = [line for header in shared for line in header.read_text().splitlines()]
    structs = [
        line.split()[1] for line in lines if line.startswith("struct ") and line.endswith(" {") and line != "struct {"
    ]
    assert len(structs) > 10
    for name in structs:
        assert ctypes.sizeof(types.struct(name)) > 0
