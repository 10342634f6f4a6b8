"""KernelDataplane on the real kernel: what one object writes, a fresh one over the same pins reads.

Each test has a bpffs and a network namespace of its own, with the ends of one veth pair, `near` and
`far`, in it. Packets go through BPF_PROG_TEST_RUN.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from pyroute2 import netns
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from filters.compiler.ebpf import R0, R1, R2, R3, R6, Assembler
from filters.compiler.hook import XDP
from filters.programs.program import load
from lb.dataplane import allocation, lookup
from lb.dataplane.dataplane import KernelDataplane
from lb.errors import DataplaneError
from lb.hashing.ring import MEMBER_MASK, TRACK, Plan, current_member
from lb.model.forwarding import Attachment, Counters, NextHop
from lb.model.options import Options
from lb.model.state import Backend, Interface, Mode, Service, XdpMode
from lb.model.vip import Address, Vip
from lb.tests.fakes.memory import MemoryDataplane
from xdp import attach as xdp_attach
from xdp import libbpf
from xdp.attach import GENERIC, NATIVE, Attached
from xdp.netlink import route_socket
from xdp.object import LB_OBJECT, BpfObject, pinned_program
from xdp.pins import Pins
from xdp.stages import Stages

SMALL = 251
WEB = Vip.parse("10.0.0.1:80/tcp")
TLS = Vip.parse("10.0.0.1:443/tcp")
DNS6 = Vip.parse("[fd00::1]:53/udp")
NEAR, FAR = Interface("near"), Interface("far")
SOURCE = {4: ip_address("10.0.0.254"), 6: ip_address("fd00::fe")}
SRC_MAC, DST_MAC = b"\x02\0\0\0\0\x01", b"\x02\0\0\0\0\x02"


def backend(number: int, port: int = 0, weight: int = 1, *, family: int = 4) -> Backend:
    address = f"10.0.{number >> 8}.{number & 255}" if family == 4 else f"fd00::{number:x}"
    return Backend(ip_address(address), port, weight)


def backends(*numbers: int, family: int = 4) -> tuple[Backend, ...]:
    return tuple(backend(number, family=family) for number in numbers)


A, B, C = backends(11, 12, 13)


def service(vip: Vip, *members: Backend, mode: Mode = Mode.NAT, **shape: Any) -> Service:
    return Service(vip, mode, members, **({"ring_size": SMALL} | shape))


def hops_for(*services: Service, ifindex: int = 1) -> dict[Address, NextHop]:
    return {
        b.address: NextHop("near", ifindex, SOURCE[b.address.version], SRC_MAC, DST_MAC, True)
        for each in services
        for b in each.backends
    }


def frame(vip: Vip, port: int, flags: str = "S") -> bytes:
    """A client's packet: TCP with these flags, or a UDP datagram."""
    ip = IP(src="10.0.9.9", dst=str(vip.address)) if vip.address.version == 4 else IPv6(src="fd00::9", dst=vip.address)
    l4 = TCP(sport=port, dport=vip.port, flags=flags) if vip.protocol == 6 else UDP(sport=port, dport=vip.port)
    return bytes(Ether(dst=SRC_MAC, src=DST_MAC) / ip / l4)


@dataclass
class Kernel:
    """One network namespace's maps: a dataplane over them, and what a test looks at underneath."""

    pins: Pins
    dataplane: KernelDataplane

    def reopen(self) -> KernelDataplane:
        """As the next process sees it."""
        self.dataplane.close()
        self.dataplane = KernelDataplane(self.pins)
        return self.dataplane

    def serve(self, *services: Service) -> list[Plan]:
        """All of them and no others, as the balancer does."""
        self.dataplane.load(services)
        plans = [self.dataplane.put(each, hops_for(each)) for each in services]
        self.dataplane.publish(services)
        for vip in set(self.dataplane.vips()) - {each.vip for each in services}:
            self.dataplane.remove(vip)
        return plans

    @property
    def generation(self) -> Path:
        current = self.pins.current()
        assert current
        return current

    def send(self, packet: bytes) -> bytes:
        return pinned_program(str(self.generation), "xdp_lb").test_run(packet).data

    def backend_of(self, vip: Vip, port: int, flags: str = "S") -> Address:
        """Where a client's packet goes, in mode nat."""
        return ip_address(Ether(self.send(frame(vip, port, flags))).payload.dst)

    def words(self, vip: Vip) -> list[int]:
        held = self.dataplane.maps.allocations[vip]
        return list(self.dataplane.maps.rings.slot_words(held))

    def numbers(self, vip: Vip) -> dict[str, int]:
        held = self.dataplane.maps.allocations[vip]
        return {str(ip_address(key)): number for (key, _), number in self.dataplane.maps.members.numbers(held).items()}

    def members(self) -> Any:
        """The live map, as an array of struct member."""
        return self.dataplane.programs.obj.map("members").view()

    def alive_members(self) -> int:
        """In all the map, whatever service they belong to."""
        with BpfObject.open(LB_OBJECT) as obj:
            obj.adopt(str(self.generation))
            return sum(member.flags & 1 for member in obj.map("members").view())

    def uids(self, vip: Vip) -> list[int]:
        held, members = self.dataplane.maps.allocations[vip], self.members()
        return [members[held.member_base + n].uid for n in sorted(self.numbers(vip).values())]

    def counters(self, vip: Vip, name: Backend) -> Counters:
        found = self.dataplane.statistics().backends[vip]
        return next(c for b, c in found.items() if b.address == name.address)

    def running(self) -> dict[str, int]:
        """Interface -> id of the program on it."""
        return {name: a.program_id for name, a in xdp_attach.all_attached().items()}


