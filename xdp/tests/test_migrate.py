"""Maps of one version become those of another: really compiled and loaded, field by field."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from xdp.btf import Btf, layout
from xdp.errors import CannotCarry, NotSupported
from xdp.migrate import Succession, catch_up
from xdp.object import BpfObject

INCLUDE = f"/usr/include/{os.uname().machine}-linux-gnu"
SOURCE = """
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
enum reason {{ {reasons} REASON_COUNT }};
enum mode {{ {modes} }};
struct names {{ enum reason reason; enum mode mode; }};
struct key {{ {key} }};
struct flow {{ {flow} }};
struct counter {{ {counter} }};
struct member {{ {member} }};
struct control {{ {control} }};
const volatile struct names names = {{}};
volatile struct control control SEC(".data") = {{}};
#define MAP(name, kind, entries, flags, k, v) \\
    struct {{ __uint(type, BPF_MAP_TYPE_##kind); __uint(max_entries, entries); __uint(map_flags, flags); \\
              __type(key, k); __type(value, v); }} name SEC(".maps")
MAP(flows, LRU_HASH, 1024, 0, struct key, struct flow);
MAP(names_of, HASH, 16, 0, struct key, __u32);
MAP(counters, PERCPU_ARRAY, {members}, 0, __u32, struct counter);
MAP(reasons, PERCPU_ARRAY, REASON_COUNT, 0, __u32, __u64);
MAP(members, ARRAY, {members}, BPF_F_MMAPABLE, __u32, struct member);
SEC("xdp") int uses(struct xdp_md *ctx)
{{
    __u32 k = names.mode;
    struct key key = {{}};

    return bpf_map_lookup_elem(&flows, &key) || bpf_map_lookup_elem(&names_of, &key) ||
           bpf_map_lookup_elem(&counters, &k) || bpf_map_lookup_elem(&reasons, &k) ||
           bpf_map_lookup_elem(&members, &k) || !control.generation ? 2 : 1;
}}
char LICENSE[] SEC("license") = "GPL";
"""
OLD = {
    "reasons": "PASS_A, DROP_B,",
    "modes": "MODE_A, MODE_B",
    "key": "__be32 address; __be16 port; __u16 zero;",
    "flow": "__u64 seen_ns; __u32 uid; __u16 member; __be16 port;",
    "counter": "__u64 packets; __u64 bytes;",
    "member": "__u32 uid; __u8 mac[6]; __u16 flags; __u32 zero;",
    "control": "__u64 generation; __u64 epoch;",
    "members": "8",
}
NEW = OLD | {
    "reasons": "PASS_NEW, PASS_A, DROP_NEW, DROP_B,",
    "flow": "__u16 member; __be16 port; __u32 extra; __u64 seen_ns; __u64 uid;",
    "counter": "__u64 bytes; __u64 more; __u64 packets;",
    "member": "__u8 mac[8]; __u16 flags; __u16 more; __u32 uid;",
    "control": "__u64 epoch; __u64 more; __u64 generation;",
    "members": "16",
}

Make = Callable[..., BpfObject]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Opens an object of these sources, not loaded yet."""
    with ExitStack() as opened:

        def compiled(**words: str) -> BpfObject:
            path = tmp_path / f"{len(list(tmp_path.glob('*.c')))}.bpf.c"
            path.write_text(SOURCE.format(**words))
            target = path.with_suffix(".o")
            options = ["-target", "bpf", "-mcpu=v3", "-g", "-O2", f"-I{INCLUDE}"]
            subprocess.run(["clang", *options, "-c", str(path), "-o", str(target)], check=True)
            return opened.enter_context(BpfObject.open(target))

        yield compiled


@pytest.fixture
def old(make: Make) -> BpfObject:
    """With something in each map."""
    obj = make(**OLD)
    obj.load()
    for number in range(1, 4):
        put_flow(obj, number, seen_ns=number)
        obj.map("names_of")[key(obj, number)] = number
    obj.map("counters").set_total(5, obj.types.struct("counter")(packets=7, bytes=900))
    obj.map("reasons").set_total(1, 33)
    member = obj.map("members").view()[2]
    member.uid, member.flags = 77, 3
    member.mac[:] = b"\2\0\0\0\0\1"
    obj.variable("control").generation = 9
    return obj


def key(obj: BpfObject, number: int) -> Any:
    return obj.types.struct("key")(address=number, port=80)


def put_flow(obj: BpfObject, number: int, **fields: int) -> None:
    obj.map("flows")[key(obj, number)] = obj.types.struct("flow")(**({"uid": 1, "member": 4, "port": 53} | fields))


def succeed(old: BpfObject, new: BpfObject, **more: Any) -> Succession:
    succession = Succession(old, new, **more)
    new.load()
    succession.copy()
    return succession


def flows(obj: BpfObject) -> dict[int, tuple[int, ...]]:
    found = obj.map("flows").items()
    return {k.address: (f.seen_ns, f.uid, f.member, f.port, getattr(f, "extra", 0)) for k, f in found}


def test_fields_are_found_by_their_names_and_new_ones_are_zero(old: BpfObject, make: Make) -> None:
    new = make(**NEW)
    succeed(old, new)
    assert flows(new) == {number: (number, 1, 4, 53, 0) for number in range(1, 4)}
    counter = new.map("counters").total(5)
    assert (counter.packets, counter.bytes, counter.more) == (7, 900, 0)
    member = new.map("members").view()[2]
    assert (member.uid, member.flags, member.more, bytes(member.mac)) == (77, 3, 0, b"\2\0\0\0\0\1\0\0")
    assert (new.variable("control").generation, new.variable("control").epoch) == (9, 0)


def test_reasons_are_found_by_their_names_whatever_their_numbers(old: BpfObject, make: Make) -> None:
    new = make(**NEW)
    succeed(old, new)
    reasons = new.types.enum("reason")
    assert new.map("reasons").totals() == [33 if number == reasons["DROP_B"] else 0 for number in range(4)]


def test_maps_of_the_same_shape_are_the_same_maps(old: BpfObject, make: Make) -> None:
    new = make(**NEW)
    succeed(old, new)
    shared = {name for name in new.map_names if new.map(name).info.id == old.map(name).info.id}
    assert shared == {"names_of"}
    alike = make(**OLD)
    succeed(old, alike)
    assert {n for n in alike.map_names if alike.map(n).info.id != old.map(n).info.id} == {".rodata"}


def test_and_back_again_what_is_new_is_left_out(old: BpfObject, make: Make) -> None:
    new = make(**(NEW | {"flow": OLD["flow"] + "__u64 extra;", "member": "__u64 more;" + OLD["member"]}))
    succeed(old, new)
    again = make(**OLD)
    succeed(new, again)
    assert flows(again) == flows(old)
    assert bytes(again.map("counters").total(5)) == bytes(old.map("counters").total(5))
    assert again.map("reasons").totals() == [0, 33]
    assert bytes(again.map("members").view()[2]) == bytes(old.map("members").view()[2])


def test_flows_that_come_while_others_are_copied_are_caught_up_with_and_the_later_stays(
    old: BpfObject, make: Make
) -> None:
    new = make(**NEW)
    succession = succeed(old, new)
    assert succession.has_to_catch_up
    put_flow(old, 4, seen_ns=4)
    put_flow(old, 1, seen_ns=50, member=5)
    put_flow(old, 2, seen_ns=60, member=6)
    put_flow(new, 2, seen_ns=61, member=7)
    assert catch_up(old, new) == 2
    assert {number: (flow[0], flow[2]) for number, flow in flows(new).items()} == {
        1: (50, 5),
        2: (61, 7),
        3: (3, 4),
        4: (4, 4),
    }
    assert catch_up(old, new) == 0


def test_what_is_counted_meanwhile_is_told(old: BpfObject, make: Make) -> None:
    new = make(**NEW)
    succession = succeed(old, new)
    old.map("counters").set_total(5, old.types.struct("counter")(packets=9, bytes=1000))
    old.map("counters").set_total(6, old.types.struct("counter")(packets=1))
    old.map("reasons").set_total(0, 2)
    found = {(name, index): more for name, index, more in succession.counted_since()}
    assert found.pop(("reasons", new.types.enum("reason")["PASS_A"])) == 2
    assert {place: (more.packets, more.bytes) for place, more in found.items()} == {
        ("counters", 5): (2, 100),
        ("counters", 6): (1, 0),
    }


REFUSED = {
    "narrower": ({"flow": "__u64 seen_ns; __u16 uid; __u16 member; __be16 port; __u16 zero;"}, "map flows.uid: "),
    "shorter": ({"member": "__u32 uid; __u8 mac[4]; __u16 flags; __u16 zero;"}, "map members.mac: "),
    "other byte order": ({"flow": "__u64 seen_ns; __u32 uid; __u16 member; __u16 port;"}, "map flows.port: "),
    "key": ({"key": "__be32 address; __u32 zero;"}, "map flows: key no longer has port"),
    "meaning": ({"modes": "MODE_B, MODE_A"}, "MODE_[AB] was [01] and is [01] now"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_place_is_refused_by_its_name(old: BpfObject, make: Make, case: str) -> None:
    words, message = REFUSED[case]
    with pytest.raises(CannotCarry, match=f"^{message}"):
        succeed(old, make(**(OLD | words)))


def test_map_that_others_refer_to_has_to_stay(old: BpfObject, make: Make) -> None:
    with pytest.raises(CannotCarry, match=r"^map members: layout changed, and other maps refer to it$"):
        Succession(old, make(**NEW), kept=["members"])


# Types of an older object, as a newer one expects them


def test_numbers_that_an_older_struct_lacks_are_zero_and_stay_it(make: Make) -> None:
    old, new = (make(**words).types for words in (OLD, NEW))
    types = Btf(old.raw, expected=new)
    counter = types.struct("counter")
    assert ctypes.sizeof(counter) == ctypes.sizeof(old.struct("counter"))
    one = counter(packets=5, more=0)
    assert (one.packets, one.more) == (5, 0)
    with pytest.raises(NotSupported, match=r"^struct counter has no more in the loaded program, which is older$"):
        one.more = 1
    with pytest.raises(NotSupported, match=r"^PASS_NEW: not supported by the loaded program, which is older$"):
        types.enum("reason")["PASS_NEW"]
    assert layout(counter) == layout(old.struct("counter"))
