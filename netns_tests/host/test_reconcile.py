"""What others change in the kernel and in the host's network, found and repaired: real programs, maps, links,
neighbours and routes, with traffic through them."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lb.control.balancer import Balancer
from lb.control.open import open_balancer
from lb.dataplane.dataplane import KernelDataplane
from lb.dataplane.lookup import VIP_ADDRESS
from lb.hashing.ring import current_member
from lb.host.events import Changes, HostEvents
from lb.model.forwarding import InstalledNextHop
from lb.model.vip import Vip
from lb.paths import Paths
from netns_tests.bed.daemon import SERVE, WEB, end, start
from netns_tests.bed.servers import start_http
from netns_tests.bed.topology import FRONT, Bed, Host, _attach_pass_program, wait_until
from netns_tests.bed.traffic import connections, curl, go_on, loading
from xdp import attach as xdp_attach

VIP = Vip.parse(WEB)


@contextmanager
def serving_bed() -> Iterator[Bed]:
    with Bed(backends=2, router=True) as made:
        for backend in made.backends:
            start_http(made, backend, [80])
        made.xdp_lb(*SERVE)
        yield made


@pytest.fixture
def bed() -> Iterator[Bed]:
    with serving_bed() as made:
        yield made


@pytest.fixture(scope="module")
def mended(nothing_is_left_behind: None) -> Iterator[Bed]:
    """For tests that check at their end that all is as it was. Members have other numbers than those of their places in
    the list of backends."""
    with serving_bed() as made:
        change_numbers(made)
        yield made


def paths(bed: Bed) -> Paths:
    return Paths(bed.directory / "state", bed.directory / "run", bed.lb.name)


@contextmanager
def balancing(bed: Bed) -> Iterator[Balancer]:
    with bed.lb.entered(), open_balancer(paths(bed)) as balancer:
        yield balancer


@contextmanager
def maps(bed: Bed) -> Iterator[Any]:
    """What is pinned, as another program would open it."""
    with bed.lb.entered():
        held = KernelDataplane.open(paths(bed))
        try:
            yield held
        finally:
            held.close()


def contents(bed: Bed) -> list[object]:
    """All that the balancer has written."""
    with maps(bed) as held:
        arrays = [held.programs.obj.map(name).bytes()[:] for name in ("services", "rings", "members")]
        return [
            held.generation,
            held.programs.obj.variable("control").epoch,
            *arrays,
            *(t.held for t in held.maps.lookups._tables.values()),
        ]


def ways(bed: Bed) -> dict[str, tuple[int, str | None]]:
    """Backend -> the interface's index and the MAC address that packets for it are sent to."""
    with maps(bed) as held:
        return {
            str(hop.address): (hop.ifindex, hop.mac.hex(":") if hop.mac else None) for hop in held.installed_next_hops()
        }


def answering(bed: Bed) -> set[str]:
    return {curl(bed.client, f"http://{WEB}/") for _ in range(24)}


# Maps


def test_nothing_is_written_where_nothing_has_changed(bed: Bed) -> None:
    before = contents(bed)
    with balancing(bed) as balancer:
        for _ in range(2):
            report = balancer.repairs.reconcile()
            assert (report.notes, report.warnings, report.attached) == ((), (), ())
    assert contents(bed) == before


def change_numbers(bed: Bed) -> None:
    bed.xdp_lb("backend", "remove", WEB, "10.99.2.11:80")
    bed.xdp_lb("backend", "add", WEB, "10.99.2.12:81")
    bed.xdp_lb("backend", "add", WEB, "10.99.2.11:80")
    bed.xdp_lb("backend", "remove", WEB, "10.99.2.12:81")
    with maps(bed) as held:
        assert sorted(held.maps.members.numbers(held.maps.allocations[VIP]).values()) == [2, 3]


def erase_slots(held: Any) -> None:
    base = held.maps.allocations[VIP].ring_base
    for slot in range(base, base + 100):
        held.maps.rings._words[slot] = 0


