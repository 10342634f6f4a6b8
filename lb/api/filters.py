"""Filter rules in the REST API: /v1/filters, /v1/filter-restore and /v1/filter-test.

Enters: requests that lb.api.middleware has admitted. Leaves: the documents of lb.firewall.documents. A change is
answered once the kernel has it, published as an event, and refused where it would drop the connection of the request:
over TCP its own; on the Unix socket the SSH connection that the client names.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Annotated
from urllib.parse import unquote

from fastapi import APIRouter, Depends, Header, Query, Request, Response

from filters.files.savefile import Packet
from lb.api.access import Role
from lb.api.common import (
    ALWAYS,
    CHANGES,
    JSON,
    READS,
    DryRun,
    IfMatch,
    IfNoneMatch,
    TheFeatures,
    check_unchanged,
    content,
    is_here,
)
from lb.api.models import filters as models
from lb.api.models.explain import pcap_bytes
from lb.errors import InvalidInput
from lb.firewall.documents import report_document, status_document, trial_document, wanted_document
from lb.firewall.firewall import Firewall
from lb.firewall.text import report_lines
from lb.formats import json_bytes
from lb.formats.capture_file import capture_of
from lb.formats.problems import Problem
from lb.host.ssh import SSH_HEADER, Connection, SshConnection
from lb.model.rule_report import ApplyOptions, FilterReport, FilterTestResult
from lb.runtime.balancer_thread import BalancerThread
from lb.runtime.events import KEPT
from lb.runtime.snapshot import etag_of

SENTENCES = 4  # of a summary

router = APIRouter(prefix="/v1")


async def _interface(interface: Annotated[str, "A name"]) -> str:
    return unquote(interface)


async def _options(
    dry_run: DryRun = False,
    force: Annotated[bool, Query(description="Apply even if the rules drop the connection of this request")] = False,
    selftest: Annotated[bool, Query(description="Compare new filters with the kernel's classic BPF first")] = True,
) -> ApplyOptions:
    return ApplyOptions(force=force, selftest=selftest, dry_run=dry_run)


async def _own_connection(
    request: Request,
    ssh: Annotated[
        str | None,
        Header(
            alias=SSH_HEADER, description="Unix socket only: the caller's $SSH_CONNECTION, which rules must not drop"
        ),
    ] = None,
) -> Connection | None:
    """Raises InvalidInput."""
    if not is_here(request):
        own: Connection | None = request.scope["state"]["peer"].connection
        return own
    found = SshConnection.parse(ssh) if ssh else None
    if ssh and found is None:
        raise InvalidInput(f"{SSH_HEADER}: not CLIENT PORT SERVER PORT: send the value of $SSH_CONNECTION")
    return found


InterfaceInPath = Annotated[str, Depends(_interface)]
TheOptions = Annotated[ApplyOptions, Depends(_options)]
OwnConnection = Annotated[Connection | None, Depends(_own_connection)]


def _rendered(firewall: Firewall, interface: str) -> bytes:
    return json_bytes.encode(wanted_document(firewall.wanted(interface)))


async def _change(
    request: Request,
    own_connection: Connection | None,
    work: Callable[[Firewall], FilterReport],
    interface: str | None = None,
    if_match: str | None = None,
) -> Response:
    """Do `work` if the rules of the interface match `if_match`."""

    def checked(firewall: Firewall) -> tuple[FilterReport, str | None]:
        if if_match is not None and interface is not None:
            now = etag_of(_rendered(firewall, interface))
            check_unchanged(if_match, now, f"filter rules of {interface}")
        report = work(firewall)
        return report, etag_of(_rendered(firewall, interface)) if interface is not None else None

    report, etag = await request.app.state.features.change_filters(checked, own_connection)
    request.scope["state"]["change"] = _summary(report)
    _tell(request.app.state.thread, report)
    return Response(json_bytes.encode(report_document(report)), media_type=JSON, headers={"ETag": etag} if etag else {})


def _summary(report: FilterReport) -> str:
    lines = report_lines(report)
    more = [f"{len(lines) - SENTENCES} more"] if len(lines) > SENTENCES else []
    return "; ".join([*lines[:SENTENCES], *more])


def _tell(thread: BalancerThread, report: FilterReport) -> None:
    if report.dry_run or not report.changes:
        return
    for change, summary in islice(zip(report.changes, report_lines(report), strict=True), KEPT):
        head = {"interface": change.rule.interface, "number": change.number, "change": change.what}
        thread.events.publish("filter", head | {"summary": summary})


# Rules


@router.get("/filters", response_model=list[models.RuleStatusAnswer], responses=ALWAYS)
async def list_rules(
    features: TheFeatures, interface: Annotated[str | None, Query(description="Only this interface")] = None
) -> Response:
    """All rules with their counters."""
    body = await features.filters(lambda firewall: json_bytes.encode(status_document(firewall.status(interface))))
    return Response(body, media_type=JSON)


@router.delete("/filters", response_model=models.FilterReportAnswer, responses=CHANGES)
async def flush_all(request: Request, options: TheOptions, own_connection: OwnConnection) -> Response:
    """Delete all rules."""
    return await _change(request, own_connection, lambda firewall: firewall.flush(None, options))


@router.get("/filters/{interface}", response_model=models.RulesAnswer, responses=READS)
async def get_rules(interface: InterfaceInPath, features: TheFeatures, if_none_match: IfNoneMatch = None) -> Response:
    """The rules of an interface, as PUT takes them; sets without their prefixes."""
    body = await features.filters(lambda firewall: _rendered(firewall, interface))
    return content(lambda: body, etag_of(body), if_none_match)


@router.put("/filters/{interface}", response_model=models.FilterReportAnswer, responses=CHANGES)
async def put_rules(
    request: Request,
    interface: InterfaceInPath,
    body: models.RulesBody,
    options: TheOptions,
    own_connection: OwnConnection,
    if_match: IfMatch = None,
) -> Response:
    """Make these all the rules of the interface. Those that are there as they are wanted stay, with their counters; of
    a set that stays, the list may be left out."""
    specs = body.to_specs(interface, is_here=is_here(request))
    return await _change(
        request, own_connection, lambda firewall: firewall.replace(interface, specs, options), interface, if_match
    )


@router.post("/filters/{interface}", response_model=models.FilterReportAnswer, responses=CHANGES)
async def add_rule(
    request: Request,
    interface: InterfaceInPath,
    body: models.NewRuleBody,
    options: TheOptions,
    own_connection: OwnConnection,
    if_match: IfMatch = None,
) -> Response:
    """Add a rule."""
    spec = body.to_new_spec(interface, is_here=is_here(request))
    return await _change(
        request, own_connection, lambda firewall: firewall.add(spec, body.position, options), interface, if_match
    )


@router.delete("/filters/{interface}", response_model=models.FilterReportAnswer, responses=CHANGES)
async def flush(
    request: Request,
    interface: InterfaceInPath,
    options: TheOptions,
    own_connection: OwnConnection,
    if_match: IfMatch = None,
) -> Response:
    """Delete all rules of the interface."""
    return await _change(
        request, own_connection, lambda firewall: firewall.flush(interface, options), interface, if_match
    )


@router.patch("/filters/{interface}/{number}", response_model=models.FilterReportAnswer, responses=CHANGES)
async def move_rule(
    request: Request,
    interface: InterfaceInPath,
    number: int,
    body: models.MoveBody,
    options: TheOptions,
    own_connection: OwnConnection,
    if_match: IfMatch = None,
) -> Response:
    """Give a rule another number. Its counters stay."""
    return await _change(
        request,
        own_connection,
        lambda firewall: firewall.move(interface, number, body.number, options),
        interface,
        if_match,
    )


@router.delete("/filters/{interface}/{number}", response_model=models.FilterReportAnswer, responses=CHANGES)
async def delete_rule(
    request: Request,
    interface: InterfaceInPath,
    number: int,
    options: TheOptions,
    own_connection: OwnConnection,
    if_match: IfMatch = None,
) -> Response:
    return await _change(
        request, own_connection, lambda firewall: firewall.delete(interface, number, options), interface, if_match
    )


LIST = {"text/plain": {"schema": {"type": "string", "example": "192.0.2.0/24\n2001:db8::/32\n"}}}


@router.put(
    "/filters/{interface}/{number}/set",
    response_model=models.FilterReportAnswer,
    responses=CHANGES,
    openapi_extra={"requestBody": {"content": LIST, "required": True}},
)
async def put_set(
    request: Request,
    interface: InterfaceInPath,
    number: int,
    options: TheOptions,
    own_connection: OwnConnection,
    if_match: IfMatch = None,
) -> Response:
    """Replace the set of a rule by this list, one prefix per line. Only prefixes that differ are changed, in place."""
    text = (await request.body()).decode(errors="replace")
    return await _change(
        request,
        own_connection,
        lambda firewall: firewall.reload(interface, number, options, set_list=text),
        interface,
        if_match,
    )


# What is no rule


@router.post("/filter-restore", response_model=models.FilterReportAnswer, responses=CHANGES)
async def restore(request: Request, options: TheOptions, own_connection: OwnConnection) -> Response:
    """Put all stored rules in force, as after a boot."""
    return await _change(request, own_connection, lambda firewall: firewall.restore(options))


@router.post("/filter-test", response_model=models.TrialAnswer, responses=ALWAYS)
async def test(request: Request, body: models.TrialBody, features: TheFeatures) -> Response:
    """Test which packets of a capture file rules would drop. Active rules and their counters are not touched. New
    rules require a token with role write, since compiling them is expensive."""
    specs, pcap = body.to_specs(is_here=is_here(request)), pcap_bytes(body.pcap)
    if specs and request.scope["state"]["caller"].role is not Role.WRITE:
        raise Problem(403, "the token is read-only: testing new rules requires role write")

    def try_them(firewall: Firewall) -> bytes:
        dropped: list[int] = []

        def keep(position: int, _: Packet) -> None:
            dropped.append(position)

        with capture_of(pcap, "pcap") as capture:
            packets = capture.packets()
            trial: FilterTestResult = (
                firewall.test_packets_with(specs, packets, keep)
                if body.interface is None
                else firewall.test_packets(body.interface, packets, body.at, keep)
            )
        return json_bytes.encode(trial_document(trial) | {"dropped_packets": dropped})

    return Response(await features.filters(try_them), media_type=JSON)
