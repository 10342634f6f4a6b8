"""The balancer over the doubles of lb.memory: what each command does, and what is left of it when
it is cut short at any of its writes."""

from __future__ import annotations

import os
import pickle
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_interface
from pathlib import Path

import pytest

from lb.control.balancer import Balancer
from lb.control.contracts import NoFilters
from lb.control.open_count import OpenCount
from lb.errors import AlreadyExists, Busy, DataplaneError, InvalidInput, NoRoute, NotFound, PruneRequired, StoreError
from lb.model.forwarding import NONE_OPEN, UNKNOWN, Attachment, Counters, OpenConnections
from lb.model.options import Options
from lb.model.report import ChangeKind, Report
from lb.model.state import Backend, Interface, Mode, OwnAddress, Service, State, XdpMode
from lb.model.vip import Vip
from lb.store.store import Store
from lb.tests.fakes.memory import Fuse, MemoryDataplane, MemoryNetwork

ETH0, ETH1 = Interface("eth0"), Interface("eth1")
WEB = Vip.parse("10.0.0.1:80/tcp")
TLS = Vip.parse("10.0.0.1:443/tcp")
DNS = Vip.parse("10.0.0.2:53/udp")
A, B, C = map(Backend.parse, ("10.0.0.11:80", "10.0.0.12:80", "10.0.0.13:80"))
FAR = Backend.parse("10.0.1.11:80")  # behind eth1
REMOTE = Backend.parse("192.0.2.11:80")  # behind a gateway
SMALL = 251


def service(vip: Vip, *backends: Backend, mode: Mode = Mode.NAT) -> Service:
    return Service(vip, mode, backends, ring_size=SMALL)


@dataclass
class Bed:
    """A host with two interfaces; the store is a real one."""

    path: Path
    dataplane: MemoryDataplane
    network: MemoryNetwork

    @classmethod
    def at(cls, path: Path) -> Bed:
        fuse = Fuse()
        interfaces = {"eth0": ["10.0.0.254/24", "2001:db8::fe/64"], "eth1": ["10.0.1.254/24"]}
        network = MemoryNetwork(interfaces, ["10.0.0.250"], fuse)
        return cls(path, MemoryDataplane(fuse), network)

    @property
    def fuse(self) -> Fuse:
        return self.dataplane.fuse

    @contextmanager
    def balancer(self) -> Iterator[Balancer]:
        with Store.open(self.path, write=True) as store:
            store.load()
            yield Balancer(store, self.dataplane, self.network, "blue")

    def run(self, command: Callable[[Balancer], Report]) -> Report:
        with self.balancer() as balancer:
            return command(balancer)

    @property
    def state(self) -> State:
        with Store.open(self.path, write=False) as store:
            return store.load()

    def extra_addresses(self) -> set[OwnAddress]:
        """What is on the interfaces beside the addresses of `at`."""
        bare = {str(a) for a in ("10.0.0.254", "2001:db8::fe", "10.0.1.254")}
        return {
            OwnAddress(name, address)
            for name in self.network.held
            for address in self.network.addresses(name)
            if str(address) not in bare
        }

    def assert_in_force(self, state: State) -> None:
        """Store, programs, rings and addresses are those of `state`, and nothing else is there."""
        assert self.state == state
        assert set(self.dataplane.attachments()) == {i.name for i in state.interfaces}
        assert self.dataplane.loaded == bool(state.interfaces)
        assert self.extra_addresses() == {own for own in state.own_addresses if state.interface(own.interface)}
        served = state.services if state.interfaces else ()
        assert self.network.neighbours >= {b.address for s in served for b in s.backends}
        assert self.dataplane.vips() == {s.vip for s in served}
        for each in served:
            self.assert_served(each)

    def assert_served(self, each: Service) -> None:
        """New flows meet the ring of `each`, and no other member is kept."""
        held, fresh = self.dataplane.rings[each.vip], MemoryDataplane()
        fresh.load([each])
        fresh.put(each, self.network.next_hops(b.address for b in each.backends))
        assert held.mode == each.mode
        assert held.currents == fresh.rings[each.vip].currents
        assert held.ids.keys() == fresh.rings[each.vip].ids.keys()


@pytest.fixture
def bed(tmp_path: Path) -> Bed:
    return Bed.at(tmp_path / "state.db")


@pytest.fixture
def serving(bed: Bed) -> Bed:
    """WEB is served on eth0 by A and B."""
    bed.run(lambda b: b.attach([ETH0], [service(WEB, A, B)]))
    return bed


# attach and detach


def test_attach_serves_and_says_what_it_did(bed: Bed) -> None:
    report = bed.run(lambda b: b.attach([ETH0], [service(WEB, A, B)]))
    assert [(c.vip, c.kind) for c in report.changes] == [(WEB, ChangeKind.ADD)]
    plan = report.changes[0].plan
    assert plan
    assert (plan.slots, plan.moved, plan.minimum) == (SMALL, SMALL, SMALL)
    assert report.attached == (Attachment("eth0", "native", 1),)
    assert report.notes == ("10.0.0.1: added to eth0",)
    bed.assert_in_force(State((service(WEB, A, B),), (ETH0,), (OwnAddress("eth0", WEB.address),)))


def test_attach_with_nothing_to_serve_is_refused(bed: Bed) -> None:
    with pytest.raises(InvalidInput, match="attach: no services: give --backends or add a"):
        bed.run(lambda b: b.attach([ETH0]))
    bed.assert_in_force(State())


def test_attach_to_no_interface_is_refused(bed: Bed) -> None:
    with pytest.raises(InvalidInput, match="attach: no interface given"):
        bed.run(lambda b: b.attach([], [service(WEB, A)]))


def test_attach_to_an_unknown_interface_is_refused(bed: Bed) -> None:
    with pytest.raises(InvalidInput, match="interface eth9: does not exist"):
        bed.run(lambda b: b.attach([ETH0, Interface("eth9")], [service(WEB, A)]))
    bed.assert_in_force(State())


def test_attach_beside_a_program_of_someone_else_leaves_nothing_half_done(bed: Bed) -> None:
    bed.dataplane.foreign.add("eth1")
    with pytest.raises(DataplaneError, match="eth1: another XDP program"):
        bed.run(lambda b: b.attach([ETH0, ETH1], [service(WEB, A)]))
    bed.assert_in_force(State())


