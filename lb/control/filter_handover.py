"""Filter rules, kept in force while the balancer comes to an interface and leaves it.

Enters: the name of an interface. Leaves: its rules in the balancer's path, or in a program of their own. What filters
bring along is imported only where there are rules.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from lb.errors import LbError
from lb.model.rules import At
from lb.paths import Paths
from lb.store.lock import writer_lock
from lb.store.store import Store

if TYPE_CHECKING:
    from lb.dataplane.programs import Programs
    from lb.firewall.firewall import Firewall


class KernelFilterHandover:
    """See lb.control.contracts.FilterHandover, which this implements, for the stored rules. Raises LbError."""

    def __init__(self, paths: Paths, store: Store, programs: Programs) -> None:
        self._paths, self._store, self._programs = paths, store, programs

    def alone(self) -> AbstractContextManager[None]:
        return writer_lock(self._paths.filter_lock, self._paths.netns)

    def hand_over_to_balancer(self, name: str) -> None:
        if self._has_rules(name):
            with self._firewall() as firewall:
                firewall.hand_over_to_balancer(name)

    def take_back(self, name: str) -> None:
        if self._has_rules(name):
            with self._firewall() as firewall:
                firewall.take_back(name)

    def repair(self) -> tuple[list[str], list[str]]:
        if not self._store.rules().all:
            return [], []
        try:
            with self._firewall() as firewall:
                if not firewall.lost():
                    return [], []
                with self.alone():
                    return self._repaired(firewall)
        except LbError as error:
            return [], [str(error)]

    def _repaired(self, firewall: Firewall) -> tuple[list[str], list[str]]:
        """Each hook by itself: what is wrong with one is no matter of the others."""
        from lb.model.rule_report import ApplyOptions

        done, failed = [], []
        for hook in firewall.lost():
            name, at = hook
            try:
                firewall.restore(ApplyOptions(force=True), [hook])
            except LbError as error:
                failed.append(str(error))
            else:
                done.append(f"{name}: filter rules at {at} were missing: reattached")
        return done, failed

    def _has_rules(self, name: str) -> bool:
        return bool(self._store.rules().hook(name, At.XDP))

    @contextmanager
    def _firewall(self) -> Iterator[Firewall]:
        from lb.firewall.firewall import firewall_of

        with firewall_of(self._paths, self._store, self._programs) as firewall:
            yield firewall
