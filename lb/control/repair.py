"""What others have changed in the kernel, found and put right. Nothing is written where all is as it should be.

Enters: the stored state, what the kernel holds, where routes and neighbours lead. Leaves: a Report whose notes say what
was repaired and whose warnings say what could not be.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace

from lb.control.change import addresses_in_force, off_link, with_reply_interfaces
from lb.control.writer import ABSENT, Writer
from lb.errors import LbError
from lb.model.forwarding import Attachment, InstalledNextHop, NextHop
from lb.model.report import Report
from lb.model.state import Interface, OwnAddress, State
from lb.model.vip import Address, Vip


class Repairs:
    """Of what `writer` has written."""

    def __init__(self, writer: Writer) -> None:
        self._writer, self._dataplane, self._network, self._handover = (
            writer,
            writer.dataplane,
            writer.network,
            writer.handover,
        )
        self._refused: dict[str, tuple[int, str]] = {}  # interface -> whose program is there, and what the kernel said

    @property
    def _state(self) -> State:
        return self._writer.state

    @property
    def _serving(self) -> bool:
        """What is stored is in force, and somewhere."""
        return bool(self._state.interfaces) and self._writer.in_sync(self._state)

    def reconcile(self) -> Report:
        """Find and repair it, all at once. Raises LbError where everything has to be written anew, and cannot be."""
        found = [self.reconcile_host()]
        found += [self.reconcile_service(service.vip) for service in self._state.services]
        found.append(self.follow({b.address for service in self._state.services for b in service.backends}))
        return Report(
            attached=tuple(attachment for report in found for attachment in report.attached),
            notes=tuple(note for report in found for note in report.notes),
            warnings=tuple(dict.fromkeys(warning for report in found for warning in report.warnings)),
        )

    def reconcile_host(self) -> Report:
        """Programs on interfaces, filter rules, VIP addresses, and by what packets find services."""
        if self._state.interfaces and not self._writer.in_sync(self._state):
            return self._writer.change(self._state)
        own = self._reconcile_own() if self._state.interfaces else Report()
        repaired, failed = self._handover.repair()
        return replace(own, notes=(*own.notes, *repaired), warnings=(*own.warnings, *failed))

    def _reconcile_own(self) -> Report:
        ours, running = self._dataplane.attachments(), self._dataplane.program_ids()
        missing = [i for i in self._state.interfaces if i.name not in ours]
        done = [self._attach_again(interface, running.get(interface.name)) for interface in missing]
        attached = tuple(each for each in done if isinstance(each, Attachment))
        notes = [f"{each.interface}: XDP program was missing: reattached" for each in attached]
        notes += self._dataplane.restore_lookups(self._writer.all_in_force(self._state.services))
        put_back = list(self._put_addresses_back())
        notes += [f"{own.address}: was missing on {own.interface}: added again" for own in put_back]
        warnings = [e for e in done if isinstance(e, str)]
        warnings += self._network.announce(put_back)
        try:
            notes += self._dataplane.restore_pins()
        except LbError as error:
            warnings.append(f"pins: removed by another process: {error}")
        return Report(attached=attached, notes=tuple(notes), warnings=tuple(warnings))

    def _attach_again(self, interface: Interface, running: int | None) -> Attachment | str:
        """Or why it cannot be. Beside the same program of someone else's, it is not tried a second time."""
        if not self._network.interface_exists(interface.name):
            return ABSENT.format(interface.name)
        known, why = self._refused.get(interface.name, (None, ""))
        if running and running == known:
            return why
        try:
            with self._handover.alone():
                return self._writer.attach(interface)
        except LbError as error:
            if running:
                self._refused[interface.name] = running, str(error)
            return str(error)

    def _put_addresses_back(self) -> Iterator[OwnAddress]:
        wanted: dict[str, list[OwnAddress]] = {}
        for own in addresses_in_force(self._state):
            wanted.setdefault(own.interface, []).append(own)
        for name in filter(self._network.interface_exists, wanted):
            held = set(self._network.addresses(name))
            for own in wanted[name]:
                if own.address not in held and self._network.owner(own.address) is None:
                    self._network.add_address(name, own.address)
                    yield own

    def announce(self, names: Collection[str] | None = None) -> Report:
        """The VIP addresses on these interfaces (None: on all), to the hosts on their links."""
        wanted = (own for own in addresses_in_force(self._state) if names is None or own.interface in names)
        return Report(warnings=tuple(self._network.announce(wanted)))

    def repeat_announcements(self) -> Report:
        return Report(warnings=tuple(self._network.repeat_announcements()))

    def reconcile_service(self, vip: Vip) -> Report:
        """Its entries, but for next hops, and its slots; nothing if there is no such service in force."""
        service = next((s for s in self._state.services if s.vip == vip), None)
        if service is None or not self._serving:
            return Report()
        wanted = self._writer.in_force(service)
        found = self._dataplane.differences(wanted)
        if not found:
            return Report()
        hops, warnings = self._reachable_hops({b.address for b in service.backends})
        with self._writer.rewriting():
            self._dataplane.repair(wanted, hops)
        notes = (f"vip {vip}: {each}: repaired" for each in found)
        return Report(notes=tuple(notes), warnings=tuple(warnings))

    def installed_next_hops(self) -> Iterable[InstalledNextHop]:
        """Where packets for each backend go, as the programs know it."""
        return self._dataplane.installed_next_hops() if self._serving else ()

    def follow(self, addresses: Collection[Address]) -> Report:
        """Have packets for these backends go where routes and neighbours lead by now. Where they lead nowhere, or not
        as the mode needs it, all stays as it was."""
        if not self._serving:
            return Report()
        found = ((service, [b for b in service.backends if b.address in addresses]) for service in self._state.services)
        concerned = {service.vip: backends for service, backends in found if backends}
        services = [service for service in self._state.services if service.vip in concerned]
        hops, warnings = self._reachable_hops({b.address for backends in concerned.values() for b in backends})
        changed: set[Address] = set()
        for service in services:
            lost = {b.address: str(error) for b in concerned[service.vip] if (error := off_link(service, b, hops))}
            changed |= self._dataplane.follow(
                self._writer.in_force(service), {a: h for a, h in hops.items() if a not in lost}
            )
            warnings += lost.values()
        notes = [f"backend {address}: {_leads(hops[address])}" for address in sorted(changed, key=lambda a: a.packed)]
        goal, reply_notes = with_reply_interfaces(self._state, services, hops)
        report = self._writer.change(goal) if goal != self._state else Report()
        return replace(report, notes=(*notes, *reply_notes), warnings=(*warnings, *report.warnings))

    def _reachable_hops(self, addresses: Collection[Address]) -> tuple[dict[Address, NextHop], list[str]]:
        """Of all that can be reached; and why others cannot."""
        if not addresses:
            return {}, []
        with suppress(LbError):
            return self._network.next_hops(addresses), []
        hops: dict[Address, NextHop] = {}
        warnings: list[str] = []
        for address in addresses:
            try:
                hops |= self._network.next_hops([address])
            except LbError as error:
                warnings.append(str(error))
        return hops, warnings


def _leads(hop: NextHop) -> str:
    to = hop.dst_mac.hex(":") if hop.dst_mac else "an unresolved neighbour"
    return f"next hop is now {to} on {hop.interface}"