def test_attach_twice_is_attach_once(serving: Bed) -> None:
    before = serving.state
    report = serving.run(lambda b: b.attach([ETH0], [service(WEB, A, B)]))
    assert (report.changes, report.notes) == ((), ())
    serving.assert_in_force(before)


def test_attach_of_a_vip_that_is_served_otherwise_is_refused(serving: Bed) -> None:
    with pytest.raises(AlreadyExists, match=r"vip 10\.0\.0\.1:80/tcp: already exists with other settings"):
        serving.run(lambda b: b.attach([ETH0], [service(WEB, C)]))


def test_attach_can_change_the_xdp_mode(serving: Bed) -> None:
    report = serving.run(lambda b: b.attach([Interface("eth0", XdpMode.GENERIC)]))
    assert report.attached == (Attachment("eth0", "generic", 1),)
    assert serving.state.interfaces == (Interface("eth0", XdpMode.GENERIC),)


def test_a_second_interface_is_attached_later(serving: Bed) -> None:
    serving.run(lambda b: b.attach([ETH1]))
    serving.assert_in_force(replace(serving.state, interfaces=(ETH0, ETH1)))


def test_attach_repairs_what_others_have_taken_away(serving: Bed) -> None:
    before = serving.state
    serving.dataplane.detach("eth0")
    serving.network.remove_address("eth0", WEB.address)
    serving.run(lambda b: b.attach([ETH0]))
    serving.assert_in_force(before)


def test_detach_keeps_the_services_and_attach_restores_them(serving: Bed) -> None:
    before = serving.state
    report = serving.run(lambda b: b.detach())
    assert report.detached == ("eth0",)
    assert report.notes == ("10.0.0.1: removed from eth0",)
    serving.assert_in_force(replace(before, interfaces=()))
    serving.run(lambda b: b.attach([ETH0]))
    serving.assert_in_force(before)


def test_addresses_move_along_to_another_interface(serving: Bed) -> None:
    serving.run(lambda b: b.detach())
    serving.run(lambda b: b.attach([ETH1]))
    assert serving.extra_addresses() == {OwnAddress("eth1", WEB.address)}


def test_detach_is_repeatable(serving: Bed) -> None:
    serving.run(lambda b: b.detach())
    report = serving.run(lambda b: b.detach())
    assert report == Report()


def test_detach_of_an_interface_that_is_not_attached_is_refused(serving: Bed) -> None:
    with pytest.raises(NotFound, match="interface eth1: not attached: see xdp-lb status"):
        serving.run(lambda b: b.detach(["eth1"]))


def test_detach_of_one_interface_moves_its_addresses_to_another_in_their_subnet(bed: Bed) -> None:
    bed.network.held["eth2"] = [ip_interface("10.0.0.253/24")]
    bed.run(lambda b: b.attach([Interface("eth2"), ETH0], [service(WEB, A)]))
    bed.run(lambda b: b.detach(["eth2"]))
    assert bed.network.owner(WEB.address) == "eth0"
    del bed.network.held["eth2"]
    bed.assert_in_force(State((service(WEB, A),), (ETH0,), (OwnAddress("eth0", WEB.address),)))


def test_attach_after_a_reboot_restores_what_is_stored(serving: Bed) -> None:
    before = serving.state
    rebooted = Bed.at(serving.path)
    rebooted.run(lambda b: b.attach([ETH0]))
    rebooted.assert_in_force(before)


def test_any_change_after_a_reboot_restores_what_is_stored_and_says_so(serving: Bed) -> None:
    before = serving.state
    rebooted = Bed.at(serving.path)
    report = rebooted.run(lambda b: b.add_backend(WEB, C))
    assert "kernel state did not match the store: rewritten" in report.notes
    rebooted.assert_in_force(before.replacing_service(service(WEB, A, B, C)))


def test_an_interface_that_has_gone_is_warned_of_and_can_be_detached(serving: Bed) -> None:
    serving.run(lambda b: b.attach([ETH1]))
    rebooted = Bed.at(serving.path)
    del rebooted.network.held["eth1"]
    report = rebooted.run(lambda b: b.add_backend(WEB, C))
    assert report.warnings == (
        "interface eth1: does not exist: not attached: run xdp-lb detach eth1 to remove it from the store",
    )
    rebooted.run(lambda b: b.detach(["eth1"]))
    assert rebooted.state.interfaces == (ETH0,)


# nat replies, dr, routes


def test_the_interface_of_nat_replies_is_attached_too(bed: Bed) -> None:
    report = bed.run(lambda b: b.attach([ETH0], [service(WEB, A, FAR)]))
    assert "eth1: also attached: nat replies of 10.0.1.11 arrive there" in report.notes
    assert bed.state.interfaces == (ETH0, replace(ETH1, replies_only=True))


def test_the_note_on_nat_replies_stays_a_line(bed: Bed) -> None:
    far = [Backend.parse(f"10.0.1.{n}:80") for n in range(11, 20)]
    report = bed.run(lambda b: b.attach([ETH0], [service(WEB, *far)]))
    assert ("eth1: also attached: nat replies of 10.0.1.11, 10.0.1.12 and 7 more arrive there") in report.notes


def test_a_backend_added_behind_another_interface_takes_it_along(serving: Bed) -> None:
    serving.run(lambda b: b.add_backend(WEB, FAR))
    assert set(serving.dataplane.attachments()) == {"eth0", "eth1"}


def test_the_interface_of_nat_replies_cannot_be_detached_alone(bed: Bed) -> None:
    bed.run(lambda b: b.attach([ETH0], [service(WEB, A, FAR)]))
    before = bed.state
    with pytest.raises(InvalidInput, match=r"eth1: nat replies of 10\.0\.1\.11 arrive there"):
        bed.run(lambda b: b.detach(["eth1"]))
    bed.assert_in_force(before)


def test_mode_dr_needs_no_program_where_the_backend_is(bed: Bed) -> None:
    bed.run(lambda b: b.attach([ETH0], [service(WEB, A, FAR, mode=Mode.DR)]))
    assert bed.state.interfaces == (ETH0,)


