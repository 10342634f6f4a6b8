"""The desired state at one moment, and its documents as they are sent: what stays as it was is not encoded again.

Enters: States, and the Report of a change. Leaves: encoded JSON, and its entity tags. A service is encoded once, when
it has changed: with a hundred backends that is the largest part of any answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from lb.formats import json_bytes
from lb.formats.documents import change_head, report_document, service_document
from lb.model.report import Change, Report
from lb.model.state import Service, State
from lb.model.vip import Vip


def etag_of(content: bytes) -> str:
    """A strong validator (RFC 9110, section 8.8.3)."""
    return f'"{hashlib.sha256(content).hexdigest()[:32]}"'


@dataclass(frozen=True)
class RenderedService:
    """A service, and its document as it is sent."""

    service: Service
    body: bytes
    etag: str

    @classmethod
    def of(cls, service: Service) -> RenderedService:
        body = json_bytes.encode(service_document(service))
        return cls(service, body, etag_of(body))


@dataclass(frozen=True)
class Snapshot:
    """The desired state at one moment."""

    state: State = field(default_factory=State)
    services: Mapping[Vip, RenderedService] = field(default_factory=dict)

    def following(self, state: State) -> Snapshot:
        """That of `state`; what has not changed is not rendered again."""
        if state is self.state:
            return self
        return Snapshot(
            state, {service.vip: self._rendered(service) or RenderedService.of(service) for service in state.services}
        )

    def _rendered(self, service: Service) -> RenderedService | None:
        """If it is this very service."""
        known = self.services.get(service.vip)
        return known if known and known.service is service else None

    @property
    def body(self) -> bytes:
        """An array of all services."""
        return json_bytes.array(each.body for each in self.services.values())

    @cached_property
    def etag(self) -> str:
        """Of all services together."""
        return etag_of("".join(each.etag for each in self.services.values()).encode())

    def report_body(self, report: Report, before: Snapshot) -> bytes:
        """`report_document`, encoded, of the change from `before` to this; in a dry run both are the same."""

        def service_body(service: Service | None) -> bytes:
            if service is None:
                return json_bytes.encode(None)
            known = self._rendered(service) or before._rendered(service) or RenderedService.of(service)
            return known.body

        def change_body(change: Change) -> bytes:
            services = {"before": service_body(change.before), "after": service_body(change.after)}
            return json_bytes.object_of(json_bytes.members(change_head(change)) | services)

        without_changes = json_bytes.members(report_document(replace(report, changes=())))
        changes = json_bytes.array(map(change_body, report.changes))
        return json_bytes.object_of(without_changes | {"changes": changes})
