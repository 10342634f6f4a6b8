"""Typed maps, against the kernel: those of the balancer's own object, loaded small."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from xdp import libbpf, maps
from xdp.errors import MapError
from xdp.maps import EXIST, NO_EXIST, Map, column
from xdp.object import LB_OBJECT, BpfObject

ENTRIES = 64


@pytest.fixture(scope="module")
def obj() -> Iterator[BpfObject]:
    with BpfObject.open(LB_OBJECT) as opened:
        for name in ("services4", "services6", "rings", "members", "counters", "nat_flows6"):
            opened.resize(name, ENTRIES)
        opened.load()
        yield opened


@pytest.fixture
def services(obj: BpfObject) -> Iterator[Map]:
    found = obj.map("services4")
    yield found
    for key, _ in list(found.items()):
        del found[key]


@pytest.fixture
def counters(obj: BpfObject) -> Map:
    return obj.map("counters")


def key(services: Map, number: int) -> Any:
    return services.key_type(address=0x0A000000 + number, port=80, protocol=6)


def value(services: Map, number: int) -> Any:
    return services.value_type(number)


def test_value_is_read_as_it_was_written(services: Map) -> None:
    services[key(services, 1)] = value(services, 7)
    assert bytes(services[key(services, 1)]) == bytes(value(services, 7))
    assert key(services, 1) in services
    services[key(services, 1)] = value(services, 8)
    assert services[key(services, 1)].value == 8


def test_key_that_is_not_there_is_a_key_error(services: Map) -> None:
    missing = key(services, 1)
    assert missing not in services
    assert services.get(missing) is None
    with pytest.raises(KeyError):
        services[missing]
    with pytest.raises(KeyError):
        del services[missing]


def test_a_column_is_one_field_of_each_entry() -> None:
    class Entry(ctypes.Structure):
        _fields_ = (
            ("seen_ns", ctypes.c_uint64),
            ("uid", ctypes.c_uint32),
            ("member", ctypes.c_uint16),
            ("state", ctypes.c_uint8),
        )

    rows = [(1 << 63, 7, 1, 255), (2, 1 << 31, 1 << 15, 0), (0, 0, 0, 1)]
    entries = (Entry * 3)(*(Entry(*row) for row in rows))
    names = [name for name, _ in Entry._fields_]
    assert [list(column(entries, name)) for name in names] == [list(each) for each in zip(*rows, strict=True)]
    assert list(column((Entry * 0)(), "uid")) == []


def test_deleted_key_is_gone(services: Map) -> None:
    services[key(services, 1)] = value(services, 7)
    del services[key(services, 1)]
    assert list(services.items()) == []


def test_put_can_insist_on_a_new_key_or_on_a_known_one(services: Map) -> None:
    with pytest.raises(MapError, match=r"^map services4: cannot write: No such file or directory$"):
        services.put(key(services, 1), value(services, 1), EXIST)
    services.put(key(services, 1), value(services, 1), NO_EXIST)
    with pytest.raises(MapError, match=r"^map services4: cannot write: File exists$"):
        services.put(key(services, 1), value(services, 2), NO_EXIST)


def test_full_map_says_so_and_how_many_it_holds(services: Map) -> None:
    for number in range(ENTRIES):
        services[key(services, number)] = value(services, number)
    with pytest.raises(MapError, match=r"^map services4: full: holds 64 entries$"):
        services[key(services, ENTRIES)] = value(services, 0)


@pytest.mark.parametrize("batch", [1, 7, 64, 4096])
def test_items_are_all_entries_whatever_the_batch(services: Map, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr(maps, "_BATCH", batch)
    for number in range(ENTRIES):
        services[key(services, number)] = value(services, number)
    found = [(k.address - 0x0A000000, v) for k, v in services.items()]
    assert sorted(found) == [(number, number) for number in range(ENTRIES)]


def test_items_of_an_empty_map_are_none(services: Map) -> None:
    assert list(services.items()) == []


def test_hash_map_is_copied_into_a_larger_one(obj: BpfObject, services: Map) -> None:
    for number in range(ENTRIES):
        services[key(services, number)] = value(services, number)
    with BpfObject.open(LB_OBJECT) as larger:
        larger.resize("services4", 2 * ENTRIES)
        larger.load()
        target = larger.map("services4")
        target.copy_from(services)
        assert {bytes(k): v for k, v in target.items()} == {bytes(k): v for k, v in services.items()}
        target[key(target, ENTRIES)] = value(target, 0)
        with pytest.raises(MapError, match=r"^map services4: cannot copy: Argument list too long$"):
            services.copy_from(target)


def test_per_cpu_values_are_read_as_one_sum(counters: Map) -> None:
    each = counters.per_cpu(3)
    assert len(each) == libbpf.possible_cpus()
    raw = b"".join(bytes(counters.value_type(packets=n + 1, bytes=1 << 40)) for n in range(len(each)))
    libbpf.update(counters.fd, ctypes.byref(ctypes.c_uint32(3)), raw, 0)
    total = counters.total(3)
    assert total.packets == sum(range(1, len(each) + 1))
    assert total.bytes == len(each) << 40
    assert total.connections == 0


def test_sum_that_is_set_is_the_sum_that_is_read(counters: Map) -> None:
    counters.set_total(4, counters.value_type(packets=1 << 63, connections=5))
    total = counters.total(4)
    assert (total.packets, total.bytes, total.connections) == (1 << 63, 0, 5)
    counters.set_total(4, counters.value_type())
    assert bytes(counters.total(4)) == bytes(ctypes.sizeof(counters.value_type))


def test_per_cpu_integers_are_summed_too(obj: BpfObject) -> None:
    reasons = obj.map("reasons")
    reasons.set_total(2, 9)
    assert reasons.total(2) == 9
    assert reasons.totals() == [9 if n == 2 else 0 for n in range(len(reasons))]
    reasons.set_total(2, 0)


def test_memory_of_a_map_is_at_least_what_its_values_take(obj: BpfObject, counters: Map) -> None:
    assert counters.memory >= len(counters) * ctypes.sizeof(counters.value_type)
    assert obj.map("rings").memory >= len(obj.map("rings").bytes())


def test_index_out_of_range_is_a_map_error(counters: Map) -> None:
    with pytest.raises(MapError, match=r"^map counters: cannot read: "):
        counters.total(ENTRIES)
    with pytest.raises(MapError, match=r"^map counters: cannot write: "):
        counters.set_total(ENTRIES, counters.value_type())


def test_view_is_the_memory_of_the_kernel(obj: BpfObject) -> None:
    members = obj.map("members")
    view = members.view()
    assert len(view) == len(members) == ENTRIES
    view[5].uid = 77
    assert members[5].uid == 77
    members[6] = members.value_type(uid=78)
    assert view[6].uid == 78
    assert obj.map("members").view()[6].uid == 78


def test_bytes_of_an_array_are_its_values_one_after_the_other(obj: BpfObject) -> None:
    rings = obj.map("rings")
    memory = rings.bytes()
    assert isinstance(memory, mmap.mmap)
    words = memoryview(memory).cast("B").cast("I")
    words[16 * 3 + 2] = 4711
    assert rings[3].words[2] == 4711
    assert len(words) == 16 * ENTRIES


def test_map_that_cannot_be_mapped_says_so(services: Map) -> None:
    with pytest.raises(MapError, match=r"^map services4: cannot map into memory: "):
        services.bytes()


def test_closed_map_is_a_map_error() -> None:
    with BpfObject.open(LB_OBJECT) as obj:
        obj.load()
        services = obj.map("services4")
    broken = Map("services4", -1, services.key_type, services.value_type)
    acts: dict[int, Callable[[], object]] = {
        errno.EBADF: lambda: broken.get(key(broken, 1)),
        errno.EBADFD: lambda: list(broken.items()),
    }
    for number, act in acts.items():
        with pytest.raises(MapError) as caught:
            act()
        assert str(caught.value) == f"map services4: cannot read: {os.strerror(number)}"
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == number
