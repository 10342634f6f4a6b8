"""Results of health checks, in a file of the run directory, for the next process.

Enters: what lb.health.checker remembers, after each change. Leaves: the same, for a daemon that starts again, and for a
command that changes something while there is none. It is replaced as a whole, so that a process killed at any moment
leaves the old or the new; nothing is synced to a disk, since of another boot nothing is believed. While the checks run,
the file's time of modification is that of the last second: until then, what it says was so.

    {"boot_id": "...", "services": [{"vip": "10.0.0.1:80/tcp", "words": "nat http /", "backends": {
        "10.0.0.11:80": {"down": false, "share": 30, "why": "", "since": 1700000000.0, "ramp": [5000.0, 30, 10]},
        "10.0.0.12:80": 1700000000.0}}]}

The ramp is start, length and steps of lb.health.state.Ramp, or null. Of a backend that is up, as most are, there is
the time alone.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lb.errors import LbError
from lb.health.state import Ramp, SavedHealth
from lb.model.conditions import WHOLE, Condition, Conditions
from lb.model.state import Service
from lb.model.vip import Vip

MOST = 1e9
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

Found = Mapping[tuple[Vip, str], SavedHealth]  # by VIP, and backend as ADDR:PORT


class HealthFile:
    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, found: Found) -> None:
        """Raises OSError."""
        services: dict[Vip, dict[str, Any]] = {}
        for (vip, name), each in found.items():
            if vip not in services:
                services[vip] = {"vip": str(vip), "words": each.words, "backends": {}}
            services[vip]["backends"][name] = _document(each)
        new = self._path.with_suffix(".new")
        new.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps({"boot_id": _boot_id(), "services": [*services.values()]}))
        new.replace(self._path)

    def touch(self) -> None:
        """To be called every second."""
        with suppress(OSError):  # nothing has been written yet, or it cannot be, which write() tells
            os.utime(self._path)

    def read(self) -> Found:
        """Empty if the file is missing, invalid, or of another boot."""
        try:
            text, age_s = self._path.read_text(), time.time() - self._path.stat().st_mtime
            document = json.loads(text)
            if document["boot_id"] != _boot_id():
                return {}
            return {key: each for service in document["services"] for key, each in _remembered(service, age_s)}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, LbError):
            return {}

    def conditions(self, services: Sequence[Service]) -> Conditions:
        """The last applied conditions of backends that are still to be checked; `why` says that checks have stopped."""
        checked = {service.vip for service in services if service.options.health}
        conditions: dict[Vip, dict[str, Condition]] = {}
        for (vip, name), each in self.read().items():
            if vip in checked:
                conditions.setdefault(vip, {})[name] = _unchecked(each)
        return conditions


def _boot_id() -> str:
    return BOOT_ID.read_text().strip()


def _document(each: SavedHealth) -> float | dict[str, Any]:
    condition, ramp = each.condition, each.ramp
    if not (condition.down or ramp or condition.share < WHOLE):
        return float(condition.since)
    return {
        "down": condition.down,
        "share": condition.share,
        "why": condition.why,
        "since": condition.since,
        "ramp": [ramp.start_s, ramp.length_s, ramp.steps] if ramp else None,
    }


def _remembered(service: Any, age_s: float) -> Iterator[tuple[tuple[Vip, str], SavedHealth]]:
    """Raises ValueError and others where it makes no sense."""
    vip, words = Vip.parse(service["vip"]), str(service["words"])
    for name, each in service["backends"].items():
        if isinstance(each, float):
            yield (vip, name), SavedHealth(words, Condition(since=each), None, age_s)
        else:
            ramp = _ramp(*each["ramp"]) if each["ramp"] else None
            yield (vip, name), SavedHealth(words, _condition(each), ramp, age_s)


def _condition(each: Any) -> Condition:
    share = _within(int(each["share"]), 1, WHOLE)
    return Condition(bool(each["down"]), share, str(each["why"]), float(each["since"]))


def _ramp(start_s: float, length_s: float, steps: int) -> Ramp:
    start_s = _within(float(start_s), 0, time.monotonic())
    return Ramp(start_s, _within(float(length_s), 1, MOST), _within(int(steps), 1, MOST))


def _within(value: Any, least: float, most: float) -> Any:
    if not least <= value <= most:
        raise ValueError(f"{value}: not within {least} and {most}")
    return value


def _unchecked(each: SavedHealth) -> Condition:
    if not each.condition.down:
        return each.condition
    last = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - each.age_s))
    return replace(each.condition, why=f"{each.condition.why}; not checked since {last}")
