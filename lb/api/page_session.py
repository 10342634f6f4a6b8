"""How the web page logs in without a token: a local user gets a code, which the page exchanges once for a session."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request, Response

from lb.api.common import ALWAYS, JSON
from lb.api.middleware import SESSIONS, Caller
from lb.api.models.session import CodeAnswer, CodeBody, SessionAnswer
from lb.api.sessions import OFFERED_S, OPEN_S, Sessions
from lb.formats import json_bytes
from lb.formats.problems import Problem

router = APIRouter()
NO_STORE = {"Cache-Control": "no-store"}


@router.post("/v1/session-codes", response_model=CodeAnswer, responses=ALWAYS)
async def create_code(request: Request) -> Response:
    """A code that opens one session of the web page, for programs on the host alone."""
    caller: Caller = request.scope["state"]["caller"]
    if not caller.local:
        raise Problem(403, "session codes are only given on the balancer's host: run xdp-lb web there")
    code = _sessions(request).offer(caller.who, time.monotonic())
    request.scope["state"]["change"] = "code for the web page"
    return _answer({"code": code, "expires_in_s": int(OFFERED_S)})


@router.post(SESSIONS, response_model=SessionAnswer, responses=ALWAYS)
async def open_session(request: Request, body: CodeBody) -> Response:
    """A session for a code, which is used up by it. The token is sent as any other."""
    token = _sessions(request).open(body.code, time.monotonic())
    if token is None:
        raise Problem(401, "code expired or used: run xdp-lb web again", headers={"WWW-Authenticate": "Bearer"})
    request.scope["state"]["change"] = "session of the web page"
    return _answer({"token": token, "expires_in_s": int(OPEN_S)})


def _sessions(request: Request) -> Sessions:
    sessions: Sessions = request.app.state.sessions
    return sessions


def _answer(document: dict[str, object]) -> Response:
    return Response(json_bytes.encode(document), media_type=JSON, headers=NO_STORE)
