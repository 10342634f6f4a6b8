"""A View -> lines of a certain width, or a whole screen of them: what `xdp-lb top` shows (pure).

Enters: what lb.top.rates measures, and the size of the terminal. Leaves: rich Texts, one a line. Where the width does
not hold every column, the least telling ones are left out first; names are shortened last, in the middle. Without a
width, as for a file, nothing is left out but the sparkline.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.text import Text

from lb.formats.text import STYLES, open_cell, short
from lb.model.state import Mode
from lb.paths import DEFAULT_NETNS
from lb.top.rates import BackendRow, Order, ReasonRow, ServiceRow, View, ordered_backends

BARS = "▁▂▃▄▅▆▇█"
ELLIPSIS = ".."
NAME = "VIP, BACKEND"
SPARKLINE_WIDTHS = range(8, 61)
TALL_ENOUGH_FOR_REASONS = 16  # lines; below, the totals at the top have to do
MAX_REASONS = 6
KEYS = "q quit  s sort  space pause  arrows, PgUp, PgDn scroll"

SERVICE, FAULT, DIM, HEADING, PAUSED = "bold", "red", "dim", "reverse", "bold yellow"


@dataclass(frozen=True, slots=True)
class Column:
    heading: str
    width: int
    number: bool = True
    dispensable: int = 0  # the highest goes first; 0: stays

    def cell(self, text: str) -> str:
        return text.rjust(self.width) if self.number else text.ljust(self.width)


STATE = Column("STATE", 11, number=False, dispensable=1)
OPEN = Column("OPEN", 6, dispensable=3)
CONNECTIONS = Column("CONN/S", 6, dispensable=2)
RETRIES = Column("RETRY/S", 7, dispensable=5)
PACKETS = Column("PKT/S", 5)
BITS = Column("BIT/S", 5)
REPLIES = Column("REPLY/S", 7, dispensable=4)
REPLY_BITS = Column("BIT/S", 5, dispensable=4)
RATES = (CONNECTIONS, RETRIES, PACKETS, BITS, REPLIES, REPLY_BITS)
COLUMNS = (STATE, OPEN, *RATES)


@dataclass(frozen=True, slots=True)
class Display:
    """How a View is to be shown. width, height: 0 where nothing bounds them. offset: the first row on the screen.
    notice: what went wrong meanwhile."""

    width: int = 0
    height: int = 0
    order: Order = Order.PACKETS
    interval_s: float = 1.0
    clock: str = ""
    offset: int = 0
    paused: bool = False
    ascii_only: bool = False
    notice: str = ""


Row = tuple[ServiceRow, BackendRow | None]


@dataclass(frozen=True, slots=True)
class Layout:
    """The columns that fit after the name, and the width of the sparkline (0: none)."""

    name_width: int
    columns: tuple[Column, ...]
    sparkline: int = 0

    def heading(self) -> Text:
        cells = [NAME.ljust(self.name_width), *(column.cell(column.heading) for column in self.columns)]
        return Text(" ".join(cells).ljust(self.width), style=HEADING)

    @property
    def width(self) -> int:
        return _taken(self.name_width, self.columns) + (self.sparkline and 1 + self.sparkline)

    def line(self, row: Row, view: View) -> Text:
        service, backend = row
        line = Text(style="" if backend else SERVICE)
        line.append(shortened(f"  {backend.name}" if backend else service.name, self.name_width).ljust(self.name_width))
        cells = _cells(row, view)
        for column in self.columns:
            text = cells.get(column, "")
            line.append(" ")
            line.append(column.cell(text), STYLES.get(text, ""))
        if not backend:
            line.append(f" {sparkline(service.history, self.sparkline)}")
        line.rstrip()
        return line


def _cells(row: Row, view: View) -> dict[Column, str]:
    service, backend = row
    shown = backend or service
    rates = shown.rates
    replies = (rates.reply_packets, rates.reply_bits) if service.mode == Mode.NAT else ()
    figures = (rates.connections, rates.repeated_syns, rates.packets, rates.bits, *replies)
    texts = (figure(rate) if view.measured else "-" for rate in figures)
    state = backend.state if backend else _condition(service)
    return {STATE: state, OPEN: open_cell(shown.open), **dict(zip(RATES, texts, strict=False))}


def _condition(service: ServiceRow) -> str:
    moving = service.slots_in_transition
    return f"{service.mode} ~{moving}" if moving else service.mode


def figure(rate: float) -> str:
    """At most five characters; below ten with a decimal, so that 0 alone is nothing at all."""
    if rate < 0.05:
        return "0"
    return f"{rate:.1f}" if rate < 9.95 else short(round(rate))


def shortened(text: str, width: int) -> str:
    """In the middle: both ends of an address tell it from its neighbours."""
    if len(text) <= width:
        return text
    kept = width - len(ELLIPSIS)
    return text[: kept // 2] + ELLIPSIS + text[len(text) - (kept - kept // 2) :]


def sparkline(values: Sequence[float], width: int) -> str:
    """The last `width` values, the highest of them a full bar."""
    shown = values[-width:] if width else ()
    top = max(shown, default=0) or 1
    return "".join(BARS[round(value / top * (len(BARS) - 1))] for value in shown)


def lay_out(view: View, width: int | None = None, *, ascii_only: bool = False) -> Layout:
    """The columns for so many characters; None: as many as it takes."""
    name_width = max([len(NAME), *_name_widths(view)])
    has_replies = any(service.mode == Mode.NAT for service in view.services)
    needless = {*(() if has_replies else (REPLIES, REPLY_BITS)), *(() if view.repeats else (RETRIES,))}
    columns = tuple(column for column in COLUMNS if column not in needless)
    if width is None:
        return Layout(name_width, columns)
    while _taken(name_width, columns) > width and (worst := max(column.dispensable for column in columns)):
        columns = tuple(column for column in columns if column.dispensable != worst)
    name_width = max(len(NAME), min(name_width, width - _taken(0, columns)))
    room = min(width - _taken(name_width, columns) - 1, SPARKLINE_WIDTHS[-1])
    return Layout(name_width, columns, room if room in SPARKLINE_WIDTHS and not ascii_only else 0)


def _name_widths(view: View) -> Iterator[int]:
    for service in view.services:
        yield len(service.name)
        yield from (2 + len(backend.name) for backend in service.backends)


def _taken(name_width: int, columns: Iterable[Column]) -> int:
    return name_width + sum(1 + column.width for column in columns)


def rows(view: View, order: Order) -> list[Row]:
    """Each service, followed by its backends."""
    found: list[Row] = []
    for service in view.ordered(order):
        found.append((service, None))
        found += ((service, backend) for backend in ordered_backends(service, order))
    return found


def screen(view: View, display: Display) -> list[Text]:
    """At most as many lines as the display is high, none longer than it is wide."""
    layout = lay_out(view, display.width, ascii_only=display.ascii_only)
    found, reasons = rows(view, display.order), _reasons_block(view, display.height)
    visible = body_height(view, display.height)
    shown = found[display.offset : display.offset + visible]
    body = [layout.line(row, view) for row in shown]
    lines = [
        _title(view, display),
        _totals(view, display),
        Text(),
        layout.heading(),
        *body,
        *(Text() for _ in range(visible - len(body))),
        *reasons,
        _footer(display, len(shown), len(found)),
    ][: display.height]
    for line in lines:
        line.no_wrap = True
        line.truncate(display.width)
    return lines


def last_offset(view: View, height: int) -> int:
    """The farthest one can scroll."""
    return max(0, sum(1 + len(service.backends) for service in view.services) - body_height(view, height))


def body_height(view: View, height: int) -> int:
    """Rows on a screen of that height, less the five fixed lines."""
    return max(1, height - 5 - len(_reasons_block(view, height)))


def _reasons_block(view: View, height: int) -> list[Text]:
    counted = _counted(view)
    room = min(MAX_REASONS, (height - 10) // 3) if height >= TALL_ENOUGH_FOR_REASONS else 0
    if not (counted and room):
        return []
    lines = _reason_lines(counted[:room], view.measured)
    more = len(counted) - room
    return [Text(), *lines, *([Text(f"and {more} more", style=DIM)] if more > 0 else [])]


def _counted(view: View) -> list[ReasonRow]:
    """The busiest first."""
    return sorted((reason for reason in view.reasons if reason.packets), key=lambda r: (-r.rate, -r.packets, r.name))


def _reason_lines(reasons: Sequence[ReasonRow], measured: bool) -> list[Text]:
    width = max(map(len, ("REASON", *(reason.name for reason in reasons))))
    lines = [Text(f"{'REASON'.ljust(width)} PKT/S PACKETS", style=HEADING)]
    for reason in reasons:
        rate = figure(reason.rate) if measured else "-"
        fault = FAULT if reason.rate and reason.name.startswith("drop_") else ""
        lines.append(Text(f"{reason.name.ljust(width)} {rate:>5} {short(reason.packets):>7}", style=fault))
    return lines


def _title(view: View, display: Display) -> Text:
    parts = [
        Text("xdp-lb top"),
        Text(display.clock),
        *([Text("paused", PAUSED)] if display.paused else []),
        Text(f"by {display.order}", DIM),
        *([] if view.netns == DEFAULT_NETNS else [Text(view.netns)]),
        *(_interfaces(view) or [Text("not attached", FAULT)]),
        Text(f"every {display.interval_s:g} s", DIM),
    ]
    return _fitting(parts, display.width)


def _interfaces(view: View) -> list[Text]:
    modes = {name: mode or "detached" for name, mode in view.interfaces.items()}
    return [Text.assemble(f"{name} ", (mode, STYLES.get(mode, ""))) for name, mode in modes.items()]


def _totals(view: View, display: Display) -> Text:
    if not view.measured:
        return Text("measuring", DIM)
    total, dropped = view.total, view.rate_of("drop_")
    figures = (
        (total.connections, "conn/s", ""),
        (total.packets, "pkt/s", ""),
        (total.bits, "bit/s", ""),
        (dropped, "dropped/s", FAULT if dropped else ""),
        (total.reply_packets, "replies/s", ""),
        (total.reply_bits, "bit/s", ""),
        (view.rate_of("pass_"), "passed/s", ""),
    )
    return _fitting([Text(f"{figure(rate)} {unit}", style) for rate, unit, style in figures], display.width)


def _fitting(parts: Iterable[Text], width: int) -> Text:
    """The first parts, as many as `width` holds (0: all)."""
    line = Text()
    for part in parts:
        gap = "  " if line and part else ""
        if width and line.cell_len + len(gap) + part.cell_len > width:
            break
        line.append(gap).append_text(part)
    return line


def _footer(display: Display, shown: int, rows: int) -> Text:
    if display.notice:
        return Text(display.notice, style=FAULT)
    part = f"{display.offset + 1}-{display.offset + shown} of {rows}  " if shown < rows else ""
    return Text(f"{part}{KEYS}", style=DIM)


def plain(view: View, display: Display) -> list[str]:
    """All rows in one block, for a file or a pipe."""
    layout = lay_out(view)
    counted = _counted(view)
    lines = [
        _title(view, display),
        _totals(view, display),
        Text(),
        layout.heading(),
        *(layout.line(row, view) for row in rows(view, display.order)),
        *([Text(), *_reason_lines(counted, view.measured)] if counted else []),
    ]
    return [line.plain.rstrip() for line in lines]
