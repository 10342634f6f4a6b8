"""What a whole configuration would remove of what is served: an empty or truncated file must not pass for one.

Enters: the services before and after. Leaves: what is lost, in words, where that is all or more than half of the
services, or of the backends; else nothing.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from lb.control.change import few
from lb.model.state import Service


def loss(before: Sequence[Service], after: Sequence[Service]) -> str:
    """`2 of 3 services (10.0.0.1:80/tcp and 10.0.0.2:80/tcp)`, or empty."""
    services = _loss("service", [str(s) for s in before], {str(s) for s in after})
    return services or _loss("backend", _backends(before), set(_backends(after)))


def _backends(services: Sequence[Service]) -> list[str]:
    return [f"{backend} of {service}" for service in services for backend in service.backends]


def _loss(noun: str, before: Sequence[str], after: Set[str]) -> str:
    gone = [name for name in before if name not in after]
    if 2 * len(gone) <= len(before):
        return ""
    return f"{len(gone)} of {len(before)} {noun}{'' if len(before) == 1 else 's'} ({few(gone)})"
