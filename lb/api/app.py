"""The API as one ASGI application: routes, metrics, health endpoints, OpenAPI description."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter, FastAPI, Response
from fastapi.responses import PlainTextResponse

from lb.api import explain, filters, page, page_session, services, stages, status
from lb.api.common import ALWAYS, JSON, TheThread, problems
from lb.api.description import described
from lb.api.errors import HANDLERS
from lb.api.models import balancer as models
from lb.api.sessions import Sessions
from lb.formats import json_bytes
from lb.formats.problems import Problem
from lb.formats.prometheus import CONTENT_TYPE, exposition
from lb.runtime.balancer_thread import BalancerThread
from lb.runtime.features import FeatureThreads

DESCRIPTION = """\
Services, their backends and the interfaces of one network namespace. A VIP in a path is percent-encoded:
`/v1/services/10.0.0.100:80%2Ftcp`.
"""


def create_app(
    thread: BalancerThread,
    unready: Callable[[], str],
    features: FeatureThreads | None = None,
    sessions: Sessions | None = None,
) -> FastAPI:
    """`unready` says why the daemon is not ready, or nothing. `features`: the kernel that filters, explanations and
    stages are of; None: there is none. `sessions`: of the web page."""
    app = FastAPI(
        title="xdp-lb",
        version="1",
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers=HANDLERS,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.thread, app.state.features, app.state.sessions = thread, features, sessions or Sessions()
    routers = [
        services.router,
        status.router,
        page.router,
        page_session.router,
        *((filters.router, explain.router, stages.router) if features else ()),
    ]
    for each in routers:
        app.include_router(each)
    app.state.routes = [route for each in routers for route in each.routes]
    app.include_router(_daemon_routes(unready))
    describe = app.openapi
    app.openapi = lambda: described(describe())  # type: ignore[method-assign]
    return app


def _daemon_routes(unready: Callable[[], str]) -> APIRouter:
    router = APIRouter()
    router.get("/metrics", response_class=PlainTextResponse, responses=ALWAYS)(metrics)
    router.get("/healthz", response_model=models.Health)(healthz)
    router.get("/readyz", response_model=models.Health, responses=problems(503))(_readyz(unready))
    return router


async def metrics(thread: TheThread) -> Response:
    """For Prometheus: what the kernel counts, and what the daemon does."""
    kernel = await thread.call(lambda balancer: exposition(balancer.status()))
    return Response(kernel + thread.metrics.exposition(), media_type=CONTENT_TYPE)


async def healthz() -> Response:
    """The daemon lives."""
    return Response(b'{"status":"ok"}', media_type=JSON)


def _readyz(unready: Callable[[], str]) -> Callable[[BalancerThread], Awaitable[Response]]:
    async def readyz(thread: TheThread) -> Response:
        """The kernel has what is stored. `problem`: why it is not by the installed program."""
        if reason := unready():
            raise Problem(503, reason, headers={"Retry-After": "1"})
        problem = {"problem": thread.refused} if thread.refused else {}
        return Response(json_bytes.encode({"status": "ready"} | problem), media_type=JSON)

    return readyz
