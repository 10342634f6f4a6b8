"""Host settings for decapsulation: VIPs on the loopback, and no ARP replies for them.

Enters: the VIPs, and a file that records the changes. Leaves: addresses on `lo` and ARP settings, changed only where
needed and reverted exactly; or warnings. IPv6 needs no setting: neighbour solicitations for an address of another
interface are not answered.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path
from socket import AF_INET, if_indextoname
from typing import TYPE_CHECKING

from pyroute2.netlink.exceptions import NetlinkError

from lb.decap.values import Prefix, is_address, prefix_text
from lb.host.neighbours import RTN_LOCAL, Network
from lb.model.vip import Address

if TYPE_CHECKING:
    from pyroute2.iproute.linux import IPRoute

LOOPBACK = "lo"
SYSCTLS = Path("/proc/sys/net/ipv4/conf")

# ip-sysctl.rst: reply to ARP only for addresses of the incoming interface, and never announce a VIP.
WANTED = {"arp_ignore": 1, "arp_announce": 2}
SET_ON = ("all", LOOPBACK)
RP_FILTER_STRICT = 1


@dataclass(frozen=True, slots=True)
class AppliedHostChanges:
    """Applied changes: addresses added to the loopback, and sysctls (`all/arp_ignore`) with their previous values."""

    addresses: tuple[str, ...] = ()
    sysctls: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> AppliedHostChanges:
        try:
            document = json.loads(path.read_text())
        except FileNotFoundError:
            return cls()
        return cls(tuple(document["addresses"]), document["sysctls"])

    def write(self, path: Path) -> None:
        """Atomically; without changes there is no file."""
        if self == AppliedHostChanges():
            path.unlink(missing_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        following = path.with_suffix(".next")
        following.write_text(json.dumps(asdict(self)))
        following.rename(path)


class DecapHost:
    """Host settings of one network namespace. Raises LbError and OSError."""

    def __init__(self, open_socket: Callable[[], IPRoute], path: Path) -> None:
        self._open_socket, self._path = open_socket, path
        self._network = Network(open_socket)
        self._applied = self._before = AppliedHostChanges.read(path)

    def own_addresses(self, names: Sequence[str]) -> dict[int, Address]:
        """IP version -> first address of these interfaces, used as source. Raises NotFound."""
        found = [address for name in names for address in self._network.addresses(name) if not address.is_link_local]
        return {address.version: address for address in reversed(found)}

    def set_up(self, vips: Sequence[Address]) -> list[str]:
        """Add VIPs that are not local addresses yet; returns notes.

        Sysctls first, so that no ARP request is answered in between.
        """
        notes = [self._set(name) for name in _settings() if _value(name) < WANTED[Path(name).name]]
        for vip in vips:
            if not self._is_local(vip):
                self._network.add_address(LOOPBACK, vip)
                self._remember(replace(self._applied, addresses=(*self._applied.addresses, str(vip))))
                notes.append(f"{vip}: added to {LOOPBACK}")
        return notes

    def commit(self, vips: Sequence[Address]) -> None:
        """Keep what set_up() did, and remove earlier addresses that are no longer VIPs."""
        kept = {str(vip) for vip in vips}
        for address in self._applied.addresses:
            if address not in kept:
                self._network.remove_address(LOOPBACK, ip_address(address))
        self._remember(replace(self._applied, addresses=tuple(a for a in self._applied.addresses if a in kept)))
        self._before = self._applied

    def undo(self) -> None:
        """Revert what was done since the last commit()."""
        self._return_to(self._before)

    def take_back(self) -> list[str]:
        """Revert all changes; returns notes."""
        return self._return_to(AppliedHostChanges())

    def warnings(self, destinations: Iterable[Prefix], interfaces: Sequence[str]) -> list[str]:
        """Warnings of what keeps decapsulated packets from being delivered, each with its fix."""
        return [
            warning
            for destination in destinations
            for warning in (self._not_local(destination), self._answers_arp(destination, interfaces))
            if warning
        ] + [warning for name in interfaces if (warning := self._drops_by_source(name))]

    def _set(self, name: str) -> str:
        before, wanted = _value(name), WANTED[Path(name).name]
        self._remember(replace(self._applied, sysctls={name: before} | self._applied.sysctls))
        _write(name, wanted)
        return f"{_dotted(name)}: {before} -> {wanted}"

    def _remember(self, applied: AppliedHostChanges) -> None:
        applied.write(self._path)
        self._applied = applied

    def _return_to(self, target: AppliedHostChanges) -> list[str]:
        notes = []
        for address in self._applied.addresses:
            if address not in target.addresses:
                self._network.remove_address(LOOPBACK, ip_address(address))
                notes.append(f"{address}: removed from {LOOPBACK}")
        for name, before in self._applied.sysctls.items():
            if name not in target.sysctls and _value(name) == WANTED[Path(name).name]:
                _write(name, before)
                notes.append(f"{_dotted(name)}: restored to {before}")
        self._remember(target)
        return notes

    def _is_local(self, address: Address) -> bool:
        with self._open_socket() as ipr:
            try:
                (message, *_) = ipr.route("get", dst=str(address))
            except NetlinkError:  # no route at all
                return False
        return bool(message["type"] == RTN_LOCAL)

    def _not_local(self, destination: Prefix) -> str | None:
        if self._is_local(destination.network_address):
            return None
        name = prefix_text(destination)
        remedy = "use --setup-vip" if is_address(destination) else f"ip route add local {name} dev {LOOPBACK}"
        return f"{name}: not an address of this host, so its packets are not accepted: {remedy}"

    def _answers_arp(self, destination: Prefix, interfaces: Sequence[str]) -> str | None:
        loud = [name for name in interfaces if _effective("arp_ignore", name) == 0]
        if destination.version == 6 or not loud or not self._is_local(destination.network_address):
            return None
        return (
            f"{prefix_text(destination)}: this host answers ARP for it on {', '.join(loud)}, instead of the balancer:"
            " use --setup-vip, or run sysctl -w net.ipv4.conf.all.arp_ignore=1 net.ipv4.conf.all.arp_announce=2"
        )

    def _drops_by_source(self, name: str) -> str | None:
        """RFC 3704's strict mode takes a client's packet only where packets to the client leave."""
        egress = set(self._default_interfaces())
        if _effective("rp_filter", name) != RP_FILTER_STRICT or name in egress:
            return None
        return (
            f"{name}: strict rp_filter drops packets from clients, replies to whom leave on"
            f" {', '.join(sorted(egress)) or 'no interface'}: sysctl -w net.ipv4.conf.{name}.rp_filter=2"
        )

    def _default_interfaces(self) -> Iterator[str]:
        """The interfaces of the IPv4 default routes."""
        with self._open_socket() as ipr:
            messages = ipr.get_default_routes(family=AF_INET)
        for message in messages:
            if index := message.get_attr("RTA_OIF"):
                with suppress(OSError):  # it has just gone
                    yield if_indextoname(index)


def _settings() -> list[str]:
    return [f"{where}/{setting}" for where in SET_ON for setting in WANTED]


def _value(name: str) -> int:
    return int((SYSCTLS / name).read_text())


def _write(name: str, value: int) -> None:
    (SYSCTLS / name).write_text(f"{value}\n")


def _dotted(name: str) -> str:
    return f"net.ipv4.conf.{name.replace('/', '.')}"


def _effective(setting: str, interface: str) -> int:
    """The kernel takes the larger one of the interface's value and that of `all`."""
    return max(_value(f"all/{setting}"), _value(f"{interface}/{setting}"))
