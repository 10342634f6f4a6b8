"""Decapsulation on a backend: configuration, status, counters.

Enters: interfaces and the destinations whose tunnel packets end here. Leaves: the attached programs, on request also
VIPs on the loopback with the ARP settings they need, and a report. Changes to the host are recorded, and `detach`
reverts exactly these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from lb.decap.values import DecapConfig, DecapReport, DecapStatus
from lb.model.state import Interface
from lb.paths import Paths

if TYPE_CHECKING:
    from lb.decap.host import DecapHost
    from lb.decap.kernel import KernelDecap


NO_SOURCES = (
    "no --from: any host may send tunnel packets, also ones that this host forwards to another backend: "
    "pass --from with the balancers' addresses"
)


class Decap:
    """The decapsulation of one network namespace. Changes are to be made with its lock held."""

    def __init__(self, kernel: KernelDecap, host: DecapHost, netns: str) -> None:
        self._kernel, self._host, self._netns = kernel, host, netns

    def attach(self, interfaces: Sequence[Interface], config: DecapConfig, *, setup_vip: bool) -> DecapReport:
        """Decapsulate on these interfaces and on those that do already, by this configuration from now on.

        All or nothing: raises LbError with everything as it was.
        """
        own = self._host.own_addresses([each.name for each in interfaces])
        notes = self._host.set_up(config.addresses) if setup_vip else []
        try:
            attached = self._kernel.attach(interfaces, config, own)
        except BaseException:
            self._host.undo()
            raise
        self._host.commit(config.addresses)
        warnings = [
            *(each.warning for each in attached if each.warning),
            *([] if config.sources else [NO_SOURCES]),
            *self._host.warnings(config.destinations, [each.interface for each in attached]),
        ]
        return DecapReport(tuple(attached), config=config, notes=tuple(notes), warnings=tuple(warnings))

    def detach(self, names: Sequence[str] = ()) -> DecapReport:
        """End it on these interfaces, or on all; with the last one goes what was done to the host."""
        running = self._kernel.attachments()
        gone = [name for name in running if name in names or not names]
        for name in gone:
            self._kernel.detach(name)
        notes: list[str] = []
        if len(gone) == len(running):
            self._kernel.unload()
            notes = self._host.take_back()
        return DecapReport(detached=tuple(gone), notes=tuple(notes))

    def status(self) -> DecapStatus:
        interfaces = tuple(self._kernel.attachments().values())
        config, statistics = self._kernel.read()
        return DecapStatus(self._netns, interfaces, config, statistics)


@contextmanager
def open_decap(paths: Paths, *, write: bool) -> Iterator[Decap]:
    """The decapsulation of this network namespace; `write` takes the lock of its changes."""
    from lb.decap.host import DecapHost
    from lb.decap.kernel import KernelDecap
    from lb.host.capabilities import check_may_change
    from lb.host.neighbours import open_route_socket
    from lb.store.lock import writer_lock

    place = paths.run_dir / "decap" / paths.netns
    if write:
        check_may_change()
    with writer_lock(place.with_name(f"{place.name}.lock"), paths.netns) if write else nullcontext():
        host = DecapHost(open_route_socket, place.with_name(f"{place.name}.json"))
        yield Decap(KernelDecap.open(paths), host, paths.netns)