def lead_a_slot_to_nobody(held: Any) -> None:
    held.maps.rings._words[held.maps.allocations[VIP].ring_base] = 30_000


def erase_members(held: Any) -> None:
    """Of both backends: they have to get their own numbers again."""
    for number in (2, 3):
        held.maps.members._members[held.maps.allocations[VIP].member_base + number] = held.maps.members._struct()


def lead_a_member_elsewhere(held: Any) -> None:
    member = held.maps.members._members[held.maps.allocations[VIP].member_base + 2]
    member.address[0] = member.address[0] + 77


def forget_the_service(held: Any) -> None:
    held.maps.services._services[held.maps.allocations[VIP].number] = held.maps.services._struct()


def delete_the_lookup(held: Any) -> None:
    table = held.maps.lookups._tables["services4"]
    table.remove(list(table.held))


def add_a_lookup(held: Any) -> None:
    table = held.maps.lookups._tables["services4"]
    key = next(key for key, value in table.held.items() if value != VIP_ADDRESS)
    table.add({key[:-4] + b"\x09\x09\x11\x00": 0})


def take_the_balancer_out_of_its_stage(held: Any) -> None:
    del held.programs.stages.map[held.programs.stages.balance]


TAMPERING: dict[Callable[[Any], None], str] = {
    erase_slots: "vip 10.99.1.100:80/tcp: 100 of 251 slots were modified: repaired",
    lead_a_slot_to_nobody: "vip 10.99.1.100:80/tcp: 1 of 251 slots was modified: repaired",
    erase_members: "vip 10.99.1.100:80/tcp: backend entries were modified: repaired",
    lead_a_member_elsewhere: "vip 10.99.1.100:80/tcp: backend entries were modified: repaired",
    forget_the_service: "vip 10.99.1.100:80/tcp: map entry was modified: repaired",
    delete_the_lookup: "lookups: 2 entries changed by another process",
    take_the_balancer_out_of_its_stage: "stages: the balancer was missing at the end of the chain",
    add_a_lookup: "lookups: 1 entry changed by another process",
}


@pytest.mark.parametrize("tamper", TAMPERING)
def test_what_is_changed_in_a_map_by_hand_is_repaired_and_connections_stay(
    mended: Bed, tamper: Callable[[Any], None]
) -> None:
    with connections(mended, "10.99.1.100", count=20) as held, balancing(mended) as balancer:
        labels = [connection.ask() for connection in held]
        assert not balancer.repairs.reconcile().notes
        before = contents(mended)[0], slots(mended)
        with maps(mended) as other:
            tamper(other)
        assert balancer.repairs.reconcile().notes == (TAMPERING[tamper],)
        assert (contents(mended)[0], slots(mended)) == before
        assert balancer.repairs.reconcile().notes == ()
        assert [connection.ask() for connection in held] == labels
    assert answering(mended) == {"b1", "b2"}


def slots(bed: Bed) -> list[int]:
    with maps(bed) as held:
        return [current_member(word) for word in held.maps.rings.slot_words(held.maps.allocations[VIP])]


# Interfaces


def program_on(bed: Bed, name: str) -> int | None:
    with bed.lb.entered():
        running = xdp_attach.attached(socket.if_nametoindex(name))
    return running.program_id if running else None


def take_all(root: Path) -> None:
    for folder in root.iterdir():
        if folder.is_dir():
            shutil.rmtree(folder)


def take_a_map(root: Path) -> None:
    (pin,) = root.glob("*/current/map_rings")
    pin.unlink()


def take_the_link(root: Path) -> None:
    (link,) = root.glob("*/current")
    link.unlink()


def take_the_mount(root: Path) -> None:
    subprocess.run(["umount", str(root)], check=True)


