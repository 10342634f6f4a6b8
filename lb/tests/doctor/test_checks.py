"""Each finding of the doctor, from facts made up here: what is said, and what mends it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lb.doctor.checks import QEMU_OFFLOADS_OFF, Finding, Severity, findings, findings_document, is_fit
from lb.doctor.facts import Dataplane, Host, Interface, Neighbours, Peer, Program, Queues, Refusal
from lb.doctor.text import lines

OK, WARN, FAIL = Severity
MIB = 1 << 20

LOADED = Dataplane(instructions=12_345, jited=True, nat_ports=(1024, 32767), map_bytes=100 * MIB)
HOST = Host(
    kernel="6.18.44-cloud",
    cpus=4,
    page_size=4096,
    missing_capabilities=(),
    dataplane=LOADED,
    loaded=False,
    has_bpffs=True,
    pins="/run/xdp-lb/bpf",
    services=2,
    modes=frozenset({"nat", "dr"}),
    families=frozenset({4}),
    free_bytes=1000 * MIB,
    memory_limit=None,
    local_ports=(32768, 60999),
    neighbours=(),
    loopback_addresses=(),
)
CARD = Interface(
    name="eth0", driver="ice", up=True, mtu=1500, native=True, transmits=False, forwarding=frozenset({4, 6})
)
PEER = Peer("far", 1500, 1, leaves_checksums_out=False, leaves_vlan_tags_out=False)
VETH = replace(CARD, driver="veth", transmits=True, peer=PEER)


def of_host(check: str, **facts: Any) -> Finding:
    (found,) = (f for f in findings(replace(HOST, **facts), ()) if f.check == check)
    return found


def of_interface(check: str, interface: Interface = CARD, host: Host = HOST, **facts: Any) -> Finding:
    found = findings(host, [replace(interface, **facts)])
    (one,) = (f for f in found if f.check == check and f.interface)
    return one


def on_eth0(check: str, status: Severity, value: str, fix: str | None = None) -> Finding:
    return Finding(check, status, value, fix, "eth0")


def test_a_sound_host_has_nothing_to_mend() -> None:
    found = findings(HOST, [CARD, VETH])
    assert {f.status for f in found} == {OK}
    assert {f.fix for f in found} == {None}
    assert is_fit(found)


def test_warnings_leave_a_host_fit_and_a_failure_does_not() -> None:
    down, foreign = replace(CARD, up=False), replace(CARD, program=Program("native", 7, "other", ours=False))
    assert is_fit(findings(HOST, [down]))
    assert not is_fit(findings(HOST, [foreign]))


# The host


@pytest.mark.parametrize(
    ("kernel", "status"),
    [("6.1.0-38-amd64", OK), ("6.12", OK), ("10.0.1", OK), ("6.0.19", FAIL), ("5.15.0-1", FAIL)],
)
def test_kernels_before_6_1_are_too_old(kernel: str, status: Severity) -> None:
    found = of_host("kernel", kernel=kernel)
    assert (found.status, found.fix is None) == (status, status is OK)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (
            {"missing_capabilities": ("CAP_NET_ADMIN", "CAP_SYS_ADMIN")},
            Finding("capabilities", FAIL, "CAP_NET_ADMIN and CAP_SYS_ADMIN missing", "sudo xdp-lb doctor"),
        ),
        ({}, Finding("program", OK, "loads: 12,345 instructions verified")),
        ({"dataplane": Refusal("too large", "make it small")}, Finding("program", FAIL, "too large", "make it small")),
        (
            {"dataplane": None},
            Finding("program", WARN, "not tested: capabilities missing", "sudo xdp-lb doctor"),
        ),
        (
            {"dataplane": replace(LOADED, jited=False)},
            Finding("jit", WARN, "off: programs run several times slower", "sysctl -w net.core.bpf_jit_enable=1"),
        ),
        (
            {"has_bpffs": False},
            Finding("bpffs", FAIL, "not supported by this kernel", "boot a kernel with CONFIG_BPF_SYSCALL=y"),
        ),
        ({}, Finding("bpffs", OK, "mounted by attach: /run/xdp-lb/bpf")),
        ({"loaded": True}, Finding("bpffs", OK, "in use: /run/xdp-lb/bpf")),
        ({"services": 1}, Finding("store", OK, "1 service")),
        ({"services": Refusal("damaged", "mv a b")}, Finding("store", FAIL, "damaged", "mv a b")),
        (
            {"local_ports": (1024, 60999)},
            Finding(
                "nat ports",
                WARN,
                "1024-32767 overlaps the host's ephemeral range 1024-60999",
                'sysctl -w net.ipv4.ip_local_port_range="32768 60999"',
            ),
        ),
        (
            {"local_ports": (512, 1023)},
            Finding("nat ports", OK, "1024-32767, outside the host's ephemeral range 512-1023"),
        ),
    ],
)
def test_finding_of_the_host(facts: dict[str, Any], expected: Finding) -> None:
    assert of_host(expected.check, **facts) == expected


@pytest.mark.parametrize(
    ("free_mib", "limit", "loaded", "expected"),
    [
        (200, None, False, Finding("memory", OK, "100 MiB for maps, 200 MiB free")),
        (
            199,
            None,
            False,
            Finding("memory", WARN, "100 MiB for maps, 199 MiB free", "free or add 2 MiB of memory"),
        ),
        (
            40,
            "/sys/fs/cgroup/lb/memory.max",
            False,
            Finding(
                "memory",
                FAIL,
                "100 MiB for maps, 40 MiB free",
                "raise the limit by 61 MiB: /sys/fs/cgroup/lb/memory.max",
            ),
        ),
        (40, None, True, Finding("memory", OK, "maps already allocated")),
    ],
)
def test_maps_need_memory(free_mib: int, limit: str | None, loaded: bool, expected: Finding) -> None:
    assert of_host("memory", free_bytes=free_mib * MIB, memory_limit=limit, loaded=loaded) == expected


def test_neighbour_tables_have_room_for_twice_the_backends() -> None:
    host = replace(HOST, neighbours=(Neighbours(4, 512, 1024), Neighbours(6, 513, 1024)))
    found = [f for f in findings(host, ()) if f.check.startswith("neighbours")]
    assert found == [
        Finding("neighbours v4", OK, "512 backends, table limit 1024"),
        Finding(
            "neighbours v6",
            WARN,
            "513 backends, table limit 1024",
            "sysctl -w net.ipv6.neigh.default.gc_thresh3=4096",
        ),
    ]


def test_what_needs_the_loaded_program_is_left_out_without_it() -> None:
    checks = {f.check for f in findings(replace(HOST, dataplane=None), ())}
    assert checks == {"kernel", "capabilities", "program", "bpffs", "store"}


# An interface


@pytest.mark.parametrize(
    ("interface", "facts", "expected"),
    [
        (CARD, {"up": False}, on_eth0("link", WARN, "down", "ip link set dev eth0 up")),
        (CARD, {}, on_eth0("native xdp", OK, "ice")),
        (
            CARD,
            {"driver": "e1000", "native": False},
            on_eth0(
                "native xdp",
                WARN,
                "e1000: not known to support native XDP; generic mode is several times slower",
                "to accept generic mode: xdp-lb attach eth0 --xdp-mode generic",
            ),
        ),
        (
            CARD,
            {"driver": None, "native": None},
            on_eth0(
                "native xdp",
                WARN,
                "unknown driver: not known to support native XDP; generic mode is several times slower",
                "to accept generic mode: xdp-lb attach eth0 --xdp-mode generic",
            ),
        ),
        (CARD, {"native": None}, on_eth0("native xdp", OK, "ice")),
        (
            VETH,
            {"native": False, "peer": replace(PEER, tx_queues=4)},
            on_eth0("native xdp", WARN, "veth: peer has more TX queues", "ethtool -L eth0 rx 4"),
        ),
        (VETH, {}, on_eth0("transmit", OK, "peer accepts frames sent by XDP")),
        (
            VETH,
            {"transmits": False},
            on_eth0("transmit", WARN, "peer drops frames sent by XDP", "ethtool -K far gro on"),
        ),
        (
            VETH,
            {"transmits": False, "peer": None},
            on_eth0(
                "transmit",
                WARN,
                "peer drops frames sent by XDP",
                "in the peer's network namespace, DEV being the peer: ethtool -K DEV gro on",
            ),
        ),
        (
            CARD,
            {"program": Program("generic", 12, "xdp_pass", ours=False)},
            on_eth0(
                "attached",
                FAIL,
                "foreign program: id 12, name xdp_pass, generic",
                "ip link set dev eth0 xdpgeneric off",
            ),
        ),
        (
            CARD,
            {"program": Program("native", 12, "xdp_lb", ours=False, lost=True)},
            on_eth0(
                "attached",
                FAIL,
                "id 12, name xdp_lb, native: pins missing",
                "xdp-lb attach eth0, using the same version",
            ),
        ),
        (
            CARD,
            {"program": Program("generic", 12, "xdp_lb", ours=True)},
            on_eth0(
                "attached",
                WARN,
                "xdp-lb, id 12, generic: several times slower than native",
                "xdp-lb detach eth0 && xdp-lb attach eth0 --xdp-mode native",
            ),
        ),
        (
            CARD,
            {"program": Program("native", 12, "xdp_lb", ours=True)},
            on_eth0("attached", OK, "xdp-lb, id 12, native"),
        ),
        (
            CARD,
            {"offloads": frozenset({"rx-lro"})},
            on_eth0("lro", WARN, "on: incompatible with native XDP", "ethtool -K eth0 lro off"),
        ),
        (
            CARD,
            {"offloads": frozenset({"rx-gro-hw"})},
            on_eth0("hardware gro", WARN, "on: incompatible with native XDP", "ethtool -K eth0 rx-gro-hw off"),
        ),
        (
            CARD,
            {"driver": "virtio_net", "offloads": frozenset({"rx-gro-hw"})},
            on_eth0("hardware gro", OK, "on: disabled by the driver for XDP"),
        ),
        (
            CARD,
            {
                "driver": "virtio_net",
                "offloads": frozenset({"rx-gro-hw"}),
                "fixed_offloads": frozenset({"rx-gro-hw", "rx-lro"}),
            },
            on_eth0("hardware gro", WARN, "on [fixed]: incompatible with native XDP", QEMU_OFFLOADS_OFF),
        ),
        (
            CARD,
            {"offloads": frozenset({"rx-vlan-hw-parse"})},
            on_eth0(
                "vlan offload",
                WARN,
                "on: XDP does not see VLAN tags",
                "ethtool -K eth0 rxvlan off",
            ),
        ),
        (VETH, {"offloads": frozenset({"rx-vlan-hw-parse"})}, on_eth0("vlan offload", OK, "off")),
        (
            VETH,
            {"peer": replace(PEER, leaves_vlan_tags_out=True)},
            on_eth0("vlan offload", WARN, "on: XDP does not see VLAN tags", "ethtool -K far txvlan off"),
        ),
        (VETH, {}, on_eth0("checksums", OK, "complete in frames from far")),
        (
            VETH,
            {"peer": replace(PEER, leaves_checksums_out=True)},
            on_eth0("checksums", WARN, "missing in frames from far", "ethtool -K far tx off"),
        ),
        (
            VETH,
            {"peer": None},
            on_eth0(
                "checksums",
                WARN,
                "unknown: peer in another network namespace",
                "in the peer's network namespace, DEV being the peer: ethtool -K DEV tx off",
            ),
        ),
        (CARD, {"mtu": 3498}, on_eth0("mtu", OK, "3498")),
        (
            CARD,
            {"mtu": 9000},
            on_eth0(
                "mtu", WARN, "9000: too large for native XDP, frames exceed a page", "ip link set dev eth0 mtu 3498"
            ),
        ),
        (
            VETH,
            {"peer": replace(PEER, mtu=9000)},
            on_eth0(
                "mtu", WARN, "9000: too large for native XDP, frames exceed a page", "ip link set dev far mtu 3498"
            ),
        ),
        (CARD, {"queues": Queues(4, 64, combined=True)}, on_eth0("queues", OK, "4 for 4 CPUs")),
        (CARD, {"queues": Queues(1, 1, combined=True)}, on_eth0("queues", OK, "1 for 4 CPUs")),
        (
            CARD,
            {"queues": Queues(1, 2, combined=True)},
            on_eth0("queues", WARN, "1 for 4 CPUs", "ethtool -L eth0 combined 2"),
        ),
        (
            CARD,
            {"queues": Queues(1, 8, combined=False)},
            on_eth0("queues", WARN, "1 for 4 CPUs", "ethtool -L eth0 rx 4"),
        ),
        (
            CARD,
            {"forwarding": frozenset()},
            on_eth0(
                "forwarding",
                WARN,
                "IPv4 off: bpf_fib_lookup cannot resolve next hops",
                "sysctl -w net.ipv4.conf.eth0.forwarding=1",
            ),
        ),
        (CARD, {"rp_filter": 2}, on_eth0("rp_filter", OK, "loose")),
        (
            CARD,
            {"rp_filter": 1},
            on_eth0(
                "rp_filter",
                WARN,
                "strict: drops packets on asymmetric routes",
                "sysctl -w net.ipv4.conf.eth0.rp_filter=2",
            ),
        ),
    ],
)
def test_finding_of_an_interface(interface: Interface, facts: dict[str, Any], expected: Finding) -> None:
    assert of_interface(expected.check, interface, **facts) == expected


def test_larger_pages_hold_jumbo_frames() -> None:
    assert of_interface("mtu", mtu=9000, host=replace(HOST, page_size=65536)).status is OK


@pytest.mark.parametrize(
    ("modes", "mtu", "status", "value", "fix"),
    [
        ({"nat", "ipip"}, 1500, WARN, "1500: 1460 inside tunnels, clients send 1500", "ip link set dev eth0 mtu 1540"),
        ({"ipip", "gue"}, 1500, WARN, "1500: 1428 inside tunnels, clients send 1500", "ip link set dev eth0 mtu 1572"),
        ({"gue"}, 1572, OK, "1572: 1500 inside tunnels", None),
        ({"nat", "dr"}, 1400, OK, "1400", None),
    ],
)
def test_tunnels_need_room_above_what_clients_send(
    modes: set[str], mtu: int, status: Severity, value: str, fix: str | None
) -> None:
    host = replace(HOST, modes=frozenset(modes))
    assert of_interface("mtu", host=host, mtu=mtu) == on_eth0("mtu", status, value, fix)


def test_forwarding_is_wanted_for_the_families_that_are_served() -> None:
    both = replace(HOST, families=frozenset({4, 6}))
    assert of_interface("forwarding", host=both).status is OK
    assert of_interface("forwarding", host=both, forwarding=frozenset({4})).fix == (
        "sysctl -w net.ipv6.conf.eth0.forwarding=1"
    )
    assert of_interface("forwarding", host=both, forwarding=frozenset()).fix == (
        "sysctl -w net.ipv4.conf.eth0.forwarding=1 net.ipv6.conf.eth0.forwarding=1"
    )


@pytest.mark.parametrize(("ignore", "announce", "status"), [(1, 2, OK), (2, 2, OK), (0, 2, WARN), (1, 1, WARN)])
def test_a_backend_is_silent_about_the_vips_on_its_loopback(ignore: int, announce: int, status: Severity) -> None:
    backend = replace(HOST, loopback_addresses=("10.0.0.100", "10.0.0.101"))
    found = of_interface("arp", host=backend, arp_ignore=ignore, arp_announce=announce)
    assert found == (
        on_eth0("arp", OK, "no ARP replies for 10.0.0.100, 10.0.0.101 on lo")
        if status is OK
        else on_eth0(
            "arp",
            WARN,
            "ARP replies for 10.0.0.100, 10.0.0.101 on lo",
            "sysctl -w net.ipv4.conf.eth0.arp_ignore=1 net.ipv4.conf.eth0.arp_announce=2",
        )
    )


def test_what_does_not_apply_is_not_mentioned() -> None:
    checks = {f.check for f in findings(HOST, [CARD]) if f.interface}
    assert checks.isdisjoint({"transmit", "checksums", "queues", "arp"})


def test_names_of_interfaces_go_through_a_shell_and_through_sysctl() -> None:
    odd = replace(CARD, name="a.1;b", up=False, rp_filter=1)
    fixes = [f.fix for f in findings(HOST, [odd]) if f.fix]
    assert fixes == ["ip link set dev 'a.1;b' up", "sysctl -w 'net/ipv4/conf/a.1;b/rp_filter=2'"]


# Output

SOME = [
    Finding("kernel", OK, "6.18"),
    Finding("store", FAIL, "damaged", "mv a b"),
    Finding("link", WARN, "down", "ip link set dev eth0 up", "eth0"),
]


def test_each_fault_is_followed_by_its_fix() -> None:
    assert lines(SOME, colour=False) == [
        "host",
        "  ok    kernel  6.18",
        "  FAIL  store   damaged",
        "        fix: mv a b",
        "",
        "eth0",
        "  warn  link    down",
        "        fix: ip link set dev eth0 up",
        "",
        "1 FAIL, 1 warn, 1 ok",
    ]


def test_colours_mark_the_status() -> None:
    coloured = "\n".join(lines(SOME, colour=True))
    assert "\x1b[31mFAIL\x1b[0m" in coloured
    assert "\x1b[33mwarn\x1b[0m" in coloured
    assert "\x1b[32mok  \x1b[0m" in coloured


def test_document_has_null_for_the_host_and_where_there_is_nothing_to_mend() -> None:
    assert findings_document(SOME)[::2] == [
        {"check": "kernel", "interface": None, "status": "ok", "value": "6.18", "fix": None},
        {
            "check": "link",
            "interface": "eth0",
            "status": "warn",
            "value": "down",
            "fix": "ip link set dev eth0 up",
        },
    ]
