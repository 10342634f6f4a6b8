"""`xdp-lb filter` on a host: what its rules do to traffic, with the balancer and without; and what is refused."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.l2 import Ether
from scapy.utils import RawPcapReader, wrpcap

from filters.tests.packets import FRAMES
from lb.errors import DataplaneError, StoreError
from lb.firewall.firewall import Firewall, open_firewall
from lb.model.rule_report import RuleSpec
from lb.model.rules import Action, At
from lb.paths import Paths
from lb.store.lock import writer_lock
from lb.store.store import Store
from netns_tests.bed.topology import XDP_LB, Bed, Host, own_prefix, wait_until
from xdp import attach as xdp_attach
from xdp import tc
from xdp.errors import XdpError

NEAR, FAR = "near", "far"
NEAR4, FAR4, NEAR6, FAR6 = "10.77.0.1", "10.77.0.2", "fd77::1", "fd77::2"
_numbers = itertools.count()


class Wire:
    """Two hosts on a veth. Rules are for `far`'s end; `send` sends there, and what arrives is counted."""

    def __init__(self, near: Host, far: Host, directory: Path) -> None:
        self.near, self.far, self.directory = near, far, directory

    @property
    def paths(self) -> Paths:
        return Paths(self.directory / "state", self.directory / "run", self.far.name)

    @property
    def environment(self) -> dict[str, str]:
        places = {"XDP_LB_STATE_DIR": str(self.paths.state_dir), "XDP_LB_RUN_DIR": str(self.paths.run_dir)}
        return {name: value for name, value in os.environ.items() if name != "SSH_CONNECTION"} | places

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.far.run([str(XDP_LB), *words], check=False, env=self.environment | environment)

    @property
    def near_mac(self) -> str:
        (link,) = json.loads(self.near.run(["ip", "-j", "link", "show", "dev", NEAR]).stdout)
        return str(link["address"])

    def filter(self, *words: str, **environment: str) -> list[str]:
        """The lines that it prints; it has to succeed."""
        done = self.run("filter", *words, **environment)
        assert done.returncode == 0, done.stderr
        return str(done.stdout).splitlines()

    def refusal(self, *words: str, **environment: str) -> str:
        """The one line of a command that fails."""
        done = self.run("filter", *words, **environment)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done
        return str(done.stderr).removeprefix("xdp-lb: ").removesuffix("\n")

    def rules(self) -> list[Any]:
        document = json.loads("\n".join(self.filter("list", "--json")))
        assert isinstance(document, list)
        return document

    def counts(self) -> list[tuple[int, int]]:
        """Of each rule, packets matched and dropped."""
        return [(rule["packets"], rule["dropped_packets"]) for rule in self.rules()]

    def arrived(self, port: int, count: int = 5, *, ipv6: bool = False, towards: str = FAR) -> int:
        """How many of `count` datagrams to a port get there. One more, to a port of no rule, comes behind them."""
        sender, receiver = (self.near, self.far) if towards == FAR else (self.far, self.near)
        family = socket.AF_INET6 if ipv6 else socket.AF_INET
        source, destination = (NEAR6, FAR6) if ipv6 else (NEAR4, FAR4)
        if towards != FAR:
            source, destination = destination, source
        with receiver.entered():
            sinks = [socket.socket(family, socket.SOCK_DGRAM) for _ in range(2)]
        with sender.entered():
            out = socket.socket(family, socket.SOCK_DGRAM)
        with sinks[0], sinks[1], out:
            for sink, number in zip(sinks, (port, 9), strict=True):
                sink.bind((destination, number))
                sink.settimeout(5)
            out.bind((source, 0))
            for number in (*[port] * count, 9):
                out.sendto(b"a datagram", (destination, number))
            sinks[1].recv(100)
            sinks[0].setblocking(False)
            return sum(1 for _ in iter(lambda: _received(sinks[0]), None))

    @contextmanager
    def firewall(self) -> Iterator[Firewall]:
        with self.far.entered(), open_firewall(self.paths, write=True) as firewall:
            yield firewall

    def program(self) -> str | None:
        """What runs at XDP, by name."""
        (link,) = json.loads(self.far.run(["ip", "-j", "-d", "link", "show", "dev", FAR]).stdout)
        name: str | None = link.get("xdp", {}).get("prog", {}).get("name")
        return name

    def footprint(self) -> dict[str, object]:
        """All that rules may leave on the host, beside the store."""
        run = str(self.paths.run_dir)
        return {
            "program": self.program(),
            "clsact": "clsact" in self.far.run(["tc", "qdisc", "show", "dev", FAR]).stdout,
            "mounts": [line for line in Path("/proc/self/mounts").read_text().splitlines() if run in line],
        }