@pytest.mark.parametrize(
    ("take", "weight"), [(take_all, "2"), (take_a_map, "1"), (take_the_link, "2"), (take_the_mount, "1")]
)
def test_pins_that_are_taken_away_are_made_again(mended: Bed, take: Callable[[Path], None], weight: str) -> None:
    before = contents(mended)
    with balancing(mended) as balancer:
        take(paths(mended).run_dir / "bpf")
        (note,) = balancer.repairs.reconcile().notes
        assert note.startswith("pins: removed by another process: pinned again in ")
        assert balancer.repairs.reconcile().notes == ()
    assert contents(mended) == before
    mended.xdp_lb("backend", "weight", WEB, "10.99.2.11:80", weight)
    assert answering(mended) == {"b1", "b2"}


@pytest.mark.parametrize("take", [take_all, take_the_mount])
def test_without_a_daemon_the_next_command_goes_on_from_what_runs(bed: Bed, take: Callable[[Path], None]) -> None:
    before = program_on(bed, "eth0")
    with loading(bed, f"http://{WEB}/") as load, connections(bed, bed.vip4, count=20) as held:
        labels = [connection.ask() for connection in held]
        take(paths(bed).run_dir / "bpf")
        assert "name xdp_lb, native: pins missing" in bed.xdp_lb("doctor", "eth0", check=False).stdout
        bed.xdp_lb("backend", "weight", WEB, "10.99.2.11:80", "2")
        after = program_on(bed, "eth0")
        assert [connection.ask() for connection in held] == labels
        go_on(20, load)
        assert load.stop().reasons == {}
    assert after not in (before, None)
    take(paths(bed).run_dir / "bpf")
    bed.xdp_lb("detach")
    assert program_on(bed, "eth0") is None


def test_a_program_that_is_taken_off_is_put_back_at_once(bed: Bed) -> None:
    process = start(bed)
    ours = program_on(bed, "eth0")
    bed.lb.run(["ip", "link", "set", "dev", "eth0", "xdp", "off"])
    wait_until(lambda: program_on(bed, "eth0") == ours, "the program put back")
    assert answering(bed) == {"b1", "b2"}
    assert end(process) == 0
    assert log(bed).count("eth0: XDP program was missing: reattached") == 1


def log(bed: Bed) -> str:
    return (bed.directory / "serve.log").read_text()


def test_a_program_of_someone_else_is_left_alone_and_told(bed: Bed) -> None:
    bed.lb.run(["ip", "link", "set", "dev", "eth0", "xdp", "off"])
    _attach_pass_program(bed.lb, "eth0")
    foreign = program_on(bed, "eth0")
    with balancing(bed) as balancer:
        for _ in range(2):
            (warning,) = balancer.repairs.reconcile().warnings
            assert warning.startswith("eth0: another XDP program is attached (id ")
            assert program_on(bed, "eth0") == foreign
        bed.lb.run(["ip", "link", "set", "dev", "eth0", "xdp", "off"])
        assert balancer.repairs.reconcile().notes == ("eth0: XDP program was missing: reattached",)
    assert answering(bed) == {"b1", "b2"}


def test_an_address_that_is_taken_off_is_put_back(bed: Bed) -> None:
    bed.lb.run(["ip", "addr", "del", "10.99.1.100/32", "dev", "eth0"])
    with balancing(bed) as balancer:
        assert balancer.repairs.reconcile().notes == ("10.99.1.100: was missing on eth0: added again",)
    assert "10.99.1.100/32" in bed.lb.run(["ip", "addr", "show", "dev", "eth0"]).stdout


def test_an_interface_that_comes_back_is_served_again_filters_and_address_and_all(bed: Bed) -> None:
    bed.xdp_lb("filter", "add", "eth0", "drop", "udp port 9")
    bed.xdp_lb("filter", "add", "eth0", "count", "tcp", "--at", "tc-in")
    process = start(bed)
    unplug(bed)
    wait_until(lambda: "interface eth0: does not exist" in log(bed), "the loss told")
    plug_again(bed)
    wait_until(lambda: "eth0: XDP program was missing: reattached" in log(bed), "attached again")
    wait_until(lambda: all(rule["in_force"] for rule in rules(bed)), "the rules in force")
    wait_until(lambda: "10.99.1.100" in bed.lb.run(["ip", "addr", "show", "dev", "eth0"]).stdout, "the address back")
    assert answering(bed) == {"b1", "b2"}
    before = rules(bed)[0]["packets"]
    bed.client.run(["bash", "-c", "echo x >/dev/udp/10.99.1.2/9"])
    wait_until(lambda: rules(bed)[0]["packets"] > before, "a packet dropped by the rule")
    assert end(process) == 0
    assert log(bed).count("interface eth0: does not exist") == 1