@pytest.fixture
def pins(tmp_path: Path) -> Iterator[Pins]:
    made = Pins(tmp_path / "run", "test.dataplane")
    yield made
    made.remove()


@pytest.fixture
def kernel(pins: Pins, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    """With tables of flows that are made quickly."""
    monkeypatch.setattr(allocation, "TRACKED_FLOWS", 1 << 12)
    monkeypatch.setattr(allocation, "NAT_FLOWS", 1 << 12)
    made = Kernel(pins, KernelDataplane(pins))
    yield made
    made.dataplane.close()


@pytest.fixture
def links() -> Iterator[None]:
    name = f"lb-dataplane-{os.getpid()}"
    with ExitStack() as cleanup:
        netns.create(name)
        cleanup.callback(netns.remove, name)
        netns.pushns(name)
        cleanup.callback(netns.popns)
        Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")  # which talks by itself
        with route_socket() as ipr:
            ipr.link("add", ifname="near", kind="veth", peer={"ifname": "far"})
            for interface in ("near", "far"):
                ipr.link("set", index=ipr.link_lookup(ifname=interface)[0], state="up")
        yield


def becomes_true(condition: Callable[[], bool], timeout_s: float = 5) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        os.sched_yield()
    return condition()


# What is there, and what was before


def test_nothing_is_loaded_until_load(kernel: Kernel) -> None:
    dataplane = kernel.dataplane
    assert (dataplane.loaded, dataplane.generation, dataplane.vips(), dataplane.attachments()) == (False, 0, set(), {})
    assert dataplane.plan(service(WEB, A)) == Plan(SMALL, SMALL, SMALL, 0)
    with pytest.raises(DataplaneError, match="no program loaded: run xdp-lb attach IFACE"):
        dataplane.statistics()
    assert not kernel.pins.mount_point.exists()


def test_generation_is_kept_for_the_next_process(kernel: Kernel) -> None:
    kernel.serve(service(WEB, A))
    assert kernel.dataplane.generation == 0
    kernel.dataplane.generation = 1 << 40
    assert kernel.reopen().generation == 1 << 40


def test_unload_leaves_no_pin_and_no_mount(kernel: Kernel) -> None:
    kernel.serve(service(WEB, A))
    assert str(kernel.pins.mount_point) in Path("/proc/self/mounts").read_text()
    kernel.dataplane.unload()
    assert not kernel.dataplane.loaded
    assert str(kernel.pins.mount_point) not in Path("/proc/self/mounts").read_text()
    assert not kernel.reopen().loaded


@pytest.mark.parametrize(
    ("vip", "family"), [(WEB, 4), (Vip.parse("[fd00::1]:80/tcp"), 6), (Vip.parse("10.0.0.1:0/udp"), 4), (DNS6, 6)]
)
@pytest.mark.parametrize("mode", Mode)
def test_next_process_finds_the_same_service(kernel: Kernel, vip: Vip, family: int, mode: Mode) -> None:
    given = service(vip, *backends(11, 12, family=family), mode=mode, flow_timeout_s=77)
    kernel.serve(given)
    allocations = dict(kernel.dataplane.maps.allocations)
    words = kernel.words(vip)
    kernel.reopen()
    assert kernel.dataplane.maps.allocations == allocations
    assert (allocations[vip].mode, allocations[vip].ring_size, allocations[vip].flow_timeout_s) == (mode, SMALL, 77)
    assert kernel.words(vip) == words
    assert kernel.dataplane.plan(given) == Plan(SMALL, 0, 0, 0)


# The same scenario gives the same plans in memory and in the kernel

SCENARIO: list[Sequence[Service]] = [
    [service(WEB, A, B)],
    [service(WEB, A, B, C)],
    [service(WEB, A, replace(B, draining=True), C), service(TLS, C)],
    [service(WEB, replace(A, weight=9), C), service(TLS, C, mode=Mode.NAT)],
    [service(WEB, A, B, C), service(DNS6, *backends(21, 22, 23, family=6), mode=Mode.DR)],
    [service(WEB)],
    [service(WEB, B), service(TLS, A, ring_size=509)],
    [service(WEB, *backends(*range(30, 50)))],
    [service(WEB, A, mode=Mode.DR), service(TLS, A, B, ring_size=257)],
    [service(WEB, A, B, C, mode=Mode.DR, ring_size=509)],
    [],
]


def test_kernel_and_memory_make_the_same_plans(kernel: Kernel) -> None:
    memory = MemoryDataplane()
    for services in SCENARIO:
        memory.load(services)
        kernel.dataplane.load(services)
        for each in services:
            foreseen = memory.plan(each), kernel.dataplane.plan(each)
            done = memory.put(each, hops_for(each)), kernel.dataplane.put(each, hops_for(each))
            assert foreseen == done
            assert done[0] == done[1], each
        for vip in memory.vips() - {each.vip for each in services}:
            memory.remove(vip)
            kernel.dataplane.remove(vip)
        assert kernel.dataplane.vips() == memory.vips() == kernel.reopen().vips()
        in_kernel, in_memory = kernel.dataplane.statistics(), memory.statistics()
        assert in_kernel.backends == in_memory.backends
        assert in_kernel.slots_in_transition == in_memory.slots_in_transition
    assert kernel.alive_members() == 0


# Packets


def test_packets_reach_the_backend_that_the_ring_names_and_are_counted(kernel: Kernel) -> None:
    kernel.serve(service(WEB, A, B))
    reached = [kernel.backend_of(WEB, port) for port in range(1024, 1056)]
    assert set(reached) == {A.address, B.address}
    counted = {b.address: c.connections for b, c in kernel.dataplane.statistics().backends[WEB].items()}
    assert counted == {b.address: reached.count(b.address) for b in (A, B)}


def test_packets_of_a_service_without_backends_are_dropped_by_name(kernel: Kernel) -> None:
    kernel.serve(service(WEB))
    kernel.send(frame(WEB, 1024))
    assert kernel.dataplane.statistics().reasons["drop_no_backend"] == 1


def test_every_reason_but_forwarded_is_named_in_the_statistics(kernel: Kernel) -> None:
    kernel.serve(service(WEB))
    reasons = kernel.dataplane.statistics().reasons
    assert all(name.startswith(("answered_", "pass_", "drop_", "noted_")) for name in reasons)
    assert {"pass_not_ip", "drop_no_backend"} <= reasons.keys()


def test_service_with_any_port_is_served_until_it_is_removed(kernel: Kernel) -> None:
    anything = Vip.parse("10.0.0.1:0/tcp")
    kernel.serve(service(anything, A))
    assert kernel.backend_of(TLS, 1024) == A.address
    kernel.serve(service(WEB, A))
    assert kernel.send(frame(TLS, 1024)) == frame(TLS, 1024)


# Members


def test_member_keeps_its_number_its_uid_and_its_counters_through_changes(kernel: Kernel) -> None:
    kernel.serve(service(WEB, A, B, C))
    for port in range(1024, 1100):
        kernel.send(frame(WEB, port))
    numbers, uids, counted = kernel.numbers(WEB), kernel.uids(WEB), kernel.counters(WEB, C)
    assert counted.connections > 0
    kernel.serve(service(WEB, B, replace(C, weight=5)))
    kernel.reopen()
    assert kernel.numbers(WEB) == {str(b.address): numbers[str(b.address)] for b in (B, C)}
    assert kernel.uids(WEB) == uids[1:]
    assert kernel.counters(WEB, C) == counted


def test_removed_backend_that_comes_back_is_another_member(kernel: Kernel) -> None:
    kernel.serve(service(WEB, A))
    kernel.send(frame(WEB, 1024))
    (uid,) = kernel.uids(WEB)
    kernel.serve(service(WEB))
    kernel.serve(service(WEB, A))
    assert kernel.uids(WEB) != [uid]
    assert kernel.counters(WEB, A) == Counters()


def test_outgrown_block_of_members_moves_with_all_that_is_in_it(kernel: Kernel) -> None:
    many = backends(*range(100, 130))
    kernel.serve(service(WEB, A, B, ring_size=509), service(TLS, C))
    before = [kernel.backend_of(WEB, port) for port in range(1024, 1056)]
    numbers, uids, base = kernel.numbers(WEB), kernel.uids(WEB), kernel.dataplane.maps.allocations[WEB].member_base
    counted = kernel.counters(WEB, A)
    kernel.serve(service(WEB, A, B, *many, ring_size=509), service(TLS, C))
    kernel.reopen()
    assert kernel.dataplane.maps.allocations[WEB].member_base != base
    assert {name: number for name, number in kernel.numbers(WEB).items() if name in numbers} == numbers
    assert kernel.uids(WEB)[:2] == uids
    assert kernel.counters(WEB, A) == counted
    assert [kernel.backend_of(WEB, port, "A") for port in range(1024, 1056)] == before
    assert kernel.alive_members() == 2 + len(many) + 1


def test_room_of_the_moved_block_is_used_again_without_what_was_in_it(kernel: Kernel) -> None:
    kernel.serve(service(WEB, A, B, ring_size=509))
    kernel.send(frame(WEB, 1024))
    base = kernel.dataplane.maps.allocations[WEB].member_base
    kernel.serve(service(WEB, A, B, *backends(*range(100, 130)), ring_size=509), service(TLS, A))
    assert kernel.dataplane.maps.allocations[TLS].member_base == base
    assert kernel.counters(TLS, A) == Counters()


def test_members_that_a_killed_process_left_in_no_service_are_not_taken_over(kernel: Kernel) -> None:
    kernel.serve(service(WEB, A, B, C))
    kernel.send(frame(WEB, 1024))
    uids = kernel.uids(WEB)
    kernel.dataplane.maps.services.erase(kernel.dataplane.maps.allocations[WEB])  # killed in the middle of remove()
    kernel.reopen()
    assert kernel.dataplane.vips() == set()
    kernel.serve(service(WEB, C, A))
    assert not set(kernel.uids(WEB)) & set(uids)
    assert kernel.alive_members() == 2
    assert {c.packets for c in kernel.dataplane.statistics().backends[WEB].values()} == {0}


def test_members_that_a_killed_process_left_in_a_service_never_spill_into_the_next_block(kernel: Kernel) -> None:
    first, second, third = (backends(*range(at, at + 15)) for at in (100, 120, 140))
    kernel.serve(service(WEB, *first), service(TLS, A, B))
    killed_before_erasing(kernel, service(WEB, *second))
    assert len(kernel.numbers(WEB)) == 30
    others = kernel.numbers(TLS), kernel.uids(TLS)
    kernel.serve(service(WEB, *third), service(TLS, A, B))
    assert (kernel.numbers(TLS), kernel.uids(TLS)) == others
    assert kernel.numbers(WEB).keys() == {str(b.address) for b in third}
    assert kernel.alive_members() == len(third) + 2


def killed_before_erasing(kernel: Kernel, wanted: Service) -> None:
    """Puts a service and stops before the members that it no longer has are erased."""

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel.dataplane.maps.members, "erase", killed)
        with pytest.raises(KeyboardInterrupt):
            kernel.dataplane.put(wanted, hops_for(wanted))
    kernel.reopen()