def test_mode_dr_refuses_a_backend_behind_a_gateway(bed: Bed) -> None:
    with pytest.raises(NoRoute, match=r"backend 192\.0\.2\.11:80: mode dr needs a backend on a dir"):
        bed.run(lambda b: b.attach([ETH0], [service(WEB, REMOTE, mode=Mode.DR)]))
    bed.assert_in_force(State())
    bed.run(lambda b: b.attach([ETH0], [service(WEB, REMOTE)]))


def test_a_backend_without_a_route_is_refused(serving: Bed) -> None:
    before = serving.state
    serving.network.gateways.clear()
    with pytest.raises(NoRoute, match=r"backend 192\.0\.2\.11: no route"):
        serving.run(lambda b: b.add_backend(WEB, REMOTE))
    serving.assert_in_force(before)


def test_a_backend_that_is_this_host_is_refused(serving: Bed) -> None:
    with pytest.raises(NoRoute, match=r"backend 10\.0\.1\.254: is an address of this host"):
        serving.run(lambda b: b.add_backend(WEB, Backend.parse("10.0.1.254")))


def test_a_backend_that_lost_its_route_can_be_removed_after_a_reboot(bed: Bed) -> None:
    bed.run(lambda b: b.attach([ETH0], [service(WEB, A, REMOTE)]))
    rebooted = Bed.at(bed.path)
    rebooted.network.gateways.clear()
    rebooted.run(lambda b: b.remove_backend(WEB, REMOTE))
    rebooted.assert_in_force(bed.state)


# addresses


def test_a_vip_that_the_host_owns_is_left_alone(bed: Bed) -> None:
    own = Vip(ip_address("10.0.0.254"), 80)
    bed.run(lambda b: b.attach([ETH0], [service(own, A)]))
    assert bed.state.own_addresses == ()
    bed.run(lambda b: b.detach())
    assert bed.network.owner(own.address) == "eth0"


def test_a_routed_vip_gets_no_address(bed: Bed) -> None:
    bed.run(lambda b: b.attach([ETH0], [service(WEB, A)], own_addresses=False))
    bed.run(lambda b: b.add_service(service(DNS, A), own_address=False))
    assert bed.extra_addresses() == set()
    bed.run(lambda b: b.detach())
    bed.run(lambda b: b.attach([ETH0]))
    assert bed.extra_addresses() == set()


def test_attach_can_take_the_addresses_of_stored_services_off(serving: Bed) -> None:
    serving.run(lambda b: b.attach([ETH0], own_addresses=False))
    assert serving.extra_addresses() == set()
    assert serving.state.own_addresses == ()


def test_whether_a_vip_has_an_address_is_an_option_of_the_service(serving: Bed) -> None:
    without = Options(vip_address=False)
    report = serving.run(lambda b: b.set_options(WEB, without))
    assert report.notes == ("10.0.0.1: removed from eth0",)
    serving.run(lambda b: b.detach())
    serving.run(lambda b: b.attach([ETH0]))
    serving.run(lambda b: b.apply(b.state.services))
    assert serving.extra_addresses() == set()
    serving.run(lambda b: b.set_options(WEB, Options()))
    assert serving.extra_addresses() == {OwnAddress("eth0", WEB.address)}


def test_an_address_stays_for_the_service_that_wants_it(serving: Bed) -> None:
    serving.run(lambda b: b.add_service(service(TLS, A), own_address=False))
    assert serving.extra_addresses() == {OwnAddress("eth0", WEB.address)}
    serving.run(lambda b: b.remove_service(WEB))
    assert serving.extra_addresses() == set()


def test_an_address_goes_with_the_last_service_on_it(serving: Bed) -> None:
    serving.run(lambda b: b.add_service(service(TLS, A)))
    serving.run(lambda b: b.remove_service(WEB))
    assert serving.network.owner(WEB.address) == "eth0"
    report = serving.run(lambda b: b.remove_service(TLS))
    assert report.notes == ("10.0.0.1: removed from eth0",)
    serving.assert_in_force(State(interfaces=(ETH0,)))


def test_a_service_stored_before_attach_gets_its_address_then(bed: Bed) -> None:
    report = bed.run(lambda b: b.add_service(service(WEB, A)))
    assert report.notes == ("stored, not active: no interface attached: run xdp-lb attach IFACE",)
    assert report.changes[0].plan is None
    assert bed.extra_addresses() == set()
    bed.run(lambda b: b.attach([ETH0]))
    assert bed.extra_addresses() == {OwnAddress("eth0", WEB.address)}


# homes of addresses

ROUTED = Vip.parse("192.0.2.1:80/tcp")  # in no subnet of the host
BACK = Vip.parse("10.0.1.1:80/tcp")  # in the subnet of eth1


@pytest.mark.parametrize("vip", [WEB, ROUTED])
def test_an_address_comes_back_where_it_was_when_its_interface_is_attached_again(bed: Bed, vip: Vip) -> None:
    bed.run(lambda b: b.attach([ETH0], [service(vip, FAR)]))
    report = bed.run(lambda b: b.detach(["eth0"]))
    assert report.notes == (f"{vip.address}: removed from eth0 until xdp-lb attach eth0",)
    assert bed.extra_addresses() == set()
    bed.run(lambda b: b.attach([ETH0]))
    assert bed.extra_addresses() == {OwnAddress("eth0", vip.address)}


@pytest.mark.parametrize("vip", [WEB, ROUTED])
def test_an_address_follows_an_interface_to_its_new_name(bed: Bed, vip: Vip) -> None:
    bed.run(lambda b: b.attach([ETH0, ETH1], [service(vip, FAR)]))
    bed.network.held["wan0"] = bed.network.held.pop("eth0")
    bed.run(lambda b: b.add_backend(vip, Backend.parse("10.0.1.12")))
    assert bed.state.own_addresses == (OwnAddress("eth0", vip.address),)
    bed.run(lambda b: b.attach([Interface("wan0")]))
    bed.run(lambda b: b.detach(["eth0"]))
    assert bed.extra_addresses() == {OwnAddress("wan0", vip.address)}


def test_an_address_is_put_where_its_subnet_is(bed: Bed) -> None:
    bed.run(lambda b: b.attach([ETH0, ETH1], [service(BACK, A)]))
    assert bed.extra_addresses() == {OwnAddress("eth1", BACK.address)}


