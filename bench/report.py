"""What every benchmark gives back, and how it is shown.

In come Results, one by one as they are measured; out go a table on standard error that grows with them and, if asked
for, one JSON array of {"bench", "case", "value", "unit", "floor", "kernel", "cpu"} objects on standard output.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.live import Live
from rich.table import Column, Table

UNCUT = 200  # columns: a file or a pipe has no width of its own


class BenchError(Exception):
    """What was measured is not what was to be measured; the message says what it was instead."""


@dataclass(frozen=True, slots=True)
class Result:
    """One figure. `value` includes `floor`, what the measuring alone costs in the same unit; None where nothing does.

    `case` is made of space-separated pairs: "mode=nat family=4 packet=ack flows=65536 transition=0".
    """

    bench: str
    case: str
    value: float
    unit: str
    floor: float | None = None


def command(measure: Callable[..., Iterable[Result]]) -> click.Command:
    """The command that shows what `measure` yields. Its options are those that decorate `measure`, and --json."""

    @click.command
    @click.option("--json", "as_json", is_flag=True, help="Print a JSON array on standard output.")
    @functools.wraps(measure)
    def show_and_print(as_json: bool, **options: Any) -> None:
        results = show(measure(**options))
        if as_json:
            click.echo(json.dumps(documents(results), indent=2))

    return show_and_print


def show(results: Iterable[Result]) -> list[Result]:
    """All of `results`, each one added to the table on standard error as it comes. No result, no table."""
    coming = iter(results)
    shown = list(islice(coming, 1))
    table = table_of(shown)
    with Live(table, console=error_console(), auto_refresh=False) as live:
        for result in coming:
            shown.append(result)
            table.add_row(*cells(result))
            live.refresh()
    return shown


def error_console() -> Console:
    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = UNCUT
    return console


def table_of(results: Iterable[Result]) -> Table:
    numbers = (Column(heading, justify="right") for heading in ("TOTAL", "FLOOR", "NET"))
    table = Table("BENCH", "CASE", *numbers, "UNIT", box=None)
    for result in results:
        table.add_row(*cells(result))
    return table


def cells(result: Result) -> tuple[str, ...]:
    if result.floor is None:
        return result.bench, result.case, f"{result.value:g}", "", "", result.unit
    net = result.value - result.floor
    return result.bench, result.case, f"{result.value:g}", f"{result.floor:g}", f"{net:g}", result.unit


def percent_lost(sent: int, arrived: int) -> float:
    """More that arrived than was sent is a negative loss: something was counted that is not what was sent."""
    return 100 * (sent - arrived) / sent


def documents(results: Iterable[Result]) -> list[dict[str, object]]:
    machine = {"kernel": os.uname().release, "cpu": cpu_model()}
    return [asdict(result) | machine for result in results]


def cpu_model() -> str:
    """The name that /proc/cpuinfo gives; the architecture where it gives none."""
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == "model name"), os.uname().machine)


def power_of_two(_: click.Context, __: click.Parameter, value: int) -> int:
    """For options that are numbers of flows."""
    if value & (value - 1):
        raise click.BadParameter(f"{value} is not a power of two.")
    return value
