"""What the program does with one frame after another: the life of a translation in mode nat, and its ports."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from scapy.layers.inet import IPOption_Router_Alert

from netns_tests.oracle import packets
from netns_tests.oracle.model import Slot
from netns_tests.oracle.table import (
    MEMBER_PORT,
    SETTINGS,
    V4,
    Balancer,
    Family,
    both_families,
    both_protocols,
    client_port_of,
    dropped,
    from_client,
    member_reached,
    redirected,
    segment,
)
from netns_tests.oracle.wire import address


def test_a_reset_without_a_connection_opens_none(balancer: Balancer) -> None:
    balancer.serve(balancer.service())
    reset = V4.request(from_client(flags="R"))
    assert balancer.send(reset) == dropped("DROP_NAT_NO_FLOW", reset)


@pytest.mark.parametrize("end", ["FA", "RA"])
def test_a_connection_opened_again_after_its_end_is_a_new_one_with_the_same_port(balancer: Balancer, end: str) -> None:
    balancer.serve(balancer.service(size=2))
    port = balancer.opened(V4.request(from_client()))
    balancer.send(V4.request(from_client(flags=end)))
    balancer.change(slots=[Slot(2)])
    assert member_reached(balancer.send(V4.request(from_client(flags="A")))) == 1
    outcome = balancer.send(V4.request(from_client()))
    assert outcome == redirected(V4.to_member(segment("tcp", port, MEMBER_PORT), member=2))


def test_a_repeated_syn_opens_nothing_new(balancer: Balancer) -> None:
    balancer.serve(balancer.service())
    first, second = (balancer.send(V4.request(from_client())) for _ in range(2))
    assert first == second
    assert balancer.program.count(1).connections == 1


@pytest.mark.parametrize(
    ("flags", "answer", "lives_s"),
    [
        ("S", None, SETTINGS.nat_opening_timeout_s),
        ("A", "A", 3600),
        ("FA", "A", 3600),
        ("FA", "FA", SETTINGS.nat_closed_timeout_s),
        ("A", "R", SETTINGS.nat_closed_timeout_s),
        ("R", None, SETTINGS.nat_closed_timeout_s),
    ],
)
def test_a_connection_lives_as_long_as_its_state_says(
    balancer_with_ports: Callable[[int], Balancer], flags: str, answer: str | None, lives_s: int
) -> None:
    balancer = balancer_with_ports(1)
    balancer.serve(balancer.service())
    port = balancer.opened(V4.request(from_client()))
    balancer.send(V4.request(from_client(flags=flags)))
    if answer:
        balancer.answer(V4.from_member(segment("tcp", MEMBER_PORT, port, answer)))
    other = V4.request(from_client(sport=5))
    balancer.after(lives_s)
    assert balancer.send(other) == dropped("DROP_NAT_NO_PORT", other)
    balancer.after(1)
    assert balancer.opened(other) == port


@both_families
def test_a_port_taken_over_belongs_to_its_new_flow(
    balancer_with_ports: Callable[[int], Balancer], family: Family
) -> None:
    balancer = balancer_with_ports(1)
    balancer.serve(balancer.service(family, "udp"))
    port = balancer.opened(family.request(from_client("udp", sport=1)))
    balancer.after(SETTINGS.udp_timeout_s + 1)
    balancer.opened(family.request(from_client("udp", sport=2)))
    reply = balancer.answer(family.from_member(segment("udp", MEMBER_PORT, port)))
    assert reply == redirected(family.to_client(segment("udp", packets.SERVICE_PORT, 2)))


@both_families
@both_protocols
def test_traffic_of_either_side_keeps_a_flow(balancer: Balancer, family: Family, protocol: str) -> None:
    balancer.serve(balancer.service(family, protocol, size=2, flow_timeout_s=120))
    port = balancer.opened(family.request(from_client(protocol)))
    balancer.send(family.request(from_client(protocol, flags="A")))
    for _ in range(3):
        balancer.after(100)
        balancer.answer(family.from_member(segment(protocol, MEMBER_PORT, port, "A")))
    balancer.change(slots=[Slot(2)])
    assert member_reached(balancer.send(family.request(from_client(protocol, flags="A")))) == 1


@both_families
def test_a_reply_entry_that_was_evicted_is_made_again(balancer: Balancer, family: Family) -> None:
    balancer.serve(balancer.service(family))
    port = balancer.opened(family.request(from_client()))
    balancer.program.forget_replies()
    balancer.after(1)
    request = balancer.send(family.request(from_client(flags="A")))
    reply = balancer.answer(family.from_member(segment("tcp", MEMBER_PORT, port, "A")))
    assert client_port_of(request.frame) == port
    assert reply == redirected(family.to_client(segment("tcp", packets.SERVICE_PORT, packets.CLIENT_PORT, "A")))


# Ports


@both_families
@both_protocols
def test_every_port_is_given_once_and_then_none(
    balancer_with_ports: Callable[[int], Balancer], family: Family, protocol: str
) -> None:
    balancer = balancer_with_ports(2)
    balancer.serve(balancer.service(family, protocol))
    requests = [family.request(from_client(protocol, sport)) for sport in (1, 2, 3)]
    assert {balancer.opened(request) for request in requests[:2]} == {2000, 2001}
    assert balancer.send(requests[2]) == dropped("DROP_NAT_NO_PORT", requests[2])


def test_members_have_ports_of_their_own(balancer_with_ports: Callable[[int], Balancer]) -> None:
    balancer = balancer_with_ports(1)
    balancer.serve(balancer.service(size=2))
    assert balancer.opened(V4.request(from_client(sport=1))) == 2000
    balancer.change(slots=[Slot(2)])
    assert balancer.opened(V4.request(from_client(sport=2))) == 2000


def test_a_flow_that_lost_its_port_to_another_never_shares_it(
    balancer_with_ports: Callable[[int], Balancer],
) -> None:
    balancer = balancer_with_ports(1)
    balancer.serve(balancer.service())
    balancer.opened(V4.request(from_client(sport=1)))
    balancer.program.forget_replies()
    balancer.opened(V4.request(from_client(sport=2)))
    balancer.after(2)
    robbed = V4.request(from_client(sport=1, flags="A"))
    assert balancer.send(robbed) == dropped("DROP_NAT_NO_PORT", robbed)


def test_a_late_reset_of_a_dead_member_does_not_close_the_flow_that_has_moved(balancer: Balancer) -> None:
    balancer.serve(balancer.service(size=2))
    port = balancer.opened(V4.request(from_client()))
    balancer.change(members={**balancer.services[0].members, 1: balancer.member(V4, 1, alive=False)}, slots=[Slot(2)])
    assert balancer.opened(V4.request(from_client())) == port
    balancer.send(V4.request(from_client(flags="A")))
    balancer.answer(V4.from_member(segment("tcp", MEMBER_PORT, port, "R")))
    (_, flow), *_ = balancer.program.entries("nat_flows4")
    assert flow.state == balancer.program.bpf.types.enum("nat_state")["NAT_ESTABLISHED"]


def test_nothing_is_translated_while_the_way_to_the_member_is_unknown(balancer: Balancer) -> None:
    balancer.serve(balancer.service(members={1: balancer.member(V4, 1, resolved=False)}))
    frame = V4.request(from_client())
    assert balancer.send(frame) == dropped("DROP_NO_NEIGHBOUR", frame)
    assert not balancer.program.entries("nat_flows4")
    assert not balancer.program.entries("nat_replies4")


def test_a_later_fragment_with_options_is_the_hosts(balancer: Balancer) -> None:
    balancer.serve(balancer.service())
    fragment = packets.frame(packets.ip4(options=[IPOption_Router_Alert()], frag=3), packets.tcp())
    assert balancer.send(fragment).reason == "PASS_FRAGMENT"


@both_families
def test_the_port_of_a_service_on_nats_own_address_is_never_given(
    balancer_with_ports: Callable[[int], Balancer], family: Family
) -> None:
    balancer = balancer_with_ports(2)
    own = balancer.service(family, address=address(family.balancer), port=2000)
    balancer.serve(balancer.service(family), own)
    assert balancer.opened(family.request(from_client(sport=1))) == 2001
    second = family.request(from_client(sport=2))
    assert balancer.send(second) == dropped("DROP_NAT_NO_PORT", second)


def test_cpus_that_open_flows_at_once_never_share_a_port(balancer: Balancer) -> None:
    balancer.serve(balancer.service())
    frames = [V4.request(from_client(sport=sport)) for sport in range(10_000, 10_800)]
    on_every_cpu(lambda worker: send_all(balancer, frames[worker::WORKERS]))
    assert_every_flow_has_a_port_of_its_own(balancer, len(frames))


def test_cpus_that_open_the_same_flow_at_once_agree_on_its_port(balancer: Balancer) -> None:
    balancer.serve(balancer.service())
    frames = [V4.request(from_client(sport=sport)) for sport in range(10_000, 10_400)]
    on_every_cpu(lambda worker: send_all(balancer, frames))
    assert_every_flow_has_a_port_of_its_own(balancer, len(frames))


WORKERS = 4


def send_all(balancer: Balancer, frames: list[bytes]) -> None:
    for frame in frames:
        balancer.program.run_uncounted(frame, balancer.front)


def on_every_cpu(work: Callable[[int], None]) -> None:
    """Start the workers at the same moment, each on a CPU of its own as far as there are so many."""
    cpus = sorted(os.sched_getaffinity(0))
    start = threading.Barrier(WORKERS)

    def run(worker: int) -> None:
        os.sched_setaffinity(0, {cpus[worker % len(cpus)]})
        start.wait()
        work(worker)

    with ThreadPoolExecutor(WORKERS) as workers:
        list(workers.map(run, range(WORKERS)))


def assert_every_flow_has_a_port_of_its_own(balancer: Balancer, flows: int) -> None:
    client_ports = {value.port: key.source_port for key, value in balancer.program.entries("nat_flows4")}
    reply_ports = {key.destination_port: value.client_port for key, value in balancer.program.entries("nat_replies4")}
    assert len(client_ports) == flows
    assert client_ports == reply_ports