def test_an_address_in_no_subnet_is_put_on_the_first_interface_named(bed: Bed) -> None:
    bed.run(lambda b: b.attach([ETH1, ETH0], [service(ROUTED, A)]))
    assert bed.extra_addresses() == {OwnAddress("eth1", ROUTED.address)}


def test_no_address_is_put_where_only_nat_replies_come_in(bed: Bed) -> None:
    bed.run(lambda b: b.attach([ETH0], [service(BACK, FAR)]))
    assert bed.state.interface("eth1") == Interface("eth1", replies_only=True)
    assert bed.extra_addresses() == {OwnAddress("eth0", BACK.address)}
    bed.run(lambda b: b.detach(["eth0"]))
    bed.run(lambda b: b.add_service(service(WEB, FAR)))
    assert bed.extra_addresses() == set()
    bed.run(lambda b: b.attach([ETH0]))
    assert bed.extra_addresses() == {OwnAddress("eth0", WEB.address), OwnAddress("eth0", BACK.address)}


def test_an_address_moves_to_an_interface_named_while_its_home_is_detached(bed: Bed) -> None:
    bed.run(lambda b: b.attach([ETH0], [service(ROUTED, A)]))
    bed.run(lambda b: b.detach())
    bed.run(lambda b: b.attach([ETH1]))
    assert bed.extra_addresses() == {OwnAddress("eth1", ROUTED.address)}


def test_an_address_that_an_earlier_version_left_on_the_wrong_side_is_put_right_by_attach(serving: Bed) -> None:
    serving.run(lambda b: b.attach([ETH1]))
    with serving.balancer() as balancer:
        stray = replace(balancer.state, own_addresses=(OwnAddress("eth1", WEB.address),))
        with balancer.writer.store.saving(stray):
            pass
    serving.network.remove_address("eth0", WEB.address)
    serving.network.add_address("eth1", WEB.address)
    serving.run(lambda b: b.attach([ETH0]))
    assert serving.extra_addresses() == {OwnAddress("eth0", WEB.address)}


@pytest.mark.parametrize(
    ("address", "fault"),
    [
        ("10.0.0.255", "broadcast address of eth0's subnet 10.0.0.0/24: use another"),
        ("10.0.0.0", "network address of eth0's subnet 10.0.0.0/24: use another"),
        ("[2001:db8::]", "subnet-router anycast address of eth0's subnet 2001:db8::/64: use another"),
        ("255.255.255.255", "limited broadcast address: use a unicast one"),
        ("240.0.0.1", "reserved address: use a unicast one"),
        ("0.1.2.3", "reserved address: use a unicast one"),
        ("169.254.1.1", "link-local address: clients beyond the link cannot reach it: use a global or private one"),
        ("[fe80::1]", "link-local address: clients beyond the link cannot reach it: use a global or private one"),
    ],
)
def test_an_address_that_cannot_be_a_vip_here_is_refused(serving: Bed, address: str, fault: str) -> None:
    before = serving.state
    wrong = Service(Vip.parse(f"{address}:80"), ring_size=SMALL)
    changes: list[Callable[[Balancer], Report]] = [
        lambda b: b.attach([ETH0], [wrong]),
        lambda b: b.add_service(wrong),
        lambda b: b.put_service(wrong),
        lambda b: b.apply([*before.services, wrong]),
        lambda b: b.add_service(wrong, own_address=False, dry_run=True),
    ]
    for change in changes:
        with pytest.raises(InvalidInput, match=rf"^vip {re.escape(str(wrong.vip))}: {re.escape(fault)}$"):
            serving.run(change)
    serving.assert_in_force(before)


@pytest.mark.parametrize("address", ["10.0.2.0", "10.0.2.1", "10.0.0.0/25", "10.0.0.128/25"])
def test_addresses_of_a_point_to_point_link_and_prefixes_can_be_vips(serving: Bed, address: str) -> None:
    serving.network.held["ptp0"] = [ip_interface("10.0.2.0/31")]
    serving.run(lambda b: b.add_service(Service(Vip.parse(f"{address}:80"), ring_size=SMALL)))


def test_a_vip_that_an_earlier_version_has_stored_stays(serving: Bed) -> None:
    with serving.balancer() as balancer:
        stored = balancer.state.with_service(Service(Vip.parse("169.254.1.1:80"), ring_size=SMALL))
        with balancer.writer.store.saving(stored):
            pass
    serving.run(lambda b: b.attach([ETH0]))
    serving.assert_in_force(stored)


def test_addresses_are_announced_when_they_are_put_on_an_interface(bed: Bed) -> None:
    bed.run(lambda b: b.attach([ETH0], [service(WEB, A)]))
    bed.run(lambda b: b.add_service(service(DNS, A)))
    bed.run(lambda b: b.add_service(service(TLS, A)))
    assert bed.network.announced == [OwnAddress("eth0", WEB.address), OwnAddress("eth0", DNS.address)]


def test_what_hinders_an_announcement_is_a_warning(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bed.network, "announce", lambda addresses: ["eth0: not announced"])
    report = bed.run(lambda b: b.attach([ETH0], [service(WEB, A)]))
    assert report.warnings == ("eth0: not announced",)
    bed.assert_in_force(bed.state)


# neighbours


def test_neighbours_are_kept_as_long_as_a_served_backend_needs_them(serving: Bed) -> None:
    serving.run(lambda b: b.add_service(service(DNS, A, C)))
    assert serving.network.neighbours == {A.address, B.address, C.address}
    serving.run(lambda b: b.remove_backend(WEB, A))
    assert serving.network.neighbours == {A.address, B.address, C.address}
    serving.run(lambda b: b.remove_service(DNS))
    assert serving.network.neighbours == {B.address}
    serving.run(lambda b: b.detach())
    assert serving.network.neighbours == set()


def test_a_change_that_failed_keeps_no_neighbours(serving: Bed) -> None:
    for n in range(4):
        serving.fuse.fail_after(n)
        with pytest.raises(DataplaneError, match="the fuse has blown"):
            serving.run(lambda b: b.add_backend(WEB, C))
        assert serving.network.neighbours == {A.address, B.address}


