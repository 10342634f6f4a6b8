"""The bodies of the API about filter rules, explanations and stages: what may come in, and what goes out.

Enters: JSON that pydantic has checked for types. Leaves: values of lb.model.rule_report and lb.explain.packet, or a
Problem that points at the value at fault. Text that is listed again has to be printable: it must not steer a terminal.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from lb.api.models.common import LARGEST, Answer, Body, Count
from lb.errors import InvalidInput
from lb.formats.problems import Pointer
from lb.model.rule_report import RuleSpec
from lb.model.rules import LONGEST_S, Action, At, Rate

AtName = Annotated[At, Field(strict=False)]
ActionName = Annotated[Action, Field(strict=False)]
Whole = Annotated[int, Field(ge=-LARGEST, le=LARGEST)]
LONGEST_NAME = 4096  # of a set: PATH_MAX


class SetBody(Body):
    """Packets with an address in a list of prefixes."""

    path: str = Field(min_length=1, max_length=LONGEST_NAME, description="Name of the set", examples=["bad"])
    side: Literal["src", "dst"] = "src"
    list: str | None = Field(None, description="One prefix per line", examples=["192.0.2.0/24\n2001:db8::/32\n"])
    prefixes: Count | None = Field(None, description="Number of prefixes; read-only")


class RuleBody(Body):
    """A rule as it is to be."""

    at: AtName = At.XDP
    action: ActionName
    rate: str | None = Field(None, description="Only with action limit", examples=["1k/s"])
    expression: str = Field("", description="tcpdump expression; empty: all packets", examples=["udp port 53"])
    set: SetBody | None = None
    until: Whole | None = Field(None, description="Unix time in seconds at which the rule expires")

    def to_spec(self, interface: str, pointer: Pointer, *, is_here: bool) -> RuleSpec:
        """`is_here`: the request comes over the Unix socket, where sets may be named after local files."""
        rate = self._rate(pointer / "rate")
        with pointer / "expression":
            _check_printable("expression", self.expression)
        self._check_set(pointer / "set", is_here=is_here)
        path, side, text = (self.set.path, self.set.side, self.set.list) if self.set else (None, "src", None)
        expression = " ".join(self.expression.split())
        return RuleSpec(interface, self.action, rate, expression, path, side, self.at, None, self.until, text)

    def _rate(self, pointer: Pointer) -> Rate | None:
        with pointer:
            if self.rate is not None and self.action is not Action.LIMIT:
                raise InvalidInput(f"rate {self.rate}: requires action limit, not {self.action}")
            if self.action is not Action.LIMIT:
                return None
            return Rate.parse(self.rate or "")

    def _check_set(self, pointer: Pointer, *, is_here: bool) -> None:
        if self.set is None:
            return
        with pointer / "path":
            _check_printable("set", self.set.path)
            if self.set.path.startswith("/") and self.set.list is not None and not is_here:
                raise InvalidInput(f"set {self.set.path}: files of the balancer's host are not read: use another name")


class NewRuleBody(RuleBody):
    for_s: Count | None = Field(None, description="Lifetime in seconds, instead of until")
    position: Whole | None = Field(None, description="Number of the new rule; default: after the last")

    def to_new_spec(self, interface: str, *, is_here: bool) -> RuleSpec:
        spec = self.to_spec(interface, Pointer(), is_here=is_here)
        if self.set and self.set.list is None:
            with Pointer() / "set" / "list":
                raise InvalidInput(f"set {self.set.path}: list: missing")
        if self.for_s is None:
            return spec
        with Pointer() / "for_s":
            if not 0 < self.for_s <= LONGEST_S or self.until is not None:
                raise InvalidInput(f"for_s {self.for_s}: out of range 1 to {LONGEST_S}, or combined with until")
        return replace(spec, seconds=self.for_s)


class RulesBody(Body):
    """All rules of an interface."""

    rules: list[RuleBody]

    def to_specs(self, interface: str, *, is_here: bool) -> list[RuleSpec]:
        pointer = Pointer() / "rules"
        return [rule.to_spec(interface, pointer / number, is_here=is_here) for number, rule in enumerate(self.rules)]


class MoveBody(Body):
    number: Whole = Field(description="New number of the rule")


class TrialBody(Body):
    """Rules of an interface, or new rules."""

    pcap: str = Field(description="A capture file, in base64")
    interface: str | None = None
    at: AtName | None = None
    rules: Annotated[list[RuleBody], Field(min_length=1)] | None = None

    def to_specs(self, *, is_here: bool) -> list[RuleSpec]:
        """None: those of the interface."""
        pointer = Pointer() / "rules"
        if (self.rules is None) == (self.interface is None):
            with pointer:
                raise InvalidInput("rules: give either interface or rules")
        if self.rules and self.at:
            with Pointer() / "at":
                raise InvalidInput("at: not allowed with rules: give it in each rule")
        specs = [r.to_spec("", pointer / n, is_here=is_here) for n, r in enumerate(self.rules or ())]
        for number, spec in enumerate(specs):
            with pointer / number:
                if spec.at is not specs[0].at:
                    raise InvalidInput(f"rules: different attach points: {specs[0].at} and {spec.at}")
                if spec.set_path is not None and spec.set_list is None:
                    raise InvalidInput(f"set {spec.set_path}: list: missing")
        return specs


def _check_printable(name: str, text: str) -> None:
    if not " ".join(text.split()).isprintable():
        raise InvalidInput(f"{name}: contains unprintable characters")


# What goes out


class SetAnswer(Answer):
    path: str
    side: str
    prefixes: int


class OwnRuleAnswer(Answer):
    at: At
    action: Action
    rate: str | None
    expression: str
    set: SetAnswer | None


class WantedRuleAnswer(OwnRuleAnswer):
    until: int | None


class RulesAnswer(Answer):
    """What PUT takes."""

    rules: list[WantedRuleAnswer]


class RuleAnswer(OwnRuleAnswer):
    interface: str
    number: int


class RuleStatusAnswer(RuleAnswer):
    packets: int
    bytes: int
    dropped_packets: int
    dropped_bytes: int
    in_force: bool
    expired: bool
    left_s: int | None


class RuleChangeAnswer(RuleAnswer):
    change: str
    detail: str


class FilterReportAnswer(Answer):
    """What a change did, or, of a dry run, would do."""

    dry_run: bool
    changes: list[RuleChangeAnswer]
    warnings: list[str]


class TriedRuleAnswer(RuleAnswer):
    matched: int


class TrialAnswer(Answer):
    """`dropped_packets`: their positions in the file, from 0."""

    packets: int
    dropped: int
    untested: int
    rules: list[TriedRuleAnswer]
    dropped_packets: list[int]
