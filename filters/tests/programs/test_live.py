"""Programs at a real interface, in a namespace of the test's own: frames that are not linear, tags beside them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from filters.compiler.expr import compile_expression
from filters.compiler.hook import TC_IN, Hook
from filters.compiler.translate import translate
from filters.programs.program import Count, Rule, assemble, counters, load
from filters.tests.packets import FRAMES
from xdp import tc
from xdp.tests.namespaces import FAR, NEAR, namespace_with_veth

# A packet socket makes frames of more than a page with nothing but the Ethernet header in the linear area.
NOT_LINEAR = FRAMES["large udp"][:42] + bytes(n * 7 & 0xFF for n in range(8000))
DEADLINE_S = 5


@pytest.fixture
def far() -> Iterator[int]:
    """The index of the end of a veth that receives what is sent on the other one, NEAR."""
    with namespace_with_veth("filters", mtu=9000):
        yield socket.if_nametoindex(FAR)


def matched(far: int, hook: Hook, expressions: list[str], frame: bytes) -> list[str]:
    """Sends the frame to an interface whose tc ingress counts what the expressions match; those that did."""
    ours = f"ether src 02:00:00:00:00:02 and len = {len(frame)}"
    counted = counters(len(expressions) + 1)
    rules = [
        Rule(translate(compile_expression(expression), hook), [Count(counted, index)])
        for index, expression in enumerate([*expressions, ours])
    ]
    with load("filter", hook, assemble(hook, rules)) as program:
        tc.attach(far, program.fd, "filter")
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
            sender.bind((NEAR, 0))
            sender.send(frame)
        deadline = time.monotonic() + DEADLINE_S
        while counted.total(len(expressions)).packets == 0:
            assert time.monotonic() < deadline, "the frame did not arrive"
        found = [expression for index, expression in enumerate(expressions) if counted.total(index).packets]
        tc.detach(far)
    os.close(counted.fd)
    return found


def test_bytes_that_are_not_linear_are_found_at_tc(far: int) -> None:
    matching = ["ether[8041] = 0xb9", "udp src port 53 and host 10.1.2.3", "ip[2:2] = 1308", "udp[4000:2] = 0x282f"]
    other = ["ether[8042] = 0", "udp port 54", "ether[8041] = 0xba", "tcp"]
    assert matched(far, TC_IN, matching + other, NOT_LINEAR) == matching


def test_without_helpers_the_same_frame_has_no_bytes_behind_its_ethernet_header(far: int) -> None:
    """That the test above tests what it says."""
    direct_only = replace(TC_IN, load_bytes=None)
    assert matched(far, direct_only, ["ether proto 0x0800", "udp src port 53"], NOT_LINEAR) == ["ether proto 0x0800"]


def test_tag_that_the_kernel_took_off_is_seen(far: int) -> None:
    matching = ["vlan 100", "vlan 100 and udp port 53", f"len = {len(FRAMES['vlan'])}", "inbound", f"ifindex {far}"]
    other = ["vlan 101", "ip", "udp port 53", "outbound", f"ifindex {far + 1}"]
    assert matched(far, TC_IN, matching + other, FRAMES["vlan"]) == matching


def test_both_tags_of_qinq_are_seen(far: int) -> None:
    expressions = ["vlan 100 and vlan 200 and tcp port 80", "vlan 200", "vlan 100 and ip"]
    assert matched(far, TC_IN, expressions, FRAMES["qinq"]) == expressions[:1]
