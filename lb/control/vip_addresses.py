"""Which interface carries the address of a VIP, its home, and which addresses can be VIPs on this host.

Enters: a desired state, and the subnets of the host's interfaces. Leaves: the state with a home for each own address.
The home is the attached interface in whose subnet the address lies; without one, the interface that was named first to
attach. It stays while the home is detached, so that a later attach puts the address back, and is never an interface
that is attached only for nat replies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from ipaddress import IPv4Address

from lb.control.contracts import Network
from lb.errors import InvalidInput
from lb.model.options import is_unicast
from lb.model.state import OwnAddress, Service, State
from lb.model.vip import Address, Subnet, Vip

LIMITED_BROADCAST = IPv4Address("255.255.255.255")


def wanted_addresses(services: Sequence[Service]) -> set[Address]:
    """What these services want on an interface."""
    return {s.vip.address for s in services if s.vip.is_one_address and s.options.vip_address}


def with_homes(goal: State, network: Network, named: Sequence[str] = ()) -> State:
    """`named`: the interfaces of an attach command, any of which may replace a home that is not attached."""
    attached = [i.name for i in goal.interfaces if not i.replies_only and network.interface_exists(i.name)]
    if not (attached and goal.own_addresses):
        return goal
    subnets = network.subnets()
    homes = (replace(own, interface=_home(own, attached, subnets, named)) for own in goal.own_addresses)
    return replace(goal, own_addresses=tuple(homes))


def _home(
    own: OwnAddress, attached: Sequence[str], subnets: Mapping[str, Sequence[Subnet]], named: Sequence[str]
) -> str:
    on_link = [name for name in attached if _contains(subnets.get(name, ()), own.address)]
    if own.interface in on_link or (own.interface in attached and not on_link):
        return own.interface
    if on_link:
        return on_link[0]
    return own.interface if own.interface and not named else [*named, *attached][0]


def _contains(subnets: Sequence[Subnet], address: Address) -> bool:
    return any(address.version == subnet.version and address in subnet for subnet in subnets)


def check_new_vips(before: State, goal: State, network: Network) -> None:
    """Refuse addresses that no host may have, or that mean something else in a subnet of this one. What an earlier
    version has stored stays. Raises InvalidInput."""
    known = {service.vip for service in before.services}
    new = [service.vip for service in goal.services if service.vip not in known]
    subnets = network.subnets() if new else {}
    for vip in new:
        if fault := _fault(vip) or _fault_in(vip, subnets):
            raise InvalidInput(f"vip {vip}: {fault}")


def _fault(vip: Vip) -> str | None:
    if vip.network.is_link_local:
        return "link-local address: clients beyond the link cannot reach it: use a global or private one"
    if vip.address == LIMITED_BROADCAST:
        return "limited broadcast address: use a unicast one"
    return None if is_unicast(vip.network) else "reserved address: use a unicast one"


def _fault_in(vip: Vip, subnets: Mapping[str, Sequence[Subnet]]) -> str | None:
    for name, subnet in ((name, subnet) for name, each in subnets.items() for subnet in each):
        if not vip.is_one_address or subnet.num_addresses <= 2:  # point-to-point, RFC 3021 and 6164: both are hosts
            continue
        if vip.address == subnet.network_address:
            kind = "network address" if subnet.version == 4 else "subnet-router anycast address"
            return f"{kind} of {name}'s subnet {subnet}: use another"
        if subnet.version == 4 and vip.address == subnet.broadcast_address:
            return f"broadcast address of {name}'s subnet {subnet}: use another"
    return None


def placed(before: State, goal: State, network: Network) -> State:
    """`goal` with the own addresses that a service still wants, each with its home."""
    wanted = wanted_addresses(goal.services)
    goal = replace(goal, own_addresses=tuple(own for own in goal.own_addresses if own.address in wanted))
    if goal.interfaces == before.interfaces and all(own.interface for own in goal.own_addresses):
        return goal
    return with_homes(goal, network)
