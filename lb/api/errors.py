"""Exceptions -> problem responses (RFC 9457); the audit log gets the detail.

Enters: an exception raised while a request was handled. Leaves: a response.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from lb.api.models.common import invalid
from lb.errors import InvalidInput, LbError
from lb.formats import json_bytes
from lb.formats.problems import MEDIA_TYPE, Problem, of_error


def _response(request: Request, problem: Problem) -> Response:
    request.scope["state"]["detail"] = problem.document["detail"]
    return Response(json_bytes.encode(problem.document), problem.status, problem.headers, MEDIA_TYPE)


async def on_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return _response(request, error)


async def on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LbError)
    return _response(request, of_error(error))


async def on_invalid(request: Request, error: Exception) -> Response:
    """What pydantic has found, the first of it."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where, *steps = first["loc"]
    if first["type"] == "json_invalid":
        return _response(request, Problem(400, f"not valid JSON: {first['ctx']['error']} at character {steps[0]}"))
    if where == "body":
        return _response(request, invalid(first["msg"], steps))
    named = ".".join(map(str, first["loc"]))
    return _response(request, of_error(InvalidInput(f"{named}: {first['msg']}")))


async def on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 404:
        detail = "no such path: see /openapi.json"
    elif error.status_code == 405:
        headers["Allow"] = ", ".join(_allowed(request))
        detail = f"method {request.method} not allowed: use {headers['Allow']}"
    else:
        detail = str(error.detail)
    return _response(request, Problem(error.status_code, detail, headers=headers))


def _allowed(request: Request) -> list[str]:
    """The methods of all routes at this path."""
    routes = (*request.app.state.routes, *request.app.routes)
    here = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return sorted(set().union(*(getattr(route, "methods", None) or () for route in here)))


async def on_bug(request: Request, error: Exception) -> Response:
    # starlette raises the error again behind this, for lb.api.middleware to log
    return _response(request, Problem(500, "internal error: see the daemon's log"))


HANDLERS: dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]] = {
    Problem: on_problem,
    LbError: on_error,
    RequestValidationError: on_invalid,
    HTTPException: on_http,
    Exception: on_bug,
}
