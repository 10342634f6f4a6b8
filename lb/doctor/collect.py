"""Collects the facts for lb.doctor.checks from this host; attaches and changes nothing.

Enters: the paths of this network namespace and names of interfaces. Leaves: a Host and its Interfaces. The program is
loaded once, with maps of one entry, and unloaded again: only the verifier knows whether it accepts it.
"""

from __future__ import annotations

import os
import platform
import resource
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from lb.dataplane.allocation import NAT_FLOWS, Sizes
from lb.dataplane.programs import PROGRAM, Programs
from lb.doctor.facts import Dataplane, Host, Interface, Neighbours, Peer, Program, Queues, Refusal
from lb.errors import DataplaneError, InvalidInput, NotFound, StoreError
from lb.health.path import FAR, NEAR
from lb.host.capabilities import missing
from lb.model.forwarding import Attachment
from lb.model.state import Service
from lb.paths import Paths
from lb.store.store import Store
from xdp import ethtool
from xdp import features as xdp_features
from xdp.attach import all_attached
from xdp.errors import XdpError
from xdp.netlink import route_socket
from xdp.object import LB_OBJECT, BpfObject, program_name

# include/uapi/linux: if_arp.h, if.h
ARPHRD_ETHER = 1
IFF_UP = 1
LOOPBACK = 1  # the index that lo has in every network namespace

BUILD = "make build"
OTHER_KERNEL = "boot Linux 6.1 or later; if it is, report this with the output of uname -r"


@dataclass(frozen=True, slots=True)
class Roots:
    """Where the kernel's text files are."""

    proc: Path = Path("/proc")
    cgroup: Path = Path("/sys/fs/cgroup")

    def sysctl(self, name: str) -> str | None:
        """The value of a setting, named with slashes; None where this namespace or kernel has none of the name."""
        try:
            return (self.proc / "sys" / name).read_text().strip()
        except OSError:
            return None

    def number(self, name: str) -> int:
        return int(self.sysctl(name) or 0)


# The host


def read_host(paths: Paths, roots: Roots = Roots()) -> Host:
    missing = _missing_capabilities(roots)
    stored = _stored_services(paths)
    services = () if isinstance(stored, Refusal) else stored
    free_bytes, limit = free_memory(roots)
    return Host(
        kernel=platform.release(),
        cpus=os.cpu_count() or 1,
        page_size=resource.getpagesize(),
        missing_capabilities=missing,
        dataplane=None if missing else _try_dataplane(services),
        loaded=bool(_our_attachments(paths)),
        has_bpffs="\tbpf\n" in (roots.proc / "filesystems").read_text(),
        pins=str(paths.run_dir / "bpf"),
        services=stored if isinstance(stored, Refusal) else len(services),
        modes=frozenset(str(service.mode) for service in services),
        families=frozenset(service.vip.address.version for service in services) or frozenset({4}),
        free_bytes=free_bytes,
        memory_limit=limit,
        local_ports=_local_ports(roots),
        neighbours=tuple(_neighbours(services, roots)),
        loopback_addresses=_loopback_addresses(),
    )


def _missing_capabilities(roots: Roots) -> tuple[str, ...]:
    return missing((roots.proc / "self/status").read_text())


def _stored_services(paths: Paths) -> Sequence[Service] | Refusal:
    try:
        with Store.open(paths.store, write=False) as store:
            return store.load().services
    except StoreError as error:
        return Refusal(str(error), f"mv {paths.store} {paths.store}.damaged")


def _try_dataplane(services: Sequence[Service]) -> Dataplane | Refusal:
    try:
        with closing(BpfObject.open(LB_OBJECT)) as obj:
            obj.load()
            return _dataplane(obj, services)
    except XdpError as error:
        first, *log = str(error).splitlines()
        why = f"{first}: {log[-1].strip()}" if log else first
        return Refusal(why, OTHER_KERNEL if LB_OBJECT.exists() else BUILD)


def _dataplane(obj: BpfObject, services: Sequence[Service]) -> Dataplane:
    verified_program = xdp_features.verified(obj.program(PROGRAM).fd)
    config = obj.map(".rodata")[0].config
    return Dataplane(
        instructions=verified_program.instructions,
        jited=verified_program.jited,
        nat_ports=(config.nat_port_first, config.nat_port_first + config.nat_port_count - 1),
        map_bytes=sum(xdp_features.map_memory(obj.map(n), entries) for n, entries in _sizes(services).by_map().items()),
    )


def _sizes(services: Sequence[Service]) -> Sizes:
    """Without a service, those for one of the default mode."""
    return Sizes.of(services) if services else replace(Sizes.of(()), nat4=NAT_FLOWS)


def free_memory(roots: Roots) -> tuple[int, str | None]:
    """Bytes that maps may take, and the file of the control group's limit, if that is what bounds them.

    Maps are charged to the control group of the process that makes them (Linux 5.11).
    """
    available = _meminfo(roots)["MemAvailable"] * 1024
    return min([(available, None), *_room_in_groups(roots)], key=lambda room: room[0])


def _meminfo(roots: Roots) -> dict[str, int]:
    lines = (line.split() for line in (roots.proc / "meminfo").read_text().splitlines())
    return {name.rstrip(":"): int(value) for name, value, *_ in lines}


def _room_in_groups(roots: Roots) -> Iterator[tuple[int, str | None]]:
    """Of this process's control group (version 2) and those around it, as far as they have a limit."""
    groups = (roots.proc / "self/cgroup").read_text().splitlines()
    for path in (line.removeprefix("0::/") for line in groups if line.startswith("0::")):
        inner = roots.cgroup / path
        for group in (inner, *inner.parents):
            with suppress(OSError, ValueError):  # no such file at the root, and "max" is no number
                limit = int((group / "memory.max").read_text())
                yield limit - _not_reclaimable(group), str(group / "memory.max")