def test_the_next_hops_of_new_and_unresolved_backends_are_unknown_and_the_others_may_be_left_out(
    kernel: Kernel,
) -> None:
    given = service(WEB, A, B)
    hops = hops_for(given)
    assert kernel.dataplane.unknown(given) == {A.address, B.address}
    kernel.serve(service(WEB))
    kernel.dataplane.put(given, {**hops, B.address: replace(hops[B.address], dst_mac=None)})
    other_port = replace(A, port=8080)
    assert kernel.dataplane.unknown(given) == {B.address}
    assert kernel.dataplane.unknown(service(WEB, A, other_port)) == {A.address}
    kernel.dataplane.put(service(WEB, A, B, C), hops_for(service(WEB, C)))
    assert kernel.dataplane.unknown(service(WEB, A, B, C)) == {B.address}
    assert kernel.dataplane.statistics().unresolved == {B.address}


@pytest.mark.parametrize("vip", [WEB, Vip.parse("[fd00::1]:80/tcp")], ids=str)
def test_a_plan_counts_the_open_connections_on_the_slots_that_move(kernel: Kernel, vip: Vip) -> None:
    near, far = backends(11, 12, family=vip.address.version)
    kernel.serve(service(vip, near))
    for port in range(2000, 2100):
        kernel.send(frame(vip, port))
    for port in range(2000, 2010):
        kernel.send(frame(vip, port, "R"))
    assert kernel.dataplane.plan(service(vip, near)).flows == 0
    assert kernel.dataplane.plan(service(vip, far)).flows == 90
    half = kernel.dataplane.plan(service(vip, near, far)).flows
    assert half is not None
    assert 20 < half < 70