def unplug(bed: Bed) -> None:
    bed.switch.run(["ip", "link", "del", "lb-eth0"])


def plug_again(bed: Bed) -> None:
    """Another interface of the same name, in the same place; others forget its MAC address."""
    interfaces, bed.lb.interfaces = bed.lb.interfaces, []
    bed._plug(bed.lb, FRONT, station=2)
    bed.lb.interfaces = interfaces
    bed._wait_for_links()
    for host in (bed.client, bed.router):
        assert host
        host.run(["ip", "neigh", "flush", "all"])


def rules(bed: Bed) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(bed.xdp_lb("filter", "list", "--json").stdout)
    return found


# Next hops


def test_packets_follow_a_backend_that_changes_its_mac_address_under_load(bed: Bed) -> None:
    backend = bed.backends[0]
    backend.sysctl("net.ipv4.conf.eth0.arp_notify", 1)
    process = start(bed)
    with loading(bed, f"http://{WEB}/") as load:
        for mac in ("02:00:00:00:aa:01", "02:00:00:00:aa:02"):
            backend.run(["ip", "link", "set", "dev", "eth0", "address", mac])
            wait_until(lambda mac=mac: ways(bed)[backend.ipv4][1] == mac, "the entry follows")  # type: ignore[misc]
            go_on(20, load)
        report = load.stop()
    assert (report.failed, report.reasons) == (0, {})
    assert answering(bed) == {"b1", "b2"}
    assert end(process) == 0
    assert [line for line in log(bed).splitlines() if "drift" in line and "next hop" not in line] == []


def added_in_silence(bed: Bed, backend: Host) -> str:
    """The warnings, of a backend that answers no ARP request; it does again when this returns."""
    bed.xdp_lb("backend", "remove", WEB, backend.ipv4)
    backend.sysctl("net.ipv4.conf.all.arp_ignore", 8)
    told = bed.xdp_lb("backend", "add", WEB, backend.ipv4).stderr
    backend.sysctl("net.ipv4.conf.all.arp_ignore", 0)
    return told


SILENT = "xdp-lb: warning: eth1: no ARP/ND reply from 10.99.2.12: packets for it are dropped until {}\n"


def test_backend_that_was_silent_is_served_when_it_has_answered_and_attach_has_looked_again(bed: Bed) -> None:
    backend = bed.backends[1]
    assert added_in_silence(bed, backend) == SILENT.format("xdp-lb attach or xdp-lb serve sees a reply")
    neighbour = ["ip", "neigh", "show", backend.ipv4]
    wait_until(lambda: "lladdr" in bed.lb.run(neighbour).stdout, "the kernel has asked again")
    bed.xdp_lb("attach", "eth0")
    assert answering(bed) == {"b1", "b2"}


def test_backend_that_was_silent_is_followed_by_the_daemon(bed: Bed) -> None:
    process = start(bed)
    assert added_in_silence(bed, bed.backends[1]) == SILENT.format("it replies")
    wait_until(lambda: ways(bed)[bed.backends[1].ipv4][1] is not None, "the neighbour seen")
    assert answering(bed) == {"b1", "b2"}
    assert end(process) == 0


def test_packets_follow_a_route_to_another_gateway_and_back(bed: Bed) -> None:
    backend = bed.backends[0]
    process = start(bed)
    before = ways(bed)[backend.ipv4]
    with bed.lb.entered():
        front = socket.if_nametoindex("eth0")
    bed.lb.run(["ip", "route", "add", f"{backend.ipv4}/32", "via", "10.99.1.254"])
    wait_until(lambda: ways(bed)[backend.ipv4] == (front, mac_of(bed.router, "eth0")), "the way through the router")
    assert answering(bed) == {"b1", "b2"}
    bed.lb.run(["ip", "route", "del", f"{backend.ipv4}/32"])
    wait_until(lambda: ways(bed)[backend.ipv4] == before, "the way back")
    assert answering(bed) == {"b1", "b2"}
    assert end(process) == 0


