"""Programs that are held on an interface, in a network namespace of its own: they are there while the link is."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from xdp import attach, tc
from xdp.errors import AttachError, NoSuchInterface, NotSupported, Occupied
from xdp.link import hold_at_tc, hold_at_xdp
from xdp.netlink import route_socket
from xdp.object import DECAP_OBJECT, BpfObject, Program
from xdp.tests.kernels import TCX
from xdp.tests.namespaces import NEAR, namespace_with_veth

LOOPBACK, NOWHERE = 1, 99
TC_PROGRAM, XDP_PROGRAM = "decap_send", "xdp_decap"


@pytest.fixture
def near() -> Iterator[int]:
    """The index of one end of a veth pair."""
    with namespace_with_veth("xdp-link"):
        yield socket.if_nametoindex(NEAR)


@pytest.fixture(scope="module")
def loaded() -> Iterator[BpfObject]:
    with BpfObject.open(DECAP_OBJECT) as obj:
        obj.load()
        yield obj


@pytest.fixture
def at_xdp(loaded: BpfObject) -> Program:
    return loaded.program(XDP_PROGRAM)


@pytest.fixture
def at_tc(loaded: BpfObject) -> Program:
    return loaded.program(TC_PROGRAM)


@pytest.mark.parametrize("generic", [False, True])
def test_xdp_program_is_there_while_it_is_held(near: int, at_xdp: Program, generic: bool) -> None:
    with hold_at_xdp(near, at_xdp.fd, generic=generic):
        assert attach.attached(near) == attach.Attached("generic" if generic else "native", at_xdp.id)
    assert attach.attached(near) is None


def test_xdp_program_of_someone_else_stays(near: int, at_xdp: Program) -> None:
    attach.attach(near, at_xdp.fd, at_xdp.id)
    with pytest.raises(Occupied, match=rf"^interface {near}: cannot attach: another XDP program is attached$"):
        hold_at_xdp(near, at_xdp.fd)
    assert attach.attached(near)


def test_what_is_held_is_not_replaced(near: int, at_xdp: Program, loaded: BpfObject) -> None:
    with BpfObject.open(loaded.path) as obj, hold_at_xdp(near, at_xdp.fd):
        obj.load()
        other = obj.program(XDP_PROGRAM)
        with pytest.raises(AttachError):
            attach.attach(near, other.fd, other.id, replace_fd=at_xdp.fd)
        assert attach.attached(near) == attach.Attached("native", at_xdp.id)


def test_driver_without_native_xdp_is_told_apart(near: int, at_xdp: Program) -> None:
    with pytest.raises(NotSupported, match=r"^interface 1: cannot attach: Operation not supported$"):
        hold_at_xdp(LOOPBACK, at_xdp.fd)


@TCX
@pytest.mark.parametrize("egress", [False, True])
def test_programs_at_tc_stand_side_by_side(near: int, at_tc: Program, egress: bool, loaded: BpfObject) -> None:
    with BpfObject.open(loaded.path) as other:
        other.load()
        with hold_at_tc(near, at_tc.fd, egress=egress), hold_at_tc(near, other.program(TC_PROGRAM).fd, egress=egress):
            pass
    with hold_at_tc(near, at_tc.fd, egress=egress), pytest.raises(Occupied):  # the same program once only
        hold_at_tc(near, at_tc.fd, egress=egress)


@TCX
def test_interface_that_is_not_there_is_refused(near: int, at_tc: Program) -> None:
    with pytest.raises(NoSuchInterface, match=rf"^interface {NOWHERE}: cannot attach: No such device$"):
        hold_at_tc(NOWHERE, at_tc.fd, egress=False)


# On kernels without tcx


@pytest.mark.parametrize("egress", [False, True])
def test_program_on_clsact_is_there_while_it_is_held(near: int, at_tc: Program, egress: bool) -> None:
    before = qdiscs(near)
    with tc.hold(near, at_tc.fd, at_tc.id, TC_PROGRAM, egress=egress):
        assert filters(near, egress) == [at_tc.id]
        assert qdiscs(near) != before
    assert (filters(near, egress), qdiscs(near)) == ([], before)


def test_program_on_clsact_leaves_ours_of_the_other_kind_alone(near: int, at_tc: Program) -> None:
    tc.attach(near, at_tc.fd, TC_PROGRAM)
    with tc.hold(near, at_tc.fd, at_tc.id, TC_PROGRAM, egress=True):
        tc.detach(near)
        assert filters(near, egress=True) == [at_tc.id]


def filters(ifindex: int, egress: bool) -> list[int]:
    with route_socket() as ipr:
        found = ipr.get_filters(index=ifindex, parent=0xFFFF_FFF3 if egress else 0xFFFF_FFF2)
        return [message["handle"] for message in found if message["handle"]]


def qdiscs(ifindex: int) -> list[str]:
    with route_socket() as ipr:
        return [message.get_attr("TCA_KIND") for message in ipr.get_qdiscs(index=ifindex)]
