"""Errors of the API as problem details (RFC 9457), for the server and its client.

Enters: an error of the balancer, or an HTTP status code. Leaves: a Problem, whose `type` names the error's class, so
that the client raises the same. `field` is the JSON Pointer (RFC 6901) of the invalid value in the body.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from lb.errors import (
    AlreadyExists,
    Busy,
    Conflict,
    DaemonError,
    DataplaneError,
    InvalidInput,
    LbError,
    NoRoute,
    NotFound,
    PruneRequired,
    StoreError,
)

MEDIA_TYPE = "application/problem+json"
URN = "urn:xdp-lb:problem:"


@dataclass(frozen=True, slots=True)
class Kind:
    """What is said of all errors of one class."""

    name: str
    title: str
    status: int


KINDS: dict[type[LbError], Kind] = {
    InvalidInput: Kind("invalid-input", "Invalid values", 422),
    NotFound: Kind("not-found", "Not found", 404),
    AlreadyExists: Kind("already-exists", "Already exists", 409),
    NoRoute: Kind("no-route", "No route to a backend", 409),
    Conflict: Kind("conflict", "Modified since it was read", 412),
    PruneRequired: Kind("prune-required", "Would remove more than half of what is served", 409),
    Busy: Kind("busy", "Another process is changing this network namespace", 503),
    StoreError: Kind("store-error", "Store cannot be read or written", 503),
    DataplaneError: Kind("dataplane-error", "Rejected by the kernel; previous state kept", 503),
    DaemonError: Kind("refused", "Refused by the daemon", 403),
}
CLASSES = {kind.name: error for error, kind in KINDS.items()}


class Problem(Exception):
    """What is answered instead of a result."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        kind: str = "",
        title: str = "",
        field: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        phrase = HTTPStatus(status).phrase
        self.status = status
        self.detail = detail
        self.headers = dict(headers or {})
        self.document: dict[str, Any] = {
            "type": URN + (kind or phrase.lower().replace(" ", "-")),
            "title": title or phrase,
            "status": status,
            "detail": detail,
            "field": field,
        }


def of_error(error: LbError, *, field: str | None = None, status: int | None = None) -> Problem:
    """The Problem of an error of the balancer. `status`: another than that of its class."""
    kind = next(kind for cls, kind in KINDS.items() if isinstance(error, cls))
    headers = {"Retry-After": "1"} if kind.status == HTTPStatus.SERVICE_UNAVAILABLE else {}
    if field is None and isinstance(error, InvalidInput) and error.part:
        field = pointer(error.part)
    return Problem(status or kind.status, str(error), kind=kind.name, title=kind.title, field=field, headers=headers)


def to_error(document: Mapping[str, Any]) -> LbError:
    """The error that a problem document is about, for the client to raise."""
    kind = str(document.get("type", "")).removeprefix(URN)
    return CLASSES.get(kind, DaemonError)(str(document.get("detail", "no reason given")))


def pointer(steps: Iterable[str | int]) -> str:
    """RFC 6901, section 3."""
    return "".join("/" + str(step).replace("~", "~0").replace("/", "~1") for step in steps)


@dataclass
class Pointer:
    """Where in the body one is; errors of the balancer on the way get its pointer."""

    steps: tuple[str | int, ...] = field(default=())

    def __truediv__(self, step: str | int) -> Pointer:
        return Pointer((*self.steps, step))

    def __str__(self) -> str:
        return pointer(self.steps)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, LbError):
            raise of_error(error, field=str(self), status=422) from error
