"""`xdp-lb metrics` and `xdp-lb top` on real traffic: what they say is what clients have sent."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from netns_tests.bed.servers import start_http, start_udp_echo
from netns_tests.bed.topology import Bed
from netns_tests.bed.traffic import backend_list, bracketed, loading, udp_flows

ECHO_PORT = 5353


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    """HTTP and a UDP echo in mode nat, both families."""
    with Bed(backends=2) as b:
        for backend in b.backends:
            start_http(b, backend)
            start_udp_echo(backend, ECHO_PORT)
        b.xdp_lb("attach", "eth0", "--vip", f"{b.vip4}:80", "--backends", backend_list(b, "ipv4"))
        for vip, family in ((b.vip4, "ipv4"), (b.vip6, "ipv6")):
            b.xdp_lb("vip", "add", f"{bracketed(vip)}:{ECHO_PORT}/udp", "--backends", backend_list(b, family))
        yield b


def samples(bed: Bed) -> list[Sample]:
    families = text_string_to_metric_families(bed.xdp_lb("metrics").stdout)
    return [sample for family in families for sample in family.samples]


def total(found: list[Sample], name: str, **labels: str) -> float:
    """The sum of all samples with these labels, among others."""
    return sum(s.value for s in found if s.name == name and labels.items() <= s.labels.items())


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_packets_and_connections_of_clients_are_counted_exactly(bed: Bed, family: str) -> None:
    address = bed.vip4 if family == "ipv4" else bed.vip6
    vip = f"{bracketed(address)}:{ECHO_PORT}/udp"

    def counted() -> list[float]:
        found = samples(bed)
        return [
            total(found, "xdp_lb_backend_packets_total", vip=vip, direction="to_backend"),
            total(found, "xdp_lb_backend_packets_total", vip=vip, direction="to_client"),
            total(found, "xdp_lb_backend_connections_total", vip=vip),
            total(found, "xdp_lb_backend_open_connections", vip=vip),
        ]

    before = counted()
    with udp_flows(bed, address, ECHO_PORT, count=20) as flows:
        for flow in flows:
            for _ in range(3):
                flow.ask()
    assert [now - then for now, then in zip(counted(), before, strict=True)] == [60, 60, 20, 20]


def test_drain_is_seen_in_states_and_slots(bed: Bed) -> None:
    vip, (first, second) = f"{bed.vip4}:80/tcp", bed.backends
    bed.xdp_lb("backend", "drain", vip, first.ipv4)
    found = samples(bed)
    bed.xdp_lb("backend", "weight", vip, first.ipv4, "1")
    states = {state: total(found, "xdp_lb_service_backends", vip=vip, state=state) for state in ("active", "draining")}
    draining = {
        backend.label: total(found, "xdp_lb_backend_draining", vip=vip, backend=f"{backend.ipv4}:80")
        for backend in (first, second)
    }
    assert (states, draining) == ({"active": 1, "draining": 1}, {"b1": 1, "b2": 0})
    moving = total(found, "xdp_lb_service_slots_in_transition", vip=vip)
    assert 0 < moving < total(found, "xdp_lb_service_ring_slots", vip=vip)


def test_packets_without_a_backend_are_counted_as_such(bed: Bed) -> None:
    vip, reason = f"{bed.vip4}:5300/udp", {"reason": "drop_no_backend"}
    bed.xdp_lb("vip", "add", vip)
    before = total(samples(bed), "xdp_lb_dropped_packets_total", **reason)
    with bed.client.entered():
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sender:
        for _ in range(7):
            sender.sendto(b"?", (bed.vip4, 5300))
    after = total(samples(bed), "xdp_lb_dropped_packets_total", **reason)
    bed.xdp_lb("vip", "remove", vip)
    assert after - before == 7


def test_program_that_someone_took_off_is_not_attached(bed: Bed) -> None:
    before = samples(bed)
    bed.lb.run(["ip", "link", "set", "eth0", "xdp", "off"])
    gone = samples(bed)
    bed.xdp_lb("attach", "eth0")
    attached = [total(found, "xdp_lb_interface_attached", interface="eth0") for found in (before, gone, samples(bed))]
    assert attached == [1, 0, 1]
    assert total(before, "xdp_lb_interface_info", interface="eth0", xdp_mode="native") == 1
    assert total(gone, "xdp_lb_interface_info", interface="eth0") == 0


def test_every_sample_names_the_namespace(bed: Bed) -> None:
    assert {sample.labels["netns"] for sample in samples(bed)} == {bed.lb.name}


def test_top_shows_the_rates_of_a_load(bed: Bed) -> None:
    with loading(bed, f"http://{bed.vip4}/", connections=5) as load:
        before = load.report.requests
        blocks = bed.xdp_lb("top", "-d", "1", "-n", "2").stdout.split("\n\nxdp-lb top")
        requests = load.report.requests - before
    assert len(blocks) == 2
    for block in blocks:
        connections, packets = figures(block, f"{bed.vip4}:80/tcp")
        assert 0 < connections < requests
        assert packets > 3 * connections, "a request has a handshake, data and an end"
        assert figures(block, f"{bed.vip4}:{ECHO_PORT}/udp") == (0, 0)


def figures(block: str, name: str) -> tuple[float, float]:
    """Connections and packets a second; less than 10,000 of each."""
    found = re.search(rf"^ *{re.escape(name)} +\S+ +\S+ +([0-9.]+) +([0-9.]+) ", block, re.MULTILINE)
    assert found, f"{name}: not in\n{block}"
    return float(found[1]), float(found[2])