def mac_of(host: Host | None, name: str) -> str:
    assert host
    (link,) = json.loads(host.run(["ip", "-j", "link", "show", "dev", name]).stdout)
    return str(link["address"])


def test_a_route_that_is_gone_leaves_entries_as_they_were(bed: Bed) -> None:
    backend = bed.backends[0]
    before = contents(bed)
    bed.lb.run(["ip", "route", "add", "blackhole", f"{backend.ipv4}/32"])
    with balancing(bed) as balancer:
        report = balancer.repairs.reconcile()
    assert report.notes == ()
    assert report.warnings == (f"backend {backend.ipv4}: no route: blackhole route: see ip route get {backend.ipv4}",)
    assert contents(bed) == before
    assert answering(bed) == {"b1", "b2"}


# Events


def told(
    bed: Bed, do: Callable[[], object], until: Callable[[Changes], bool], buffer_size: int | None = None
) -> Changes:
    """All that is told of what `do` does, up to a condition."""

    async def listen() -> Changes:
        with bed.lb.entered():
            events = HostEvents()
        with events:
            if buffer_size:
                events._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_size)
            await asyncio.to_thread(do)
            async with asyncio.timeout(20):
                found = Changes()
                while not until(found):
                    news = await events.next(1)
                    found.everything |= news.everything
                    found.links |= news.links
                    found.neighbours |= news.neighbours
                    for length, networks in news.prefixes.items():
                        found.prefixes.setdefault(length, set()).update(networks)
        return found

    return asyncio.run(listen())


def test_ten_thousand_neighbours_of_others_concern_no_backend(bed: Bed) -> None:
    count = 10_000
    mine = dict(ways(bed))
    found = told(bed, lambda: add_neighbours(bed, count), lambda so_far: len(so_far.neighbours) >= count)
    assert not found.everything
    with maps(bed) as held:
        assert found.concerned(held.installed_next_hops()) == set()
    assert ways(bed) == mine


def add_neighbours(bed: Bed, count: int) -> None:
    lines = (
        f"neigh add 10.77.{i >> 8}.{i & 255} lladdr 02:00:00:01:{i >> 8:02x}:{i & 255:02x} dev eth1\n"
        for i in range(count)
    )
    batch = bed.directory / "neighbours"
    batch.write_text("".join(lines))
    bed.lb.run(["ip", "-batch", str(batch)])


def test_notifications_that_are_lost_concern_everything(bed: Bed) -> None:
    found = told(bed, lambda: add_neighbours(bed, 1000), bool, buffer_size=4096)
    assert found.everything


def test_a_neighbour_that_says_nothing_new_is_no_change(bed: Bed) -> None:
    with bed.lb.entered():
        index = socket.if_nametoindex("eth1")
    known = bed.backends[0].ipv4
    again = ["ip", "neigh", "replace", known, "lladdr", mac_of(bed.backends[0], "eth0"), "dev", "eth1"]
    other = ["ip", "neigh", "add", "10.99.2.77", "lladdr", "02:00:00:00:00:77", "dev", "eth1"]

    def change() -> None:
        bed.lb.run(again)
        bed.lb.run(other)

    found = told(bed, change, lambda so_far: bool(so_far.neighbours))
    assert found.neighbours == {(index, socket.inet_aton("10.99.2.77")): None}


def test_a_rule_concerns_everything(bed: Bed) -> None:
    found = told(bed, lambda: bed.lb.run(["ip", "rule", "add", "pref", "99", "lookup", "main"]), bool)
    assert found.everything
    way = InstalledNextHop(VIP.address, 1, None)
    assert found.concerned([way]) == {VIP.address}
