"""The one thread that owns the balancer, for all others in the daemon to ask.

Enters: work to be done on the balancer, from the event loop. Leaves: what the work returns, and after each piece of
work a snapshot of the desired state, ready to be sent, which the event loop reads without waiting.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import TypeVar

from lb.control.balancer import Balancer
from lb.errors import LbError
from lb.formats import text
from lb.formats.documents import Document, change_head, plan_document, report_document, service_document
from lb.model.report import Report
from lb.model.state import Service, State
from lb.model.vip import Vip
from lb.runtime.events import KEPT, Events
from lb.runtime.metrics import DaemonMetrics

T = TypeVar("T")

SENTENCES = 4  # of a summary


def to_bytes(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def etag_of(content: bytes) -> str:
    """A strong validator (RFC 9110, section 8.8.3)."""
    return f'"{hashlib.sha256(content).hexdigest()[:32]}"'


@dataclass(frozen=True)
class RenderedService:
    """A service, and its document as it is sent."""

    service: Service
    body: bytes
    etag: str


@dataclass(frozen=True)
class Snapshot:
    """The desired state at one moment."""

    state: State = field(default_factory=State)
    services: Mapping[Vip, RenderedService] = field(default_factory=dict)

    def following(self, state: State) -> Snapshot:
        """That of `state`; what has not changed is not rendered again."""
        if state is self.state:
            return self
        return Snapshot(state, {service.vip: self._rendered(service) for service in state.services})

    def _rendered(self, service: Service) -> RenderedService:
        known = self.services.get(service.vip)
        if known and known.service is service:
            return known
        body = to_bytes(service_document(service))
        return RenderedService(service, body, etag_of(body))

    @property
    def body(self) -> bytes:
        """An array of all services."""
        return b"[%b]" % b",".join(each.body for each in self.services.values())

    @cached_property
    def etag(self) -> str:
        """Of all services together."""
        return etag_of("".join(each.etag for each in self.services.values()).encode())


@dataclass(frozen=True)
class AppliedChange:
    """A change that was made. body: the document of the report; summary: a line; happened: the events of it. All of
    that may be large, so it is made in the thread."""

    report: Report
    body: bytes
    summary: str
    happened: tuple[tuple[str, Document], ...]


class BalancerThread:
    """Work is done one piece after the other, in the order in which it was asked for."""

    def __init__(self, opener: Callable[[], AbstractContextManager[Balancer]]) -> None:
        self.events = Events()
        self.metrics = DaemonMetrics()
        self.snapshot = Snapshot()
        self.refused = ""  # why the installed program is not in force
        self._opened = opener()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="balancer")
        self._balancer: Balancer | None = None

    @classmethod
    @asynccontextmanager
    async def open(cls, opener: Callable[[], AbstractContextManager[Balancer]]) -> AsyncIterator[BalancerThread]:
        """Raises what the opener raises; the balancer is opened, used and closed in the thread."""
        owner, loop = cls(opener), asyncio.get_running_loop()
        try:
            await loop.run_in_executor(owner._thread, owner._enter)
            yield owner
        finally:
            owner.events.close()
            await loop.run_in_executor(owner._thread, owner._exit)
            owner._thread.shutdown()

    def _enter(self) -> None:
        self._balancer = self._opened.__enter__()
        self.snapshot = self.snapshot.following(self._balancer.state)

    def _exit(self) -> None:
        if self._balancer:
            self._balancer = None
            self._opened.__exit__(None, None, None)

    async def call(self, work: Callable[[Balancer], T]) -> T:
        """The result of `work`, done in the thread; `snapshot` is of the time after it."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._do, work)

    def _do(self, work: Callable[[Balancer], T]) -> T:
        assert self._balancer, "closed"
        try:
            return work(self._balancer)
        finally:
            self.snapshot = self.snapshot.following(self._balancer.state)
            if self.refused and not self._balancer.outdated:
                self._refuse("")

    async def upgrade(self) -> tuple[str, ...]:
        """Have the installed program take over; if it cannot, the one in force goes on. What listeners are told."""
        try:
            notes = (await self.call(Balancer.upgrade)).notes
            refused = ""
        except LbError as error:
            notes, refused = (str(error),), str(error)
        self._refuse(refused)
        for note in notes:
            self.events.publish("upgrade", {"refused": bool(refused), "summary": note})
        return notes

    def _refuse(self, why: str) -> None:
        self.refused = why
        self.metrics.upgrade_refused(bool(why))

    def _made(self, report: Report, state: State) -> AppliedChange:
        before, self.snapshot = self.snapshot, self.snapshot.following(state)

        def body_of(service: Service | None) -> bytes:
            if service is None:
                return b"null"
            known = (snapshot.services.get(service.vip) for snapshot in (self.snapshot, before))
            ready = next((each.body for each in known if each and each.service is service), None)
            return ready or to_bytes(service_document(service))

        return _done(report, _report_body(report, body_of))

    async def change(self, work: Callable[[Balancer], Report]) -> AppliedChange:
        """As `call`, and listeners are told of what has changed."""
        done = await self.call(lambda balancer: self._made(work(balancer), balancer.state))
        self.metrics.changed(done.report)
        for kind, document in done.happened:
            self.events.publish(kind, document)
        return done


def _done(report: Report, body: bytes) -> AppliedChange:
    happened = tuple(islice(_happened(report), KEPT))
    sentences = [document["summary"] for _, document in happened[:SENTENCES]] or ["nothing to change"]
    more = len(report.attached) + len(report.detached) + len(report.changes) - SENTENCES
    summary = "; ".join([*sentences, f"{more} more"] if more > 0 else sentences)
    return (
        AppliedChange(report, body, f"dry run: {summary}", ())
        if report.dry_run
        else AppliedChange(report, body, summary, happened)
    )


def _report_body(report: Report, body_of: Callable[[Service | None], bytes]) -> bytes:
    """That of `report_document`, of which services are the largest part, and rendered already as a rule. No text within
    the rest can be taken for the place where they go: it would have its quotes escaped."""
    changes = [
        b'%b,"before":%b,"after":%b}' % (to_bytes(head)[:-1], body_of(change.before), body_of(change.after))
        for change in report.changes
        for head in [change_head(change)]
    ]
    rest = to_bytes(report_document(replace(report, changes=())) | {"changes": None})
    return rest.replace(b'"changes":null', b'"changes":[%b]' % b",".join(changes), 1)


def _happened(report: Report) -> Iterator[tuple[str, Document]]:
    for attachment in report.attached:
        summary = text.attachment_sentence(attachment)
        yield "attach", {"interface": attachment.interface, "xdp_mode": attachment.mode, "summary": summary}
    for name in report.detached:
        yield "detach", {"interface": name, "summary": f"{name}: detached"}
    for change in report.changes:
        document = {"vip": str(change.vip), "change": str(change.kind), "summary": text.change_sentence(change)}
        yield "change", document | {"plan": plan_document(change.plan) if change.plan else None}