def _received(sink: socket.socket) -> bytes | None:
    try:
        return sink.recv(100)
    except BlockingIOError:
        return None


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    number = next(_numbers)
    near, far = (Host(f"{own_prefix()}{label}{number}", label) for label in ("fnear", "ffar"))
    try:
        for host in (near, far):
            host.create()
        with near.netlink() as ip:
            ip.link("add", ifname=NEAR, kind="veth", peer={"ifname": FAR, "net_ns_fd": far.name})
        for host, name, address4, address6 in ((near, NEAR, NEAR4, NEAR6), (far, FAR, FAR4, FAR6)):
            with host.netlink() as ip:
                (index,) = ip.link_lookup(ifname=name)
                ip.link("set", index=index, state="up")
                ip.addr("add", index=index, address=address4, prefixlen=24)
                ip.addr("add", index=index, address=address6, prefixlen=64, flags=2)
        yield near, far
    finally:
        near.close()
        far.close()


@pytest.fixture
def wire(hosts: tuple[Host, Host], tmp_path: Path) -> Iterator[Wire]:
    made = Wire(*hosts, tmp_path)
    before = made.footprint()
    yield made
    made.run("detach")
    made.run("filter", "flush", "--all")
    assert made.footprint() == before


# What rules do


@pytest.mark.parametrize("at", ["xdp", "tc-in"])
@pytest.mark.parametrize("ipv6", [False, True], ids=["ipv4", "ipv6"])
def test_packets_are_dropped_and_counted(wire: Wire, at: str, ipv6: bool) -> None:
    assert wire.filter("add", FAR, "drop", "udp", "port", "53", "--at", at) == [
        f"{FAR}: rule 1 added: drop at {at}: udp port 53"
    ]
    assert [wire.arrived(port, ipv6=ipv6) for port in (53, 54)] == [0, 5]
    assert wire.counts() == [(5, 5)]


def test_what_goes_out_is_dropped_at_tc_out(wire: Wire) -> None:
    wire.filter("add", FAR, "drop", "udp dst port 53", "--at", "tc-out")
    assert [wire.arrived(53, towards=NEAR), wire.arrived(53), wire.arrived(54, towards=NEAR)] == [0, 5, 5]
    assert wire.counts() == [(5, 5)]


def test_first_rule_that_drops_or_passes_decides(wire: Wire) -> None:
    wire.filter("add", FAR, "count", "udp")
    wire.filter("add", FAR, "pass", "udp port 53")
    wire.filter("add", FAR, "drop", "udp portrange 50-60")
    assert [wire.arrived(port) for port in (53, 54, 70)] == [5, 0, 5]
    assert wire.counts() == [(18, 0), (5, 0), (5, 5)]  # three more are those to port 9


def test_counters_stay_with_their_rule_through_changes_of_others(wire: Wire) -> None:
    for port in (51, 52, 53):
        wire.filter("add", FAR, "drop", f"udp port {port}")
        assert wire.arrived(port, port - 50) == 0
    wire.filter("move", FAR, "3", "1")
    wire.filter("add", FAR, "count", "udp port 1", "--position", "2")
    wire.filter("del", FAR, "3")
    assert [(rule["expression"], rule["packets"]) for rule in wire.rules()] == [
        ("udp port 53", 3),
        ("udp port 1", 0),
        ("udp port 52", 2),
    ]
    wire.filter("add", FAR, "drop", "udp port 51")  # in the slot of the deleted one
    assert [rule["packets"] for rule in wire.rules()] == [3, 0, 2, 0]


def test_limit_lets_packets_in_time_go_on(wire: Wire) -> None:
    wire.filter("add", FAR, "limit", "1/h", "udp port 53")
    assert wire.arrived(53, 20) == 5
    assert wire.counts() == [(20, 15)]


def test_rule_ends_by_itself_and_leaves_with_the_next_change(wire: Wire) -> None:
    wire.filter("add", FAR, "drop", "udp port 53", "--for", "1s")
    wait_until(lambda: wire.arrived(53, 1) == 1, "a packet past the rule")
    (rule,) = wire.rules()
    assert (rule["expired"], rule["left_s"], rule["in_force"]) == (True, 0, True)
    assert "expired" in wire.filter("list")[1]
    assert wire.filter("add", FAR, "count", "udp port 1") == [
        f"{FAR}: rule 1 expired: drop at xdp: udp port 53",
        f"{FAR}: rule 1 added: count at xdp: udp port 1",
    ]
    assert len(wire.rules()) == 1


