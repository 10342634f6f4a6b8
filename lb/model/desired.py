"""What a configuration file asks for, over what is served.

Enters: the services of the file, which weights and drains it gives, and the services in force. Leaves: the services to
apply. Operators change weight and drain by command, for the moment: a file that does not give them leaves them alone.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace

from lb.model.state import Backend, Service
from lb.model.vip import Vip

Given = dict[tuple[Vip, str], Set[str]]  # by VIP and backend, which of KEYS the file gives
KEYS = {"weight": "weight", "draining": "drain"}  # field of Backend -> key of the file


@dataclass(frozen=True, slots=True)
class Merged:
    """`kept` and `overridden`: a sentence for each value in force that differs from the file's."""

    services: tuple[Service, ...]
    kept: tuple[str, ...] = ()
    overridden: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Desired:
    services: tuple[Service, ...]
    given: Given = field(default_factory=dict)

    def over(self, served: Sequence[Service]) -> Merged:
        old = {service.vip: service for service in served}
        kept: list[str] = []
        overridden: list[str] = []
        services = tuple(self._over(s, old[s.vip], kept, overridden) if s.vip in old else s for s in self.services)
        return Merged(services, tuple(kept), tuple(overridden))

    def _over(self, service: Service, served: Service, kept: list[str], overridden: list[str]) -> Service:
        old = {str(backend): backend for backend in served.backends}
        changes: dict[str, Backend] = {}
        for backend in service.backends:
            was, given = old.get(str(backend), backend), self.given.get((service.vip, str(backend)), frozenset())
            where = f"{service}: backend {backend}"
            for name in (name for name in KEYS if getattr(was, name) != getattr(backend, name)):
                if name in given:
                    overridden.append(f"{where}: {_word(name, was)} -> {_word(name, backend)}: given by the file")
                else:
                    kept.append(f"{where}: {_word(name, was)} kept: {KEYS[name]} is not in the file")
                    changed = changes.get(str(backend), backend)
                    changes[str(backend)] = replace(changed, **{name: getattr(was, name)})
        if not changes:
            return service
        return replace(service, backends=tuple(changes.get(str(b), b) for b in service.backends))


def _word(name: str, backend: Backend) -> str:
    if name == "weight":
        return f"weight {backend.weight}"
    return "draining" if backend.draining else "active"
