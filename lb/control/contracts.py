"""What the balancer needs of the kernel, of the host and of the filter in front, as protocols.

Enters and leaves: values of lb.model.state and lb.model.report. lb.dataplane.dataplane, lb.host.neighbours and
lb.control.filter_handover do it in the kernel, lb.tests.fakes.memory in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from lb.hashing.ring import Plan
from lb.model.forwarding import Attachment, InstalledNextHop, NextHop, OpenConnections, Statistics
from lb.model.state import Interface, OwnAddress, Service
from lb.model.vip import Address, Subnet, Vip


class Dataplane(Protocol):
    """Programs and maps. All of it may be repeated: what is so already is not done again. Raises
    DataplaneError."""

    @property
    def loaded(self) -> bool:
        """Programs and maps are in the kernel, by this process or an earlier one."""

    @property
    def generation(self) -> int:
        """That of the store which the kernel has applied completely; 0 if there is none."""

    @generation.setter
    def generation(self, value: int) -> None: ...

    def load(self, services: Sequence[Service]) -> None:
        """Have programs, and maps with room for `services` beside those that are there."""

    def recover(self, interfaces: Collection[Interface]) -> None:
        """Go on from a program of ours that runs there, where others have taken away what a process finds it by."""

    @property
    def outdated(self) -> str:
        """The version of xdp-lb that the program in force is of, where it is not the installed one; else empty."""

    def upgrade(self) -> bool:
        """Have the installed program in force on the maps that are there, in the place of one that is outdated: whether
        there was one. If it fails, that goes on."""

    def unload(self) -> None:
        """Give them up, after the last detach."""

    def attach(self, interface: Interface) -> Attachment:
        """Run the program there, in the place of an older one of ours, never of someone else's."""

    def detach(self, name: str) -> None: ...

    def attachments(self) -> Mapping[str, Attachment]:
        """Interface name -> our program there."""

    def put(self, service: Service, hops: Mapping[Address, NextHop]) -> Plan:
        """Create or change one service: members, then slots, then erasures. `hops` may leave out all but `unknown`."""

    def unknown(self, service: Service) -> Set[Address]:
        """The addresses of backends that are new, or whose next hop is not known yet."""

    def publish(self, services: Sequence[Service]) -> None:
        """Have packets find `services`, all of which were put, and no others."""

    def program_ids(self) -> Mapping[str, int]:
        """Interface name -> the id of the XDP program there, ours or not."""

    def restore_lookups(self, services: Sequence[Service]) -> list[str]:
        """`publish`, also where others have changed what was published: sentences of what they had."""

    def restore_pins(self) -> list[str]:
        """Have programs and maps outlive this process, where others have seen to it that they would not: sentences of
        that."""

    def differences(self, service: Service) -> list[str]:
        """What others have changed of a service that was put, but for its next hops; nothing is written."""

    def repair(self, service: Service, hops: Mapping[Address, NextHop]) -> Plan:
        """As `put`, where `differences` were found; `hops` of all backends that have one."""

    def follow(self, service: Service, hops: Mapping[Address, NextHop]) -> Set[Address]:
        """Have packets take these next hops: the backends whose next hop was another."""

    def installed_next_hops(self) -> Iterable[InstalledNextHop]:
        """Of all members, as packets take them."""

    def due(self) -> Sequence[Vip]:
        """The services in whose rings a transition has had its time. Takes next to no time."""

    def settle(self, vip: Vip) -> None:
        """End the service's transitions that have had their time, but for slots with flows that are open still."""

    def plan(self, service: Service) -> Plan:
        """What `put` would do to the ring; nothing is written."""

    def remove(self, vip: Vip) -> None: ...

    def vips(self) -> Set[Vip]: ...

    def statistics(self) -> Statistics: ...

    def open_connections(self, services: Collection[Service]) -> Mapping[Vip, Mapping[str, OpenConnections]]:
        """VIP -> name of a backend -> its connections that are open now, of services in force. Large tables take it
        about a second."""


class FilterHandover(Protocol):
    """Filter rules in front, which stay in force wherever the balancer comes or goes. All may be repeated."""

    def alone(self) -> AbstractContextManager[None]:
        """Nobody else changes the rules meanwhile: for as long as a change takes."""

    def hand_over_to_balancer(self, name: str) -> None:
        """To be called before the balancer is attached to an interface."""

    def take_back(self, name: str) -> None:
        """To be called before it is detached."""

    def repair(self) -> tuple[list[str], list[str]]:
        """Put rules in force where others have taken them out: sentences of that, and why it cannot be."""


class NoFilters:
    """Where there are no filter rules."""

    def alone(self) -> AbstractContextManager[None]:
        return nullcontext()

    def hand_over_to_balancer(self, name: str) -> None:
        pass

    def take_back(self, name: str) -> None:
        pass

    def repair(self) -> tuple[list[str], list[str]]:
        return [], []


class Network(Protocol):
    """The host's routes, neighbours and addresses."""

    def next_hops(self, addresses: Iterable[Address], *, probe: bool = False) -> dict[Address, NextHop]:
        """Raises NoRoute for an address that is not reachable through an interface. The kernel
        keeps the neighbours on the way resolved from then on, until `release`. `probe`: those that
        it keeps already have to answer anew."""

    def release(self, addresses: Collection[Address] | None = None) -> None:
        """Stop keeping the neighbours with these addresses, or (None) all of them."""

    def interface_exists(self, name: str) -> bool: ...

    def addresses(self, name: str) -> list[Address]:
        """Those of one interface, global scope first."""

    def subnets(self) -> Mapping[str, Sequence[Subnet]]:
        """Interface -> the subnets of its addresses, none for a host address."""

    def owner(self, address: Address) -> str | None:
        """The local interface that has the address."""

    def add_address(self, name: str, address: Address) -> None: ...

    def remove_address(self, name: str, address: Address) -> None: ...

    def announce(self, addresses: Iterable[OwnAddress]) -> list[str]:
        """Have hosts on the links replace the MAC addresses that they know of these: why it was not possible."""

    def repeat_announcements(self) -> list[str]:
        """Those that are due, as one lost frame must not matter."""
