"""Runs rules on test frames, with the program that the kernel would run."""

from __future__ import annotations

from collections.abc import Sequence

from filters.programs.actions import Answer
from filters.programs.program import FilterAction, LoadedProgram
from filters.selftest.selftest import is_runnable
from lb.model.rules import Action, Rule
from xdp.maps import Map

_LONGEST_FRAME = 3520 + 16 * 4096


def test_actions(rule: Rule, number: int) -> list[FilterAction]:
    """A limit never drops: test packets have no rate."""
    if rule.action is Action.DROP:
        return [Answer(number + 1)]
    return [Answer(0)] if rule.action is Action.PASS else []


class RuleTester:
    """Runs frames through rules; the counters of active rules are not touched."""

    def __init__(self, program: LoadedProgram, rules: Sequence[Rule], counted: Map) -> None:
        self._program, self._rules, self._counted = program, rules, counted

    def can_run(self, frame: bytes) -> bool:
        return is_runnable(frame, self._program.hook) and len(frame) <= _LONGEST_FRAME

    def dropped_by(self, frame: bytes) -> Rule | None:
        verdict = self._program.test_run(frame).verdict
        return self._rules[verdict - 1] if verdict else None

    def matched(self) -> dict[int, int]:
        """Slot -> packets so far."""
        return {rule.slot: self._counted.total(number).packets for number, rule in enumerate(self._rules)}