def test_a_refused_backend_keeps_no_neighbour(bed: Bed) -> None:
    with pytest.raises(NoRoute):
        bed.run(lambda b: b.attach([ETH0], [service(WEB, A, REMOTE, mode=Mode.DR)]))
    assert bed.network.neighbours == set()


# services and backends


def test_a_service_is_added_and_removed(serving: Bed) -> None:
    before = serving.state
    serving.run(lambda b: b.add_service(service(DNS, A)))
    assert serving.dataplane.vips() == {WEB, DNS}
    report = serving.run(lambda b: b.remove_service(DNS))
    assert [(c.kind, c.plan) for c in report.changes] == [(ChangeKind.REMOVE, None)]
    serving.assert_in_force(before)


def test_a_vip_that_is_served_cannot_be_added(serving: Bed) -> None:
    with pytest.raises(AlreadyExists, match=r"vip 10\.0\.0\.1:80/tcp: already exists"):
        serving.run(lambda b: b.add_service(service(WEB, C)))


def test_another_port_of_an_address_that_is_served_gets_connections(serving: Bed) -> None:
    other = replace(A, port=8080)
    serving.run(lambda b: b.add_backend(WEB, other))
    currents = serving.dataplane.rings[WEB].currents
    assert {A, B, other} == {replace(current, weight=1) for current in currents if current}
    assert len(serving.dataplane.rings[WEB].hops) == 3


def test_an_added_backend_moves_few_slots_and_the_report_says_how_many(serving: Bed) -> None:
    report = serving.run(lambda b: b.add_backend(WEB, C))
    plan = report.changes[0].plan
    assert plan
    assert plan.minimum <= plan.moved == plan.in_transition < 1.3 * plan.minimum
    assert plan.minimum == SMALL // 3
    assert serving.state.services == (service(WEB, A, B, C),)


def test_several_backends_are_added_in_one_change(serving: Bed) -> None:
    report = serving.run(lambda b: b.add_backends(WEB, [C, FAR]))
    assert len(report.changes) == 1
    serving.assert_in_force(serving.state)


def test_a_backend_that_is_there_cannot_be_added(serving: Bed) -> None:
    with pytest.raises(AlreadyExists, match=r"backend 10\.0\.0\.11:80: already in service"):
        serving.run(lambda b: b.add_backend(WEB, Backend.parse("10.0.0.11@3")))


@pytest.mark.parametrize(
    "command",
    [
        lambda b: b.remove_backend(WEB, C),
        lambda b: b.drain_backend(WEB, C),
        lambda b: b.set_weight(WEB, C, 3),
    ],
)
def test_a_backend_that_is_not_there_cannot_be_changed(serving: Bed, command: Callable[[Balancer], Report]) -> None:
    before = serving.state
    with pytest.raises(NotFound, match=r"backend 10\.0\.0\.13:80: not in service 10\.0\.0\.1:80"):
        serving.run(command)
    serving.assert_in_force(before)


def test_a_drained_backend_stays_a_member_without_new_flows(serving: Bed) -> None:
    report = serving.run(lambda b: b.drain_backend(WEB, A))
    held = serving.dataplane.rings[WEB]
    assert set(held.currents) == {B}
    assert A in held.ids
    plan = report.changes[0].plan
    assert plan
    assert plan.in_transition == plan.moved > 0


def test_a_backend_drained_twice_is_no_change(serving: Bed) -> None:
    serving.run(lambda b: b.drain_backend(WEB, A))
    writes = serving.fuse.writes
    assert serving.run(lambda b: b.drain_backend(WEB, A)) == Report()
    assert serving.fuse.writes == writes


def test_a_weight_ends_a_drain(serving: Bed) -> None:
    serving.run(lambda b: b.drain_backend(WEB, A))
    serving.run(lambda b: b.set_weight(WEB, A, 3))
    serving.assert_in_force(serving.state.replacing_service(service(WEB, replace(A, weight=3), B)))


def test_a_weight_out_of_range_is_refused(serving: Bed) -> None:
    with pytest.raises(InvalidInput, match="weight 65536: out of range 0 to 65535"):
        serving.run(lambda b: b.set_weight(WEB, A, 65536))


def test_the_last_backend_can_be_removed(serving: Bed) -> None:
    serving.run(lambda b: b.remove_backend(WEB, A))
    serving.run(lambda b: b.remove_backend(WEB, B))
    assert set(serving.dataplane.rings[WEB].currents) == {None}


def test_only_the_changed_service_is_written_with_one_query_for_hops(serving: Bed) -> None:
    serving.run(lambda b: b.add_service(service(DNS, A, B)))
    put: list[int] = []
    queries = serving.network.queries
    with serving.balancer() as balancer:
        balancer.on_progress = lambda done, total: put.append(total)
        balancer.add_backend(DNS, C)
    assert put == [1]
    assert serving.network.queries == queries + 1


def test_progress_counts_services(bed: Bed) -> None:
    seen: list[tuple[int, int]] = []
    with bed.balancer() as balancer:
        balancer.on_progress = lambda done, total: seen.append((done, total))
        balancer.attach([ETH0], [service(v, A) for v in (WEB, TLS, DNS)])
    assert seen == [(1, 3), (2, 3), (3, 3)]


# apply


def test_apply_makes_the_given_services_all_that_is_served(serving: Bed) -> None:
    serving.run(lambda b: b.add_service(service(TLS, A)))
    report = serving.run(lambda b: b.apply([service(DNS, B), service(WEB, A, C)], prune=True))
    assert [(c.vip, c.kind) for c in report.changes] == [
        (WEB, ChangeKind.CHANGE),
        (TLS, ChangeKind.REMOVE),
        (DNS, ChangeKind.ADD),
    ]
    own = tuple(OwnAddress("eth0", vip.address) for vip in (WEB, DNS))
    serving.assert_in_force(State((service(WEB, A, C), service(DNS, B)), (ETH0,), own))


def test_apply_of_what_is_served_changes_nothing(serving: Bed) -> None:
    writes = serving.fuse.writes
    assert serving.run(lambda b: b.apply([service(WEB, A, B)])) == Report()
    assert serving.fuse.writes == writes


