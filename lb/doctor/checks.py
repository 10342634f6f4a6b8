"""Facts of a host -> findings (pure).

Enters: what lb.doctor.collect has read from the kernel, the host and its interfaces. Leaves: one Finding per applicable
check, with a fix unless it is ok. A FAIL keeps the balancer from running; a warning means lower performance, or loss of
some packets.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from lb.doctor.facts import Dataplane, Host, Interface, Refusal

MIN_KERNEL = (6, 1)

# What a mode puts in front of a packet at most: IPv6 40; GUE besides UDP 8, its header 4, and on slots in transition 20
# (xdp/bpf/common/tunnel.h).
TUNNEL_BYTES = {"ipip": 40, "gue": 72}
CLIENT_MTU = 1500

# A frame in one page with headroom (256) and struct skb_shared_info (320), less Ethernet and two VLAN tags.
ROOM_OF_A_PAGE = 256 + 320 + 14 + 2 * 4

# Drivers with native XDP in Linux 6.1 and 6.2, which have no way to ask (those that the kernel's commit 66c0e13ad236
# marks for 6.3, less the rare); later kernels are asked.
NATIVE_DRIVERS = frozenset(
    [
        "atlantic",
        "bnxt_en",
        "ena",
        "hv_netvsc",
        "i40e",
        "ice",
        "igb",
        "igc",
        "ixgbe",
        "ixgbevf",
        "mana",
        "mlx4_en",
        "mlx5_core",
        "mvneta",
        "mvpp2",
        "nfp",
        "qede",
        "sfc",
        "tun",
        "veth",
        "virtio_net",
    ]
)

STRICT, LOOSE = 1, 2  # rp_filter, Documentation/networking/ip-sysctl.rst
LOCAL_PORTS = (32768, 60999)  # the kernel's default ip_local_port_range

QEMU_OFFLOADS_OFF = "in QEMU: guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off"


class Severity(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """`interface` is None for the host; `fix` is None where `status` is ok."""

    check: str
    status: Severity
    value: str
    fix: str | None = None
    interface: str | None = None


# Facts


Findings = Iterator[Finding]


def _ok(check: str, value: str) -> Finding:
    return Finding(check, Severity.OK, value)


def _warn(check: str, value: str, fix: str) -> Finding:
    return Finding(check, Severity.WARN, value, fix)


def _fail(check: str, value: str, fix: str) -> Finding:
    return Finding(check, Severity.FAIL, value, fix)


def findings(host: Host, interfaces: Iterable[Interface]) -> list[Finding]:
    """All checks that apply, the host's first."""
    found = [finding for check in HOST_CHECKS for finding in check(host)]
    for interface in interfaces:
        found += [replace(f, interface=interface.name) for check in INTERFACE_CHECKS for f in check(interface, host)]
    return found


def is_fit(found: Iterable[Finding]) -> bool:
    return all(finding.status is not Severity.FAIL for finding in found)


def findings_document(found: Sequence[Finding]) -> list[dict[str, Any]]:
    """`check`, `interface` (null: the host), `status` (ok, warn, FAIL), `value`, `fix` (null where ok)."""
    keys = ("check", "interface", "status", "value", "fix")
    return [{key: getattr(finding, key) for key in keys} for finding in found]


# The host


def _kernel(host: Host) -> Findings:
    version = tuple(int(number) for number in re.findall(r"\d+", host.kernel)[:2])
    if version >= MIN_KERNEL:
        yield _ok("kernel", host.kernel)
    else:
        needed = ".".join(map(str, MIN_KERNEL))
        yield _fail("kernel", f"{host.kernel}: too old", f"boot Linux {needed} or later (Debian 12, Ubuntu 24.04)")


def _capabilities(host: Host) -> Findings:
    if host.missing_capabilities:
        yield _fail("capabilities", f"{' and '.join(host.missing_capabilities)} missing", "sudo xdp-lb doctor")
    else:
        yield _ok("capabilities", "all present")


def _program_loads(host: Host) -> Findings:
    match host.dataplane:
        case Refusal(why, fix):
            yield _fail("program", why, fix)
        case Dataplane(instructions=count):
            yield _ok("program", f"loads: {count:,} instructions verified")
        case None:
            yield _warn("program", "not tested: capabilities missing", "sudo xdp-lb doctor")