def test_a_plan_of_direct_routing_counts_no_connections_since_nobody_knows_them(kernel: Kernel) -> None:
    kernel.serve(service(WEB, A, mode=Mode.DR))
    assert kernel.dataplane.plan(service(WEB, A, B, mode=Mode.DR)).flows is None


def test_hop_of_a_backend_is_rewritten_and_one_that_is_silent_keeps_the_last_on_its_link(kernel: Kernel) -> None:
    given = service(WEB, A)
    kernel.serve(given)
    other = bytes.fromhex("020000000077")
    hop = replace(hops_for(given)[A.address], dst_mac=other)
    for known in (hop, replace(hop, dst_mac=None)):
        kernel.dataplane.put(given, {A.address: known})
        assert kernel.send(frame(WEB, 1024))[:6] == other
    kernel.dataplane.put(given, {A.address: replace(hop, dst_mac=None, ifindex=hop.ifindex + 1)})
    kernel.send(frame(WEB, 1024))
    assert kernel.dataplane.statistics().reasons["drop_no_neighbour"] == 1


# Services put in the place of others


def test_service_put_in_the_place_of_a_removed_one_inherits_nothing(kernel: Kernel) -> None:
    kernel.serve(service(WEB, A, B))
    kernel.send(frame(WEB, 1024))
    kernel.dataplane.remove(WEB)
    assert kernel.alive_members() == 0
    kernel.serve(service(TLS, B, C))
    assert kernel.dataplane.maps.allocations[TLS].ring_base == 0
    assert {current_member(word) for word in kernel.words(TLS)} == {1, 2}
    assert set(kernel.dataplane.statistics().backends[TLS].values()) == {Counters()}
    assert kernel.send(frame(WEB, 1024)) == frame(WEB, 1024)


@pytest.mark.parametrize("other", [{"mode": Mode.DR}, {"ring_size": 509}, {"mode": Mode.DR, "ring_size": 509}], ids=str)
def test_service_of_another_shape_takes_the_place_of_what_a_killed_process_left(
    kernel: Kernel, other: dict[str, Any]
) -> None:
    kernel.serve(service(WEB, A, B))
    wanted = service(WEB, B, C, **other)
    size = wanted.ring_size
    assert kernel.dataplane.plan(wanted) == Plan(size, size, size, 0)
    assert kernel.serve(wanted) == [Plan(size, size, size, 0)]
    web = kernel.reopen().maps.allocations[WEB]
    assert (web.mode, web.ring_size) == (wanted.mode, size)
    assert kernel.numbers(WEB).keys() == {str(B.address), str(C.address)}
    assert kernel.alive_members() == 2


def test_removing_a_service_that_is_not_there_is_no_error(kernel: Kernel) -> None:
    kernel.serve(service(WEB, A))
    kernel.dataplane.remove(TLS)
    assert kernel.dataplane.vips() == {WEB}


def test_map_that_is_broken_by_hand_is_repaired_by_putting_the_service_again(kernel: Kernel) -> None:
    given = service(WEB, A, B)
    kernel.serve(given)
    words = kernel.words(WEB)
    web = kernel.dataplane.maps.allocations[WEB]
    kernel.dataplane.maps.rings._words[web.ring_base] = 77 | 99 << 15 | TRACK
    kernel.dataplane.maps.rings._words[web.ring_base + 1] = 0
    members = kernel.members()
    members[web.member_base + 2] = type(members[0])()
    kernel.reopen()
    kernel.serve(given)
    assert [current_member(word) for word in kernel.words(WEB)] == words
    assert {kernel.backend_of(WEB, port) for port in range(1024, 1056)} == {A.address, B.address}


def test_two_hundred_services_are_served_side_by_side(kernel: Kernel) -> None:
    some = [service(Vip.parse(f"10.1.0.{n}:80"), *backends(n, n + 1)) for n in range(1, 201)]
    kernel.serve(*some)
    kernel.reopen()
    assert kernel.dataplane.vips() == {each.vip for each in some}
    for each in some:
        assert kernel.backend_of(each.vip, 1024) in {b.address for b in each.backends}