def _not_reclaimable(group: Path) -> int:
    statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int((group / "memory.current").read_text()) - int(statistics["inactive_file"])


def _local_ports(roots: Roots) -> tuple[int, int]:
    low, high = (roots.sysctl("net/ipv4/ip_local_port_range") or "0 0").split()
    return int(low), int(high)


def _neighbours(services: Sequence[Service], roots: Roots) -> Iterator[Neighbours]:
    """Only the first network namespace shows the limit, which holds for all."""
    backends = {backend.address for service in services for backend in service.backends}
    for family in sorted({address.version for address in backends}):
        limit = roots.sysctl(f"net/ipv{family}/neigh/default/gc_thresh3")
        if limit:
            yield Neighbours(family, sum(address.version == family for address in backends), int(limit))


def _loopback_addresses() -> tuple[str, ...]:
    with route_socket() as ipr:
        found = [message.get_attr("IFA_LOCAL") for message in ipr.get_addr(family=socket.AF_INET, index=LOOPBACK)]
    return tuple(address for address in found if not ip_address(address).is_loopback)


# Interfaces


def read_interfaces(paths: Paths, names: Collection[str], roots: Roots = Roots()) -> list[Interface]:
    """Those named, or all Ethernet interfaces that are up, but for the daemon's own. Raises NotFound, InvalidInput."""
    with route_socket() as ipr:
        links = {message["index"]: message for message in ipr.link("dump")}
    found = [m for m in links.values() if _is_ethernet(m) and _is_up(m) and _name(m) not in (NEAR, FAR)]
    chosen = _named(links.values(), names) if names else found
    programs = _programs(paths)
    return [_interface(message, links, programs, roots) for message in chosen]


def _name(message: Any) -> str:
    return str(message.get_attr("IFLA_IFNAME"))


def _is_ethernet(message: Any) -> bool:
    return bool(message["ifi_type"] == ARPHRD_ETHER)


def _is_up(message: Any) -> bool:
    return bool(message["flags"] & IFF_UP)


def _named(messages: Collection[Any], names: Collection[str]) -> list[Any]:
    by_name = {_name(message): message for message in messages}
    for name in names:
        if name not in by_name:
            raise NotFound(f"interface {name}: does not exist: see ip link")
        if not _is_ethernet(by_name[name]):
            raise InvalidInput(f"interface {name}: not an Ethernet interface: see ip link")
    return [by_name[name] for name in dict.fromkeys(names)]


def _programs(paths: Paths) -> dict[str, Program]:
    """Interface name -> what it runs."""
    ours = _our_attachments(paths)
    found = {}
    for name, running in all_attached().items():
        called, is_ours = program_name(running.program_id), name in ours
        lost = called == PROGRAM and not is_ours
        found[name] = Program(running.mode, running.program_id, called, is_ours, lost)
    return found


def _our_attachments(paths: Paths) -> Mapping[str, Attachment]:
    """None without the capabilities to look."""
    with suppress(DataplaneError), closing(Programs.open(paths)) as programs:
        return programs.attachments()
    return {}


def _interface(message: Any, links: Mapping[int, Any], programs: Mapping[str, Program], roots: Roots) -> Interface:
    name = _name(message)
    can = xdp_features.xdp_features(message["index"])
    offloads = ethtool.offloads(name)
    queues = ethtool.queues(name)
    return Interface(
        name=name,
        driver=ethtool.driver(name),
        up=_is_up(message),
        mtu=message.get_attr("IFLA_MTU"),
        native=None if can is None else xdp_features.XdpFeatures.BASIC in can,
        transmits=None if can is None else xdp_features.XdpFeatures.NDO_XMIT in can,
        program=programs.get(name),
        peer=_peer(message, links),
        queues=Queues(queues.rx, queues.most_rx, queues.combined) if queues else None,
        offloads=offloads.on,
        fixed_offloads=offloads.fixed,
        forwarding=frozenset(f for f in (4, 6) if roots.number(f"net/ipv{f}/conf/{name}/forwarding")),
        rp_filter=_stricter(roots, name, "rp_filter"),
        arp_ignore=_stricter(roots, name, "arp_ignore"),
        arp_announce=_stricter(roots, name, "arp_announce"),
    )


def _peer(message: Any, links: Mapping[int, Any]) -> Peer | None:
    """A veth's other end, if it is in this namespace."""
    info = message.get_attr("IFLA_LINKINFO")
    here = message.get_attr("IFLA_LINK_NETNSID") is None
    other = links.get(message.get_attr("IFLA_LINK")) if here else None
    if other is None or info is None or info.get_attr("IFLA_INFO_KIND") != "veth":
        return None
    name, queues = _name(other), ethtool.queues(_name(other))
    offloads = ethtool.offloads(name)
    return Peer(
        name=name,
        mtu=other.get_attr("IFLA_MTU"),
        tx_queues=queues.tx if queues else 1,
        leaves_checksums_out=offloads.leave_checksums_out,
        leaves_vlan_tags_out=offloads.leave_vlan_tags_out,
    )


def _stricter(roots: Roots, name: str, key: str) -> int:
    """The larger of the interface's own and that of all, Documentation/networking/ip-sysctl.rst."""
    return max(roots.number(f"net/ipv4/conf/{each}/{key}") for each in ("all", name))
