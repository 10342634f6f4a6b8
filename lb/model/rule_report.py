"""What is asked of the filter and what it answers, as plain values: nothing here knows the kernel.

Enters and leaves: frozen values, for lb.firewall.firewall, for the daemon's client, and for those who print them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lb.model.rules import Action, At, Rate, Rule


@dataclass(frozen=True, slots=True)
class RuleSpec:
    """A rule as it is asked for. `seconds`: for how long, or `until_s`, Unix time: until when.

    `set_path` is the file of its set, or what its set is called; `set_list` the text of that file, where it has been
    read already.
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
    """How a change is to be made. `force`: also if it ends the connection that it is asked for on; `selftest`: of new
    expressions."""

    force: bool = False
    selftest: bool = True
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class RuleChange:
    """What became of a rule: added, deleted, moved, reloaded, restored or expired. `number`: the one it has, or had."""

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
    """What a rule has matched, and of that what it has dropped."""

    packets: int = 0
    bytes: int = 0
    dropped_packets: int = 0
    dropped_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RuleStatus:
    """`left_ns`: of its time, None for a rule without end; `in_force`: a program of ours is where the rule belongs."""

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
    """What rules would do to the packets of a file. `matched`: slot -> packets; `untested`: too short, or too long."""

    rules: tuple[Rule, ...]
    matched: Mapping[int, int]
    packets: int
    dropped: int
    untested: int
