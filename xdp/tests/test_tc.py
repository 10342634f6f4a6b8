"""Programs at tc ingress, in a network namespace of its own: put on, replaced, taken off, beside those of others."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from xdp import tc
from xdp.errors import XdpError
from xdp.netlink import route_socket
from xdp.object import DECAP_OBJECT, BpfObject, Program
from xdp.tests.namespaces import NEAR, namespace_with_veth

NAME = "decap_send"
INGRESS, EGRESS = 0xFFFF_FFF2, 0xFFFF_FFF3


@pytest.fixture
def near() -> Iterator[int]:
    """The index of one end of a veth pair."""
    with namespace_with_veth("xdp-tc"):
        yield socket.if_nametoindex(NEAR)


@pytest.fixture
def program() -> Iterator[Program]:
    with BpfObject.open(DECAP_OBJECT) as obj:
        obj.load()
        yield obj.program(NAME)


def filters(ifindex: int, parent: int = INGRESS) -> list[Any]:
    with route_socket() as ipr:
        return [message for message in ipr.get_filters(index=ifindex, parent=parent) if message["handle"]]


def qdiscs(ifindex: int) -> list[str]:
    with route_socket() as ipr:
        return [message.get_attr("TCA_KIND") for message in ipr.get_qdiscs(index=ifindex)]


def test_program_is_attached_once_however_often_it_is_put_there(near: int, program: Program) -> None:
    assert not tc.is_attached(near)
    for _ in range(3):
        tc.attach(near, program.fd, NAME)
    assert tc.is_attached(near)
    (found,) = filters(near)
    assert found.get_attr("TCA_KIND") == "bpf"


def test_detach_leaves_nothing_and_may_be_repeated(near: int, program: Program) -> None:
    before = qdiscs(near)
    tc.attach(near, program.fd, NAME)
    assert qdiscs(near) != before
    for _ in range(2):
        tc.detach(near)
        assert (tc.is_attached(near), qdiscs(near)) == (False, before)


@pytest.mark.parametrize("parent", [INGRESS, EGRESS])
def test_filter_of_someone_else_stays(near: int, program: Program, parent: int) -> None:
    with route_socket() as ipr:
        ipr.tc("add", "clsact", near)
        ipr.tc("add-filter", "bpf", near, parent=parent, prio=1, handle=1, protocol=3, fd=program.fd, name="theirs")
    tc.attach(near, program.fd, NAME)
    tc.detach(near)
    assert [message["handle"] for message in filters(near, parent)] == [1]


@pytest.mark.parametrize(("place", "parent"), [(tc.LAST_IN, INGRESS), (tc.LAST_OUT, EGRESS)])
def test_each_place_has_a_program_of_its_own(near: int, program: Program, place: tc.Place, parent: int) -> None:
    tc.attach(near, program.fd, NAME)
    tc.attach(near, program.fd, "last", place)
    assert filters(near, parent)[-1].get_attr("TCA_OPTIONS").get_attr("TCA_BPF_NAME") == "last"
    tc.detach(near)
    assert (tc.is_attached(near), tc.is_attached(near, place)) == (False, True)
    tc.detach(near, place)
    assert "clsact" not in qdiscs(near)


def test_nothing_is_attached_to_an_interface_that_is_gone(near: int) -> None:
    with route_socket() as ipr:
        ipr.link("del", index=near)
    assert not tc.is_attached(near)


def test_detaching_from_an_interface_that_is_gone_is_no_error(near: int) -> None:
    with route_socket() as ipr:
        ipr.link("del", index=near)
    tc.detach(near)


def test_interface_that_is_gone_is_named(near: int, program: Program) -> None:
    with route_socket() as ipr:
        ipr.link("del", index=near)
    with pytest.raises(XdpError, match=f"interface {near}: cannot attach decap_send: "):
        tc.attach(near, program.fd, NAME)