# Growth


@pytest.fixture
def small_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "MIN_SERVICES", 4)
    monkeypatch.setattr(allocation, "MIN_SLOTS", 1024)
    monkeypatch.setattr(allocation, "MIN_MEMBERS", 128)
    monkeypatch.setattr(allocation, "MIN_SERVER_IDS", 2)


@pytest.fixture
def grown(small_maps: None, links: None, kernel: Kernel) -> Kernel:
    """Two services on two interfaces, one of them in transition, in maps that are full."""
    kernel.serve(service(WEB, A, B), service(TLS, A, mode=Mode.DR))
    kernel.dataplane.attach(NEAR)
    kernel.dataplane.attach(FAR)
    kernel.serve(service(WEB, A, B), service(TLS, A, C, mode=Mode.DR))
    return kernel


def vips(count: int) -> list[Vip]:
    return [Vip.parse(f"10.2.0.{n}:80") for n in range(1, count + 1)]


def test_outgrown_maps_are_replaced_with_all_that_is_in_them(grown: Kernel) -> None:
    ports = range(1024, 1056)
    reached = [grown.backend_of(WEB, port) for port in ports]
    tracked = [grown.send(frame(TLS, port)) for port in ports]
    before, words, uids = grown.dataplane.statistics(), grown.words(TLS), grown.uids(WEB)
    first, old = grown.generation, grown.running()
    grown.dataplane.generation = 9
    big = [service(vip, A) for vip in vips(9)]
    grown.dataplane.load([service(WEB, A, B), service(TLS, A, C, mode=Mode.DR), *big])
    grown.reopen()
    assert grown.generation != first
    assert not first.exists()
    assert grown.dataplane.generation == 9
    after = grown.dataplane.statistics()
    assert replace(after, maps=before.maps) == before
    assert after.maps["members"] > before.maps["members"]
    assert (grown.words(TLS), grown.uids(WEB)) == (words, uids)
    assert [grown.backend_of(WEB, port, "A") for port in ports] == reached
    assert [grown.send(frame(TLS, port)) for port in ports] == tracked
    now = grown.running()
    assert now.keys() == old.keys() == {"near", "far"}
    assert len(set(now.values())) == 1
    assert not set(now.values()) & set(old.values())


def test_table_of_translations_that_is_added_later_keeps_the_flows_of_the_other_family(
    small_maps: None, kernel: Kernel
) -> None:
    kernel.serve(service(WEB, A, B))
    reached = [kernel.backend_of(WEB, port) for port in range(1024, 1056)]
    kernel.serve(service(WEB, A, B), service(DNS6, *backends(21, family=6)))
    assert kernel.backend_of(DNS6, 1024) == ip_address("fd00::15")
    kernel.serve(service(WEB, B, C), service(DNS6, *backends(21, family=6)))
    again = [kernel.backend_of(WEB, port, "A") for port in range(1024, 1056)]
    assert [a for a, b in zip(again, reached, strict=True) if b == B.address] == [B.address] * reached.count(B.address)


def test_server_ids_that_outgrow_their_map_are_all_in_force(small_maps: None, kernel: Kernel) -> None:
    for count in (1, 2, 5, 30):
        ids = {f"0:{number:04x}" for number in range(count)}
        kernel.serve(service(Vip.parse("10.2.0.1:443/udp"), replace(A, server_ids=tuple(ids)), B, mode=Mode.DR))
        held = kernel.dataplane.programs.obj.map("quic_members")
        assert {f"{key.config}:{bytes(key.server_id[:2]).hex()}" for key, _ in held.items()} == ids


def test_no_table_is_as_small_as_it_was_compiled(kernel: Kernel) -> None:
    kernel.serve(service(WEB, A), service(DNS6, *backends(21, family=6)))
    obj = kernel.dataplane.programs.obj
    sizes = {name: len(obj.map(name)) for name in obj.map_names if not name.startswith(".")}
    assert {name for name, size in sizes.items() if size == 1} == {"verdicts"}  # one for each CPU


@pytest.mark.parametrize("what", ["services", "slots", "members"])
def test_all_services_can_be_exchanged_for_as_many_others_at_once(small_maps: None, kernel: Kernel, what: str) -> None:
    shape: dict[str, Any] = {"ring_size": 1021} if what == "slots" else {}
    members = backends(*range(100, 125)) if what == "members" else (A,)
    for first, last in ((0, 4), (4, 8), (8, 16), (16, 30)):
        wanted = [service(vip, *members, **shape) for vip in vips(30)[first:last]]
        kernel.serve(*wanted)
        assert kernel.reopen().vips() == {each.vip for each in wanted}


def test_mode_of_an_interface_survives_growth(grown: Kernel) -> None:
    grown.dataplane.detach("far")
    grown.dataplane.attach(Interface("far", XdpMode.GENERIC))
    grown.serve(service(WEB, A), *(service(vip, A) for vip in vips(9)))
    assert {name: a.mode for name, a in grown.dataplane.attachments().items()} == {"near": NATIVE, "far": GENERIC}