def _jit(host: Host) -> Findings:
    if not isinstance(host.dataplane, Dataplane):
        return
    if host.dataplane.jited:
        yield _ok("jit", "on")
    else:
        yield _warn("jit", "off: programs run several times slower", "sysctl -w net.core.bpf_jit_enable=1")


def _bpffs(host: Host) -> Findings:
    if not host.has_bpffs:
        yield _fail("bpffs", "not supported by this kernel", "boot a kernel with CONFIG_BPF_SYSCALL=y")
    elif host.loaded:
        yield _ok("bpffs", f"in use: {host.pins}")
    else:
        yield _ok("bpffs", f"mounted by attach: {host.pins}")


def _store(host: Host) -> Findings:
    match host.services:
        case Refusal(why, fix):
            yield _fail("store", why, fix)
        case count:
            yield _ok("store", "1 service" if count == 1 else f"{count} services")


def _memory(host: Host) -> Findings:
    if not isinstance(host.dataplane, Dataplane):
        return
    needed = host.dataplane.map_bytes
    room = f"{_mebibytes(needed)} for maps, {_mebibytes(host.free_bytes)} free"
    if host.loaded:
        yield _ok("memory", "maps already allocated")
    elif needed > host.free_bytes:
        yield _fail("memory", room, _more_memory(host, needed))
    elif 2 * needed > host.free_bytes:
        yield _warn("memory", room, _more_memory(host, 2 * needed))
    else:
        yield _ok("memory", room)


def _mebibytes(count: int) -> str:
    return f"{count >> 20} MiB"


def _more_memory(host: Host, needed: int) -> str:
    missing = _mebibytes(needed - host.free_bytes + (1 << 20))
    if host.memory_limit:
        return f"raise the limit by {missing}: {host.memory_limit}"
    return f"free or add {missing} of memory"


def _nat_ports(host: Host) -> Findings:
    if not isinstance(host.dataplane, Dataplane):
        return
    (low, high), (first, last) = host.local_ports, host.dataplane.nat_ports
    if low > last or high < first:
        yield _ok("nat ports", f"{first}-{last}, outside the host's ephemeral range {low}-{high}")
    else:
        default = " ".join(map(str, LOCAL_PORTS))
        yield _warn(
            "nat ports",
            f"{first}-{last} overlaps the host's ephemeral range {low}-{high}",
            f'sysctl -w net.ipv4.ip_local_port_range="{default}"',
        )


def _neighbours(host: Host) -> Findings:
    for table in host.neighbours:
        check, value = f"neighbours v{table.family}", f"{table.backends} backends, table limit {table.limit}"
        if 2 * table.backends <= table.limit:
            yield _ok(check, value)
        else:
            room = 1 << (4 * table.backends - 1).bit_length()
            yield _warn(check, value, f"sysctl -w net.ipv{table.family}.neigh.default.gc_thresh3={room}")


HOST_CHECKS: tuple[Callable[[Host], Findings], ...] = (
    _kernel,
    _capabilities,
    _program_loads,
    _jit,
    _bpffs,
    _store,
    _memory,
    _nat_ports,
    _neighbours,
)


# An interface


def _link(interface: Interface, _host: Host) -> Findings:
    if interface.up:
        yield _ok("link", "up")
    else:
        yield _warn("link", "down", f"ip link set dev {_word(interface.name)} up")


def _native(interface: Interface, _host: Host) -> Findings:
    driver = interface.driver or "unknown driver"
    native = interface.driver in NATIVE_DRIVERS if interface.native is None else interface.native
    if native:
        yield _ok("native xdp", driver)
    elif interface.is_veth and interface.native is not None:
        yield _warn("native xdp", f"{driver}: peer has more TX queues", _as_many_queues(interface))
    else:
        accept = f"to accept generic mode: xdp-lb attach {_word(interface.name)} --xdp-mode generic"
        yield _warn(
            "native xdp", f"{driver}: not known to support native XDP; generic mode is several times slower", accept
        )


