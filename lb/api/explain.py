"""Explain in the REST API.

Enters: a packet as a flow, in hex or in a capture file. Leaves: the documents of `xdp-lb explain --json`.
"""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import APIRouter, Response

from lb.api.common import ALWAYS, JSON, TheFeatures
from lb.api.models.explain import ExplainBody, ExplanationAnswer, pcap_bytes
from lb.errors import InvalidInput, part
from lb.explain.explainer import Explainer
from lb.explain.request import ExplainService, LocalExplainer, explain_capture
from lb.formats import json_bytes
from lb.formats.capture_file import capture_of
from lb.formats.documents import Document

MAX_PACKETS = 1000  # of one request

router = APIRouter(prefix="/v1")


@router.post("/explain", response_model=list[ExplanationAnswer], responses=ALWAYS)
async def explain(body: ExplainBody, features: TheFeatures) -> Response:
    """What becomes of a packet, and why, by the program that is loaded. It is sent nowhere."""
    body.check()

    def work(explainer: Explainer) -> bytes:
        return json_bytes.encode(list(_explained(body, LocalExplainer(explainer))))

    return Response(await features.explainer(work), media_type=JSON)


def _explained(body: ExplainBody, service: ExplainService) -> Iterator[Document]:
    if body.hex is not None:
        yield service.frame(body.frame(), body.interface, length=body.length)
    elif body.pcap is None:
        yield service.flow(*body.flow(), body.interface)
    else:
        yield from _captured(pcap_bytes(body.pcap), body, service)


def _captured(pcap: bytes, body: ExplainBody, service: ExplainService) -> Iterator[Document]:
    with part("pcap"), capture_of(pcap, "pcap") as capture:
        found = explain_capture(service, capture, body.number, body.interface)
        for count, document in enumerate(found):
            if count == MAX_PACKETS:
                raise InvalidInput(f"pcap: more than {MAX_PACKETS} packets: select one with number")
            yield document
