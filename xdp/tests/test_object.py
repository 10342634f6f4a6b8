"""Objects from source to program: constants and sizes set, loaded, pinned, adopted, refused."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from xdp.errors import LoadError, NotPermitted
from xdp.object import LB_OBJECT, BpfObject, Program, pinned_program, program_by_id, program_name, useful_tail

INCLUDE = f"/usr/include/{os.uname().machine}-linux-gnu"
ETHERNET = bytes(12) + b"\x88\xcc"  # LLDP: the host's business
XDP_PASS = 2
NOBODY = 65534

HEADER = '#include <linux/bpf.h>\n#include <bpf/bpf_helpers.h>\nchar LICENSE[] SEC("license") = "GPL";\n'
BEYOND_THE_PACKET = 'SEC("xdp") int reads_beyond(struct xdp_md *ctx) { return *(int *)(long)ctx->data; }'
LONG_AND_BEYOND = (
    'SEC("xdp") int reads_beyond(struct xdp_md *ctx) { __u64 sum = 0; __u32 i;'
    " for (i = 0; i < 50; i++) sum += bpf_get_prandom_u32() * i;"
    " return *(int *)(long)ctx->data + sum; }"
)
ONE_MAP = (
    "struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __type(key, __u32); __type(value, %s); }"
    ' things SEC(".maps");'
    ' SEC("xdp") int uses(struct xdp_md *ctx) { __u32 k = 0; return bpf_map_lookup_elem(&things, &k) ? 2 : 0; }'
)

Compile = Callable[[str], Path]


@pytest.fixture
def compiled(tmp_path: Path) -> Compile:
    def compile_source(source: str) -> Path:
        path = tmp_path / f"{len(list(tmp_path.glob('*.c')))}.bpf.c"
        path.write_text(HEADER + source)
        target = path.with_suffix(".o")
        options = ["-target", "bpf", "-mcpu=v3", "-g", "-O2", f"-I{INCLUDE}"]
        subprocess.run(["clang", *options, "-c", str(path), "-o", str(target)], check=True)
        return target

    return compile_source


@pytest.fixture
def bpffs(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "bpffs"
    path.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", str(path)], check=True)
    yield path
    subprocess.run(["umount", str(path)], check=True)


def load(path: Path) -> BpfObject:
    obj = BpfObject.open(path)
    obj.load()
    return obj


# Opening


def test_missing_object_says_how_it_is_made(tmp_path: Path) -> None:
    path = tmp_path / "none.bpf.o"
    with pytest.raises(LoadError) as refusal:
        BpfObject.open(path)
    assert str(refusal.value) == f"{path}: not found: run `make build`"


def test_file_that_is_no_object_is_named(tmp_path: Path) -> None:
    path = tmp_path / "text.bpf.o"
    path.write_text("no ELF")
    with pytest.raises(LoadError, match=rf"^{path}: not a BPF object: "):
        BpfObject.open(path)


# Loading


def test_loaded_program_runs() -> None:
    with load(LB_OBJECT) as obj:
        run = obj.program("xdp_lb").test_run(ETHERNET)
        assert (run.verdict, run.data) == (XDP_PASS, ETHERNET)
        assert obj.map("reasons").total(obj.types.enum("reason")["PASS_NOT_IP"]) == 1


def test_constants_and_sizes_are_those_that_were_set() -> None:
    with BpfObject.open(LB_OBJECT) as obj:
        obj.configure("config", hash_seed=1, nat_port_first=5000)
        obj.resize("services6", 99)
        obj.load()
        config = obj.map(".rodata")[0].config
        assert (config.hash_seed, config.nat_port_first) == (1, 5000)
        assert len(obj.map("services6")) == 99


def test_constant_that_is_misspelt_raises() -> None:
    with BpfObject.open(LB_OBJECT) as obj, pytest.raises(AttributeError):
        obj.configure("config", hash_sede=1)


def test_variable_is_live() -> None:
    with load(LB_OBJECT) as obj:
        obj.variable("control").generation = 5
        assert obj.variable("control").generation == 5
        assert obj.map(".data")[0].control.generation == 5


def test_map_of_another_object_is_reused_if_it_is_of_the_same_shape() -> None:
    with load(LB_OBJECT) as first, BpfObject.open(LB_OBJECT) as second:
        first.map("members").view()[0].uid = 7
        second.reuse("members", first.map("members").fd)
        with pytest.raises(LoadError, match=r"^map counters: layout differs from that in lb\.bpf\.o$"):
            second.reuse("counters", first.map("members").fd)
        second.load()
        assert second.map("members")[0].uid == 7


def test_program_that_the_verifier_refuses_is_shown_with_what_it_said(compiled: Compile) -> None:
    with BpfObject.open(compiled(BEYOND_THE_PACKET)) as obj, pytest.raises(LoadError) as refusal:
        obj.load()
    first, program, *log = str(refusal.value).split("\n  ")
    assert first == "0.bpf.o: rejected by the kernel: Permission denied"
    assert "prog 'reads_beyond'" in program
    assert log[-1].startswith("R1 offset is outside of the packet") or "invalid access to packet" in log[-2]
    assert not any(line.startswith(("processed", "verification time", "stack depth")) for line in log)


def test_long_log_of_the_verifier_is_cut_and_says_by_how_much(compiled: Compile) -> None:
    with BpfObject.open(compiled(LONG_AND_BEYOND)) as obj, pytest.raises(LoadError) as refusal:
        obj.load()
    _, program, left_out, *log = str(refusal.value).split("\n  ")
    assert "prog 'reads_beyond'" in program
    assert left_out.removeprefix("(").split()[1:] == ["log", "lines", "omitted)"]
    assert int(left_out[1:].split()[0]) > 0
    assert len(log) == 12
    assert any("invalid access to packet" in line for line in log)


def test_tail_counts_the_lines_that_it_leaves_out() -> None:
    log = [f"{n}: r0 = {n}" for n in range(20)]
    frame = ["libbpf: prog 'p': BPF program load failed: X", "-- BEGIN PROG LOAD LOG --", *log, "processed 20 insns"]
    tail = useful_tail([*frame, "-- END PROG LOAD LOG --", "libbpf: failed to load object"])
    expected = ["prog 'p': BPF program load failed: X", "(8 log lines omitted)", *log[8:]]
    assert tail == "".join(f"\n  {line}" for line in expected)
    assert useful_tail([]) == ""


def test_loading_without_capabilities_says_what_is_needed() -> None:
    obj = BpfObject.open(LB_OBJECT)
    os.seteuid(NOBODY)
    try:
        with pytest.raises(NotPermitted, match=r"^not permitted to use BPF programs: run as root"):
            obj.load()
    finally:
        os.seteuid(0)
        obj.close()


# Pinning and adopting


def test_adopted_object_is_the_one_that_was_pinned(bpffs: Path) -> None:
    with load(LB_OBJECT) as first:
        first.pin(str(bpffs))
        first.map("members").view()[0].uid = 7
        program_id = first.program("xdp_lb").id
    with BpfObject.open(LB_OBJECT) as second:
        second.adopt(str(bpffs))
        assert second.map("members")[0].uid == 7
        assert second.program("xdp_lb").id == program_id == pinned_program(str(bpffs), "xdp_lb").id
        assert second.map(".rodata")[0].config.nat_port_first == 1024
    assert program_name(program_id) == "xdp_lb"


def test_descriptor_of_a_pinned_program_is_closed_with_it(bpffs: Path) -> None:
    with load(LB_OBJECT) as first:
        first.pin(str(bpffs))
        before = os.listdir("/proc/self/fd")
        program_id = pinned_program(str(bpffs), "xdp_lb").id
        assert program_by_id(program_id).id == program_id
        assert os.listdir("/proc/self/fd") == before


def test_pins_of_another_shape_are_refused_in_one_line(bpffs: Path, compiled: Compile) -> None:
    with load(compiled(ONE_MAP % "__u64")) as older:
        older.pin(str(bpffs))
    newer = compiled(ONE_MAP % "struct xdp_md")
    with BpfObject.open(newer) as obj, pytest.raises(LoadError) as refusal:
        obj.adopt(str(bpffs))
    assert str(refusal.value) == f"map things: layout differs from that in {newer.name}"


def test_pins_that_are_incomplete_are_refused_in_one_line(bpffs: Path, compiled: Compile) -> None:
    path = compiled(ONE_MAP % "__u64")
    with load(path) as first:
        first.pin(str(bpffs))
    (bpffs / "prog_uses").unlink()
    with BpfObject.open(path) as obj, pytest.raises(LoadError) as refusal:
        obj.adopt(str(bpffs))
    assert str(refusal.value) == f"pin {bpffs}/prog_uses: No such file or directory"
    with pytest.raises(LoadError, match=r"^pin .*/prog_uses: No such file"):
        pinned_program(str(bpffs), "uses")


def test_adopting_without_capabilities_says_what_is_needed(bpffs: Path) -> None:
    with load(LB_OBJECT) as first:
        first.pin(str(bpffs))
    os.seteuid(NOBODY)
    try:
        with (
            BpfObject.open(LB_OBJECT) as second,
            pytest.raises(NotPermitted, match=r"^not permitted to use BPF programs: run as root"),
        ):
            second.adopt(str(bpffs))
    finally:
        os.seteuid(0)


def test_closing_gives_every_descriptor_back(bpffs: Path) -> None:
    with load(LB_OBJECT) as first:
        first.pin(str(bpffs))
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        with BpfObject.open(LB_OBJECT) as obj:
            obj.adopt(str(bpffs))
            obj.close()
        load(LB_OBJECT).close()
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_program_that_is_gone_has_no_name() -> None:
    assert program_name(2**31 - 1) == "?"


# Running


def test_frame_may_grow_or_shrink_in_a_run(compiled: Compile) -> None:
    source = 'SEC("xdp") int grows(struct xdp_md *ctx) { return bpf_xdp_adjust_head(ctx, %d) ? 0 : 2; }'
    for delta, size in ((-20, 34), (4, 60)):
        with load(compiled(source % delta)) as obj:
            frame = bytes(range(64)) if delta > 0 else ETHERNET
            assert len(obj.program("grows").test_run(frame).data) == size


def test_syscall_program_changes_its_context_in_place(compiled: Compile) -> None:
    class Context(ctypes.Structure):
        _fields_ = (("given", ctypes.c_uint32), ("made", ctypes.c_uint32))

    source = (
        "struct c { __u32 given, made; };"
        ' SEC("syscall") int doubles(struct c *c) { c->made = c->given * 2; return -3; }'
    )
    with load(compiled(source)) as obj:
        context = Context(given=21)
        program: Program = obj.program("doubles")
        assert program.run_syscall(context) == -3
        assert context.made == 42
