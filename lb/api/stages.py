"""Users' stages in the REST API: list, tables, stop.

Stages are only started by `xdp-lb stage run`, in its own process and with its user's rights: C sent over the API would
be code in the kernel, and its compiler 128 MB in the daemon.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from lb.api.common import ALWAYS, CHANGES, JSON, TheFeatures
from lb.api.models.stages import StageAnswer, TableAnswer
from lb.formats import json_bytes
from lb.formats.documents import Document
from lb.stages.local import LocalStages

router = APIRouter(prefix="/v1")


@router.get("/stages", response_model=list[StageAnswer], responses=ALWAYS)
async def list_stages(features: TheFeatures) -> Response:
    """Those that run, and those that a killed process left at work."""
    return Response(
        await features.stages(lambda paths: json_bytes.encode(LocalStages(paths).listed())), media_type=JSON
    )


@router.get("/stages/{number}/tables", response_model=list[TableAnswer], responses=ALWAYS)
async def get_tables(number: int, features: TheFeatures) -> Response:
    """What a stage has found up to now."""
    return Response(
        await features.stages(lambda paths: json_bytes.encode(LocalStages(paths).tables(number))), media_type=JSON
    )


@router.delete("/stages", response_model=list[StageAnswer], responses=CHANGES)
async def stop_stages(
    request: Request,
    features: TheFeatures,
    number: Annotated[list[int] | None, Query(description="May be repeated; default: all")] = None,
) -> Response:
    """End stages: packets go on as if they had never been there. The answer has them as they were."""
    ended = await features.stages(lambda paths: LocalStages(paths).stop(number or ()))
    sentences = [_sentence(stage) for stage in ended]
    request.scope["state"]["change"] = "; ".join(sentences) or "no stages"
    for stage, summary in zip(ended, sentences, strict=True):
        event = {"number": stage["number"], "interface": stage["interface"], "change": "stopped", "summary": summary}
        request.app.state.thread.events.publish("stage", event)
    return Response(json_bytes.encode(ended), media_type=JSON)


def _sentence(stage: Document) -> str:
    return f"stage {stage['number']}: stopped, {stage['interface']}, at {stage['at']}"
