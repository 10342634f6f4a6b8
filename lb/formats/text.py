"""Reports, services and status -> lines and tables for people.

Enters: frozen values of lb.model.report and lb.model.state. Leaves: lines. Nothing here depends on a terminal: the
caller asks for colour, and tables are never truncated, since a shortened address is ambiguous. Large counters are
shortened; the exact ones are in the JSON documents.
"""

from __future__ import annotations

import textwrap
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from lb.formats import option_text
from lb.hashing.ring import Plan
from lb.model.conditions import WHOLE
from lb.model.forwarding import Attachment, Counters, OpenConnections
from lb.model.report import BackendStatus, Change, ChangeKind, InterfaceStatus, Report, ServiceStatus, Status
from lb.model.state import Backend, Service

SIGNS = {ChangeKind.ADD: "+", ChangeKind.CHANGE: "~", ChangeKind.REMOVE: "-"}
STYLES = {
    "draining": "yellow",
    "down": "red",
    "unresolved": "red",
    "detached": "red",
    "generic": "yellow",
    "total": "dim",
}
SGR = {"bold": 1, "dim": 2, "red": 31, "yellow": 33}  # ECMA-48
FEW = 10  # services whose backends are shown unasked
OUTDATED = "the running program is of xdp-lb {}, not the installed version: run xdp-lb attach IFACE to upgrade it"
CONFIG_FAULT = "configuration file not applied: "
WIDTH = 80  # of text that may be broken
OPEN = "OPEN"  # connections open now, beside those that were opened
# Headings of the counters, by name. Bytes stand right of the packets they belong to.
COUNTERS = {
    "connections": "CONNS",
    "repeated_syns": "RETRIES",
    "packets": "PACKETS",
    "bytes": "BYTES",
    "reply_packets": "REPLIES",
    "reply_bytes": "BYTES",
}


@dataclass(frozen=True, slots=True)
class Difference:
    """Change of one backend: `kind`, its name, and its settings or their change."""

    kind: ChangeKind
    backend: Backend
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.backend} ({self.detail})" if self.detail else str(self.backend)


def differences(before: Service | None, after: Service | None) -> list[Difference]:
    """The backends that differ, in the order of their addresses."""
    was, now = (service.backends if service else () for service in (before, after))
    same = set(map(id, was)) & set(map(id, now))  # most of many are the very same
    old = {str(b): b for b in was if id(b) not in same}
    new = {str(b): b for b in now if id(b) not in same}
    backends = sorted({**old, **new}.values(), key=lambda b: b.sort_key)
    pairs = ((old.get(str(b)), new.get(str(b))) for b in backends)
    return [_difference(was, now) for was, now in pairs if was != now]


def _difference(was: Backend | None, now: Backend | None) -> Difference:
    if now is None:
        assert was is not None
        return Difference(ChangeKind.REMOVE, was)
    if was is None:
        return Difference(ChangeKind.ADD, now, _condition(now))
    return Difference(ChangeKind.CHANGE, now, ", ".join(_turns(was, now)))


def _condition(backend: Backend) -> str:
    weight = f"weight {backend.weight}" if backend.weight != 1 else ""
    server_ids = f"server id {_server_ids(backend)}" if backend.server_ids else ""
    return ", ".join(word for word in (weight, "draining" if backend.draining else "", server_ids) if word)


def _server_ids(backend: Backend) -> str:
    return " ".join(backend.server_ids) or "none"


def _turns(was: Backend, now: Backend) -> Iterator[str]:
    if was.weight != now.weight:
        yield f"weight {was.weight} -> {now.weight}"
    if was.draining != now.draining:
        yield "draining" if now.draining else "active again"
    if was.server_ids != now.server_ids:
        yield f"server id {_server_ids(was)} -> {_server_ids(now)}"


def _service_turns(before: Service | None, after: Service | None) -> list[str]:
    if before is None or after is None:
        return []
    facts = (
        ("mode", before.mode, after.mode),
        ("ring", before.ring_size, after.ring_size),
        ("flow timeout", f"{before.flow_timeout_s} s", f"{after.flow_timeout_s} s"),
    )
    turned = [f"{name} {was} -> {now}" for name, was, now in facts if was != now]
    return [*turned, *option_text.turns(before.options, after.options)]


def _backend_turns(change: Change) -> Iterator[str]:
    """What became of the backends: those removed in one phrase, those added in another."""
    found = differences(change.before, change.after)
    for kind, done in ((ChangeKind.REMOVE, "removed"), (ChangeKind.ADD, "added")):
        some = [str(each) for each in found if each.kind is kind]
        if some:
            yield f"backend{'' if len(some) == 1 else 's'} {', '.join(some)} {done}"
    yield from (f"backend {d.backend} {d.detail}" for d in found if d.kind is ChangeKind.CHANGE)


