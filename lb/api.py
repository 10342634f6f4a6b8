"""The REST API under /v1, over the balancer's owner.

Enters: requests that lb.guard has let through. Leaves: the documents of lb.documents, with entity tags, and every error
as a Problem. A change is answered when the kernel has it. The description of all of it is at /openapi.json.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from typing import Annotated, Any
from urllib.parse import unquote

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response
from fastapi.responses import PlainTextResponse, StreamingResponse

from lb import api_explain, api_filters, api_stages, page
from lb import api_models as models
from lb.api_common import (
    ALWAYS,
    CHANGES,
    JSON,
    READS,
    DryRun,
    IfMatch,
    IfNoneMatch,
    TheOwner,
    check_unchanged,
    content,
    problems,
)
from lb.api_errors import HANDLERS
from lb.api_models import backends_of, options_of, services_of
from lb.balancer import Balancer
from lb.beside import Beside
from lb.documents import (
    backend_document,
    counters_document,
    interface_document,
    status_document,
    total,
)
from lb.errors import AlreadyExists
from lb.guard import Caller
from lb.health_check import Kind
from lb.metrics import CONTENT_TYPE, exposition
from lb.model import Backend, Service, State
from lb.owner import Owner, Rendered, to_bytes
from lb.problems import Place, Problem, of_error
from lb.report import Report, Status
from lb.vip import Vip

DESCRIPTION = """\
Services, their backends and the interfaces of one network namespace. A VIP in a path is percent-encoded:
`/v1/services/10.0.0.100:80%2Ftcp`.
"""


class _Path:
    """A segment of the path, decoded. Like all that a request depends on, it is no work for another thread."""

    @staticmethod
    async def vip(vip: Annotated[str, "ADDR:PORT/PROTO, percent-encoded"]) -> Vip:
        return Vip.parse(unquote(vip))

    @staticmethod
    async def backend(vip: str, backend: Annotated[str, "ADDR:PORT"]) -> Backend:
        return Backend.parse(unquote(backend), Vip.parse(unquote(vip)).fixed_port)


VipInPath = Annotated[Vip, Depends(_Path.vip)]
BackendInPath = Annotated[Backend, Depends(_Path.backend)]

router = APIRouter(prefix="/v1")


async def _change(
    request: Request,
    work: Callable[[Balancer], Report],
    *,
    vip: Vip | None = None,
    if_match: str | None = None,
) -> Response:
    """Do `work` if the service, or (None) all of them, are what `if_match` says; the report of it."""
    owner: Owner = request.app.state.owner

    def checked(balancer: Balancer) -> Report:
        if if_match is not None:
            now = owner.snapshot.following(balancer.state)
            found = now.services.get(vip) if vip else now
            check_unchanged(if_match, found.etag if found else None, f"vip {vip}" if vip else "the configuration")
        return work(balancer)

    done = await owner.change(checked)
    request.scope["state"]["change"] = done.summary
    rendered = owner.snapshot.services.get(vip) if vip else owner.snapshot
    headers = {"ETag": rendered.etag} if rendered else {}
    return Response(done.body, media_type=JSON, headers=headers)


def _check_scripts(request: Request, before: State, wanted: Iterable[Service]) -> None:
    """A script of a health check is a program that the daemon runs: who comes over TCP may keep one, and set none.
    Raises Problem."""
    if request.scope["state"]["peer"].uid is not None:
        return
    known = {service.vip: service.options.health for service in before.services}
    for service in wanted:
        check = service.options.health
        if check and check.kind is Kind.SCRIPT and known.get(service.vip) != check:
            raise Problem(403, f"vip {service}: a script as health check can be set on the balancer itself alone")


# Services


@router.get("/services", response_model=list[models.ServiceAnswer], responses=READS)
async def list_services(owner: TheOwner, if_none_match: IfNoneMatch = None) -> Response:
    """All services, as they are desired."""
    now = owner.snapshot
    return content(lambda: now.body, now.etag, if_none_match)


@router.get("/services/{vip}", response_model=models.ServiceAnswer, responses=READS)
async def get_service(vip: VipInPath, owner: TheOwner, if_none_match: IfNoneMatch = None) -> Response:
    found = _rendered(owner, vip)
    return content(lambda: found.body, found.etag, if_none_match)


def _rendered(owner: Owner, vip: Vip) -> Rendered:
    owner.snapshot.state.service(vip)  # raises NotFound
    return owner.snapshot.services[vip]


@router.put("/services/{vip}", response_model=models.ReportAnswer, responses=CHANGES)
async def put_service(
    request: Request,
    vip: VipInPath,
    body: models.ServiceBody,
    own_address: Annotated[bool, Query(description="Put a VIP that nobody has on an interface")] = True,
    dry_run: DryRun = False,
    if_match: IfMatch = None,
    if_none_match: Annotated[str | None, Header(description="*: only if it is not there")] = None,
) -> Response:
    """Have the service served as the body says, whether it is there or not."""
    service = body.to_model(Place(), vip)

    def put(balancer: Balancer) -> Report:
        _check_scripts(request, balancer.state, [service])
        if if_none_match is None:
            return balancer.put_service(service, own_address=own_address, dry_run=dry_run)
        _check_absent(balancer, service, if_none_match)
        return balancer.add_service(service, own_address=own_address, dry_run=dry_run)

    return await _change(request, put, vip=vip, if_match=if_match)


def _check_absent(balancer: Balancer, service: Service, if_none_match: str) -> None:
    """Raises Problem."""
    if if_none_match.strip() != "*":
        raise Problem(400, "If-None-Match: only * has a meaning here")
    if any(other.vip == service.vip for other in balancer.state.services):
        raise of_error(AlreadyExists(f"vip {service}: already served"), status=412)


@router.patch("/services/{vip}", response_model=models.ReportAnswer, responses=CHANGES)
async def patch_service(
    request: Request, vip: VipInPath, body: models.ServicePatch, dry_run: DryRun = False, if_match: IfMatch = None
) -> Response:
    """Change some options; the others stay."""

    def patch(balancer: Balancer) -> Report:
        before = balancer.state.service(vip)
        options = options_of(body.options.given, before.options, Place() / "options")  # type: ignore[attr-defined]
        with Place() / "options":
            _check_scripts(request, balancer.state, [replace(before, options=options)])
        return balancer.set_options(vip, options, dry_run=dry_run)

    return await _change(request, patch, vip=vip, if_match=if_match)


@router.delete("/services/{vip}", response_model=models.ReportAnswer, responses=CHANGES)
async def delete_service(
    request: Request, vip: VipInPath, dry_run: DryRun = False, if_match: IfMatch = None
) -> Response:
    """Serve it no longer. Its connections end."""
    return await _change(
        request, lambda balancer: balancer.remove_service(vip, dry_run=dry_run), vip=vip, if_match=if_match
    )


# Backends


@router.get("/services/{vip}/backends", response_model=list[models.BackendAnswer], responses=ALWAYS)
async def list_backends(vip: VipInPath, owner: TheOwner) -> Response:
    service = _rendered(owner, vip).service
    return Response(to_bytes([backend_document(b) for b in service.backends]), media_type=JSON)


@router.post("/services/{vip}/backends", response_model=models.ReportAnswer, responses=CHANGES)
async def add_backends(
    request: Request, vip: VipInPath, body: models.BackendsBody, dry_run: DryRun = False, if_match: IfMatch = None
) -> Response:
    """Add backends. Connections stay where they are."""
    backends = backends_of(body.backends, vip, Place() / "backends")
    return await _change(
        request, lambda balancer: balancer.add_backends(vip, backends, dry_run=dry_run), vip=vip, if_match=if_match
    )


@router.patch("/services/{vip}/backends/{backend}", response_model=models.ReportAnswer, responses=CHANGES)
async def patch_backend(
    request: Request,
    vip: VipInPath,
    backend: BackendInPath,
    body: models.BackendPatch,
    dry_run: DryRun = False,
    if_match: IfMatch = None,
) -> Response:
    """Change weight, drain (or end the drain), or server IDs."""

    def patch(balancer: Balancer) -> Report:
        service = balancer.state.service(vip).changing_backend(backend, body.changed)
        return balancer.put_service(service, dry_run=dry_run)

    return await _change(request, patch, vip=vip, if_match=if_match)


@router.delete("/services/{vip}/backends/{backend}", response_model=models.ReportAnswer, responses=CHANGES)
async def delete_backend(
    request: Request, vip: VipInPath, backend: BackendInPath, dry_run: DryRun = False, if_match: IfMatch = None
) -> Response:
    """Remove it at once: its connections end. Drain it first where they are not to."""
    return await _change(
        request,
        lambda balancer: balancer.remove_backend(vip, backend, dry_run=dry_run),
        vip=vip,
        if_match=if_match,
    )


# All at once


@router.get("/config", response_model=models.ConfigAnswer, responses=READS)
async def get_config(owner: TheOwner, if_none_match: IfNoneMatch = None) -> Response:
    """What PUT takes."""
    now = owner.snapshot
    return content(lambda: b'{"services":%b}' % now.body, now.etag, if_none_match)


OwnAddresses = Annotated[bool, Query(description="Put VIPs that nobody has on an interface")]


@router.put("/config", response_model=models.ReportAnswer, responses=CHANGES)
async def put_config(
    request: Request,
    body: models.ConfigBody,
    own_address: OwnAddresses = True,
    dry_run: DryRun = False,
    if_match: IfMatch = None,
) -> Response:
    """Make the services of the body all that is served."""

    def apply(balancer: Balancer) -> Report:
        services = body.to_model()
        _check_scripts(request, balancer.state, services)
        return balancer.apply(services, own_addresses=own_address, dry_run=dry_run)

    return await _change(request, apply, if_match=if_match)


@router.post("/plan", response_model=models.ReportAnswer, responses=CHANGES)
async def plan(request: Request, body: models.ConfigBody, own_address: OwnAddresses = True) -> Response:
    """What PUT /v1/config would do with the same body."""
    return await _change(
        request, lambda balancer: balancer.apply(body.to_model(), own_addresses=own_address, dry_run=True)
    )


# Interfaces


@router.get("/interfaces", response_model=list[models.InterfaceAnswer], responses=ALWAYS)
async def list_interfaces(owner: TheOwner) -> Response:
    return await _described(owner, lambda status: [interface_document(i) for i in status.interfaces])


@router.post("/interfaces", response_model=models.ReportAnswer, responses=CHANGES)
async def attach(request: Request, body: models.AttachBody, dry_run: DryRun = False) -> Response:
    """Serve on these interfaces too; everything is written anew."""
    interfaces = [interface.to_model() for interface in body.interfaces]

    def attach(balancer: Balancer) -> Report:
        services = services_of(body.services, Place() / "services")
        _check_scripts(request, balancer.state, services)
        return balancer.attach(interfaces, services, own_addresses=body.own_address, dry_run=dry_run)

    return await _change(request, attach)


@router.delete("/interfaces", response_model=models.ReportAnswer, responses=CHANGES)
async def detach(
    request: Request,
    name: Annotated[list[str] | None, Query(description="May be repeated; none: all")] = None,
    dry_run: DryRun = False,
) -> Response:
    """Serve there no longer. Services stay stored."""
    return await _change(request, lambda balancer: balancer.detach(name or (), dry_run=dry_run))


# What is going on


@router.get("/status", response_model=models.StatusAnswer, responses=ALWAYS)
async def status(owner: TheOwner) -> Response:
    """Interfaces, services and counters, as the kernel has them."""
    return await _described(owner, status_document)


async def _described(owner: Owner, describe: Callable[[Status], object]) -> Response:
    """A document of the status, which may be large: it is made in the balancer's thread."""
    return Response(await owner.call(lambda balancer: to_bytes(describe(balancer.status()))), media_type=JSON)