def test_rule_that_is_not_over_yet_drops(wire: Wire) -> None:
    wire.filter("add", FAR, "drop", "udp port 53", "--for", "1h30m")
    assert wire.arrived(53) == 0
    assert 5300 < wire.rules()[0]["left_s"] <= 5400


# Sets


@pytest.mark.parametrize("at", ["xdp", "tc-in"])
def test_set_drops_what_is_in_it_and_is_reloaded_in_place(wire: Wire, at: str, tmp_path: Path) -> None:
    file = tmp_path / "set.txt"
    file.write_text(f"{NEAR4}  # a host\nfd00::/16\n")
    wire.filter("add", FAR, "drop", "udp port 53", "--set", str(file), "--at", at)
    assert [wire.arrived(53, ipv6=ipv6) for ipv6 in (False, True)] == [0, 5]
    file.write_text(f"{NEAR4}\nfd77::/64\n10.0.0.0/9\n")
    assert wire.filter("reload", FAR, "1") == [
        f"{FAR}: rule 1 reloaded (2 added, 1 removed): drop at {at}: src in {file} (3) and udp port 53"
    ]
    assert [wire.arrived(53, ipv6=ipv6) for ipv6 in (False, True)] == [0, 0]
    file.write_text("")
    wire.filter("reload", FAR, "1")
    assert [wire.arrived(53, ipv6=ipv6) for ipv6 in (False, True)] == [5, 5]
    assert wire.counts() == [(15, 15)]


def test_destination_is_looked_up_on_the_side_asked_for(wire: Wire, tmp_path: Path) -> None:
    file = tmp_path / "set.txt"
    file.write_text(f"{FAR4}\n")
    wire.filter("add", FAR, "drop", "udp", "--set", str(file), "--at", "tc-out")
    wire.filter("add", FAR, "drop", "udp port 53", "--set", str(file), "--set-side", "dst")
    assert [wire.arrived(53), wire.arrived(54)] == [0, 5]
    assert [counts[1] for counts in wire.counts()] == [0, 5]


