"""Filter rules: the desired list, without kernel state.

Enters: text of the command line (`drop`, `10k/s`, `10m`). Leaves: frozen values that are valid by construction, and new
lists made from old ones. No access to files, network or kernel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from lb.errors import InvalidInput, NotFound

MAX_RULES = 4096  # of a network namespace: places for counters
MAX_PACKETS_PER_S = 10_000_000  # the limit of the resolution of nanoseconds
LONGEST_S = 10 * 365 * 86400
MIN_BURST = 5  # packets, as of iptables and nft

_NS = 1_000_000_000
_PERIODS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
_PERIOD_WORDS = {"sec": "s", "second": "s", "m": "min", "minute": "min", "hour": "h", "day": "d"}
_THOUSANDS = {"": 1, "k": 1000, "M": 1_000_000}
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


class At(StrEnum):
    """Where a rule looks at packets."""

    XDP = "xdp"
    TC_IN = "tc-in"
    TC_OUT = "tc-out"


class Action(StrEnum):
    DROP = "drop"
    PASS = "pass"
    COUNT = "count"
    LIMIT = "limit"


@dataclass(frozen=True, slots=True)
class Rate:
    """`1000/s`, `10k/s`, `60/min`: packets in a period of s, min, h or d."""

    packets: int
    period: str = "s"

    @classmethod
    def parse(cls, text: str) -> Rate:
        found = re.fullmatch(r"([0-9]{1,12})([kM]?)/([a-z]+)", text)
        period = _PERIOD_WORDS.get(found[3], found[3]) if found else ""
        if found is None or period not in _PERIODS:
            raise InvalidInput(f"rate {text or '(empty)'}: not a packet rate such as 1000/s, 10k/s or 60/min")
        return cls(int(found[1]) * _THOUSANDS[found[2]], period)

    def __post_init__(self) -> None:
        if not self.packets:
            raise InvalidInput(f"rate {self}: passes no packets: use drop")
        if self.packets > MAX_PACKETS_PER_S * _PERIODS[self.period]:
            raise InvalidInput(f"rate {self}: more than {MAX_PACKETS_PER_S // 1_000_000}M/s")

    def __str__(self) -> str:
        for letter in "Mk":
            if self.packets and self.packets % _THOUSANDS[letter] == 0:
                return f"{self.packets // _THOUSANDS[letter]}{letter}/{self.period}"
        return f"{self.packets}/{self.period}"

    @property
    def interval_ns(self) -> int:
        """Between packets that come evenly."""
        return _PERIODS[self.period] * _NS // self.packets

    @property
    def per_second(self) -> float:
        return self.packets / _PERIODS[self.period]

    @property
    def burst_ns(self) -> int:
        """How much may come at once: what comes in a second, but five packets at least."""
        return max(_NS, MIN_BURST * self.interval_ns)


def parse_duration(text: str) -> int:
    """Seconds, of `90`, `90s`, `10m`, `1h30m`, `2d`."""
    parts = re.findall(r"([0-9]{1,10})([smhdw]?)", text)
    if not parts or "".join(map("".join, parts)) != text or any(not unit for _, unit in parts[:-1]):
        raise InvalidInput(f"time {text or '(empty)'}: not a duration such as 90s, 10m or 1h30m")
    seconds = sum(int(number) * _SECONDS[unit] for number, unit in parts)
    if not 0 < seconds <= LONGEST_S:
        raise InvalidInput(f"time {text}: out of range 1s to {LONGEST_S // 86400}d")
    return seconds


@dataclass(frozen=True, slots=True)
class Clock:
    """Now: nanoseconds since this boot, which time spent asleep counts for, and since 1970."""

    boot_id: str
    boot_ns: int
    unix_ns: int


@dataclass(frozen=True, slots=True)
class Deadline:
    """By the monotonic clock of the boot that it was set in; after another boot by the time of day."""

    boot_id: str
    boot_ns: int
    unix_ns: int

    @classmethod
    def after(cls, seconds: int, now: Clock) -> Deadline:
        return cls(now.boot_id, now.boot_ns + seconds * _NS, now.unix_ns + seconds * _NS)

    @classmethod
    def at(cls, unix_s: int, now: Clock) -> Deadline:
        """Raises InvalidInput for a time that has passed."""
        left_ns = unix_s * _NS - now.unix_ns
        if not 0 < left_ns <= LONGEST_S * _NS:
            raise InvalidInput(f"until {unix_s}: not within {LONGEST_S // 86400}d from now, in seconds since 1970")
        return cls(now.boot_id, now.boot_ns + left_ns, unix_s * _NS)

    @property
    def unix_s(self) -> int:
        """Rounded up."""
        return -(-self.unix_ns // _NS)

    def left_ns(self, now: Clock) -> int:
        """Negative if it has passed."""
        return self.boot_ns - now.boot_ns if self.boot_id == now.boot_id else self.unix_ns - now.unix_ns


@dataclass(frozen=True, slots=True)
class SetSource:
    """A file of prefixes, and which address of a packet is looked up in it: src or dst. `prefixes`: how many it had."""

    path: str
    side: str
    prefixes: int = 0


@dataclass(frozen=True, slots=True)
class Rule:
    """`slot` is its own as long as it lives, whatever number it has: the place of its counters and the key of its set.

    `expression` is text for people, `instructions` what it was compiled to (struct sock_filter), so that names in it
    are looked up once.
    """

    slot: int
    interface: str
    at: At
    action: Action
    expression: str
    instructions: bytes
    rate: Rate | None = None
    set: SetSource | None = None
    deadline: Deadline | None = None

    def is_expired(self, now: Clock) -> bool:
        return self.deadline is not None and self.deadline.left_ns(now) <= 0


@dataclass(frozen=True, slots=True)
class Rules:
    """All rules of a network namespace; those of one interface are numbered from 1, in this order."""

    all: tuple[Rule, ...] = ()

    def of(self, interface: str) -> tuple[Rule, ...]:
        return tuple(rule for rule in self.all if rule.interface == interface)

    def hook(self, interface: str, at: At) -> tuple[Rule, ...]:
        return tuple(rule for rule in self.of(interface) if rule.at is at)

    @property
    def interfaces(self) -> list[str]:
        return list(dict.fromkeys(rule.interface for rule in self.all))

    @property
    def hooks(self) -> list[tuple[str, At]]:
        return list(dict.fromkeys((rule.interface, rule.at) for rule in self.all))

    def numbered(self, interface: str, number: int) -> Rule:
        rules = self.of(interface)
        if not rules:
            raise NotFound(f"{interface}: has no rules: see xdp-lb filter list")
        if not 1 <= number <= len(rules):
            raise NotFound(
                f"{interface}: no rule {number}: the last is {len(rules)}: see xdp-lb filter list {interface}"
            )
        return rules[number - 1]

    def number(self, rule: Rule) -> int:
        return self.of(rule.interface).index(rule) + 1

    def free_slot(self) -> int:
        """Raises InvalidInput when there are as many rules as can be counted."""
        taken = {rule.slot for rule in self.all}
        if len(taken) >= MAX_RULES:
            raise InvalidInput(f"limit of {MAX_RULES} rules reached: delete some, or use a set")
        return next(slot for slot in range(MAX_RULES) if slot not in taken)

    def with_rule(self, rule: Rule, position: int | None = None) -> Rules:
        """At that number, or behind the last one of its interface."""
        others = self.of(rule.interface)
        place = len(others) + 1 if position is None else position
        if not 1 <= place <= len(others) + 1:
            raise InvalidInput(f"{rule.interface}: position {place}: out of range 1 to {len(others) + 1}")
        return self.ordered(rule.interface, [*others[: place - 1], rule, *others[place - 1 :]])

    def without(self, gone: Iterable[Rule]) -> Rules:
        slots = {rule.slot for rule in gone}
        return Rules(tuple(rule for rule in self.all if rule.slot not in slots))

    def moved(self, rule: Rule, to: int) -> Rules:
        self.numbered(rule.interface, to)
        others = [other for other in self.of(rule.interface) if other.slot != rule.slot]
        return self.ordered(rule.interface, [*others[: to - 1], rule, *others[to - 1 :]])

    def replacing(self, rule: Rule) -> Rules:
        return Rules(tuple(rule if other.slot == rule.slot else other for other in self.all))

    def in_time(self, now: Clock) -> Rules:
        return Rules(tuple(rule for rule in self.all if not rule.is_expired(now)))

    def ordered(self, interface: str, rules: Sequence[Rule]) -> Rules:
        """With these as the rules of an interface."""
        return Rules((*(rule for rule in self.all if rule.interface != interface), *rules))


def rebased(rule: Rule, now: Clock) -> Rule:
    """With a deadline by the clock of this boot."""
    deadline = rule.deadline
    if deadline is None or deadline.boot_id == now.boot_id:
        return rule
    return replace(rule, deadline=Deadline(now.boot_id, now.boot_ns + deadline.left_ns(now), deadline.unix_ns))


def set_of(rule: Rule, number: int) -> SetSource:
    """Raises InvalidInput for a rule without a set."""
    if rule.set is None:
        raise InvalidInput(f"{rule.interface}: rule {number} has no set")
    return rule.set


def set_file(rule: Rule, number: int) -> str:
    """The file of its set. Raises InvalidInput where it came by the API, under a name."""
    path = set_of(rule, number).path
    if not path.startswith("/"):
        raise InvalidInput(f"{rule.interface}: rule {number}: set {path}: not read from a file: upload it again")
    return path