@router.get("/stats", response_model=models.StatsAnswer, responses=ALWAYS)
async def stats(owner: TheOwner) -> Response:
    """The counters alone."""
    return await _described(owner, _stats_document)


def _stats_document(now: Status) -> dict[str, Any]:
    services = [
        {
            "vip": str(s.service),
            "slots_in_transition": s.slots_in_transition,
            **counters_document(total(s)),
            "backends": [{"backend": str(b.backend), **counters_document(b.counters)} for b in s.backends],
        }
        for s in now.services
    ]
    reasons = {"answered": now.answered, "drops": now.drops, "passes": now.passes, "noted": now.noted}
    return {"services": services} | {name: dict(counts) for name, counts in reasons.items()}


STREAM = {"text/event-stream": {"schema": {"type": "string"}}}
EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": STREAM, "description": "Until either side ends"}}


@router.get("/events", response_class=StreamingResponse, responses=ALWAYS | EVENTS)
async def events(
    owner: TheOwner,
    last_event_id: Annotated[str | None, Header(description="Go on behind this one")] = None,
) -> StreamingResponse:
    """Server-sent events: change, attach, detach, health, drift, upgrade, filter, stage; missed: some are gone."""
    return StreamingResponse(
        owner.events.follow(last_event_id), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
    )