def _joined(*parts: str) -> str:
    return ": ".join(part for part in parts if part)


def _listed(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _moves(plan: Plan | None) -> str:
    if plan is None:
        return ""
    if not plan.moved:
        return "no slot moves"
    return f"{plan.moved} of {plan.slots} slots move (minimum {plan.minimum})"


def _effect(change: Change) -> str:
    """On the ring, and on open connections."""
    return _listed(_moves(change.plan), ends(change.ending))


def ends(ending: OpenConnections | None) -> str:
    """Empty where no backend goes out of service."""
    if ending is None:
        return ""
    if ending.number is None:
        return "ends an unknown number of open connections"
    if ending.estimated:
        return f"ends ~{ending.number} open connection{'' if ending.number == 1 else 's'}"
    return f"ends {_count(ending.number, 'open connection')}"


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def _shape(service: Service) -> str:
    return f"{service.mode}, {_count(len(service.backends), 'backend')}, ring {service.ring_size}"


def _description(service: Service) -> str:
    return ", ".join([_shape(service), *option_text.phrases(service.options)])


def extent(services: Sequence[Service]) -> str:
    """How much is served, for who attaches what is stored."""
    backends = sum(len(service.backends) for service in services)
    return f"serving {_count(len(services), 'service')}, {_count(backends, 'backend')}"


def change_sentence(change: Change) -> str:
    """One line: `10.0.0.1:80/tcp: backend 10.0.0.13:80 added: 4095 of 16381 slots move (...)`."""
    if change.after is None:
        return f"{change.vip}: {_listed('removed', ends(change.ending))}"
    if change.before is None:
        return f"{change.vip}: added: {_description(change.after)}"
    turns = ", ".join([*_service_turns(change.before, change.after), *_backend_turns(change)])
    return _joined(str(change.vip), turns, _effect(change))


def attachment_sentence(attachment: Attachment) -> str:
    return f"{attachment.interface}: attached, {attachment.mode} XDP"


def report_lines(report: Report) -> list[str]:
    """What has happened, a line each; notes are indented under what they explain."""
    done = [
        *(attachment_sentence(a) for a in report.attached),
        *(f"{name}: detached" for name in report.detached),
        *(change_sentence(c) for c in report.changes),
    ]
    return _with_notes([_headed(line, report) for line in done], report)


def _headed(line: str, report: Report) -> str:
    return f"dry run: {line}" if report.dry_run else line


def _with_notes(done: list[str], report: Report) -> list[str]:
    if not done and not report.notes:
        return [_headed("nothing to change", report)]
    notes = [*([ends(report.ending)] if report.detached and report.ending else []), *report.notes]
    return [*done, *(f"  {note}" if done else note for note in notes)]


def diff_lines(report: Report) -> list[str]:
    """The changes as a diff, each line led by `+`, `~` or `-`, and a line that counts them."""
    lines = [line for change in report.changes for line in _diff_of_change(change)]
    return _with_notes([*lines, _headed(_listed(_tally(report.changes), ends(report.ending)), report)], report)


def _diff_of_change(change: Change) -> Iterator[str]:
    yield _joined(f"{SIGNS[change.kind]} service {change.vip}", *_diff_detail(change))
    if change.kind is not ChangeKind.REMOVE:
        for difference in differences(change.before, change.after):
            yield f"  {SIGNS[difference.kind]} backend {difference}"


def _diff_detail(change: Change) -> list[str]:
    if change.before is None and change.after is not None:
        return [_description(change.after)]
    return [", ".join(_service_turns(change.before, change.after)), _effect(change)]


def _tally(changes: Sequence[Change]) -> str:
    verbs = {ChangeKind.ADD: "added", ChangeKind.CHANGE: "changed", ChangeKind.REMOVE: "removed"}
    counts = {verb: sum(c.kind is kind for c in changes) for kind, verb in verbs.items()}
    parts = [f"{_count(n, 'service')} {verb}" for verb, n in counts.items() if n]
    return ", ".join(parts) or "nothing to change"


@dataclass(frozen=True, slots=True)
class Column:
    heading: str
    number: bool = False


def table(columns: Sequence[Column], rows: Iterable[Sequence[str]], *, colour: bool) -> list[str]:
    """Lines of a table without borders, as wide as its contents; numbers stand to the right. Not by rich, which takes
    4 s for a thousand services."""
    lines = [[column.heading for column in columns], *rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]

    def line(cells: Sequence[str], style: str = "") -> str:
        placed = zip(cells, widths, columns, strict=True)
        return "  ".join(_cell(*each, (style or STYLES.get(each[0], "")) if colour else "") for each in placed).rstrip()

    return [line(lines[0], "bold"), *map(line, lines[1:])]


def _cell(text: str, width: int, column: Column, style: str) -> str:
    space = " " * (width - len(text))
    styled = f"\x1b[{SGR[style]}m{text}\x1b[0m" if style else text
    return space + styled if column.number else styled + space


def short(number: int) -> str:
    """Three figures and a power of 1000, at most five characters: 9999, 12.3k, 1.23M."""
    if number < 10_000:
        return str(number)
    power = 1
    while number / 1000**power >= 999.5:
        power += 1
    figures = f"{number / 1000**power:#.3g}".rstrip(".")
    return f"{figures}{'kMGTPE'[power - 1]}"


def services_table(services: Sequence[Service], *, colour: bool) -> list[str]:
    if not services:
        return ["no services: add one with xdp-lb vip add"]
    columns = [
        Column("VIP"),
        Column("MODE"),
        Column("BACKENDS", number=True),
        Column("RING", number=True),
        Column("FLOW TIMEOUT", number=True),
    ]
    heading, *rows = table(columns, [_service_row(s) for s in services], colour=colour)
    described = zip(services, rows, strict=True)
    return [heading, *(line for service, row in described for line in (row, *_options_lines(service)))]


def _options_lines(service: Service) -> list[str]:
    """Under the service's own line, since most have none."""
    words = ", ".join(option_text.phrases(service.options))
    return textwrap.wrap(words, WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def _service_row(service: Service) -> tuple[str, ...]:
    count, size = len(service.backends), service.ring_size
    return str(service), str(service.mode), str(count), str(size), f"{service.flow_timeout_s} s"


def backends_table(status: Status, *, colour: bool) -> list[str]:
    rows = [
        (
            str(s.service),
            str(b.backend),
            str(b.backend.weight),
            _state(b, status.loaded),
            " ".join(b.backend.server_ids),
        )
        for s in status.services
        for b in s.backends
    ]
    if not rows:
        return ["no backends: add one with xdp-lb backend add"]
    columns = [Column("VIP"), Column("BACKEND"), Column("WEIGHT", number=True), Column("STATE"), Column("SERVER IDS")]
    known = len(columns) if any(row[-1] for row in rows) else len(columns) - 1
    return table(columns[:known], [row[:known] for row in rows], colour=colour)


def _state(status: BackendStatus, loaded: bool) -> str:
    """Next hops are known only while programs are loaded."""
    return "unresolved" if loaded and status.in_trouble and status.state == "active" else status.state


def status_lines(status: Status, *, colour: bool) -> list[str]:
    """Interfaces, then the services, those in trouble first, then what was not balanced and why. A few services are
    shown with their backends, more in a line each."""
    services = sorted(status.services, key=lambda s: not (status.loaded and s.in_trouble))
    status = replace(status, services=tuple(services))
    return _spaced(
        _faults(status),
        _interfaces_table(status.interfaces, colour=colour),
        *(
            _service_paragraphs(status, colour=colour)
            if len(services) <= FEW
            else [_services_overview(status, colour=colour)]
        ),
        _reasons_table(status, colour=colour),
    )


def service_lines(status: Status, *, colour: bool) -> list[str]:
    """The services alone, each with its backends."""
    return _spaced(_faults(status), *_service_paragraphs(status, colour=colour))


def trouble_lines(status: Status, *, colour: bool) -> list[str]:
    """What is in trouble, and nothing else."""
    detached = [i for i in status.interfaces if i.attached is None]
    troubled = status.in_trouble()
    services = (replace(s, backends=tuple(b for b in s.backends if b.in_trouble)) for s in troubled.services)
    found = _spaced(
        _interfaces_table(detached, colour=colour),
        *_service_paragraphs(replace(status, services=tuple(services)), colour=colour, total=False),
    )
    nothing = [f"{_count(len(status.services), 'service')}: nothing is down"] if status.loaded else []
    return _spaced(_faults(status), found or nothing)


def _spaced(*paragraphs: list[str]) -> list[str]:
    filled = [paragraph for paragraph in paragraphs if paragraph]
    return [line for paragraph in filled for line in ("", *paragraph)][1:]


def _faults(status: Status) -> list[str]:
    fault = [f"{CONFIG_FAULT}{status.config_fault}"] if status.config_fault else []
    return [*_headline(status), *fault]


def _headline(status: Status) -> list[str]:
    where = "" if status.netns == "default" else f"network namespace {status.netns}: "
    if not status.services and not status.interfaces:
        return [f"{where}no services: start with xdp-lb attach IFACE --backends A,B"]
    if not status.loaded:
        return [f"{where}not attached: run xdp-lb attach IFACE"]
    if status.outdated:
        return [f"{where}{OUTDATED.format(status.outdated)}"]
    return [where.removesuffix(": ")] if where else []


def _interfaces_table(interfaces: Sequence[InterfaceStatus], *, colour: bool) -> list[str]:
    if not interfaces:
        return []
    columns = [Column("INTERFACE"), Column("XDP"), Column("PROGRAM", number=True)]
    return table(columns, [_interface_row(i) for i in interfaces], colour=colour)


def _interface_row(status: InterfaceStatus) -> tuple[str, str, str]:
    if status.attached is None:
        return status.interface.name, "detached", "-"
    return status.interface.name, status.attached.mode, str(status.attached.program_id)


def _services_overview(status: Status, *, colour: bool) -> list[str]:
    """A line each."""
    shown = [name for name in COUNTERS if name != "repeated_syns"]
    columns = [
        Column("VIP"),
        Column("MODE"),
        Column("BACKENDS", number=True),
        Column(OPEN, number=True),
        *(Column(COUNTERS[name], number=True) for name in shown),
        Column("STATE"),
    ]
    rows = (
        (
            str(each.service),
            str(each.service.mode),
            str(len(each.backends)),
            open_cell(each.open),
            *_counter_cells(each.total, shown),
            _states(each, status.loaded),
        )
        for each in status.services
    )
    return table(columns, rows, colour=colour)


def _states(status: ServiceStatus, loaded: bool) -> str:
    """`active`, or `1 down, 2 draining`: the backends that are not."""
    counts = Counter(_state(backend, loaded) for backend in status.backends)
    others = [f"{counts[state]} {state}" for state in ("down", "unresolved", "draining") if counts[state]]
    return ", ".join(others) or ("active" if status.backends else "no backends")


def _service_paragraphs(status: Status, *, colour: bool, total: bool = True) -> Iterator[list[str]]:
    names = (str(b.backend) for s in status.services for b in s.backends)
    width = max(map(len, names), default=0)
    for service in status.services:
        lines = _backend_status_table(service, status.loaded, width, colour=colour, total=total)
        faults = [f"{b.backend}: {_fault(b)}" for b in service.backends if _fault(b)]
        yield [_service_headline(service), *(f"  {line}" for line in [*lines, *faults])]


def _fault(status: BackendStatus) -> str:
    """The result of health checks, unless it gets its full share."""
    condition = status.condition
    if condition is None or not (condition.down or condition.share < WHOLE):
        return ""
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(condition.since))
    return (
        f"down since {since}: {condition.why}"
        if condition.down
        else f"up since {since}: slow start at {condition.share} %"
    )


def _service_headline(status: ServiceStatus) -> str:
    service, moving = status.service, status.slots_in_transition
    transition = f", {moving} slots in transition" if moving else ""
    unused = "" if status.takes_connections or not service.backends else ", no backend takes new connections"
    return f"{service}: {_shape(service)}{transition}{unused}"


def _backend_status_table(status: ServiceStatus, loaded: bool, width: int, *, colour: bool, total: bool) -> list[str]:
    if not status.backends:
        return []
    every = status.total
    shown = [name for name in COUNTERS if name != "repeated_syns" or every.repeated_syns]
    columns = [
        Column("BACKEND".ljust(width)),
        Column("WEIGHT", number=True),
        Column("STATE".ljust(len("draining"))),
        Column(OPEN, number=True),
        *(Column(COUNTERS[name], number=True) for name in shown),
    ]
    rows = [_backend_status_row(b, loaded, shown) for b in status.backends]
    if total and len(rows) > 1:
        rows.append(("total", "", "", open_cell(status.open), *_counter_cells(every, shown)))
    return table(columns, rows, colour=colour)


def _backend_status_row(status: BackendStatus, loaded: bool, shown: Iterable[str]) -> tuple[str, ...]:
    backend = status.backend
    state, counters = _state(status, loaded), _counter_cells(status.counters, shown)
    return str(backend), str(backend.weight), state, open_cell(status.open), *counters


def open_cell(connections: OpenConnections) -> str:
    """`40`, `~37` if estimated, `-` if unknown."""
    return "-" if connections.number is None else f"{'~' * connections.estimated}{short(connections.number)}"


def _counter_cells(counters: Counters, shown: Iterable[str]) -> tuple[str, ...]:
    return tuple(short(getattr(counters, name)) for name in shown)


def _reasons_table(status: Status, *, colour: bool) -> list[str]:
    columns = [Column("REASON"), Column("PACKETS", number=True)]
    rows = [(reason, short(n)) for reason, n in _counted(status)]
    return table(columns, rows, colour=colour) if rows else []


def _counted(status: Status) -> list[tuple[str, int]]:
    kinds = (status.answered, status.drops, status.passes, status.noted)
    return [(reason, n) for each in kinds for reason, n in each.items() if n]
