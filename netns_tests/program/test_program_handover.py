"""What the program does with packets while flows of the program before are still being copied to its tables: what may
come yet is waited for, since clients and members send again what they hear nothing of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from netns_tests.oracle import table
from netns_tests.oracle.model import SECOND_NS, Slot
from netns_tests.oracle.table import (
    MEMBER_PORT,
    V4,
    Balancer,
    Family,
    both_families,
    dropped,
    from_client,
    member_reached,
    segment,
)

WAITS_S = 2
REASONS = {"nat": "DROP_NAT_NO_FLOW", "dr": "DROP_NO_BACKEND"}
TRACKED = Slot(current=1, previous=2, track=True)

both_modes = pytest.mark.parametrize("mode", REASONS)


@pytest.fixture
def handed_on(balancer: Balancer) -> Callable[[], None]:
    """Begins it, for WAITS_S from then on."""
    return lambda: balancer.program.wait_for_flows_until(balancer.now_ns + WAITS_S * SECOND_NS)


def serve(balancer: Balancer, family: Family, mode: str, protocol: str = "tcp") -> None:
    balancer.serve(balancer.service(family, protocol, size=2, mode=mode, slots=[TRACKED]))


@both_families
@both_modes
def test_flow_that_is_not_there_is_waited_for_but_a_new_one_is_served(
    balancer: Balancer, handed_on: Callable[[], None], family: Family, mode: str
) -> None:
    serve(balancer, family, mode)
    data = family.request(from_client(flags="A"))
    handed_on()
    assert balancer.send(data) == dropped(REASONS[mode], data)
    assert member_reached(balancer.send(family.request(from_client(sport=5)))) == 1
    assert member_reached(balancer.send(family.request(from_client(sport=5, flags="A")))) == 1
    balancer.after(WAITS_S + 1)
    assert member_reached(balancer.send(data)) == 2


@both_families
@both_modes
@pytest.mark.parametrize("end", ["FA", "RA"])
def test_connection_between_the_same_ports_that_has_ended_tells_nothing(
    balancer: Balancer, handed_on: Callable[[], None], family: Family, mode: str, end: str
) -> None:
    """A later one may have been opened since the copy."""
    serve(balancer, family, mode)
    data = family.request(from_client(flags="A"))
    for flags in ("S", "A", end):
        assert member_reached(balancer.send(family.request(from_client(flags=flags)))) == 1
    handed_on()
    assert balancer.send(data) == dropped(REASONS[mode], data)
    balancer.change(slots=[replace(TRACKED, current=2)])
    assert member_reached(balancer.send(family.request(from_client()))) == 2
    assert member_reached(balancer.send(data)) == 2


@both_families
@both_modes
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_flow_that_is_there_goes_on(
    balancer: Balancer, handed_on: Callable[[], None], family: Family, mode: str, protocol: str
) -> None:
    serve(balancer, family, mode, protocol)
    first = member_reached(balancer.send(family.request(from_client(protocol))))
    handed_on()
    balancer.change(slots=[replace(TRACKED, current=3 - first)])
    assert member_reached(balancer.send(family.request(from_client(protocol, flags="A")))) == first


@both_families
def test_reply_waits_for_its_translation(balancer: Balancer, handed_on: Callable[[], None], family: Family) -> None:
    serve(balancer, family, "nat")
    answer = family.from_member(segment("tcp", MEMBER_PORT, 2000, "SA"))
    handed_on()
    assert balancer.answer(answer) == dropped("DROP_NAT_NO_FLOW", answer)


@pytest.mark.parametrize("ended", [True, False])
def test_reply_does_not_go_to_a_client_that_had_the_port_before(
    balancer: Balancer, handed_on: Callable[[], None], ended: bool
) -> None:
    serve(balancer, V4, "nat")
    port = balancer.opened(V4.request(from_client()))
    if ended:
        balancer.send(V4.request(from_client(flags="R")))
    else:
        balancer.after(table.SETTINGS.nat_opening_timeout_s + 1)
    answer = V4.from_member(segment("tcp", MEMBER_PORT, port, "SA"))
    handed_on()
    assert balancer.answer(answer) == dropped("DROP_NAT_NO_FLOW", answer)
