"""The bodies of the API: what may come in, and, for its description, what goes out.

Enters: JSON that pydantic has checked for types. Leaves: values of lb.model.state, or a Problem that points at the
value at fault. The documents are those of lb.formats.documents, and what was read may be sent back: keys that follow
from others (such as `address` from `vip`) may be there if they agree.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field, SkipValidation, create_model

from lb.api.access import Role
from lb.api.models.common import Answer, Body, Count, Port, Weight, checked
from lb.errors import InvalidInput, LbError
from lb.formats.documents import backend_document, service_document
from lb.formats.problems import Pointer, Problem
from lb.model.options import DEFAULTS, Options, from_values, values
from lb.model.state import DEFAULT_FLOW_TIMEOUT_S, DEFAULT_RING_SIZE, Backend, Interface, Mode, Service, XdpMode
from lb.model.vip import Vip

ModeName = Annotated[Mode, Field(strict=False)]
XdpModeName = Annotated[XdpMode, Field(strict=False)]
BODY = Pointer()
CHECK_S = 20.0  # for all services of a body; 18,000 take 2 s


OPTION_TYPES = {list: list[str], int: Count, bool: bool, str: str}
OPTION_FIELDS: dict[str, Any] = {name: (OPTION_TYPES[type(plain)], plain) for name, plain in values(DEFAULTS).items()}
OptionsBody = create_model("OptionsBody", __base__=Body, **OPTION_FIELDS)


class BackendBody(Body):
    """`backend` (ADDR[:PORT][@WEIGHT]) or `address`; without a port, that of the VIP."""

    backend: str | None = Field(None, examples=["10.0.0.11:8080"])
    address: str | None = Field(None, examples=["10.0.0.11"])
    port: Port | None = None
    weight: Weight | None = None
    draining: bool = False
    server_ids: list[str] = Field(
        default_factory=list, description="CONFIG:HEX, the server's IDs in QUIC connection IDs"
    )

    def to_model(self, vip: Vip, pointer: Pointer) -> Backend:
        text = self.backend if self.backend is not None else self.address
        if text is None:
            with pointer / "backend":
                raise InvalidInput("backend: missing: give backend, or address and port")
        with pointer / ("backend" if self.backend is not None else "address"):
            named = Backend.parse(text, vip.fixed_port)
        with pointer / "server_ids":
            found = replace(named, draining=self.draining, server_ids=tuple(self.server_ids))
        if self.port is not None and self.backend is None:
            found = replace(found, port=self.port or vip.fixed_port)
        if self.weight is not None:
            found = replace(found, weight=self.weight)
        _check_agrees(self.given, backend_document(found), ("address", "port"), pointer)
        return found


class ServiceBody(Body):
    """A service as it is to be; what is left out has its default."""

    vip: str | None = Field(None, examples=["10.0.0.100:80/tcp"])
    address: str | None = None
    prefix_length: Annotated[int, Field(ge=0, le=128)] | None = None
    port: Port | None = None
    last_port: Port | None = None
    protocol: str | None = None
    set: str | None = None
    mode: ModeName = Mode.NAT
    ring_size: Count = DEFAULT_RING_SIZE
    flow_timeout_s: Count = DEFAULT_FLOW_TIMEOUT_S
    options: OptionsBody = Field(default_factory=OptionsBody)  # type: ignore[valid-type]
    backends: list[SkipValidation[BackendBody]] = Field(default_factory=list)

    def to_model(self, pointer: Pointer, vip: Vip | None = None) -> Service:
        """`vip`: that of the address of the request."""
        with pointer / "vip":
            own = self._own_vip(vip)
        parts = {
            "mode": self.mode,
            "ring_size": self.ring_size,
            "flow_timeout_s": self.flow_timeout_s,
            "options": options_of(self.options.given, DEFAULTS, pointer / "options"),  # type: ignore[attr-defined]
            "backends": backends_of(self.backends, own, pointer / "backends"),
        }
        service = _built(own, parts, pointer)
        _check_agrees(self.given, service_document(service), DERIVED, pointer)
        return service

    def _own_vip(self, vip: Vip | None) -> Vip:
        named = Vip.parse(self.vip) if self.vip is not None else vip
        if named is None:
            raise InvalidInput("vip: missing")
        if vip and named != vip:
            raise InvalidInput(f"vip {named}: does not match {vip} in the path")
        return named


DERIVED = ("address", "prefix_length", "port", "last_port", "protocol", "set")


def _check_agrees(given: Mapping[str, Any], document: Mapping[str, Any], keys: Sequence[str], pointer: Pointer) -> None:
    for key in keys:
        if given.get(key) not in (None, document[key]):
            with pointer / key:
                raise InvalidInput(
                    f"{key} {given[key]}: conflicts with {document[key]} from the other keys: leave it out"
                )


def backends_of(documents: Sequence[object], vip: Vip, pointer: Pointer) -> tuple[Backend, ...]:
    """Raises Problem."""

    def backend(document: object, where: Pointer) -> Backend:
        return checked(BackendBody, document, where).to_model(vip, where)

    return tuple(backend(document, pointer / number) for number, document in enumerate(documents))


def options_of(given: Mapping[str, Any], before: Options, pointer: Pointer) -> Options:
    """`before` with what is given."""
    try:
        return from_values(values(before) | dict(given))
    except (LbError, TypeError, ValueError, AttributeError, KeyError):
        for name, value in given.items():
            with pointer / name:
                _one_option(name, value)
        with pointer:
            return from_values(values(before) | dict(given))


def _one_option(name: str, value: object) -> None:
    """Raises InvalidInput, also for what is not of the right shape."""
    try:
        from_values({name: value})
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise InvalidInput(f"option {name}: invalid value: {error}") from None


def _built(vip: Vip, parts: Mapping[str, Any], pointer: Pointer) -> Service:
    """The service, or the Problem of the first part that does not fit to those before it."""
    try:
        return Service(vip, **parts)
    except LbError:
        for key, some in _growing(parts):
            with pointer / key if isinstance(key, str) else pointer / "backends" / key:
                Service(vip, **some)
        raise


def _growing(parts: Mapping[str, Any]) -> Iterator[tuple[str | int, dict[str, Any]]]:
    """Services of ever more parts; each backend alone before all of them."""
    plain = {**parts, "options": DEFAULTS, "backends": ()}
    yield "ring_size", {"ring_size": parts["ring_size"]}
    yield "flow_timeout_s", {"flow_timeout_s": parts["flow_timeout_s"]}
    for name, value in values(parts["options"]).items():
        if value != values(DEFAULTS)[name]:
            yield "options", {**plain, "options": from_values({name: value})}
    yield "options", {**plain, "options": parts["options"]}
    for number, backend in enumerate(parts["backends"]):
        yield number, {**plain, "backends": (backend,)}
    yield "backends", dict(parts)


class ConfigBody(Body):
    """All that is to be served."""

    services: list[SkipValidation[ServiceBody]]

    def to_model(self) -> list[Service]:
        return services_of(self.services, Pointer(("services",)))


def services_of(documents: Sequence[object], pointer: Pointer) -> list[Service]:
    """Raises Problem."""
    found: dict[Vip, Service] = {}
    ends_s = time.monotonic() + CHECK_S
    for number, document in enumerate(documents):
        if time.monotonic() > ends_s:
            raise Problem(503, f"services: checking {len(documents)} took longer than {CHECK_S:g} s: try again later")
        service = checked(ServiceBody, document, pointer / number).to_model(pointer / number)
        with pointer / number / "vip":
            if found.setdefault(service.vip, service) is not service:
                raise InvalidInput(f"vip {service}: given twice")
    return list(found.values())


class BackendsBody(Body):
    backends: Annotated[list[SkipValidation[BackendBody]], Field(min_length=1)]


class BackendPatch(Body):
    """What is to change of a backend."""

    weight: Weight | None = None
    draining: bool | None = None
    server_ids: list[str] | None = None

    def changed(self, backend: Backend, pointer: Pointer = BODY) -> Backend:
        changes = {key: value for key, value in self.given.items() if value is not None and key != "backend"}
        if "server_ids" in changes:
            changes["server_ids"] = tuple(changes["server_ids"])
        with pointer / "server_ids":
            return replace(backend, **changes)


class NamedBackendPatch(BackendPatch):
    backend: str = Field(examples=["10.0.0.11:8080"])

    def applied(self, service: Service, pointer: Pointer) -> Service:
        with pointer:
            name = Backend.parse(self.backend, service.vip.fixed_port)
            return service.changing_backend(name, lambda backend: self.changed(backend, pointer))


class BackendsPatch(Body):
    """What is to change of some backends: of all of them, or of none."""

    backends: Annotated[list[NamedBackendPatch], Field(min_length=1)]

    def applied(self, service: Service) -> Service:
        for number, patch in enumerate(self.backends):
            service = patch.applied(service, BODY / "backends" / number)
        return service


class ServicePatch(Body):
    """Options that are to change; the others stay."""

    options: OptionsBody  # type: ignore[valid-type]


class InterfaceBody(Body):
    name: Annotated[str, Field(min_length=1, max_length=15)]
    xdp_mode: XdpModeName = XdpMode.AUTO

    def to_model(self) -> Interface:
        return Interface(self.name, self.xdp_mode)


class AttachBody(Body):
    """Interfaces to attach to, and services to add to the stored ones."""

    interfaces: Annotated[list[InterfaceBody], Field(min_length=1)]
    services: list[SkipValidation[ServiceBody]] = Field(default_factory=list)
    own_address: bool = Field(True, description="Add a VIP that is no host's address to an interface")


# What goes out, for the description alone: lb.formats.documents makes it.


class BackendAnswer(Answer):
    backend: str
    address: str
    port: int
    weight: int
    draining: bool
    server_ids: list[str]


class ServiceHead(Answer):
    vip: str
    address: str
    prefix_length: int
    port: int
    last_port: int
    protocol: str
    set: str
    mode: Mode
    ring_size: int
    flow_timeout_s: int
    options: dict[str, Any]


class ServiceAnswer(ServiceHead):
    backends: list[BackendAnswer]


class ConfigAnswer(Answer):
    services: list[ServiceAnswer]


class PlanAnswer(Answer):
    slots: int
    moved: int
    minimum: int
    in_transition: int


class OpenAnswer(Answer):
    """Connections that are open now; null: unknown."""

    connections: int | None
    estimated: bool


class ChangeAnswer(Answer):
    vip: str
    change: str
    before: ServiceAnswer | None
    after: ServiceAnswer | None
    plan: PlanAnswer | None
    ending: OpenAnswer | None


class AttachmentAnswer(Answer):
    name: str
    xdp_mode: str
    program_id: int


class ReportAnswer(Answer):
    """What a change did, or, of a dry run, would do."""

    dry_run: bool
    changes: list[ChangeAnswer]
    ending: OpenAnswer | None
    attached: list[AttachmentAnswer]
    detached: list[str]
    notes: list[str]
    warnings: list[str]


class CountersAnswer(Answer):
    packets: int
    bytes: int
    reply_packets: int
    reply_bytes: int
    connections: int
    repeated_syns: int


class BackendStats(CountersAnswer):
    backend: str
    open: OpenAnswer


class ServiceStats(CountersAnswer):
    vip: str
    slots_in_transition: int
    open: OpenAnswer
    backends: list[BackendStats]


class Reasons(Answer):
    answered: dict[str, int]
    drops: dict[str, int]
    passes: dict[str, int]
    noted: dict[str, int]


class StatsAnswer(Reasons):
    """The counters alone."""

    services: list[ServiceStats]


class BackendStatusAnswer(BackendAnswer, CountersAnswer):
    resolved: bool
    open: OpenAnswer


class ServiceStatusAnswer(ServiceHead, CountersAnswer):
    slots_in_transition: int
    open: OpenAnswer
    backends: list[BackendStatusAnswer]


class InterfaceAnswer(Answer):
    name: str
    xdp_mode: str
    attached: bool
    program_id: int | None


class StatusAnswer(Reasons):
    netns: str
    loaded: bool
    interfaces: list[InterfaceAnswer]
    services: list[ServiceStatusAnswer]
    maps: dict[str, int]
    outdated: str | None
    config_fault: str | None


class Health(Answer):
    status: str
    problem: str | None = None


class CallerAnswer(Answer):
    who: str
    role: Role
