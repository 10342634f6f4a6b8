"""Read-only routes: status, statistics, the event stream, and the caller's identity."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Request, Response
from fastapi.responses import StreamingResponse

from lb.api.common import ALWAYS, JSON, TheThread, status_response
from lb.api.middleware import Caller
from lb.api.models import balancer as models
from lb.formats import json_bytes
from lb.formats.documents import counters_document, open_document, status_document
from lb.model.report import Status

router = APIRouter(prefix="/v1")


@router.get("/status", response_model=models.StatusAnswer, responses=ALWAYS)
async def status(thread: TheThread) -> Response:
    """Interfaces, services and counters, as the kernel has them."""
    return await status_response(thread, status_document)


@router.get("/stats", response_model=models.StatsAnswer, responses=ALWAYS)
async def stats(thread: TheThread) -> Response:
    """The counters alone."""
    return await status_response(thread, _stats_document)


def _stats_document(now: Status) -> dict[str, Any]:
    services = [
        {
            "vip": str(s.service),
            "slots_in_transition": s.slots_in_transition,
            "open": open_document(s.open),
            **counters_document(s.total),
            "backends": [
                {"backend": str(b.backend), "open": open_document(b.open), **counters_document(b.counters)}
                for b in s.backends
            ],
        }
        for s in now.services
    ]
    reasons = {"answered": now.answered, "drops": now.drops, "passes": now.passes, "noted": now.noted}
    return {"services": services} | {name: dict(counts) for name, counts in reasons.items()}


STREAM = {"text/event-stream": {"schema": {"type": "string"}}}
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": STREAM, "description": "Stream of events, until either side closes it"}
}


@router.get("/events", response_class=StreamingResponse, responses=ALWAYS | EVENTS)
async def events(
    thread: TheThread,
    last_event_id: Annotated[str | None, Header(description="ID of the last event received: continue after it")] = None,
) -> StreamingResponse:
    """Server-sent events: change, attach, detach, health, drift, upgrade, filter, stage; missed: some are gone."""
    return StreamingResponse(
        thread.events.follow(last_event_id), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
    )


@router.get("/whoami", response_model=models.CallerAnswer, responses=ALWAYS)
async def whoami(request: Request) -> Response:
    """Who asks, as the audit log has it, and what they may."""
    caller: Caller = request.scope["state"]["caller"]
    return Response(json_bytes.encode({"who": caller.who, "role": caller.role}), media_type=JSON)
