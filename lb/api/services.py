"""Services, backends and interfaces in the REST API under /v1.

Enters: requests that lb.api.middleware has admitted. Leaves: the documents of lb.formats.documents with entity tags,
and errors as problems. A change is answered once the kernel has it. Described at /openapi.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Annotated
from urllib.parse import unquote

from fastapi import APIRouter, Depends, Header, Query, Request, Response

from lb.api.body import LargeBodyRoute, off_the_loop
from lb.api.common import (
    ALWAYS,
    CHANGES,
    JSON,
    READS,
    DryRun,
    IfMatch,
    IfNoneMatch,
    TheThread,
    check_unchanged,
    content,
    status_response,
)
from lb.api.middleware import Caller
from lb.api.models import balancer as models
from lb.api.models.balancer import backends_of, options_of, services_of
from lb.api.paging import ThePage
from lb.control.balancer import Balancer
from lb.errors import AlreadyExists
from lb.formats import json_bytes
from lb.formats.documents import backend_document, interface_document
from lb.formats.problems import Pointer, Problem, of_error
from lb.model.health_check import Kind
from lb.model.report import Report
from lb.model.state import Backend, Service, State
from lb.model.vip import Vip
from lb.runtime.balancer_thread import BalancerThread
from lb.runtime.snapshot import RenderedService


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

router = APIRouter(prefix="/v1", route_class=LargeBodyRoute)


async def _change(
    request: Request,
    work: Callable[[Balancer], Report],
    *,
    vip: Vip | None = None,
    if_match: str | None = None,
) -> Response:
    """Do `work` if the service, or (None) all services, match `if_match`; returns its report."""
    thread: BalancerThread = request.app.state.thread

    def checked(balancer: Balancer) -> Report:
        if if_match is not None:
            now = thread.snapshot.following(balancer.state)
            found = now.services.get(vip) if vip else now
            check_unchanged(if_match, found.etag if found else None, f"vip {vip}" if vip else "the configuration")
        return work(balancer)

    done = await thread.change(checked)
    request.scope["state"]["change"] = done.summary
    rendered = thread.snapshot.services.get(vip) if vip else thread.snapshot
    headers = {"ETag": rendered.etag} if rendered else {}
    return Response(done.body, media_type=JSON, headers=headers)


def _check_scripts(request: Request, before: State, wanted: Iterable[Service]) -> None:
    """A script of a health check is a program that the daemon runs as root: who is not root on this host, or comes
    through a browser, may keep one, and set none. Raises Problem."""
    caller: Caller = request.scope["state"]["caller"]
    if caller.uid == 0:
        return
    known = {service.vip: service.options.health for service in before.services}
    for service in wanted:
        check = service.options.health
        if check and check.kind is Kind.SCRIPT and known.get(service.vip) != check:
            raise Problem(403, f"vip {service}: script health checks can only be set by root on the balancer's host")


# Services


@router.get("/services", response_model=list[models.ServiceAnswer], responses=READS)
async def list_services(thread: TheThread, page: ThePage, if_none_match: IfNoneMatch = None) -> Response:
    """The services, as they are desired."""
    now = thread.snapshot
    every = list(now.services.values())
    answer = content(lambda: json_bytes.array(each.body for each in page.of(every)), now.etag, if_none_match)
    return page.link(answer, len(every))


@router.get("/services/{vip}", response_model=models.ServiceAnswer, responses=READS)
async def get_service(vip: VipInPath, thread: TheThread, if_none_match: IfNoneMatch = None) -> Response:
    found = _rendered(thread, vip)
    return content(lambda: found.body, found.etag, if_none_match)


def _rendered(thread: BalancerThread, vip: Vip) -> RenderedService:
    thread.snapshot.state.service(vip)  # raises NotFound
    return thread.snapshot.services[vip]


@router.put("/services/{vip}", response_model=models.ReportAnswer, responses=CHANGES)
async def put_service(
    request: Request,
    vip: VipInPath,
    body: models.ServiceBody,
    own_address: Annotated[bool, Query(description="Add a VIP that is no host's address to an interface")] = True,
    dry_run: DryRun = False,
    if_match: IfMatch = None,
    if_none_match: Annotated[str | None, Header(description="*: only create")] = None,
) -> Response:
    """Create or replace the service."""
    service = await off_the_loop(lambda: body.to_model(Pointer(), vip))

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
        raise Problem(400, "If-None-Match: only * is supported")
    if any(other.vip == service.vip for other in balancer.state.services):
        raise of_error(AlreadyExists(f"vip {service}: already exists"), status=412)


@router.patch("/services/{vip}", response_model=models.ReportAnswer, responses=CHANGES)
async def patch_service(
    request: Request, vip: VipInPath, body: models.ServicePatch, dry_run: DryRun = False, if_match: IfMatch = None
) -> Response:
    """Change some options; the others stay."""

    def patch(balancer: Balancer) -> Report:
        before = balancer.state.service(vip)
        options = options_of(body.options.given, before.options, Pointer() / "options")  # type: ignore[attr-defined]
        with Pointer() / "options":
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
async def list_backends(vip: VipInPath, thread: TheThread, page: ThePage) -> Response:
    every = _rendered(thread, vip).service.backends
    answer = Response(json_bytes.encode([backend_document(b) for b in page.of(every)]), media_type=JSON)
    return page.link(answer, len(every))


@router.post("/services/{vip}/backends", response_model=models.ReportAnswer, responses=CHANGES)
async def add_backends(
    request: Request, vip: VipInPath, body: models.BackendsBody, dry_run: DryRun = False, if_match: IfMatch = None
) -> Response:
    """Add backends. Connections stay where they are."""
    backends = await off_the_loop(lambda: backends_of(body.backends, vip, Pointer() / "backends"))
    return await _change(
        request, lambda balancer: balancer.add_backends(vip, backends, dry_run=dry_run), vip=vip, if_match=if_match
    )


@router.patch("/services/{vip}/backends", response_model=models.ReportAnswer, responses=CHANGES)
async def patch_backends(
    request: Request, vip: VipInPath, body: models.BackendsPatch, dry_run: DryRun = False, if_match: IfMatch = None
) -> Response:
    """Change several backends, as one change."""
    return await _change(
        request,
        lambda balancer: balancer.put_service(body.applied(balancer.state.service(vip)), dry_run=dry_run),
        vip=vip,
        if_match=if_match,
    )


@router.delete("/services/{vip}/backends", response_model=models.ReportAnswer, responses=CHANGES)
async def delete_backends(
    request: Request,
    vip: VipInPath,
    backend: Annotated[list[str], Query(description="ADDR:PORT; may be repeated", min_length=1)],
    dry_run: DryRun = False,
    if_match: IfMatch = None,
) -> Response:
    """Remove several backends at once, as one change: their connections end."""
    backends = [Backend.parse(name, vip.fixed_port) for name in backend]
    return await _change(
        request, lambda balancer: balancer.remove_backends(vip, backends, dry_run=dry_run), vip=vip, if_match=if_match
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
async def get_config(thread: TheThread, if_none_match: IfNoneMatch = None) -> Response:
    """What PUT takes."""
    now = thread.snapshot
    return content(lambda: json_bytes.object_of({"services": now.body}), now.etag, if_none_match)


OwnAddresses = Annotated[bool, Query(description="Add VIPs that are no host's address to an interface")]


@router.put("/config", response_model=models.ReportAnswer, responses=CHANGES)
async def put_config(
    request: Request,
    body: models.ConfigBody,
    own_address: OwnAddresses = True,
    prune: Annotated[bool, Query(description="Allow removing more than half of the services or backends")] = False,
    dry_run: DryRun = False,
    if_match: IfMatch = None,
) -> Response:
    """Make the services of the body all that is served."""
    services = await off_the_loop(body.to_model)

    def apply(balancer: Balancer) -> Report:
        _check_scripts(request, balancer.state, services)
        return balancer.apply(services, own_addresses=own_address, prune=prune, dry_run=dry_run)

    answer = await _change(request, apply, if_match=if_match)
    if prune and not dry_run:  # which is what a configuration file that was refused asks for
        request.app.state.thread.set_config_fault("")
    return answer


@router.post("/plan", response_model=models.ReportAnswer, responses=CHANGES)
async def plan(request: Request, body: models.ConfigBody, own_address: OwnAddresses = True) -> Response:
    """What PUT /v1/config would do with the same body."""
    services = await off_the_loop(body.to_model)
    return await _change(request, lambda balancer: balancer.apply(services, own_addresses=own_address, dry_run=True))


# Interfaces


@router.get("/interfaces", response_model=list[models.InterfaceAnswer], responses=ALWAYS)
async def list_interfaces(thread: TheThread) -> Response:
    return await status_response(thread, lambda status: [interface_document(i) for i in status.interfaces])


@router.post("/interfaces", response_model=models.ReportAnswer, responses=CHANGES)
async def attach(request: Request, body: models.AttachBody, dry_run: DryRun = False) -> Response:
    """Attach to these interfaces too; all maps are rewritten."""
    interfaces = [interface.to_model() for interface in body.interfaces]
    services = await off_the_loop(lambda: services_of(body.services, Pointer() / "services"))

    def attach(balancer: Balancer) -> Report:
        _check_scripts(request, balancer.state, services)
        return balancer.attach(interfaces, services, own_addresses=body.own_address, dry_run=dry_run)

    return await _change(request, attach)


@router.delete("/interfaces", response_model=models.ReportAnswer, responses=CHANGES)
async def detach(
    request: Request,
    name: Annotated[list[str] | None, Query(description="May be repeated; default: all")] = None,
    dry_run: DryRun = False,
) -> Response:
    """Serve there no longer. Services stay stored."""
    return await _change(request, lambda balancer: balancer.detach(name or (), dry_run=dry_run))
