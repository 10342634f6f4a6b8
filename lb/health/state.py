"""Outcomes of checks -> the condition of a backend (pure: no clock, no network).

Enters: outcomes in order, and the time. Leaves: conditions. A backend without history is up, and its first outcome
decides; from then on `rise` and `fall` do. A recovered backend starts slowly, in steps. A new process resumes from the
saved state of the previous one.
"""

from __future__ import annotations

from dataclasses import dataclass

from lb.model.conditions import UP, WHOLE, Condition
from lb.model.health_check import HealthCheck
from lb.model.state import Service

MIN_STEP_S = 1.0
MIN_STEPS = 10
SLOTS_PER_STEP = 0.01  # of the ring
FRESH_S, FRESH_INTERVALS = 60.0, 10  # what is remembered, the larger of both


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one check. why: what went wrong, in a few words; empty if nothing did."""

    why: str = ""

    @property
    def ok(self) -> bool:
        return not self.why


SUCCESS = Outcome()


@dataclass(frozen=True, slots=True)
class Ramp:
    """A slow start: from `start_s` on, `steps` steps in `length_s` seconds."""

    start_s: float
    length_s: float
    steps: int

    def share(self, now_s: float) -> int:
        """Percent; the first step is the least."""
        done = int((now_s - self.start_s) / self.length_s * self.steps) + 1
        return WHOLE if done > self.steps else max(1, WHOLE * done // (self.steps + 1))

    def next_step_s(self, now_s: float) -> float:
        """When the share changes next, on the clock of start_s."""
        done = int((now_s - self.start_s) / self.length_s * self.steps) + 1
        return self.start_s + done * self.length_s / self.steps


def steps_of(service: Service, weight: int) -> int:
    """In how many steps a backend of that weight starts: so many that none moves more than a hundredth of the ring, but
    at least MIN_STEPS and not so many that two are closer than MIN_STEP_S."""
    total = sum(b.weight for b in service.backends if not b.draining)
    wanted = max(MIN_STEPS, round(weight / max(total, 1) / SLOTS_PER_STEP))
    return max(1, min(wanted, int(service.options.slow_start_s / MIN_STEP_S)))


def words_of(service: Service) -> str:
    """What is asked of its backends, and by which way: where that is another, another thing is found."""
    return f"{service.mode} {service.options.health}"


@dataclass(frozen=True, slots=True)
class SavedHealth:
    """What an earlier process has found of a backend. words: see words_of(). age_s: so long ago it was true still.
    The ramp is on CLOCK_MONOTONIC."""

    words: str
    condition: Condition
    ramp: Ramp | None = None
    age_s: float = 0

    def still_holds(self, service: Service) -> bool:
        """Or the next check alone decides."""
        check = service.options.health
        if check is None or self.words != words_of(service):
            return False
        return 0 <= self.age_s <= max(FRESH_S, FRESH_INTERVALS * check.interval_s)


@dataclass(slots=True)
class BackendHealth:
    """One backend of one service. `now_s` is of any clock that never goes back, `time_s` Unix time."""

    check: HealthCheck
    down: bool = False
    known: bool = False
    streak: int = 0  # of outcomes that speak against what is known
    why: str = ""
    since: float = 0
    ramp: Ramp | None = None
    _last: Condition = UP

    @classmethod
    def resumed(cls, check: HealthCheck, left: SavedHealth, *, known: bool) -> BackendHealth:
        """As an earlier process left it: what was down has to rise, what was up to fall; if that is not `known` to
        hold still, one check is enough for either."""
        condition = left.condition
        return cls(check, condition.down, known, 0, condition.why, condition.since, left.ramp)

    @property
    def is_reported(self) -> bool:
        """There is a condition to tell."""
        return self.known or self.down or self.ramp is not None

    def record(self, outcome: Outcome, now_s: float, time_s: float, *, slow_start_s: float = 0, steps: int = 1) -> bool:
        """Whether the backend has gone up or down by this."""
        was_known, self.known = self.known, True
        if outcome.ok != self.down:
            self.streak, self.since = 0, self.since or time_s
            if self.down:
                self.why = outcome.why
            return False
        self.streak += 1
        if was_known and self.streak < (self.check.rise if self.down else self.check.fall):
            return False
        if outcome.ok and slow_start_s:
            self.ramp = Ramp(now_s, slow_start_s, steps)
        return self._turn(outcome, time_s)

    def _turn(self, outcome: Outcome, time_s: float) -> bool:
        self.down, self.why, self.since, self.streak = not outcome.ok, outcome.why, time_s, 0
        if self.down:
            self.ramp = None
        return True

    def condition(self, now_s: float) -> Condition:
        share = self.ramp.share(now_s) if self.ramp else WHOLE
        if share == WHOLE:
            self.ramp = None
        now = Condition(self.down, share, self.why, self.since)
        if now != self._last:  # the very same is quick to compare, and there are thousands
            self._last = now
        return self._last