def test_frames_that_are_not_linear_are_looked_up_too(wire: Wire, tmp_path: Path) -> None:
    """A packet socket leaves nothing but the Ethernet header in the linear area."""
    file = tmp_path / "set.txt"
    file.write_text("192.168.7.9\n2001:db8:9::/64\n")
    wire.filter("add", FAR, "drop", "--set", str(file), "--at", "tc-in")
    names = ["udp", "tcp syn", "qinq", "vlan ipv6", "ipv6 tcp"]
    with wire.near.entered(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
        sender.bind((NEAR, 0))
        for name in names:
            sender.send(FRAMES[name])
    wait_until(lambda: wire.counts() == [(len(names), len(names))], "all frames dropped")


def test_bad_line_of_a_set_changes_nothing(wire: Wire, tmp_path: Path) -> None:
    file = tmp_path / "set.txt"
    file.write_text(f"{NEAR4}\n")
    wire.filter("add", FAR, "drop", "udp port 53", "--set", str(file))
    before = wire.rules()
    file.write_text("10.0.0.0/8\n10.0.0.0/40\n")
    assert wire.refusal("reload", FAR, "1") == f"{file}:2: '10.0.0.0/40': not an IPv4 or IPv6 prefix or range"
    assert wire.refusal("add", FAR, "drop", "--set", str(file)).startswith(f"{file}:2: ")
    assert wire.rules() == before
    assert wire.arrived(53) == 0


# The balancer beside them


SERVE = ("attach", FAR, "--vip", "10.77.0.100:80", "--mode", "dr", "--backends", NEAR4)


def test_rules_stay_in_force_when_the_balancer_comes_and_goes(wire: Wire) -> None:
    wire.filter("add", FAR, "drop", "udp port 53")
    assert wire.run(*SERVE).returncode == 0
    assert wire.program() == "xdp_lb"
    assert [wire.arrived(53), wire.arrived(54)] == [0, 5]
    wire.filter("add", FAR, "drop", "udp port 54")
    assert [wire.arrived(53), wire.arrived(54), wire.arrived(55)] == [0, 0, 5]
    assert wire.run("detach").returncode == 0
    assert wire.program() == "xdp_lb_filter"
    assert [wire.arrived(53), wire.arrived(54), wire.arrived(55)] == [0, 0, 5]
    assert wire.counts() == [(15, 15), (10, 10)]


def test_balanced_interface_takes_rules_and_gives_them_up(wire: Wire) -> None:
    assert wire.run(*SERVE).returncode == 0
    wire.filter("add", FAR, "drop", "udp port 53")
    wire.filter("add", FAR, "drop", "udp port 54", "--at", "tc-in")
    assert [wire.arrived(53), wire.arrived(54), wire.rules()[0]["in_force"]] == [0, 0, True]
    wire.filter("flush", FAR)
    assert [wire.arrived(53), wire.arrived(54), wire.program()] == [5, 5, "xdp_lb"]


def test_no_packet_slips_through_while_the_balancer_comes_and_goes(wire: Wire) -> None:
    wire.filter("add", FAR, "drop", "udp port 53")
    sent = 0
    with ThreadPoolExecutor(max_workers=1) as executor:
        changing = executor.submit(come_and_go, wire, rounds=3)
        while not changing.done():
            assert wire.arrived(53, 50) == 0
            sent += 50
        assert changing.result() == [0] * 9
    assert wire.counts() == [(sent, sent)]


def come_and_go(wire: Wire, rounds: int) -> list[int]:
    """Exit statuses. The commands are forked elsewhere: a fork of this process would hold on to the test's sockets."""
    commands = (SERVE, ("detach",), ("vip", "remove", "10.77.0.100:80"))
    return [wire.run(*words).returncode for _ in range(rounds) for words in commands]


def test_balancer_gets_what_rules_let_go_on(bed: Callable[..., Bed]) -> None:
    """Each interface has its own rules, also in one program."""
    b = bed(backends=1)
    b.xdp_lb("attach", "eth0", "eth1", "--vip", f"{b.vip4}:80", "--backends", b.backends[0].ipv4)
    b.xdp_lb("filter", "add", "eth1", "drop", "tcp")
    b.xdp_lb("filter", "add", "eth0", "count", "tcp port 80")

    def opens() -> bool:
        with b.client.entered():
            client = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        with client:
            client.settimeout(1)
            return client.connect_ex((b.vip4, 80)) == 111  # nobody listens: its refusal comes back

    assert not opens()
    b.xdp_lb("filter", "flush", "eth1")
    wait_until(opens, "an answer of the backend")
    (rule,) = json.loads(b.xdp_lb("filter", "list", "--json").stdout)
    assert rule["packets"] >= 2
    b.xdp_lb("filter", "flush", "--all")


# SSH

SSH = f"{NEAR4} 50022 {FAR4} 22"


REFUSED = [
    ("drop",),
    ("drop", "tcp port 22"),
    ("drop", f"src host {NEAR4}"),
    ("drop", "greater 1000"),
    ("drop", "tcp[tcpflags] & tcp-syn != 0"),
    ("drop", f"src host {NEAR4}", "--at", "tc-in"),
    ("drop", f"dst host {NEAR4}", "--at", "tc-out"),
    ("limit", "1/h", "tcp"),
    ("limit", "9/s"),
    ("limit", "1/h", "arp"),
    ("drop", "arp"),
    ("drop", "arp", "--at", "tc-out"),
    ("drop", "not tcp port 22"),
    ("drop", "ether src {near_mac}"),
]
TAKEN = [
    ("drop", "tcp port 23"),
    ("limit", "10/s"),
    ("limit", "1/s", "arp"),
    ("limit", "1/h", "udp"),
    ("count",),
    ("drop", "not tcp port 22 and not arp"),
    ("drop", "ip6"),
    ("drop", f"src host {FAR4}"),
    ("drop", f"src host {NEAR4}", "--at", "tc-out"),
]


def test_rule_that_would_drop_the_connection_it_is_typed_in_is_refused(wire: Wire) -> None:
    wire.arrived(53, towards=NEAR)  # so that the neighbour is known
    for words in ([word.format(near_mac=wire.near_mac) for word in words] for words in REFUSED):
        assert wire.refusal("add", FAR, *words, SSH_CONNECTION=SSH).endswith(
            f"the SSH connection from {NEAR4} port 50022 that runs this command: use --force to override"
        ), words
    assert wire.rules() == []
    assert wire.filter("add", FAR, *REFUSED[0], "--force", SSH_CONNECTION=SSH)


def test_rule_that_leaves_the_connection_alone_is_taken(wire: Wire) -> None:
    for words in TAKEN:
        assert wire.filter("add", FAR, *words, "--dry-run", SSH_CONNECTION=SSH), words


def test_rule_of_an_interface_that_the_connection_does_not_take_is_none_of_its_business(wire: Wire) -> None:
    assert wire.filter("add", "lo", "drop", "tcp port 22", SSH_CONNECTION=SSH)


def test_set_that_would_drop_the_connection_is_refused_when_it_is_added_and_when_it_is_reloaded(
    wire: Wire, tmp_path: Path
) -> None:
    file = tmp_path / "set.txt"
    file.write_text("10.77.0.0/24\n")
    assert "rule 1 (drop --set" in wire.refusal("add", FAR, "drop", "--set", str(file), SSH_CONNECTION=SSH)
    file.write_text("10.78.0.0/24\n")
    wire.filter("add", FAR, "drop", "--set", str(file), SSH_CONNECTION=SSH)
    file.write_text("10.77.0.0/24\n")
    assert "would drop the SSH" in wire.refusal("reload", FAR, "1", SSH_CONNECTION=SSH)
    assert wire.arrived(53) == 5
    assert wire.filter("reload", FAR, "1", "--force", SSH_CONNECTION=SSH)
    assert wire.rules()[0]["set"]["prefixes"] == 1


def test_set_with_host_bits_is_taken_with_a_warning(wire: Wire, tmp_path: Path) -> None:
    file = tmp_path / "set.txt"
    file.write_text(f"; a list\n{NEAR4}/24 ; SBL1\n192.0.2.9/24 # two\n198.51.100.7-198.51.100.9\n")
    done = wire.run("filter", "add", FAR, "drop", "udp port 53", "--set", str(file))
    warning = f"xdp-lb: warning: set {file}: 2 prefixes have host bits set: line 2 is read as 10.77.0.0/24, ...\n"
    assert (done.returncode, done.stderr) == (0, warning)
    assert (wire.rules()[0]["set"]["prefixes"], wire.arrived(53)) == (4, 0)
    assert wire.run("filter", "reload", FAR, "1").stderr == warning


def test_rule_that_spares_the_connection_cannot_be_taken_away(wire: Wire) -> None:
    wire.filter("add", FAR, "pass", "tcp port 22")
    wire.filter("add", FAR, "drop", "tcp", SSH_CONNECTION=SSH)
    assert "rule 2 (drop tcp) would drop" in wire.refusal("del", FAR, "1", SSH_CONNECTION=SSH)
    assert "rule 2 (drop tcp) would drop" in wire.refusal("move", FAR, "2", "1", SSH_CONNECTION=SSH)
    assert [rule["action"] for rule in wire.rules()] == ["pass", "drop"]


def test_connection_that_is_dropped_already_hinders_no_harmless_change(wire: Wire) -> None:
    wire.filter("add", FAR, "count", "udp")
    wire.filter("add", FAR, "drop", f"src host {NEAR4}", "--force", SSH_CONNECTION=SSH)
    assert wire.filter("add", FAR, "count", "arp", SSH_CONNECTION=SSH)
    assert wire.filter("add", FAR, "pass", "udp", SSH_CONNECTION=SSH)
    assert wire.filter("del", FAR, "1", SSH_CONNECTION=SSH)
    assert wire.filter("add", FAR, "pass", f"src host {NEAR4}", "--position", "1", SSH_CONNECTION=SSH)


def test_packet_that_is_dropped_already_excuses_no_further_drop(wire: Wire) -> None:
    """A rule for the opening alone leaves the open connection alive."""
    wire.filter("add", FAR, "drop", "tcp[tcpflags] & tcp-syn != 0", "--force", SSH_CONNECTION=SSH)
    assert "rule 2 (drop tcp) would drop the SSH" in wire.refusal("add", FAR, "drop", "tcp", SSH_CONNECTION=SSH)


def test_pass_rule_that_expires_spares_nothing(wire: Wire) -> None:
    wire.filter("add", FAR, "pass", f"src host {NEAR4}", "--for", "1h", SSH_CONNECTION=SSH)
    assert wire.refusal("add", FAR, "drop", "tcp", SSH_CONNECTION=SSH).startswith(
        f"{FAR}: rule 2 (drop tcp), once the pass rules with a deadline have expired, would drop the SSH connection"
    )
    wire.filter("add", FAR, "drop", "tcp", "--force", SSH_CONNECTION=SSH)
    assert "rule 2 (drop tcp) would drop the SSH" in wire.refusal("del", FAR, "1", SSH_CONNECTION=SSH)
    assert wire.filter("add", FAR, "count", SSH_CONNECTION=SSH)


def test_drop_of_the_neighbour_is_named(wire: Wire) -> None:
    assert wire.refusal("add", FAR, "drop", "arp", SSH_CONNECTION=SSH).startswith(
        f"{FAR}: rule 1 (drop arp) would drop ARP with {NEAR4} and thereby the SSH connection from {NEAR4} port 50022"
    )
    over_ipv6 = f"{NEAR6} 50022 {FAR6} 22"
    assert wire.refusal("add", FAR, "drop", "icmp6", SSH_CONNECTION=over_ipv6).startswith(
        f"{FAR}: rule 1 (drop icmp6) would drop neighbour discovery with {NEAR6} and thereby the SSH connection"
    )
    assert wire.filter("add", FAR, "drop", "arp", SSH_CONNECTION=over_ipv6)


def test_neighbour_of_a_connection_from_elsewhere_is_the_gateway(wire: Wire) -> None:
    wire.far.run(["ip", "route", "add", "192.0.2.0/24", "via", NEAR4])
    from_elsewhere = f"192.0.2.7 50022 {FAR4} 22"
    said = [
        wire.refusal("add", FAR, "drop", expression, SSH_CONNECTION=from_elsewhere)
        for expression in ("arp", f"arp src host {NEAR4}")
    ]
    wire.far.run(["ip", "route", "del", "192.0.2.0/24"])
    assert [f"ARP with {NEAR4} and" in line for line in said] == [True, True]


def test_rule_is_named_by_its_number_in_the_list(wire: Wire) -> None:
    wire.filter("add", FAR, "pass", "tcp port 22", SSH_CONNECTION=SSH)
    wire.filter("add", FAR, "drop", "tcp", SSH_CONNECTION=SSH)
    assert "rule 2 (drop tcp) would drop" in wire.refusal("del", FAR, "1", SSH_CONNECTION=SSH)
    assert "rule 2 (drop tcp) would drop" in wire.refusal("move", FAR, "2", "1", SSH_CONNECTION=SSH)


def test_restoring_rules_that_would_drop_the_connection_is_refused(wire: Wire, tmp_path: Path) -> None:
    file = tmp_path / "set.txt"
    file.write_text("10.77.0.0/24\n")
    wire.filter("add", FAR, "drop", "--set", str(file), "--force", SSH_CONNECTION=SSH)
    assert wire.filter("restore", SSH_CONNECTION=SSH)  # nothing that is not dropped already
    forget_all(wire)
    assert "rule 1 (drop --set" in wire.refusal("restore", SSH_CONNECTION=SSH)
    assert wire.arrived(53) == 5
    assert wire.filter("restore", "--force", SSH_CONNECTION=SSH)
    assert [rule["in_force"] for rule in wire.rules()] == [True]


# What is refused


BAD_WORDS = [
    (("add", "nope0", "drop"), "interface nope0: does not exist"),
    (("add", FAR, "drop", "udp prot 53"), "expression 'udp prot 53': can't parse filter expression: syntax error"),
    (("add", FAR, "limit", "0/s"), "rate 0/s: passes no packets: use drop"),
    (("add", FAR, "drop", "--set", "/none"), "set /none: No such file or directory"),
    (("add", FAR, "drop", "--for", "soon"), "time soon: not a duration such as 90s, 10m or 1h30m"),
    (("add", FAR, "drop", "arp", "--position", "3"), f"{FAR}: position 3: out of range 1 to 2"),
    (("del", FAR, "2"), f"{FAR}: no rule 2: the last is 1: see xdp-lb filter list {FAR}"),
    (("move", FAR, "1", "0"), f"{FAR}: no rule 0: the last is 1: see xdp-lb filter list {FAR}"),
    (("reload", FAR, "1"), f"{FAR}: rule 1 has no set"),
    (("flush", "nope0"), "nope0: has no rules: see xdp-lb filter list"),
    (("test", FAR, "-r", "/none"), "/none: No such file or directory"),
    (
        ("test", "--rule", "fly udp", "-r", "/none"),
        "rule 'fly udp': no action: begin with drop, pass, count or limit RATE",
    ),
]


def test_bad_words_are_one_line_and_change_nothing(wire: Wire) -> None:
    wire.filter("add", FAR, "count", "udp port 53")
    before = wire.rules(), wire.program()
    for words, line in BAD_WORDS:
        assert wire.refusal(*words) == line
    assert (wire.rules(), wire.program()) == before


def test_filter_too_long_for_one_program_names_the_limit(wire: Wire) -> None:
    ranges = " or ".join(f"portrange {port}-{port + 1}" for port in range(1, 1000, 3))
    assert re.fullmatch(
        r"expression portrange 1-2 or .*: \d+ classic BPF instructions, at most 16384: shorten the expression, or put"
        r" addresses into a file and use --set FILE",
        wire.refusal("add", FAR, "drop", ranges),
    )


def test_list_of_3000_hosts_is_one_rule(wire: Wire) -> None:
    hosts = " or ".join(f"src host 10.{78 + number // 256}.{number % 256}.9" for number in range(3000))
    (line,) = wire.filter("add", FAR, "drop", hosts, SSH_CONNECTION=SSH)
    assert line == f"{FAR}: rule 1 added: drop at xdp: {hosts[:197]}..."
    assert wire.filter("list")[-1].endswith(f"  {hosts[:197]}...")
    assert wire.rules()[0]["expression"] == hosts
    assert wire.arrived(53) == 5
    wire.filter("add", FAR, "drop", f"({hosts} or src host {NEAR4}) and udp port 53")
    assert wire.arrived(53) == 0


def test_program_of_someone_else_is_named_and_left_alone(wire: Wire) -> None:
    assert wire.run("decap", "attach", FAR, "--vip", "10.77.0.100").returncode == 0
    line = wire.refusal("add", FAR, "drop", "udp port 53")
    assert re.search(r"another XDP program is attached \(id \d+, name xdp_decap\): .*, or use --at tc-in$", line)
    assert (wire.rules(), wire.program()) == ([], "xdp_decap")
    wire.filter("add", FAR, "drop", "udp port 53", "--at", "tc-in")
    assert wire.arrived(53) == 0
    assert wire.run("decap", "detach").returncode == 0
    assert wire.arrived(53) == 0


def test_dry_run_says_what_would_be_and_changes_nothing(wire: Wire) -> None:
    assert wire.filter("add", FAR, "drop", "udp port 53", "--dry-run") == [
        f"dry run: {FAR}: rule 1 added: drop at xdp: udp port 53"
    ]
    assert (wire.rules(), wire.program(), wire.arrived(53)) == ([], None, 5)


# Life and death


def test_restore_puts_stored_rules_in_force(wire: Wire, tmp_path: Path) -> None:
    """As after a boot: the interface, the pins and the file of the set are gone, the store is there."""
    file = tmp_path / "set.txt"
    file.write_text(f"{NEAR4}\n")
    wire.filter("add", FAR, "drop", "udp port 53", "--set", str(file))
    wire.filter("add", FAR, "drop", "udp port 54", "--at", "tc-in", "--for", "1h")
    file.unlink()
    forget_all(wire)
    assert [rule["in_force"] for rule in wire.rules()] == [False, False]
    assert wire.filter("list")[-1] == f"not active on {FAR}: run xdp-lb filter restore"
    assert [wire.arrived(53), wire.arrived(54)] == [5, 5]
    assert len(wire.filter("restore")) == 2
    assert [rule["in_force"] for rule in wire.rules()] == [True, True]
    assert [wire.arrived(53), wire.arrived(54)] == [0, 0]


def forget_all(wire: Wire) -> None:
    with wire.far.entered():
        index = socket.if_nametoindex(FAR)
        xdp_attach.detach(index)
        tc.detach(index, tc.LAST_IN)
    wire.far.run(["umount", str(wire.paths.run_dir / "filter" / "bpf")], check=False)
    subprocess.run(["umount", str(wire.paths.run_dir / "filter" / "bpf")], check=False, capture_output=True)


def test_rules_of_an_interface_that_is_gone_wait_for_it(wire: Wire) -> None:
    with wire.far.netlink() as ip:
        ip.link("add", ifname="other", kind="veth", peer={"ifname": "rehto"})
    wire.filter("add", "other", "drop", "udp port 53")
    with wire.far.netlink() as ip:
        ip.link("del", ifname="other")
    assert not wire.rules()[0]["in_force"]
    done = wire.run("filter", "restore")
    assert (done.returncode, done.stderr) == (
        0,
        "xdp-lb: warning: interface other: does not exist: rules stay pending\n",
    )
    wire.filter("flush", "other")


DROP_53 = RuleSpec(FAR, Action.DROP, expression="udp port 53")


def test_store_that_cannot_be_written_leaves_the_old_rules_in_force(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire.filter("add", FAR, "drop", "udp port 54")
    commit = Store._roll_back

    @contextmanager
    def fails_at_the_end(self: Store, write: Callable[[], None]) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        write()
        yield
        commit(self)
        raise StoreError("the disk is full")

    for at in At:
        with wire.firewall() as firewall, monkeypatch.context() as patch:
            patch.setattr(Store, "_transaction", fails_at_the_end)
            with pytest.raises(StoreError):
                firewall.add(RuleSpec(FAR, Action.DROP, expression="udp port 53", at=at))
    assert [wire.arrived(53), wire.arrived(54), wire.arrived(53, towards=NEAR)] == [5, 0, 5]
    assert wire.counts() == [(5, 5)]


def test_kernel_that_refuses_half_way_leaves_the_old_rules_in_force(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flush takes off two programs: the second refuses."""
    wire.filter("add", FAR, "drop", "udp port 53")
    wire.filter("add", FAR, "drop", "udp port 54", "--at", "tc-in")

    def refuses(*_: object) -> None:
        raise XdpError("refused")

    with wire.firewall() as firewall, monkeypatch.context() as patch:
        patch.setattr(tc, "detach", refuses)
        with pytest.raises(DataplaneError, match=r"^refused$"):
            firewall.flush()
    assert [wire.arrived(53), wire.arrived(54)] == [0, 0]
    assert [rule["in_force"] for rule in wire.rules()] == [True, True]


KILLED = """
import os, signal, sys
from lb.store import store
from lb.cli.main import main
store.Store.saving_rules = (lambda saving: lambda *words: Killing(saving(*words)))(store.Store.saving_rules)

class Killing:
    def __init__(self, saving): self.saving = saving
    def __enter__(self): self.saving.__enter__()
    def __exit__(self, *_): os.kill(os.getpid(), signal.SIGKILL)

main()
"""


@pytest.mark.parametrize("at", list(At))
@pytest.mark.parametrize("balanced", [False, True], ids=["plain", "balanced"])
def test_change_that_was_killed_is_put_right_by_the_next(wire: Wire, at: At, balanced: bool) -> None:
    """The kernel has the new rules, the store the old ones."""
    if balanced:
        assert wire.run(*SERVE).returncode == 0
    towards = NEAR if at is At.TC_OUT else FAR
    wire.filter("add", FAR, "drop", "udp dst port 53", "--at", str(at))
    words = ["filter", "add", FAR, "drop", "udp dst port 54", "--at", str(at)]
    done = wire.far.run([sys.executable, "-c", KILLED, *words], check=False, env=wire.environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [wire.arrived(port, towards=towards) for port in (53, 54)] == [0, 0]
    assert [(rule["expression"], rule["in_force"]) for rule in wire.rules()] == [("udp dst port 53", False)]
    wire.filter("add", FAR, "count", "arp", "--at", str(at))
    assert [wire.arrived(port, towards=towards) for port in (53, 54)] == [0, 5]
    assert [rule["in_force"] for rule in wire.rules()] == [True, True]


def test_second_command_waits_for_the_first_and_says_so(wire: Wire) -> None:
    with wire.firewall():
        line = wire.refusal("add", FAR, "drop", "udp port 53")
    assert re.fullmatch(r"another xdp-lb \(.*\) is changing network namespace .*: try again when it has ended", line)


def test_rules_change_beside_a_daemon_that_holds_the_balancers_lock(wire: Wire) -> None:
    paths = wire.paths
    with writer_lock(paths.lock, paths.netns):
        wire.filter("add", FAR, "drop", "udp dst port 53")
    assert [wire.arrived(port) for port in (53, 54)] == [0, 5]


# Files of packets


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    path = tmp_path / "in.pcap"
    names = ("udp", "tcp syn", "arp", "ipv6 udp", "echo request")
    wrpcap(str(path), [Ether(FRAMES[name]) for name in names])
    return path


def packets(path: Path) -> list[bytes]:
    with RawPcapReader(str(path)) as reader:
        return [data for data, _ in reader]


def test_file_of_packets_is_tried_on_rules_in_force(wire: Wire, capture: Path, tmp_path: Path) -> None:
    wire.filter("add", FAR, "pass", "udp port 53 and ip6")
    wire.filter("add", FAR, "drop", "udp")
    wire.filter("add", FAR, "count", "--at", "tc-in")
    out = tmp_path / "out.pcap"
    found = json.loads("\n".join(wire.filter("test", FAR, "-r", str(capture), "-w", str(out), "--json")))
    assert [rule["matched"] for rule in found["rules"]] == [1, 1, 4]
    assert (found["packets"], found["dropped"], found["untested"]) == (5, 1, 0)
    assert packets(out) == [FRAMES["udp"]]
    assert [rule["packets"] for rule in wire.rules()[:2]] == [0, 0]


def test_file_of_packets_is_tried_on_rules_that_are_not_there(wire: Wire, capture: Path) -> None:
    rules = ("--rule", "limit 1/h udp", "--rule", "drop arp or icmp")
    lines = wire.filter("test", *rules, "-r", str(capture))
    assert lines[-1] == "5 packets: 2 dropped, 3 passed"
    assert [line.split()[3:] for line in lines[1:3]] == [["1/h", "2", "udp"], ["2", "arp", "or", "icmp"]]
    assert wire.rules() == []
