"""Requests and reports of filter rules, as plain values without kernel state.

Enters and leaves: frozen values, for lb.firewall.firewall, the client of the daemon, and the formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lb.model.rules import Action, At, Rate, Rule


@dataclass(frozen=True, slots=True)
class RuleSpec:
    """A requested rule. `seconds`: its lifetime, or `until_s`: its end as Unix time.

    `set_path`: file or name of its set; `set_list`: the text of that file, if it has been read already.
    """

    interface: str
    action: Action
    rate: Rate | None = None
    expression: str = ""
    set_path: str | None = None
    set_side: str = "src"
    at: At = At.XDP
    seconds: int | None = None
    until_s: int | None = None
    set_list: str | None = None


@dataclass(frozen=True, slots=True)
class ApplyOptions:
    """`force`: apply even if it drops the connection of the request; `selftest`: of new filters."""

    force: bool = False
    selftest: bool = True
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class RuleChange:
    """`what`: added, deleted, moved, reloaded, restored or expired. `number`: its current or last number."""

    what: str
    rule: Rule
    number: int
    detail: str = ""


@dataclass(frozen=True, slots=True)
class FilterReport:
    changes: tuple[RuleChange, ...] = ()
    warnings: tuple[str, ...] = ()
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class Counts:
    """Packets that a rule has matched, and those of them that it has dropped."""

    packets: int = 0
    bytes: int = 0
    dropped_packets: int = 0
    dropped_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RuleStatus:
    """`left_ns`: remaining lifetime, None for no limit; `in_force`: our program is attached at the rule's hook."""

    rule: Rule
    number: int
    counts: Counts
    in_force: bool
    left_ns: int | None

    @property
    def is_expired(self) -> bool:
        return self.left_ns is not None and self.left_ns <= 0


@dataclass(frozen=True, slots=True)
class FilterTestResult:
    """Result of rules on the packets of a file. `matched`: slot -> packets; `untested`: too short or too long."""

    rules: tuple[Rule, ...]
    matched: Mapping[int, int]
    packets: int
    dropped: int
    untested: int
