"""Options -> text for people; defaults are left out.

Enters: the Options of a service. Leaves: phrases such as `mss 1400`, and changes such as `mss off -> 1400`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lb.model.health_check import HealthCheck
from lb.model.options import DEFAULTS, FIELDS, Network, Options


def _seconds(value: int) -> str:
    return f"{value} s" if value else "off"


def _rate(value: int) -> str:
    return f"{value}/s" if value else "off"


def _number(value: int) -> str:
    return str(value) if value else "off"


def _switch(value: bool) -> str:
    return "on" if value else "off"


def _check(value: HealthCheck | None) -> str:
    return str(value or "off")


def _prefixes(none: str) -> Callable[[tuple[Network, ...]], str]:
    return lambda value: " ".join(map(str, value)) or none


# Field -> its name, and the text of a value.
WORDS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "affinity_s": ("affinity", _seconds),
    "sources": ("sources", _prefixes("any")),
    "syn_limit": ("syn limit", _rate),
    "syn_limit_of_source": ("syn limit per source", _rate),
    "mss": ("mss", _number),
    "echo": ("echo", _switch),
    "tunnel_sources": ("tunnel source", _prefixes("own")),
    "gue_port": ("gue port", _number),
    "outer_checksum": ("outer checksum", _switch),
    "second_chance": ("second chance", _switch),
    "health": ("health", _check),
    "slow_start_s": ("slow start", _seconds),
    "fail_closed": ("fail closed", _switch),
    "vip_address": ("vip address", _switch),
}


def phrases(options: Options) -> list[str]:
    """What is not the default: `affinity 300 s`, `echo on`."""
    return [
        f"{name} {say(getattr(options, field))}" for field, name, say in _rows() if _differs(field, options, DEFAULTS)
    ]


def turns(before: Options, after: Options) -> list[str]:
    """What has changed: `mss off -> 1400`."""
    return [
        f"{name} {say(getattr(before, field))} -> {say(getattr(after, field))}"
        for field, name, say in _rows()
        if _differs(field, before, after)
    ]


def _rows() -> list[tuple[str, str, Callable[[Any], str]]]:
    return [(field, *WORDS[field]) for field in FIELDS]


def _differs(field: str, one: Options, other: Options) -> bool:
    return bool(getattr(one, field) != getattr(other, field))