def test_growth_that_the_kernel_refuses_leaves_the_old_maps_in_force(
    grown: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, old = grown.generation, grown.running()
    monkeypatch.setattr(allocation, "MIN_SLOTS", 1 << 35)
    with pytest.raises(DataplaneError, match=r"lb\.bpf\.o: rejected by the kernel"):
        grown.dataplane.load([service(vip, A) for vip in vips(9)])
    assert (grown.generation, grown.running()) == (first, old)
    assert grown.dataplane.vips() == {WEB, TLS}


# Cut short in the middle of growth


@pytest.mark.parametrize("killed_at", ["prepare", "put_in_force", "attach", "second attach", "discard"])
def test_growth_that_was_cut_short_is_finished_by_the_next_attach(
    grown: Kernel, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    wanted = [service(WEB, A, B), service(TLS, A, C, mode=Mode.DR), *(service(vip, A) for vip in vips(9))]
    with monkeypatch.context() as patch:
        cut_short(patch, grown, killed_at)
        with pytest.raises(KeyboardInterrupt):
            grown.dataplane.load(wanted)
    grown.reopen()
    assert grown.dataplane.attachments().keys() == {"near", "far"}
    grown.serve(*wanted)
    grown.dataplane.attach(NEAR)
    grown.dataplane.attach(FAR)
    assert grown.pins.others() == []
    assert set(grown.running().values()) == {pinned_program(str(grown.generation), "xdp_lb").id}
    assert grown.dataplane.vips() == {each.vip for each in wanted}


def cut_short(patch: pytest.MonkeyPatch, kernel: Kernel, where: str) -> None:
    """Ends the next growth, as a kill would, before the step named."""
    calls = iter([where != "second attach"])

    def killed(*_: object) -> None:
        if next(calls, True):
            raise KeyboardInterrupt
        attach(NEAR)

    attach = kernel.dataplane.programs.attach
    if where == "prepare":
        patch.setattr(BpfObject, "pin", killed)
    elif where == "put_in_force":
        patch.setattr(Pins, "put_in_force", killed)
    elif where.endswith("attach"):
        patch.setattr(kernel.dataplane.programs, "attach", killed)
    else:
        patch.setattr(Pins, "discard", killed)


def test_leftovers_of_a_first_load_that_was_cut_short_do_no_harm(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Pins, "put_in_force", killed)
        with pytest.raises(KeyboardInterrupt):
            kernel.dataplane.load([service(WEB, A)])
    assert not kernel.reopen().loaded
    kernel.serve(service(WEB, A))
    assert kernel.pins.others() == []
    kernel.dataplane.unload()
    assert not kernel.reopen().loaded


# Interfaces


@pytest.mark.usefixtures("links")
def test_program_is_attached_detached_and_seen_by_the_next_process(kernel: Kernel) -> None:
    kernel.serve(service(WEB, A))
    done = kernel.dataplane.attach(NEAR)
    assert (done.interface, done.mode) == ("near", NATIVE)
    assert kernel.reopen().attachments() == {"near": replace(done, warning=None)}
    assert kernel.dataplane.attach(NEAR).program_id == done.program_id
    kernel.dataplane.detach("near")
    kernel.dataplane.detach("near")
    assert kernel.dataplane.attachments() == {}


@pytest.mark.usefixtures("links")
def test_program_of_someone_else_is_neither_replaced_nor_listed_nor_taken_off(kernel: Kernel) -> None:
    kernel.serve(service(WEB, A))
    with BpfObject.open(LB_OBJECT) as other, route_socket() as ipr:
        other.load()
        index = ipr.link_lookup(ifname="near")[0]
        theirs = other.program("xdp_lb")
        xdp_attach.attach(index, theirs.fd, theirs.id)
        with pytest.raises(DataplaneError, match=rf"near: another XDP program is attached \(id {theirs.id}, name xdp"):
            kernel.dataplane.attach(NEAR)
        kernel.dataplane.detach("near")
        assert kernel.dataplane.attachments() == {}
        assert xdp_attach.attached(index) == Attached(NATIVE, theirs.id)


@pytest.mark.usefixtures("links")
def test_detaching_from_an_interface_that_is_gone_is_no_error(kernel: Kernel) -> None:
    kernel.serve(service(WEB, A))
    kernel.dataplane.attach(NEAR)
    with route_socket() as ipr:
        ipr.link("del", index=ipr.link_lookup(ifname="near")[0])
    kernel.dataplane.detach("near")
    assert kernel.dataplane.attachments() == {}


@pytest.mark.usefixtures("links")
def test_pins_of_another_version_are_named_once_and_can_be_taken_away(kernel: Kernel) -> None:
    kernel.serve(service(WEB, A))
    attached = kernel.dataplane.attach(NEAR)
    with BpfObject.open(LB_OBJECT) as other:
        other.load()
        pin = kernel.generation / "map_members"
        pin.unlink()
        libbpf.pin(other.map("reasons").fd, os.fsencode(pin))
    kernel.reopen()
    with pytest.raises(DataplaneError) as refusal:
        kernel.dataplane.load([service(WEB, A)])
    assert str(refusal.value) == (
        "the loaded programs are of another version of xdp-lb"
        " (map members: layout differs from that in its description): run xdp-lb detach, then xdp-lb attach IFACE"
    )
    assert kernel.dataplane.loaded
    assert kernel.dataplane.attachments() == {"near": Attachment("near", NATIVE, attached.program_id)}
    kernel.dataplane.detach("near")
    kernel.dataplane.unload()
    assert (kernel.running(), kernel.dataplane.loaded) == ({}, False)


# Transitions


def test_transition_whose_time_is_over_ends_with_the_next_change(kernel: Kernel) -> None:
    brief = service(WEB, A, B, mode=Mode.DR, flow_timeout_s=1)
    kernel.serve(brief)
    kernel.serve(replace(brief, backends=(A, replace(B, draining=True))))
    assert kernel.dataplane.statistics().slots_in_transition[WEB] > 0
    drained = replace(brief, backends=(A, replace(B, draining=True)))
    assert becomes_true(lambda: kernel.dataplane.plan(drained).in_transition == 0)
    kernel.serve(drained)
    assert all(word <= MEMBER_MASK for word in kernel.words(WEB))
    assert kernel.dataplane.statistics().slots_in_transition == {WEB: 0}


def test_slot_with_a_live_flow_stays_tracked_after_its_transition(kernel: Kernel) -> None:
    brief = service(WEB, A, B, mode=Mode.DR, flow_timeout_s=2)
    kernel.serve(brief)
    drained = replace(brief, backends=(A, replace(B, draining=True)))
    kernel.serve(drained)
    ports = range(1024, 1040)

    def over() -> bool:
        for port in ports:
            kernel.send(frame(WEB, port, "A"))
        return kernel.dataplane.plan(drained).in_transition == 0

    assert becomes_true(over)
    kernel.serve(drained)
    words = kernel.words(WEB)
    tracked = [word for word in words if word & TRACK]
    assert 0 < len(tracked) <= len(ports)
    assert all(word >> 15 & MEMBER_MASK == 0 for word in words)


def test_transition_whose_time_is_over_ends_when_it_is_settled(kernel: Kernel) -> None:
    brief, lasting = (service(vip, A, B, mode=Mode.DR, flow_timeout_s=s) for vip, s in ((WEB, 1), (TLS, 3600)))
    kernel.serve(brief, lasting)
    kernel.serve(*(replace(each, backends=(A, replace(B, draining=True))) for each in (brief, lasting)))
    assert becomes_true(lambda: kernel.dataplane.due() == [WEB])
    lasting_words = kernel.words(TLS)
    for vip in (WEB, TLS):
        kernel.dataplane.settle(vip)
    assert all(word <= MEMBER_MASK for word in kernel.words(WEB))
    assert kernel.words(TLS) == lasting_words
    assert (kernel.dataplane.due(), kernel.reopen().due()) == ([], [])


def test_slots_with_flows_that_are_open_are_settled_but_not_tried_again_at_once(kernel: Kernel) -> None:
    brief = service(WEB, A, B, mode=Mode.DR, flow_timeout_s=2)
    kernel.serve(brief)
    kernel.serve(replace(brief, backends=(A, replace(B, draining=True))))
    ports = range(1024, 1040)

    def over() -> bool:
        for port in ports:
            kernel.send(frame(WEB, port, "A"))
        return kernel.dataplane.due() == [WEB]

    assert becomes_true(over)
    kernel.dataplane.settle(WEB)
    words = kernel.words(WEB)
    assert 0 < sum(bool(word & TRACK) for word in words) <= len(ports)
    assert all(word >> 15 & MEMBER_MASK == 0 for word in words)
    assert kernel.dataplane.due() == []
    assert kernel.reopen().due() == [WEB]  # who comes anew knows nothing of that


EVERYWHERE = Vip.parse("10.7.0.0/16:0/tcp")
RANGE = Vip.parse("10.7.1.0/24:8000-8999/tcp")
EU = Vip.parse("10.0.0.1:80/tcp@eu")
CLIENTS = (ip_network("10.0.9.0/24"),)


def held_by_lookups(kernel: Kernel) -> dict[str, int]:
    """Map name -> how many entries it has, of those that have any."""
    sizes = {name: len(list(kernel.dataplane.programs.obj.map(name).items())) for name in lookup.TABLES}
    return {name: size for name, size in sizes.items() if size}


@pytest.mark.parametrize(
    ("address", "port", "expected"),
    [("10.7.1.9", 8080, B), ("10.7.1.9", 80, A), ("10.7.2.9", 8080, A)],
    ids=["range", "outside the range", "outside the prefix"],
)
def test_prefix_and_range_of_ports_are_served(kernel: Kernel, address: str, port: int, expected: Backend) -> None:
    kernel.serve(service(EVERYWHERE, A), service(RANGE, B))
    sent = Ether(dst=SRC_MAC, src=DST_MAC) / IP(src="10.0.9.9", dst=address) / TCP(sport=4000, dport=port, flags="S")
    left = Ether(kernel.send(bytes(sent)))
    assert (left[IP].dst, left[TCP].dport) == (str(expected.address), port)


def test_next_process_finds_prefixes_ranges_and_sets_and_takes_them_away(kernel: Kernel) -> None:
    asked = service(WEB, A), service(RANGE, B), service(EU, C, options=Options(sources=CLIENTS))
    kernel.serve(*asked)
    assert kernel.reopen().vips() == {WEB, RANGE, EU}
    assert kernel.backend_of(WEB, 4000) == C.address
    kernel.serve(asked[0])
    assert held_by_lookups(kernel) == {"services4": 2}
    assert kernel.backend_of(WEB, 4001) == A.address


def test_only_allowed_clients_are_served_until_anyone_is(kernel: Kernel) -> None:
    closed = service(WEB, A, options=Options(sources=(ip_network("192.0.2.0/24"),)))
    kernel.serve(closed)
    packet = frame(WEB, 4000)
    assert kernel.send(packet) == packet
    assert kernel.dataplane.statistics().reasons["drop_source_not_allowed"] == 1
    kernel.serve(service(WEB, A))
    assert kernel.backend_of(WEB, 4000) == A.address


def test_service_put_in_the_place_of_a_known_one_is_found_at_once(kernel: Kernel) -> None:
    """The programs keep copies of what they have found: a number that another service gets must not be in them."""
    kernel.serve(service(WEB, A))
    assert kernel.backend_of(WEB, 4000) == A.address
    kernel.serve(service(TLS, B))
    assert kernel.send(frame(WEB, 4001)) == frame(WEB, 4001)
    assert kernel.backend_of(TLS, 4000) == B.address


def test_outer_source_follows_the_option_also_of_a_backend_that_is_known(kernel: Kernel) -> None:
    plain = service(WEB, A, mode=Mode.IPIP)
    kernel.serve(plain)
    varied = replace(plain, options=Options(tunnel_sources=(ip_network("10.200.0.0/16"),)))
    assert kernel.dataplane.unknown(plain) == set()
    assert kernel.dataplane.unknown(varied) == {A.address}
    kernel.serve(varied)
    assert Ether(kernel.send(frame(WEB, 4000)))[IP].src.startswith("10.200.")
    assert kernel.dataplane.unknown(plain) == {A.address}


# Stages of others

TAIL_CALL = 12  # enum bpf_func_id
XDP_DROP, XDP_PASS, XDP_TX = 1, 2, 3


@contextmanager
def stage(*, hand_on_to: tuple[Stages, int] | None, otherwise: int) -> Iterator[int]:
    """A loaded program that hands packets on to that place, or returns the action `otherwise`."""
    asm = Assembler()
    asm.mov(R6, R1)
    if hand_on_to:
        stages, place = hand_on_to
        asm.load_map(R2, stages.map.fd)
        asm.mov(R3, place)
        asm.call(TAIL_CALL)
    asm.mov(R0, otherwise)
    asm.exit()
    with load("stage", XDP, asm.assemble()) as program:
        yield program.fd


def verdict_on(kernel: Kernel, vip: Vip) -> int:
    return pinned_program(str(kernel.generation), "xdp_lb").test_run(frame(vip, 4000)).verdict


@pytest.fixture
def stages(kernel: Kernel) -> Stages:
    kernel.serve(service(WEB, A))
    return kernel.dataplane.programs.stages


def test_a_stage_in_front_drops_packets_before_the_balancer_sees_them(kernel: Kernel, stages: Stages) -> None:
    with stage(hand_on_to=None, otherwise=XDP_DROP) as program:
        stages.set(stages.filter, program)
        assert verdict_on(kernel, WEB) == XDP_DROP
        assert list(stages.occupied()) == [stages.filter]
    stages.clear(stages.filter)
    assert (kernel.backend_of(WEB, 4000), stages.occupied()) == (A.address, {})


def test_a_stage_in_front_hands_packets_on_to_the_balancer(kernel: Kernel, stages: Stages) -> None:
    with stage(hand_on_to=(stages, stages.balance), otherwise=XDP_DROP) as program:
        stages.set(stages.users[1], program)
        assert kernel.backend_of(WEB, 4000) == A.address


def test_a_stage_behind_sees_the_verdict_and_may_drop(kernel: Kernel, stages: Stages) -> None:
    with stage(hand_on_to=None, otherwise=XDP_DROP) as program:
        stages.set(stages.exits[3], program)
        assert verdict_on(kernel, TLS) == XDP_DROP
        [verdict] = [v for v in stages.verdicts.per_cpu(0) if v.bytes]
        assert (verdict.action, verdict.reason) == (XDP_PASS, reason_number(kernel, "PASS_NOT_A_SERVICE"))
        stages.clear(stages.exits[3])
    assert verdict_on(kernel, TLS) == XDP_PASS


def reason_number(kernel: Kernel, name: str) -> int:
    return kernel.dataplane.programs.obj.types.enum("reason")[name]


def test_verdicts_are_recorded_only_while_somebody_wants_them(kernel: Kernel, stages: Stages) -> None:
    verdict_on(kernel, WEB)
    assert not any(verdict.bytes for verdict in stages.verdicts.per_cpu(0))
    stages.records_verdicts = True
    verdict_on(kernel, WEB)
    [verdict] = [v for v in stages.verdicts.per_cpu(0) if v.bytes]
    assert (verdict.reason, verdict.egress) == (reason_number(kernel, "FORWARDED"), 1)
    stages.records_verdicts = False
    assert not stages.records_verdicts


def outgrow(grown: Kernel) -> None:
    grown.serve(service(WEB, A, B), service(TLS, A, C, mode=Mode.DR), *(service(vip, A) for vip in vips(9)))


def test_stages_stay_when_the_maps_grow(grown: Kernel) -> None:
    stages = grown.dataplane.programs.stages
    with stage(hand_on_to=(stages, stages.balance), otherwise=XDP_DROP) as program:
        stages.set(stages.filter, program)
        outgrow(grown)
        assert list(grown.dataplane.programs.stages.occupied()) == [stages.filter]
        assert grown.backend_of(vips(9)[8], 4000) == A.address


def test_a_process_that_opened_the_smaller_maps_still_changes_stages(grown: Kernel) -> None:
    with BpfObject.open(LB_OBJECT) as other, stage(hand_on_to=None, otherwise=XDP_DROP) as program:
        other.adopt(str(grown.generation))
        stages = Stages(other)
        outgrow(grown)
        stages.set(stages.filter, program)
        assert verdict_on(grown, vips(9)[8]) == XDP_DROP


def test_another_process_that_changes_stages_is_waited_for(kernel: Kernel, stages: Stages) -> None:
    with stage(hand_on_to=None, otherwise=XDP_DROP) as program:
        change = Thread(target=stages.set, args=(stages.filter, program))
        with Stages(kernel.dataplane.programs.obj).alone():
            change.start()
            change.join(0.2)
            assert (change.is_alive(), stages.occupied()) == (True, {})
        change.join()
        assert verdict_on(kernel, WEB) == XDP_DROP
