"""Filter rules as commands reach them: of this host, or through the daemon where it runs.

Enters: the paths of this network namespace. Leaves: a Firewall, or what has its methods.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from lb.client.balancer import daemon_listens
from lb.model.rule_report import ApplyOptions, FilterReport, RuleSpec, RuleStatus, TestResult
from lb.model.rules import At
from lb.paths import Paths


class Filters(Protocol):
    """See lb.firewall.firewall.Firewall."""

    def add(self, spec: RuleSpec, position: int | None = None, options: ApplyOptions | None = None) -> FilterReport: ...

    def delete(self, interface: str, number: int, options: ApplyOptions | None = None) -> FilterReport: ...

    def move(self, interface: str, number: int, to: int, options: ApplyOptions | None = None) -> FilterReport: ...

    def flush(self, interface: str | None = None, options: ApplyOptions | None = None) -> FilterReport: ...

    def reload(self, interface: str, number: int, options: ApplyOptions | None = None) -> FilterReport: ...

    def restore(self, options: ApplyOptions | None = None) -> FilterReport: ...

    def status(self, interface: str | None = None) -> list[RuleStatus]: ...

    def test(self, interface: str, path: str, at: At | None = None, write_to: str | None = None) -> TestResult: ...

    def test_specs(self, specs: Sequence[RuleSpec], path: str, write_to: str | None = None) -> TestResult: ...


@contextmanager
def open_filters(paths: Paths, *, write: bool) -> Iterator[Filters]:
    """To `write` is to hold the lock until the end, or the daemon's to do. Raises LbError."""
    if daemon_listens(paths.socket):
        from lb.client.client import Client

        with Client.unix(paths.socket) as client:
            yield client.filters
        return
    from lb.firewall.firewall import open_firewall

    with open_firewall(paths, write=write) as firewall:
        yield firewall
