"""Reports, services and status <-> JSON documents.

Enters: frozen values of lb.model.report and lb.model.state. Leaves: dicts and lists for `json`. Keys are stable, in
snake_case, and named in each docstring. What `read_...` returns prints like the original value; it raises KeyError,
TypeError, ValueError or LbError for an invalid document.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from lb.hashing.ring import Plan
from lb.model.conditions import UP, Condition
from lb.model.forwarding import Attachment, Counters, OpenConnections
from lb.model.options import from_values, values
from lb.model.report import BackendStatus, Change, InterfaceStatus, Report, ServiceStatus, Status
from lb.model.state import Backend, Interface, Mode, Service, XdpMode
from lb.model.vip import Vip, parse_address

Document = dict[str, Any]


def to_json(document: object) -> str:
    return json.dumps(document, indent=2)


def backend_document(backend: Backend) -> Document:
    """`backend` (ADDR:PORT), `address`, `port` (0: the client's), `weight`, `draining`, `server_ids` (CONFIG:HEX)."""
    return {
        "backend": str(backend),
        "address": str(backend.address),
        "port": backend.port,
        "weight": backend.weight,
        "draining": backend.draining,
        "server_ids": list(backend.server_ids),
    }


def service_document(service: Service) -> Document:
    """`vip`, `address`, `prefix_length`, `port` (0: any), `last_port`, `protocol`, `set` (empty: none), `mode`,
    `ring_size`, `flow_timeout_s`, `options` (the fields of lb.model.options.Options), `backends`."""
    return {
        **_service_head(service),
        "backends": [backend_document(b) for b in service.backends],
    }


def _service_head(service: Service) -> Document:
    return {
        "vip": str(service.vip),
        "address": str(service.vip.address),
        "prefix_length": service.vip.prefix_length,
        "port": service.vip.port,
        "last_port": service.vip.last_port,
        "protocol": service.vip.protocol.label,
        "set": service.vip.set,
        "mode": str(service.mode),
        "ring_size": service.ring_size,
        "flow_timeout_s": service.flow_timeout_s,
        "options": values(service.options),
    }


def services_document(services: Iterable[Service]) -> list[Document]:
    """An array of services, see `service_document`."""
    return [service_document(s) for s in services]


def backends_document(status: Status) -> list[Document]:
    """An array of backends, as in `status_document` but for the counters, each with the `vip` it serves."""
    return [{"vip": str(s.service), **_backend_state_document(b)} for s in status.services for b in s.backends]


def report_document(report: Report) -> Document:
    """`dry_run`; `changes`: `{vip, change, before, after, plan, ending}`; `ending`; `attached`: `{name, xdp_mode,
    program_id}`; `detached`: interface names; `notes` and `warnings`: sentences.

    `change` is add, change or remove; `before` and `after` are services (`service_document`) or
    null; `plan` is `{slots, moved, minimum, in_transition}`, or null while nothing is attached; `ending`, an
    `open_document`, is of the connections that end, null if no backend goes out of service.
    """
    return {
        "dry_run": report.dry_run,
        "changes": [_change_document(c) for c in report.changes],
        "ending": _ending_document(report.ending),
        "attached": [_attachment_document(a) for a in report.attached],
        "detached": list(report.detached),
        "notes": list(report.notes),
        "warnings": report.all_warnings,
    }


def _change_document(change: Change) -> Document:
    head = change_head(change)
    plan, ending = head.pop("plan"), head.pop("ending")
    return {
        **head,
        "before": service_document(change.before) if change.before else None,
        "after": service_document(change.after) if change.after else None,
        "plan": plan,
        "ending": ending,
    }


def change_head(change: Change) -> Document:
    """All of it but the services."""
    plan = plan_document(change.plan) if change.plan else None
    ending = _ending_document(change.ending)
    return {"vip": str(change.vip), "change": str(change.kind), "plan": plan, "ending": ending}


def _ending_document(ending: OpenConnections | None) -> Document | None:
    return None if ending is None else open_document(ending)


def open_document(connections: OpenConnections) -> Document:
    """`connections` (null: unknown), `estimated`."""
    return {"connections": connections.number, "estimated": connections.estimated}


def plan_document(plan: Plan) -> Document:
    return {
        "slots": plan.slots,
        "moved": plan.moved,
        "minimum": plan.minimum,
        "in_transition": plan.in_transition,
    }


def _attachment_document(attachment: Attachment) -> Document:
    return {
        "name": attachment.interface,
        "xdp_mode": attachment.mode,
        "program_id": attachment.program_id,
    }


def status_document(status: Status) -> Document:
    """`netns`, `loaded`; `interfaces`: `{name, xdp_mode, attached, program_id}`; `services`: the
    keys of `service_document`, `slots_in_transition`, `open` and the sums of the counters; in their
    `backends` the keys of `backend_document`, `resolved`, `state`, `share`, `why`, `since`, `open` and the counters;
    `answered`, `drops`, `passes` and `noted`: reason -> packets; `maps`: map -> bytes of kernel memory; `outdated`: the
    version that the program in force is of, null if it is the installed one; `config_fault`: why the daemon's
    configuration file is not in force, null if it is, or there is none.

    `state` is active, draining or down; `share` the percent of its weight that a backend gets while it starts slowly,
    else 100; `why` the reason it is or was down, `since` the Unix time of its last change, null if unchecked.
    `open`, an `open_document`, is of the connections open now.

    Counters: `packets` and `bytes` from clients, `reply_packets` and `reply_bytes` to them (mode
    nat), `connections`, `repeated_syns`. An interface that is not attached has the `xdp_mode` asked for and
    `program_id` null.
    """
    return {
        "netns": status.netns,
        "loaded": status.loaded,
        "interfaces": [interface_document(i) for i in status.interfaces],
        "services": [_service_status_document(s) for s in status.services],
        "answered": dict(status.answered),
        "drops": dict(status.drops),
        "passes": dict(status.passes),
        "noted": dict(status.noted),
        "maps": dict(status.maps),
        "outdated": status.outdated or None,
        "config_fault": status.config_fault or None,
    }


def interface_document(status: InterfaceStatus) -> Document:
    attached = status.attached
    return {
        "name": status.interface.name,
        "xdp_mode": attached.mode if attached else str(status.interface.xdp_mode),
        "attached": attached is not None,
        "program_id": attached.program_id if attached else None,
    }


def _service_status_document(status: ServiceStatus) -> Document:
    return {
        **_service_head(status.service),
        "slots_in_transition": status.slots_in_transition,
        "open": open_document(status.open),
        **counters_document(status.total),
        "backends": [_backend_status_document(b) for b in status.backends],
    }


def _backend_status_document(status: BackendStatus) -> Document:
    opened = {"open": open_document(status.open)}
    return _backend_state_document(status) | opened | counters_document(status.counters)


def _backend_state_document(status: BackendStatus) -> Document:
    return {
        **backend_document(status.backend),
        "resolved": status.resolved,
        **_condition_document(status),
    }


def _condition_document(status: BackendStatus) -> Document:
    condition = status.condition or UP
    return {
        "state": status.state,
        "share": condition.share,
        "why": condition.why,
        "since": condition.since if status.condition else None,
    }


def counters_document(counters: Counters) -> Document:
    return {
        "packets": counters.packets,
        "bytes": counters.bytes,
        "reply_packets": counters.reply_packets,
        "reply_bytes": counters.reply_bytes,
        "connections": counters.connections,
        "repeated_syns": counters.repeated_syns,
    }


# The way back


def read_backend(document: Document) -> Backend:
    """From a `backend_document`."""
    return Backend(
        parse_address(document["address"]),
        document["port"],
        document["weight"],
        document["draining"],
        tuple(document["server_ids"]),
    )


def read_service(document: Document) -> Service:
    """From a `service_document`."""
    return Service(
        Vip.parse(document["vip"]),
        Mode(document["mode"]),
        tuple(map(read_backend, document["backends"])),
        document["ring_size"],
        document["flow_timeout_s"],
        from_values(document["options"]),
    )


def read_report(document: Document) -> Report:
    """From a `report_document`; the warnings of interfaces have become the report's own."""
    return Report(
        changes=tuple(map(_read_change, document["changes"])),
        attached=tuple(map(_read_attachment, document["attached"])),
        detached=tuple(document["detached"]),
        notes=tuple(document["notes"]),
        warnings=tuple(document["warnings"]),
        dry_run=document["dry_run"],
        ending=_read_ending(document["ending"]),
    )


def _read_change(document: Document) -> Change:
    before, after, plan = document["before"], document["after"], document["plan"]
    return Change(
        Vip.parse(document["vip"]),
        read_service(before) if before else None,
        read_service(after) if after else None,
        Plan(**plan) if plan else None,
        _read_ending(document["ending"]),
    )


def _read_ending(document: Document | None) -> OpenConnections | None:
    return None if document is None else _read_open(document)


def _read_open(document: Document) -> OpenConnections:
    return OpenConnections(document["connections"], document["estimated"])


def _read_attachment(document: Document) -> Attachment:
    return Attachment(document["name"], document["xdp_mode"], document["program_id"])


def read_status(document: Document) -> Status:
    """From a `status_document`; the configured mode of an attached interface is unknown."""
    return Status(
        document["netns"],
        document["loaded"],
        tuple(map(_read_interface_status, document["interfaces"])),
        tuple(map(_read_service_status, document["services"])),
        drops=document["drops"],
        passes=document["passes"],
        answered=document["answered"],
        noted=document["noted"],
        maps=document["maps"],
        outdated=document["outdated"] or "",
        config_fault=document["config_fault"] or "",
    )


def _read_interface_status(document: Document) -> InterfaceStatus:
    if document["attached"]:
        return InterfaceStatus(Interface(document["name"]), _read_attachment(document))
    return InterfaceStatus(Interface(document["name"], XdpMode(document["xdp_mode"])), None)


def _read_service_status(document: Document) -> ServiceStatus:
    return ServiceStatus(
        read_service(document),
        document["slots_in_transition"],
        tuple(map(_read_backend_status, document["backends"])),
    )


def _read_backend_status(document: Document) -> BackendStatus:
    counters = Counters(**{counter.name: document[counter.name] for counter in fields(Counters)})
    condition, open_now = _read_condition(document), _read_open(document["open"])
    return BackendStatus(read_backend(document), document["resolved"], counters, condition, open_now)


def _read_condition(document: Document) -> Condition | None:
    if document["since"] is None:
        return None
    return Condition(document["state"] == "down", document["share"], document["why"], document["since"])
