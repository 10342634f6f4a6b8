"""Output of a running stage, until it is stopped.

Enters: a Stage and its Trace. Leaves: on a terminal tables that are redrawn in place, below the events and lines that
have come; elsewhere one block of lines after the other; or a JSON document a line, with `time` (ISO 8601) and one of
`table` (see lb.stages.tables), `event` and `data`, `trace`, `lost_events`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import IO, TYPE_CHECKING, Any, Protocol

from lb.formats.documents import Document
from lb.stages import tables as stage_tables
from lb.stages.tables import Entry, Snapshot

if TYPE_CHECKING:
    from rich.live import Live

    from lb.stages.compile import Event, Stage
    from lb.stages.socket import TableSocket
    from lb.stages.trace import Trace

POLL_S = 0.05


class Printer(Protocol):
    def tables(self, snapshots: Sequence[Snapshot], *, final: bool) -> None: ...

    def events(self, events: Sequence[Event]) -> None: ...

    def traced(self, lines: Sequence[str]) -> None: ...

    def lost(self, events: int) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Shown:
    """What tables had, and when; 0: never."""

    at_s: float = 0
    entries: Mapping[str, Sequence[Entry]] = field(default_factory=dict)


class Watch:
    """Remembers what was shown last, and before that."""

    def __init__(self, stage: Stage, trace: Trace | None, printer: Printer, socket: TableSocket | None = None) -> None:
        """`socket`: where others ask for the tables."""
        self._stage, self._trace, self._printer, self._socket = stage, trace, printer, socket
        self._shown, self._earlier = Shown(), Shown()
        self._lost = 0

    def until(self, ended: Callable[[], bool], interval_s: float) -> None:
        """Shows tables every interval, the rest as it comes; `ended` is asked every POLL_S."""
        due = time.monotonic() + interval_s
        while not ended():
            time.sleep(POLL_S)
            if self._socket:
                self._socket.answer(self.documents)
            self._show_events()
            if time.monotonic() >= due:
                self._show_tables(final=False)
                due = max(due + interval_s, time.monotonic())

    def finish(self) -> None:
        """What has come since then; to be called when the stage sees no packets any more."""
        self._show_events()
        self._show_tables(final=True)
        self._printer.close()

    def _show_events(self) -> None:
        if events := self._stage.events():
            self._printer.events(events)
        if self._trace and (lines := self._trace.lines()):
            self._printer.traced(lines)
        if self._stage.lost > self._lost:
            self._printer.lost(self._stage.lost - self._lost)
            self._lost = self._stage.lost

    def _show_tables(self, *, final: bool) -> None:
        snapshots, now = self._snapshots(self._shown)
        if snapshots:
            self._printer.tables(snapshots, final=final)
        self._earlier, self._shown = self._shown, now

    def documents(self) -> list[Document]:
        """The tables now. Rates are over an interval at least."""
        snapshots, _ = self._snapshots(self._earlier)
        return [_timed(stage_tables.document(snapshot)) for snapshot in snapshots]

    def _snapshots(self, before: Shown) -> tuple[list[Snapshot], Shown]:
        now = Shown(time.monotonic(), {table.name: table.read() for table in self._stage.tables})
        seconds = now.at_s - before.at_s if before.at_s else 0
        kinds = {table.name: table.kind for table in self._stage.tables}
        snapshots = [
            Snapshot(name, kinds[name], entries, before.entries.get(name, ()), seconds)
            for name, entries in now.entries.items()
        ]
        return snapshots, now


# Printers


def _now() -> datetime:
    return datetime.now().astimezone()


class JsonPrinter:
    def __init__(self, out: IO[str]) -> None:
        self._out = out

    def tables(self, snapshots: Sequence[Snapshot], *, final: bool) -> None:
        for snapshot in snapshots:
            self._write({**stage_tables.document(snapshot), "final": final})

    def events(self, events: Sequence[Event]) -> None:
        for event in events:
            self._write({"event": event.table, "data": event.data})

    def traced(self, lines: Sequence[str]) -> None:
        for line in lines:
            self._write({"trace": line})

    def lost(self, events: int) -> None:
        self._write({"lost_events": events})

    def close(self) -> None:
        pass

    def _write(self, document: Document) -> None:
        print(json.dumps(_timed(document)), file=self._out, flush=True)


def _timed(document: Document) -> Document:
    return {"time": _now().isoformat(timespec="milliseconds"), **document}


class LinePrinter:
    """Appends."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out

    def tables(self, snapshots: Sequence[Snapshot], *, final: bool) -> None:
        self._write("\n".join(_block(snapshots, colour=False)) + "\n")

    def events(self, events: Sequence[Event]) -> None:
        self._write(_event_lines(events))

    def traced(self, lines: Sequence[str]) -> None:
        self._write(_traced_lines(lines))

    def lost(self, events: int) -> None:
        self._write(_lost_line(events))

    def close(self) -> None:
        pass

    def _write(self, text: str) -> None:
        print(text, file=self._out, flush=True)


class ScreenPrinter:
    """Redraws the tables in place, below what has come."""

    def __init__(self, out: IO[str], *, colour: bool) -> None:
        self._out, self._colour = out, colour
        self._live: Live | None = None

    def tables(self, snapshots: Sequence[Snapshot], *, final: bool) -> None:
        from rich.text import Text

        block = "\n".join(_block(snapshots, colour=self._colour))
        self._screen().update(Text.from_ansi(block), refresh=True)

    def events(self, events: Sequence[Event]) -> None:
        self._append(_event_lines(events))

    def traced(self, lines: Sequence[str]) -> None:
        self._append(_traced_lines(lines))

    def lost(self, events: int) -> None:
        self._append(_lost_line(events))

    def _append(self, text: str) -> None:
        self._screen().console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._live:
            self._live.stop()

    def _screen(self) -> Live:
        if self._live is None:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(file=self._out), auto_refresh=False, vertical_overflow="ellipsis")
            self._live.start()
        return self._live


def _block(snapshots: Sequence[Snapshot], *, colour: bool) -> list[str]:
    documents = map(stage_tables.document, snapshots)
    shown = [line for document in documents for line in stage_tables.lines(document, colour=colour)]
    return [_now().strftime("%H:%M:%S"), *shown]


def _clock() -> str:
    return _now().strftime("%H:%M:%S.%f")[:-3]


def _event_lines(events: Sequence[Event]) -> str:
    clock = _clock()
    return "\n".join(f"{clock} {event.table} {_fields(event.data)}" for event in events)


def _traced_lines(lines: Sequence[str]) -> str:
    clock = _clock()
    return "\n".join(f"{clock} {line}" for line in lines)


def _fields(data: Any) -> str:
    if isinstance(data, dict):
        return " ".join(f"{name}={_fields(value)}" for name, value in data.items())
    return ",".join(map(_fields, data)) if isinstance(data, list) else str(data)


def _lost_line(events: int) -> str:
    return f"{_clock()} {events} event{'' if events == 1 else 's'} lost: they arrive faster than they are shown"