def test_apply_makes_a_draining_backend_active_unless_it_says_drain(serving: Bed) -> None:
    serving.run(lambda b: b.drain_backend(WEB, A))
    drained = replace(A, draining=True)
    assert serving.run(lambda b: b.apply([service(WEB, drained, B)])) == Report()
    serving.run(lambda b: b.apply([service(WEB, A, B)]))
    assert serving.state.services == (service(WEB, A, B),)


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        (service(WEB, A, B, mode=Mode.DR), "mode"),
        (replace(service(WEB, A, B), ring_size=257), "ring size"),
    ],
)
def test_apply_cannot_change_the_shape_of_what_is_served(serving: Bed, wanted: Service, name: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        serving.run(lambda b: b.apply([wanted]))
    assert str(caught.value) == (
        f"vip 10.0.0.1:80/tcp: {name} cannot be changed on an existing service: remove it first"
    )
    serving.run(lambda b: b.detach())
    serving.run(lambda b: b.apply([wanted]))
    assert serving.state.services == (wanted,)


@pytest.mark.parametrize(
    ("wanted", "lost"),
    [
        ([], "3 of 3 services (10.0.0.1:80/tcp, 10.0.0.1:443/tcp and 1 more)"),
        ([service(WEB, A, B)], "2 of 3 services (10.0.0.1:443/tcp and 10.0.0.2:53/udp)"),
        (
            [service(WEB, A), service(TLS), service(DNS)],
            "3 of 4 backends (10.0.0.12:80 of 10.0.0.1:80/tcp, 10.0.0.11:80 of 10.0.0.1:443/tcp and 1 more)",
        ),
    ],
)
def test_apply_removes_more_than_half_only_if_told_to_prune(serving: Bed, wanted: list[Service], lost: str) -> None:
    serving.run(lambda b: b.add_service(service(TLS, A)))
    serving.run(lambda b: b.add_service(service(DNS, B)))
    before, message = serving.state, f"would remove {lost}: use --prune (API: prune=true) to remove them"
    with pytest.raises(PruneRequired) as caught:
        serving.run(lambda b: b.apply(wanted))
    assert str(caught.value) == message
    planned = serving.run(lambda b: b.apply(wanted, dry_run=True))
    assert planned.warnings[0] == message
    assert serving.state == before
    serving.run(lambda b: b.apply(wanted, prune=True))
    assert {s.vip for s in serving.state.services} == {s.vip for s in wanted}


def test_apply_removes_half_without_being_told(serving: Bed) -> None:
    serving.run(lambda b: b.add_service(service(TLS, A, B)))
    serving.run(lambda b: b.apply([service(WEB, A, B)]))
    serving.run(lambda b: b.apply([service(WEB, A)]))
    assert serving.state.services == (service(WEB, A),)


def test_apply_before_attach_is_stored(bed: Bed) -> None:
    report = bed.run(lambda b: b.apply([service(WEB, A)]))
    assert report.notes[0].startswith("stored, not active")
    assert bed.state.services == (service(WEB, A),)


# status


def test_status_joins_what_is_desired_with_what_the_kernel_counts(serving: Bed) -> None:
    serving.run(lambda b: b.set_weight(WEB, A, 3))
    serving.dataplane.counters[WEB, A] = Counters(packets=7, bytes=700)
    serving.dataplane.reasons = {"drop_no_backend": 2, "pass_not_vip": 5}
    writes = serving.fuse.writes
    with Store.open(serving.path, write=False) as store:
        store.load()
        status = Balancer(store, serving.dataplane, serving.network, "blue").status()
    assert (status.netns, status.loaded) == ("blue", True)
    assert [(i.interface, i.attached) for i in status.interfaces] == [(ETH0, Attachment("eth0", "native", 1))]
    (web,) = status.services
    assert web.slots_in_transition > 0
    assert [(b.backend, b.counters.packets) for b in web.backends] == [
        (replace(A, weight=3), 7),
        (B, 0),
    ]
    assert (status.drops, status.passes) == ({"drop_no_backend": 2}, {"pass_not_vip": 5})
    assert serving.fuse.writes == writes


def test_status_without_anything_is_empty(bed: Bed) -> None:
    with Store.open(bed.path, write=False) as store:
        store.load()
        status = Balancer(store, bed.dataplane, bed.network).status()
    assert (status.loaded, status.interfaces, status.services) == (False, (), ())


def test_status_has_the_connections_that_are_open_now(serving: Bed) -> None:
    serving.dataplane.opened[WEB, str(A)] = OpenConnections(7)
    with Store.open(serving.path, write=False) as store:
        store.load()
        (web,) = Balancer(store, serving.dataplane, serving.network).status().services
    assert [b.open for b in web.backends] == [OpenConnections(7), NONE_OPEN]
    assert web.open == OpenConnections(7)


# Open connections that a change ends


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_change_counts_the_open_connections_of_the_backends_that_it_removes(serving: Bed, dry_run: bool) -> None:
    serving.run(lambda b: b.drain_backend(WEB, A))
    serving.dataplane.opened = {(WEB, str(A)): OpenConnections(5), (WEB, str(B)): OpenConnections(40)}
    report = serving.run(lambda b: b.remove_backend(WEB, A, dry_run=dry_run))
    assert [c.ending for c in report.changes] == [OpenConnections(5)]
    assert report.ending == OpenConnections(5)


def test_a_change_that_removes_no_backend_ends_no_connection(serving: Bed) -> None:
    serving.dataplane.opened = {(WEB, str(A)): OpenConnections(5)}
    commands: list[Callable[[Balancer], Report]] = [
        lambda b: b.add_backends(WEB, [C]),
        lambda b: b.drain_backend(WEB, A),
        lambda b: b.set_weight(WEB, A, 0),
        lambda b: b.add_service(service(TLS, A)),
    ]
    for command in commands:
        report = serving.run(command)
        assert (report.ending, [c.ending for c in report.changes]) == (None, [None])


def test_all_that_is_served_ends_with_the_last_interface(serving: Bed) -> None:
    serving.run(lambda b: b.add_service(service(DNS, Backend.parse("10.0.0.11:53"))))
    serving.dataplane.opened = {
        (WEB, str(A)): OpenConnections(5),
        (DNS, "10.0.0.11:53"): OpenConnections(2, estimated=True),
    }
    assert serving.run(lambda b: b.detach(dry_run=True)).ending == OpenConnections(7, estimated=True)
    assert serving.run(lambda b: b.apply([service(DNS, C)], dry_run=True)).ending == OpenConnections(7, estimated=True)
    assert serving.run(lambda b: b.remove_service(WEB, dry_run=True)).ending == OpenConnections(5)


def test_what_comes_through_one_of_two_interfaces_is_unknown(serving: Bed) -> None:
    serving.run(lambda b: b.attach([ETH1]))
    assert serving.run(lambda b: b.detach(["eth1"], dry_run=True)).ending == UNKNOWN


def test_one_unknown_number_makes_the_sum_unknown(serving: Bed) -> None:
    serving.dataplane.opened = {(WEB, str(A)): OpenConnections(5), (WEB, str(B)): UNKNOWN}
    report = serving.run(lambda b: b.remove_service(WEB, dry_run=True))
    assert (report.ending, report.changes[0].ending) == (UNKNOWN, UNKNOWN)


def test_nothing_ends_where_nothing_is_attached(serving: Bed) -> None:
    serving.run(lambda b: b.detach())
    assert serving.run(lambda b: b.remove_service(WEB)).ending is None


def test_open_connections_are_counted_again_only_after_a_change_or_twenty_times_as_long_as_it_took() -> None:
    now_s, counted = [100.0], list[State]()

    def count(state: State) -> dict[Vip, dict[str, OpenConnections]]:
        counted.append(state)
        now_s[0] += 0.1
        return {WEB: {str(A): OpenConnections(len(counted))}}

    recent, state, other = OpenCount(count, lambda: now_s[0]), State(), State((service(WEB, A),))
    for at_s, given, times in ((100, state, 1), (102, state, 1), (102.2, state, 2), (103, other, 3), (104, other, 3)):
        now_s[0] = at_s
        assert recent.of(given) == {WEB: {str(A): OpenConnections(times)}}


# Cut short. Each scenario: what was there, and the change.

Command = Callable[[Balancer], Report]

BOTH = [service(WEB, A, B), service(DNS, A, FAR)]

SCENARIOS: dict[str, tuple[list[Command], Command]] = {
    "first attach": ([], lambda b: b.attach([ETH0], BOTH)),
    "attach again": (
        [lambda b: b.attach([ETH0], BOTH), lambda b: b.detach()],
        lambda b: b.attach([ETH1]),
    ),
    "detach": ([lambda b: b.attach([ETH0], BOTH)], lambda b: b.detach()),
    "detach one of two": (
        [lambda b: b.attach([ETH1, ETH0], BOTH[:1])],
        lambda b: b.detach(["eth1"]),
    ),
    "add a service": ([lambda b: b.attach([ETH0], BOTH[:1])], lambda b: b.add_service(BOTH[1])),
    "remove a service": ([lambda b: b.attach([ETH0], BOTH)], lambda b: b.remove_service(DNS)),
    "add a backend": ([lambda b: b.attach([ETH0], BOTH)], lambda b: b.add_backend(WEB, C)),
    "remove a backend": ([lambda b: b.attach([ETH0], BOTH)], lambda b: b.remove_backend(WEB, A)),
    "drain a backend": ([lambda b: b.attach([ETH0], BOTH)], lambda b: b.drain_backend(WEB, A)),
    "weigh a backend": ([lambda b: b.attach([ETH0], BOTH)], lambda b: b.set_weight(WEB, A, 9)),
    "apply": (
        [lambda b: b.attach([ETH0], BOTH)],
        lambda b: b.apply([service(WEB, B, C), service(TLS, A)], prune=True),
    ),
}


@dataclass
class Scenario:
    """Beds in the state before the change, and what is in force before and after it."""

    folder: Path
    setup: list[Command]
    change: Command

    def bed(self, name: str) -> Bed:
        bed = Bed.at(self.folder / f"{name}.db")
        for command in self.setup:
            bed.run(command)
        return bed

    def measure(self) -> tuple[State, State, int]:
        bed = self.bed("measured")
        before, writes = bed.state, bed.fuse.writes
        bed.run(self.change)
        bed.assert_in_force(bed.state)
        return before, bed.state, bed.fuse.writes - writes


@pytest.fixture(params=SCENARIOS)
def scenario(request: pytest.FixtureRequest, tmp_path: Path) -> Scenario:
    setup, change = SCENARIOS[request.param]
    return Scenario(tmp_path, setup, change)


def next_change(bed: Bed) -> Report:
    """One that has nothing to do with any scenario: it changes nothing."""
    return bed.run(lambda b: b.apply(b.state.services))


def test_a_refused_write_leaves_the_old_state_in_force(scenario: Scenario) -> None:
    before, _, writes = scenario.measure()
    assert writes > 2
    for n in range(writes):
        bed = scenario.bed(f"refused-{n}")
        bed.fuse.fail_after(n)
        with pytest.raises(DataplaneError, match="the fuse has blown"):
            bed.run(scenario.change)
        bed.assert_in_force(before)


def test_a_kernel_that_refuses_every_write_is_repaired_by_the_next_change(
    scenario: Scenario,
) -> None:
    before, after, writes = scenario.measure()
    for n in range(writes):
        bed = scenario.bed(f"lost-{n}")
        bed.fuse.fail_after(n, times=1_000_000)
        with pytest.raises(DataplaneError, match="the fuse has blown"):
            bed.run(scenario.change)
        bed.fuse.mend()
        next_change(bed)
        # Where even the way back is barred, a change that was committed stays so.
        assert bed.state in (before, after)
        bed.assert_in_force(bed.state)


def test_a_killed_process_leaves_the_old_or_the_new_state(scenario: Scenario) -> None:
    before, after, writes = scenario.measure()
    seen = set()
    for n in range(writes):
        bed = killed_after(n, scenario)
        assert bed.state in (before, after)
        seen.add(bed.state == after)
        next_change(bed)
        bed.assert_in_force(bed.state)
        assert bed.state in (before, after)
    assert False in seen


def killed_after(writes: int, scenario: Scenario) -> Bed:
    """What a process leaves that is killed instead of its next write, after so many."""
    bed = scenario.bed(f"killed-{writes}")
    kernel = scenario.folder / f"killed-{writes}.kernel"

    def die() -> None:
        bed.fuse.mend()
        kernel.write_bytes(pickle.dumps((bed.dataplane, bed.network)))
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            bed.fuse.fail_after(writes, blow=die)
            bed.run(scenario.change)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    return Bed(bed.path, *pickle.loads(kernel.read_bytes()))


def test_an_interrupted_change_leaves_the_old_state_in_force(serving: Bed) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    before = serving.state
    serving.fuse.fail_after(2, blow=interrupt)
    with pytest.raises(KeyboardInterrupt):
        serving.run(lambda b: b.add_backend(WEB, C))
    serving.assert_in_force(before)


def test_a_store_that_cannot_commit_leaves_the_old_state_in_force(serving: Bed) -> None:
    before = serving.state
    with Store.open(serving.path, write=True) as store, Store.open(serving.path, write=False) as reader:
        store.load()
        balancer = Balancer(store, serving.dataplane, serving.network)
        store._connection.execute("PRAGMA busy_timeout = 0")
        reader._connection.execute("BEGIN")
        reader._connection.execute("SELECT * FROM service").fetchone()
        with pytest.raises(StoreError, match="locked by another process"):
            balancer.add_backend(WEB, C)
    serving.assert_in_force(before)
    assert serving.network.neighbours == {A.address, B.address}


def test_a_store_that_is_locked_keeps_the_kernel_untouched(serving: Bed) -> None:
    before, writes = serving.state, serving.fuse.writes
    with Store.open(serving.path, write=True) as store, Store.open(serving.path, write=True) as other:
        store.load()
        balancer = Balancer(store, serving.dataplane, serving.network)
        store._connection.execute("PRAGMA busy_timeout = 0")
        other._connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="locked by another process"):
            balancer.add_backend(WEB, C)
    assert serving.fuse.writes == writes
    serving.assert_in_force(before)