def _as_many_queues(interface: Interface) -> str:
    """drivers/net/veth.c: no native XDP on an end with fewer RX queues than its peer has TX queues."""
    count = str(interface.peer.tx_queues) if interface.peer else "N"
    return f"ethtool -L {_word(interface.name)} rx {count}"


def _transmit(interface: Interface, _host: Host) -> Findings:
    """A veth passes frames sent by XDP only if its peer expects them; NIC drivers usually do once a program is
    attached."""
    if not (interface.is_veth and interface.native):
        return
    if interface.transmits:
        yield _ok("transmit", "peer accepts frames sent by XDP")
    else:
        yield _warn("transmit", "peer drops frames sent by XDP", _at_other_end(interface, "gro on"))


def _at_other_end(veth: Interface, setting: str) -> str:
    if veth.peer is None:
        return f"in the peer's network namespace, DEV being the peer: ethtool -K DEV {setting}"
    return f"ethtool -K {_word(veth.peer.name)} {setting}"


def _running(interface: Interface, _host: Host) -> Findings:
    program, name = interface.program, _word(interface.name)
    if program is None:
        yield _ok("attached", "nothing")
    elif program.lost:
        value = f"id {program.program_id}, name {program.name}, {program.mode}: pins missing"
        yield _fail("attached", value, f"xdp-lb attach {name}, using the same version")
    elif not program.ours:
        link_word = "xdp" if program.mode == "native" else f"xdp{program.mode}"
        value = f"foreign program: id {program.program_id}, name {program.name}, {program.mode}"
        yield _fail("attached", value, f"ip link set dev {name} {link_word} off")
    elif program.mode == "generic":
        value = f"xdp-lb, id {program.program_id}, generic: several times slower than native"
        yield _warn("attached", value, f"xdp-lb detach {name} && xdp-lb attach {name} --xdp-mode native")
    else:
        yield _ok("attached", f"xdp-lb, id {program.program_id}, {program.mode}")


def _lro(interface: Interface, _host: Host) -> Findings:
    yield _merging(interface, "lro", "rx-lro", "lro")


def _hardware_gro(interface: Interface, _host: Host) -> Findings:
    if interface.driver == "virtio_net" and interface.offloads - interface.fixed_offloads >= {"rx-gro-hw"}:
        yield _ok("hardware gro", "on: disabled by the driver for XDP")
    else:
        yield _merging(interface, "hardware gro", "rx-gro-hw", "rx-gro-hw")


def _merging(interface: Interface, check: str, feature: str, word: str) -> Finding:
    """Offloads that merge packets: drivers refuse native XDP with them."""
    if feature not in interface.offloads:
        return _ok(check, "off")
    if feature not in interface.fixed_offloads:
        return _warn(check, "on: incompatible with native XDP", f"ethtool -K {_word(interface.name)} {word} off")
    accept = f"to accept generic mode: xdp-lb attach {_word(interface.name)} --xdp-mode generic"
    fix = QEMU_OFFLOADS_OFF if interface.driver == "virtio_net" else accept
    return _warn(check, "on [fixed]: incompatible with native XDP", fix)


def _vlan(interface: Interface, _host: Host) -> Findings:
    """A NIC strips tags from frames; a veth passes frames whose tag its peer left out of band."""
    hidden, fix = "rx-vlan-hw-parse" in interface.offloads, f"ethtool -K {_word(interface.name)} rxvlan off"
    if interface.is_veth:
        hidden = interface.peer is not None and interface.peer.leaves_vlan_tags_out
        fix = _at_other_end(interface, "txvlan off")
    if hidden:
        yield _warn("vlan offload", "on: XDP does not see VLAN tags", fix)
    else:
        yield _ok("vlan offload", "off")


def _checksums(interface: Interface, _host: Host) -> Findings:
    """A veth passes frames whose checksums were left to a NIC: XDP cannot complete them."""
    if not interface.is_veth:
        return
    if interface.peer and not interface.peer.leaves_checksums_out:
        yield _ok("checksums", f"complete in frames from {interface.peer.name}")
    else:
        lacking = (
            f"missing in frames from {interface.peer.name}"
            if interface.peer
            else "unknown: peer in another network namespace"
        )
        yield _warn("checksums", lacking, _at_other_end(interface, "tx off"))


