"""Results of health checks applied to the desired state: the effective services (pure).

Enters: a desired service, and the conditions of its backends. Leaves: the service to load. The desired state holds no
conditions, so every change of it applies them anew, and they are never stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lb.model.state import MAX_WEIGHT, Backend, Service
from lb.model.vip import Vip

WHOLE = 100
SHOWN = 3  # backends, in a sentence


@dataclass(frozen=True, slots=True)
class Condition:
    """down: it gets nothing, and what it had is lost. share: percent of its weight, 1 to 100, less than all while it
    starts slowly. why: of the last failure, empty while it is up. since: Unix time in seconds."""

    down: bool = False
    share: int = WHOLE
    why: str = ""
    since: float = 0


UP = Condition()

# Backends by ADDR:PORT. Others are up: unchecked, or not checked yet.
Conditions = Mapping[Vip, Mapping[str, Condition]]


def in_force(service: Service, conditions: Mapping[str, Condition] | None) -> Service:
    """`service` itself, as long as no condition makes a difference, and where it is not to be checked at all.

    If no backend is left for new connections, `fail_closed` decides: none gets them, or all, as if they were up.
    """
    if not (conditions and service.options.health):
        return service
    found = {b: conditions.get(str(b), UP) for b in service.backends}
    if all(not each.down and each.share == WHOLE for each in found.values()):
        return service
    eligible = [b for b in service.backends if b.ring_weight]
    if all(found[b].down for b in eligible) and not service.options.fail_closed:
        return service
    scale = _scale(service) if any(found[b].share < WHOLE for b in eligible) else 1
    return replace(service, backends=tuple(_effective(b, found[b], scale) for b in service.backends))


def _scale(service: Service) -> int:
    """What all weights are multiplied with, so that a hundredth of the least is still a whole number if possible."""
    return max(1, min(WHOLE, MAX_WEIGHT // max(b.weight for b in service.backends)))


def _effective(backend: Backend, condition: Condition, scale: int) -> Backend:
    if condition.down:
        return replace(backend, down=True, server_ids=())  # nor does a QUIC connection ID lead to it
    if not backend.weight:
        return backend
    return replace(backend, weight=max(1, backend.weight * scale * condition.share // WHOLE))


def left_behind(service: Service, conditions: Mapping[str, Condition] | None) -> str:
    """A warning about backends without their full share while checks are not running; empty if none."""
    if in_force(service, conditions) is service:
        return ""
    found = ((b, (conditions or {}).get(str(b), UP)) for b in service.backends)
    kept = [f"{b} ({'down' if c.down else f'at {c.share} %'})" for b, c in found if c.down or c.share < WHOLE]
    names = ", ".join(kept[:SHOWN]) + (f" and {len(kept) - SHOWN} more" if len(kept) > SHOWN else "")
    keep = "keeps its" if len(kept) == 1 else "keep their"
    return f"{service.vip}: {names} {keep} last health state until xdp-lb serve runs or --health off"


def with_other_conditions(before: Conditions, after: Conditions) -> set[Vip]:
    """The VIPs whose conditions are not the same."""
    return {vip for vip in before.keys() | after.keys() if before.get(vip) != after.get(vip)}
