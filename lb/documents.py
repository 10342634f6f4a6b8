"""Reports, services and status -> JSON documents for programs.

In come the frozen values of lb.report and lb.model; out go dicts and lists that `json` can write.
The keys are stable, in snake_case, and each docstring names those of its document.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import astuple
from typing import Any

from lb.model import Backend, Service
from lb.options import values
from lb.report import (
    Attachment,
    BackendStatus,
    Change,
    Counters,
    InterfaceStatus,
    Report,
    ServiceStatus,
    Status,
)
from lb.ring import Plan

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
    `ring_size`, `flow_timeout_s`, `options` (the fields of lb.options.Options), `backends`."""
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


def backends_document(services: Iterable[Service]) -> list[Document]:
    """An array of backends, see `backend_document`, each with the `vip` it serves."""
    return [{"vip": str(s.vip), **backend_document(b)} for s in services for b in s.backends]


def report_document(report: Report) -> Document:
    """`dry_run`; `changes`: `{vip, change, before, after, plan}`; `attached`: `{name, xdp_mode,
    program_id}`; `detached`: interface names; `notes` and `warnings`: sentences.

    `change` is add, change or remove; `before` and `after` are services (`service_document`) or
    null; `plan` is `{slots, moved, minimum, in_transition, flows}`, or null while nothing is attached; `flows`,
    the open connections on the slots that move, is counted in a dry run in mode nat, else null.
    """
    return {
        "dry_run": report.dry_run,
        "changes": [_change_document(c) for c in report.changes],
        "attached": [_attachment_document(a) for a in report.attached],
        "detached": list(report.detached),
        "notes": list(report.notes),
        "warnings": warnings(report),
    }


def _change_document(change: Change) -> Document:
    return {
        "vip": str(change.vip),
        "change": str(change.kind),
        "before": service_document(change.before) if change.before else None,
        "after": service_document(change.after) if change.after else None,
        "plan": _plan_document(change.plan) if change.plan else None,
    }


def _plan_document(plan: Plan) -> Document:
    return {
        "slots": plan.slots,
        "moved": plan.moved,
        "minimum": plan.minimum,
        "in_transition": plan.in_transition,
        "flows": plan.flows,
    }


def _attachment_document(attachment: Attachment) -> Document:
    return {
        "name": attachment.interface,
        "xdp_mode": attachment.mode,
        "program_id": attachment.program_id,
    }


def status_document(status: Status) -> Document:
    """`netns`, `loaded`; `interfaces`: `{name, xdp_mode, attached, program_id}`; `services`: the
    keys of `service_document`, `slots_in_transition` and the sums of the counters; in their
    `backends` the keys of `backend_document`, `resolved` and the counters; `answered`, `drops`,
    `passes` and `noted`: reason -> packets.

    Counters: `packets` and `bytes` from clients, `reply_packets` and `reply_bytes` to them (mode
    nat), `connections`. An interface that is not attached has the `xdp_mode` asked for and
    `program_id` null.
    """
    return {
        "netns": status.netns,
        "loaded": status.loaded,
        "interfaces": [_interface_document(i) for i in status.interfaces],
        "services": [_service_status_document(s) for s in status.services],
        "answered": dict(status.answered),
        "drops": dict(status.drops),
        "passes": dict(status.passes),
        "noted": dict(status.noted),
    }


def _interface_document(status: InterfaceStatus) -> Document:
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
        **_counters_document(total(status)),
        "backends": [_backend_status_document(b) for b in status.backends],
    }


def _backend_status_document(status: BackendStatus) -> Document:
    return {
        **backend_document(status.backend),
        "resolved": status.resolved,
        **_counters_document(status.counters),
    }


def _counters_document(counters: Counters) -> Document:
    return {
        "packets": counters.packets,
        "bytes": counters.bytes,
        "reply_packets": counters.reply_packets,
        "reply_bytes": counters.reply_bytes,
        "connections": counters.connections,
    }


def warnings(report: Report) -> list[str]:
    """Each warning once, those of the interfaces included."""
    of_interfaces = (a.warning for a in report.attached if a.warning)
    return list(dict.fromkeys([*report.warnings, *of_interfaces]))


def total(status: ServiceStatus) -> Counters:
    """The counters of all backends of a service together."""
    each = [astuple(b.counters) for b in status.backends]
    return Counters(*(sum(column) for column in zip(*each, strict=True)))