def _mtu(interface: Interface, host: Host) -> Findings:
    most = host.page_size - ROOM_OF_A_PAGE
    name, mtu = _sender(interface)
    if mtu > most:
        value = f"{mtu}: too large for native XDP, frames exceed a page"
        yield _warn("mtu", value, f"ip link set dev {_word(name)} mtu {most}")
    else:
        yield _tunnel_room(interface, host)


def _sender(interface: Interface) -> tuple[str, int]:
    """Name and MTU of the sender that bounds received frames: of a veth, its peer (drivers/net/veth.c)."""
    sender = interface.peer or interface
    return sender.name, sender.mtu


def _tunnel_room(interface: Interface, host: Host) -> Finding:
    """Clients send up to 1500 bytes; larger ones than the tunnel takes are answered with an ICMP error."""
    tunnels = host.modes & TUNNEL_BYTES.keys()
    if not tunnels:
        return _ok("mtu", str(interface.mtu))
    overhead = max(TUNNEL_BYTES[mode] for mode in tunnels)
    value = f"{interface.mtu}: {interface.mtu - overhead} inside tunnels"
    if interface.mtu >= CLIENT_MTU + overhead:
        return _ok("mtu", value)
    wider = f"ip link set dev {_word(interface.name)} mtu {CLIENT_MTU + overhead}"
    return _warn("mtu", f"{value}, clients send {CLIENT_MTU}", wider)


def _queues(interface: Interface, host: Host) -> Findings:
    """Of a veth, the peer decides how many are used."""
    queues = interface.queues
    if queues is None or interface.is_veth:
        return
    wanted = min(queues.most_rx, host.cpus)
    value = f"{queues.rx} for {host.cpus} CPUs"
    if queues.rx >= wanted:
        yield _ok("queues", value)
    else:
        kind = "combined" if queues.combined else "rx"
        yield _warn("queues", value, f"ethtool -L {_word(interface.name)} {kind} {wanted}")


def _forwarding(interface: Interface, host: Host) -> Findings:
    """net/core/filter.c, bpf_ipv4_fib_lookup: no answer for an interface that does not forward."""
    off = sorted(host.families - interface.forwarding)
    if off:
        families = " and ".join(f"IPv{family}" for family in off)
        settings = (_setting(interface, family, "forwarding", 1) for family in off)
        value = f"{families} off: bpf_fib_lookup cannot resolve next hops"
        yield _warn("forwarding", value, f"sysctl -w {' '.join(settings)}")
    else:
        yield _ok("forwarding", "on")


def _rp_filter(interface: Interface, _host: Host) -> Findings:
    if interface.rp_filter == STRICT:
        value = "strict: drops packets on asymmetric routes"
        yield _warn("rp_filter", value, f"sysctl -w {_setting(interface, 4, 'rp_filter', LOOSE)}")
    else:
        yield _ok("rp_filter", "loose" if interface.rp_filter == LOOSE else "off")


def _arp(interface: Interface, host: Host) -> Findings:
    """With a VIP on the loopback, as on a backend, the host must not reply to ARP for it."""
    if not host.loopback_addresses:
        return
    addresses = ", ".join(host.loopback_addresses)
    if interface.arp_ignore >= 1 and interface.arp_announce >= 2:
        yield _ok("arp", f"no ARP replies for {addresses} on lo")
    else:
        settings = (_setting(interface, 4, "arp_ignore", 1), _setting(interface, 4, "arp_announce", 2))
        yield _warn("arp", f"ARP replies for {addresses} on lo", f"sysctl -w {' '.join(settings)}")


def _setting(interface: Interface, family: int, key: str, value: int) -> str:
    """For sysctl(8), which takes slashes too: names of interfaces may have dots."""
    separator = "/" if "." in interface.name else "."
    path = separator.join(("net", f"ipv{family}", "conf", interface.name, key))
    return _word(f"{path}={value}")


def _word(text: str) -> str:
    return shlex.quote(text)


INTERFACE_CHECKS: tuple[Callable[[Interface, Host], Findings], ...] = (
    _link,
    _native,
    _transmit,
    _running,
    _lro,
    _hardware_gro,
    _vlan,
    _checksums,
    _mtu,
    _queues,
    _forwarding,
    _rp_filter,
    _arp,
)