DRY: list[Command] = [
    lambda b: b.attach([ETH1], [service(DNS, A)], dry_run=True),
    lambda b: b.detach(dry_run=True),
    lambda b: b.add_service(service(DNS, FAR), dry_run=True),
    lambda b: b.remove_service(WEB, dry_run=True),
    lambda b: b.add_backend(WEB, C, dry_run=True),
    lambda b: b.remove_backend(WEB, A, dry_run=True),
    lambda b: b.drain_backend(WEB, A, dry_run=True),
    lambda b: b.set_weight(WEB, A, 9, dry_run=True),
    lambda b: b.apply([service(TLS, A)], dry_run=True),
]


@pytest.mark.parametrize("command", DRY)
def test_a_dry_run_writes_nothing(serving: Bed, command: Command) -> None:
    before, writes = serving.state, serving.fuse.writes
    report = serving.run(command)
    assert report.dry_run
    assert report.changes or report.detached
    assert serving.fuse.writes == writes
    assert serving.network.neighbours == {A.address, B.address}
    serving.assert_in_force(before)


def test_a_dry_run_plans_what_the_change_then_does(serving: Bed) -> None:
    planned = serving.run(lambda b: b.add_backend(WEB, C, dry_run=True))
    done = serving.run(lambda b: b.add_backend(WEB, C))
    assert planned == replace(done, dry_run=True)