@router.get("/whoami", response_model=models.CallerAnswer, responses=ALWAYS)
async def whoami(request: Request) -> Response:
    """Who asks, as the audit log has it, and what they may."""
    caller: Caller = request.scope["state"]["caller"]
    return Response(to_bytes({"who": caller.who, "role": caller.role}), media_type=JSON)


# The application


def create_app(owner: Owner, unready: Callable[[], str], beside: Beside | None = None) -> FastAPI:
    """`unready` says why the daemon is not ready, or nothing. `beside`: the kernel that filters, explanations and
    stages are of; None: there is none."""
    app = FastAPI(
        title="xdp-lb",
        version="1",
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers=HANDLERS,
    )
    app.state.owner, app.state.beside = owner, beside
    routers = [router, page.router, *((api_filters.router, api_explain.router, api_stages.router) if beside else ())]
    for each in routers:
        app.include_router(each)
    app.state.routes = [route for each in routers for route in each.routes]
    app.get("/metrics", response_class=PlainTextResponse, responses=ALWAYS)(_metrics)
    app.get("/healthz", response_model=models.Health)(_healthz)
    app.get("/readyz", response_model=models.Health, responses=problems(503))(_readyz(unready))
    _describe_problems(app)
    return app


async def _metrics(owner: TheOwner) -> Response:
    """For Prometheus: what the kernel counts, and what the daemon does."""
    kernel = await owner.call(lambda balancer: exposition(balancer.status()))
    return Response(kernel + owner.metrics.exposition(), media_type=CONTENT_TYPE)


async def _healthz() -> Response:
    """The daemon lives."""
    return Response(b'{"status":"ok"}', media_type=JSON)


def _readyz(unready: Callable[[], str]) -> Callable[[Owner], Awaitable[Response]]:
    async def readyz(owner: TheOwner) -> Response:
        """The kernel has what is stored. `problem`: why it is not by the installed program."""
        if reason := unready():
            raise Problem(503, reason, headers={"Retry-After": "1"})
        problem = {"problem": owner.refused} if owner.refused else {}
        return Response(to_bytes({"status": "ready"} | problem), media_type=JSON)

    return readyz


def _describe_problems(app: FastAPI) -> None:
    """Add the schema that all problems refer to, when somebody asks for the description."""
    describe = app.openapi

    def described() -> dict[str, Any]:
        document = describe()
        document["components"]["schemas"]["ProblemAnswer"] = models.ProblemAnswer.model_json_schema()
        return document

    app.openapi = described  # type: ignore[method-assign]
