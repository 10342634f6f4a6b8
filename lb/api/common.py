"""Parameters, responses and entity tags shared by all routes.

Enters: requests. Leaves: the parts of the daemon that serve them, and bodies with entity tags.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

from fastapi import Depends, Header, Query, Request, Response

from lb.control.balancer import Balancer
from lb.errors import Conflict
from lb.formats import json_bytes
from lb.formats.problems import MEDIA_TYPE
from lb.model.report import Status
from lb.runtime.balancer_thread import BalancerThread
from lb.runtime.features import FeatureThreads

JSON = "application/json"

DryRun = Annotated[bool, Query(description="Report what would change without changing anything")]
IfMatch = Annotated[str | None, Header(description="Entity tags; 412 if none matches")]
IfNoneMatch = Annotated[str | None, Header(description="Entity tags; 304 if one matches")]


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemAnswer"}}}
    return {status: {"description": "A problem", "content": content} for status in statuses}


ALWAYS = problems(400, 401, 403, 404, 408, 413, 415, 421, 422, 429, 500, 503)
CHANGES = ALWAYS | problems(409, 412)
READS: dict[int | str, dict[str, Any]] = ALWAYS | {304: {"description": "Not modified"}}


async def _thread(request: Request) -> BalancerThread:
    thread: BalancerThread = request.app.state.thread
    return thread


async def _features(request: Request) -> FeatureThreads:
    features: FeatureThreads = request.app.state.features
    return features


TheThread = Annotated[BalancerThread, Depends(_thread)]
TheFeatures = Annotated[FeatureThreads, Depends(_features)]


def is_here(request: Request) -> bool:
    """Whether it comes from the balancer itself, by the Unix socket."""
    return request.scope["state"]["peer"].uid is not None


# Entity tags (RFC 9110, section 13)


def _tags(header: str) -> list[str]:
    return [tag.strip() for tag in header.split(",")]


def check_unchanged(if_match: str | None, etag: str | None, what: str) -> None:
    """Raises Conflict. `etag` None: it is not there."""
    if if_match is None or (etag and (if_match.strip() == "*" or etag in _tags(if_match))):
        return
    raise Conflict(f"{what}: modified since it was read: fetch it again and retry")


def _is_known(if_none_match: str | None, etag: str) -> bool:
    """The client has it already; weak comparison."""
    known = [tag.removeprefix("W/") for tag in _tags(if_none_match or "")]
    return etag in known or known == ["*"]


def content(body: Callable[[], bytes], etag: str, if_none_match: str | None) -> Response:
    if _is_known(if_none_match, etag):
        return Response(status_code=304, headers={"ETag": etag})
    return Response(body(), media_type=JSON, headers={"ETag": etag})


async def status_response(thread: BalancerThread, describe: Callable[[Status], object]) -> Response:
    """A document of the status, which may be large: it is made in the balancer's thread."""

    def described(balancer: Balancer) -> bytes:
        status = replace(balancer.status(), config_fault=thread.config_fault)
        return json_bytes.encode(describe(status))

    return Response(await thread.call(described), media_type=JSON)
