"""Attaching, against a real kernel: each test works on interfaces of a namespace of its own."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from pyroute2 import netns

from xdp.attach import AUTO, GENERIC, NATIVE, Attached, attach, attached, detach
from xdp.errors import AttachError, NoSuchInterface, NotPermitted, NotSupported, Occupied
from xdp.netlink import IPRoute
from xdp.tests.namespaces import own_namespace

SYS_BPF = {"x86_64": 321, "aarch64": 280}[platform.machine()]
BPF_PROG_LOAD, BPF_OBJ_GET_INFO_BY_FD = 5, 15
BPF_PROG_TYPE_XDP = 6
R0_IS_XDP_PASS, EXIT = 0x00000002_000000B7, 0x95
NOBODY = 65534


@dataclass(frozen=True)
class Program:
    fd: int
    id: int


def bpf(command: int, attributes: bytes) -> int:
    """bpf(2), with the attributes padded with zeros over every field that is left out."""
    buffer = ctypes.create_string_buffer(attributes, 128)
    result = ctypes.CDLL(None, use_errno=True).syscall(SYS_BPF, command, buffer, len(buffer))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"bpf command {command}")
    return int(result)


def load_pass_program() -> Program:
    instructions = (ctypes.c_uint64 * 2)(R0_IS_XDP_PASS, EXIT)
    licence = ctypes.create_string_buffer(b"GPL")
    pointers = ctypes.addressof(instructions), ctypes.addressof(licence)
    fd = bpf(BPF_PROG_LOAD, struct.pack("IIQQ", BPF_PROG_TYPE_XDP, 2, *pointers))
    info = (ctypes.c_uint32 * 64)()
    bpf(BPF_OBJ_GET_INFO_BY_FD, struct.pack("IIQ", fd, len(info) * 4, ctypes.addressof(info)))
    return Program(fd, info[1])


@pytest.fixture
def program() -> Iterator[Program]:
    loaded = load_pass_program()
    yield loaded
    os.close(loaded.fd)


other_program = program


@pytest.fixture
def ipr() -> Iterator[IPRoute]:
    with own_namespace("xdp-attach") as opened:
        yield opened


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """Another network namespace."""
    name = f"xdp-attach-{os.getpid()}-elsewhere"
    netns.create(name)
    yield name
    netns.remove(name)


@pytest.fixture
def veth(ipr: IPRoute) -> int:
    ipr.link("add", ifname="near", kind="veth", peer={"ifname": "far"})
    set_tx_checksum_offload("far", on=False)
    return int(ipr.link_lookup(ifname="near")[0])


@pytest.fixture
def tun(ipr: IPRoute) -> int:
    """A device whose driver has no native XDP in this mode."""
    ipr.link("add", ifname="tun0", kind="tuntap", mode="tun")
    return int(ipr.link_lookup(ifname="tun0")[0])


def set_tx_checksum_offload(name: str, on: bool) -> None:
    command = ["ethtool", "-K", name, "tx", "on" if on else "off"]
    subprocess.run(command, check=True, capture_output=True)


@pytest.mark.parametrize("mode", [NATIVE, GENERIC])
def test_program_is_attached_in_the_mode_asked_for(veth: int, program: Program, mode: str) -> None:
    assert attached(veth) is None
    assert attach(veth, program.fd, program.id, mode) == Attached(mode, program.id)
    assert attached(veth) == Attached(mode, program.id)


def test_auto_mode_prefers_native(veth: int, program: Program) -> None:
    assert attach(veth, program.fd, program.id, AUTO) == Attached(NATIVE, program.id)


def test_auto_mode_falls_back_to_generic_and_says_why(tun: int, program: Program) -> None:
    result = attach(tun, program.fd, program.id, AUTO)
    assert (result.mode, result.program_id) == (GENERIC, program.id)
    assert result.warning is not None
    assert result.warning.startswith("tun0: generic mode, several times slower than native: ")


def test_native_mode_without_driver_support_attaches_nothing(tun: int, program: Program) -> None:
    with pytest.raises(NotSupported, match=r"^tun0: cannot attach: "):
        attach(tun, program.fd, program.id, NATIVE)
    assert attached(tun) is None


def test_attaching_twice_changes_nothing(veth: int, program: Program) -> None:
    first = attach(veth, program.fd, program.id)
    assert attach(veth, program.fd, program.id) == first
    assert attach(veth, program.fd, program.id, replace_fd=program.fd) == first


@pytest.mark.parametrize("mode", [NATIVE, GENERIC])
def test_older_program_is_replaced_in_its_own_mode(
    veth: int, program: Program, other_program: Program, mode: str
) -> None:
    attach(veth, program.fd, program.id, mode)
    result = attach(veth, other_program.fd, other_program.id, AUTO, replace_fd=program.fd)
    assert result == attached(veth) == Attached(mode, other_program.id)


def test_mode_of_a_running_program_is_not_changed_behind_its_back(
    veth: int, program: Program, other_program: Program
) -> None:
    attach(veth, program.fd, program.id, GENERIC)
    with pytest.raises(AttachError, match=r"^near: runs in generic mode: detach it first"):
        attach(veth, other_program.fd, other_program.id, NATIVE, replace_fd=program.fd)
    assert attached(veth) == Attached(GENERIC, program.id)


@pytest.mark.parametrize(("mode", "word"), [(NATIVE, "xdp"), (GENERIC, "xdpgeneric")])
def test_program_of_someone_else_stays_and_is_named(
    veth: int, program: Program, other_program: Program, mode: str, word: str
) -> None:
    attach(veth, program.fd, program.id, mode)
    with pytest.raises(Occupied) as refusal:
        attach(veth, other_program.fd, other_program.id, describe=lambda i: f"id {i}, name foo")
    assert str(refusal.value) == (
        f"near: another XDP program is attached (id {program.id}, name foo):"
        f" detach it first: ip link set dev near {word} off"
    )
    assert attached(veth) == Attached(mode, program.id)


def test_command_that_the_refusal_names_frees_the_interface(
    veth: int, program: Program, other_program: Program
) -> None:
    attach(veth, program.fd, program.id, GENERIC)
    with pytest.raises(Occupied) as refusal:
        attach(veth, other_program.fd, other_program.id)
    subprocess.run(str(refusal.value).rpartition(": ")[2].split(), check=True)
    assert attached(veth) is None


def test_replacing_refuses_when_another_program_has_come_between(
    veth: int, program: Program, other_program: Program
) -> None:
    attach(veth, program.fd, program.id)
    newer = load_pass_program()
    try:
        with pytest.raises(Occupied, match=rf"\(id {program.id}\)"):
            attach(veth, newer.fd, newer.id, replace_fd=other_program.fd)
    finally:
        os.close(newer.fd)
    assert attached(veth) == Attached(NATIVE, program.id)


@pytest.mark.parametrize("mode", [NATIVE, GENERIC])
def test_detaching_twice_is_no_error(veth: int, program: Program, mode: str) -> None:
    attach(veth, program.fd, program.id, mode)
    for _ in range(2):
        detach(veth, program.fd)
        assert attached(veth) is None


def test_detaching_without_a_program_to_compare_takes_any_off(veth: int, program: Program) -> None:
    attach(veth, program.fd, program.id)
    detach(veth)
    assert attached(veth) is None


def test_detaching_leaves_the_program_of_someone_else(veth: int, program: Program, other_program: Program) -> None:
    attach(veth, program.fd, program.id)
    detach(veth, other_program.fd)
    assert attached(veth) == Attached(NATIVE, program.id)


def test_interface_that_is_gone_runs_nothing(ipr: IPRoute, veth: int, program: Program) -> None:
    attach(veth, program.fd, program.id)
    ipr.link("del", index=veth)
    assert attached(veth) is None
    detach(veth, program.fd)
    with pytest.raises(NoSuchInterface, match=rf"^interface {veth}: no longer exists"):
        attach(veth, program.fd, program.id)


def test_attaching_without_capabilities_says_what_is_needed(veth: int, program: Program) -> None:
    os.seteuid(NOBODY)
    try:
        with pytest.raises(NotPermitted, match=r"^near: cannot attach: not permitted: run as root"):
            attach(veth, program.fd, program.id)
    finally:
        os.seteuid(0)


def test_veth_whose_peer_leaves_checksums_out_is_pointed_at(veth: int, program: Program) -> None:
    set_tx_checksum_offload("far", on=True)
    assert attach(veth, program.fd, program.id).warning == (
        "near: packets from its peer far lack checksums: ethtool -K far tx off"
    )


def test_veth_whose_peer_is_out_of_sight_is_pointed_at(
    ipr: IPRoute, veth: int, program: Program, elsewhere: str
) -> None:
    ipr.link("set", index=ipr.link_lookup(ifname="far")[0], net_ns_fd=elsewhere)
    assert attach(veth, program.fd, program.id).warning == (
        "near: is a veth: its peer must send complete checksums and accept frames sent by XDP:"
        " run ethtool -K DEV tx off gro on at the peer"
    )


def test_the_rest_of_pyroute2_is_imported_when_it_is_asked_for() -> None:
    script = (
        "import sys, xdp.netlink\n"
        "assert 'pyroute2.ndb.main' not in sys.modules\n"
        "from pyroute2 import NDB, IPRoute\n"
        "assert IPRoute is xdp.netlink.IPRoute\n"
        "import pyroute2\n"
        "assert pyroute2.NDB is NDB and pyroute2.netns.create\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
