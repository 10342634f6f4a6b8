"""Filter rules, kept in force while the balancer comes to an interface and leaves it.

Enters: the name of an interface. Leaves: its rules in the balancer's path, or in a program of their own. What filters
bring along is imported only where there are rules.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from lb.paths import Paths
from lb.rules import At
from lb.store import Store, writer_lock

if TYPE_CHECKING:
    from lb.dataplane import KernelDataplane
    from lb.firewall import Firewall


class FilterGuard:
    """See lb.balancer.Guard, which this implements, for the stored rules. Raises LbError."""

    def __init__(self, paths: Paths, store: Store, dataplane: KernelDataplane) -> None:
        self._paths, self._store, self._dataplane = paths, store, dataplane

    def alone(self) -> AbstractContextManager[None]:
        return writer_lock(self._paths.filter_lock, self._paths.netns)

    def make_way(self, name: str) -> None:
        if self._has_rules(name):
            with self._firewall() as firewall:
                firewall.make_way(name)

    def take_over(self, name: str) -> None:
        if self._has_rules(name):
            with self._firewall() as firewall:
                firewall.take_over(name)

    def _has_rules(self, name: str) -> bool:
        return bool(self._store.rules().hook(name, At.XDP))

    @contextmanager
    def _firewall(self) -> Iterator[Firewall]:
        from lb.firewall import firewall_of

        with firewall_of(self._paths, self._store, self._dataplane) as firewall:
            yield firewall
