"""What a running stage finds, on a terminal, in lines and as documents."""

from __future__ import annotations

import io
import json
import os
import re
import tty
from dataclasses import dataclass, field
from typing import Any, cast

from lb.stages.compile import Event, Stage, Table
from lb.stages.trace import Trace
from lb.stages.watch import JsonPrinter, LinePrinter, Printer, ScreenPrinter, Watch

PACKET = Event("packets", {"source": "10.0.0.1", "bytes": 60, "tags": [1, 2]})


@dataclass
class Found:
    """In the place of a Stage and of its Trace."""

    count: int = 0
    lost: int = 0
    coming: list[Event] = field(default_factory=list)
    traced: list[str] = field(default_factory=list)

    @property
    def tables(self) -> tuple[Table, ...]:
        return (Table("sources", "hash", lambda: [("10.0.0.1", self.count)]),)

    def events(self) -> list[Event]:
        found, self.coming = self.coming, []
        return found

    def lines(self) -> list[str]:
        found, self.traced = self.traced, []
        return found


def watch(found: Found, printer: Printer) -> Watch:
    return Watch(cast(Stage, found), cast(Trace, found), printer)


def times(count: int) -> Any:
    """Whether it has been asked so many times already."""
    left = iter([False] * count)
    return lambda: next(left, True)


def test_lines_come_as_they_come_and_tables_at_the_end() -> None:
    out = io.StringIO()
    found = Found(count=3, lost=2, coming=[PACKET], traced=["hello 1"])
    watching = watch(found, LinePrinter(out))
    watching.until(times(1), 3600)
    assert "sources" not in out.getvalue()
    watching.finish()
    clock = r"\d\d:\d\d:\d\d\.\d{3}"
    assert re.fullmatch(
        rf"{clock} packets source=10\.0\.0\.1 bytes=60 tags=1,2\n"
        rf"{clock} hello 1\n"
        rf"{clock} 2 events lost: they arrive faster than they are shown\n"
        r"\d\d:\d\d:\d\d\nsources\n  KEY       VALUE\n  10\.0\.0\.1      3\n\n",
        out.getvalue(),
    )


def test_documents_have_a_time_and_say_which_is_the_last_of_a_table() -> None:
    out = io.StringIO()
    watching = watch(Found(count=3, lost=1, coming=[PACKET], traced=["hello"]), JsonPrinter(out))
    watching.until(times(1), 0)
    watching.finish()
    documents = [json.loads(line) for line in out.getvalue().splitlines()]
    assert all("time" in document for document in documents)
    assert [sorted(document.keys() - {"time"}) for document in documents] == [
        ["data", "event"],
        ["trace"],
        ["lost_events"],
        ["entries", "final", "kind", "table"],
        ["entries", "final", "kind", "table"],
    ]
    assert documents[0]["data"] == PACKET.data
    assert [document["final"] for document in documents if "table" in document] == [False, True]
    first, last = (document["entries"][0] for document in documents if "table" in document)
    assert (first["per_second"], last["per_second"]) == (None, 0.0)


def test_events_that_are_lost_are_told_once() -> None:
    out = io.StringIO()
    watching = watch(Found(lost=1), LinePrinter(out))
    watching.until(times(3), 3600)
    assert out.getvalue().count("1 event lost") == 1


def test_on_a_terminal_tables_are_redrawn_below_what_has_come() -> None:
    master, slave = os.openpty()
    tty.setraw(slave)
    with os.fdopen(slave, "w") as terminal:
        printer = ScreenPrinter(terminal, colour=False)
        found = Found(count=1)
        watching = watch(found, printer)
        watching.until(times(1), 0)
        found.count, found.coming = 2, [PACKET]
        watching.finish()
    shown = os.read(master, 1 << 16).decode()
    os.close(master)
    cursor_up, erase_line = "\x1b[1A", "\x1b[2K"
    first, _, rest = shown.partition("packets source=10.0.0.1")
    assert first.count("sources") == 1
    assert cursor_up in first
    assert erase_line in first
    assert cursor_up in rest
    assert rest.rindex("10.0.0.1      1") < rest.rindex("10.0.0.1      2")


def test_tables_are_told_to_who_asks_with_rates_over_an_interval_at_least() -> None:
    found = Found(count=3)
    watching = watch(found, LinePrinter(io.StringIO()))
    (first,) = watching.documents()
    assert (first["table"], first["entries"]) == (
        "sources",
        [{"key": "10.0.0.1", "value": 3, "per_second": None}],
    )
    watching.finish()  # shows them
    assert watching.documents()[0]["entries"][0]["per_second"] is None
    watching.finish()
    found.count = 7
    assert watching.documents()[0]["entries"][0]["per_second"] > 0
