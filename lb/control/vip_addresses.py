"""Which interface carries the address of a VIP: its home.

Enters: a desired state, and the subnets of the host's interfaces. Leaves: the state with a home for each own address.
The home is the attached interface in whose subnet the address lies; without one, the interface that was named first to
attach. It stays while the home is detached, so that a later attach puts the address back, and is never an interface
that is attached only for nat replies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lb.control.contracts import Network
from lb.model.state import OwnAddress, State
from lb.model.vip import Address, Subnet


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


def placed(before: State, goal: State, network: Network) -> State:
    """`goal` with the own addresses that are still served, each with its home."""
    served = {service.vip.address for service in goal.services}
    goal = replace(goal, own_addresses=tuple(own for own in goal.own_addresses if own.address in served))
    if goal.interfaces == before.interfaces and all(own.interface for own in goal.own_addresses):
        return goal
    return with_homes(goal, network)