def test_a_dry_run_of_the_first_attach_says_where_it_would_attach(bed: Bed) -> None:
    report = bed.run(lambda b: b.attach([ETH0], [service(WEB, FAR)], dry_run=True))
    assert [a.interface for a in report.attached] == ["eth0", "eth1"]
    assert report.changes[0].plan is None
    bed.assert_in_force(State())


# Filter rules in front


@dataclass
class Calls(NoFilters):
    """A guard that notes when it is called, and what the balancer runs on then."""

    dataplane: MemoryDataplane
    made: list[tuple[str, str, bool]] = field(default_factory=list)
    is_alone: bool = False

    @contextmanager
    def alone(self) -> Iterator[None]:
        self.is_alone = True
        yield
        self.is_alone = False

    def hand_over_to_balancer(self, name: str) -> None:
        assert self.is_alone
        self.made.append(("hand_over_to_balancer", name, name in self.dataplane.attachments()))

    def take_back(self, name: str) -> None:
        assert self.is_alone
        self.made.append(("take_back", name, name in self.dataplane.attachments()))


def test_guard_is_called_before_the_balancer_comes_and_before_it_goes(bed: Bed) -> None:
    calls = Calls(bed.dataplane)
    with Store.open(bed.path, write=True) as store:
        store.load()
        balancer = Balancer(store, bed.dataplane, bed.network, handover=calls)
        balancer.attach([Interface("eth0"), Interface("eth1")], [service(WEB, A, mode=Mode.DR)])
        balancer.detach(["eth1"])
        balancer.detach()
    assert calls.made == [
        ("hand_over_to_balancer", "eth0", False),
        ("hand_over_to_balancer", "eth1", False),
        ("take_back", "eth1", True),
        ("take_back", "eth0", True),
    ]


def test_changes_of_backends_do_not_wait_for_filter_rules(bed: Bed) -> None:
    calls = Calls(bed.dataplane)
    with Store.open(bed.path, write=True) as store:
        store.load()
        balancer = Balancer(store, bed.dataplane, bed.network, handover=calls)
        balancer.attach([Interface("eth0")], [service(WEB, A, mode=Mode.DR)])
        calls.alone = refuse  # type: ignore[assignment, method-assign]
        balancer.add_backends(WEB, [B])
        balancer.set_weight(WEB, A, 7)
        balancer.remove_service(WEB)
        with pytest.raises(Busy):
            balancer.detach()


def refuse() -> AbstractContextManager[None]:
    raise Busy("somebody changes the rules")


def test_guard_takes_over_where_an_attach_fails(bed: Bed) -> None:
    calls = Calls(bed.dataplane)
    bed.dataplane.foreign.add("eth1")
    with Store.open(bed.path, write=True) as store:
        store.load()
        balancer = Balancer(store, bed.dataplane, bed.network, handover=calls)
        with pytest.raises(DataplaneError):
            balancer.attach([Interface("eth0"), Interface("eth1")], [service(WEB, A, mode=Mode.DR)])
    assert calls.made[-1] == ("take_back", "eth0", True)
    assert not bed.dataplane.attachments()
