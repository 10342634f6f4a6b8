"""`xdp-lb stage`: a C function of the user's own -> a program in the packets' path, and what it finds on the screen."""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lb.cli import completion
from lb.cli.common import wants_colour
from lb.cli.options import json_option
from lb.errors import DataplaneError
from lb.formats.documents import Document, to_json
from lb.paths import Paths

if TYPE_CHECKING:  # what is compiled for, other commands do not wait for
    from lb.stages.lifecycle import Record, Request
    from lb.stages.source import Source
    from lb.stages.trace import Trace
    from lb.stages.watch import Printer

UNITS_S = {"ms": 0.001, "s": 1, "m": 60, "": 1}
ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def parse_interval(text: str) -> float:
    """Seconds: 1s, 500ms, 2m; without a unit they are seconds too."""
    figures = text.rstrip("ms")
    try:
        seconds = float(figures) * UNITS_S[text[len(figures) :]]
    except (ValueError, KeyError):
        raise click.BadParameter(f"{text}: not a duration such as 1s, 500ms or 2m") from None
    if not 0.1 <= seconds <= 86400:
        raise click.BadParameter(f"{text}: out of range 100ms to 1440m")
    return seconds


@click.group()
def stage() -> None:
    """Run your own C function as an XDP stage."""


@stage.command()
@click.argument("interface", metavar="IFACE", shell_complete=completion.interfaces)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--at",
    type=click.Choice(["xdp", "xdp-exit"]),
    default="xdp",
    metavar="WHERE",
    help="xdp: before the balancer; xdp-exit: after its verdict.  [default: xdp]",
)
@click.option(
    "--interval",
    "interval_s",
    type=parse_interval,
    default="1s",
    metavar="TIME",
    help="Interval between tables.  [default: 1s]",
)
@click.option("--function", default="stage", metavar="NAME", help="Entry function in FILE.  [default: stage]")
@click.option("-D", "defines", multiple=True, metavar="NAME[=VALUE]", help="Define a macro. Repeatable.")
@json_option("Print JSON, one document per line (keys above).")
def run(
    interface: str,
    file: Path,
    at: str,
    interval_s: float,
    function: str,
    defines: tuple[str, ...],
    as_json: bool,
) -> None:
    """Compile FILE with BCC and run it on IFACE until Ctrl-C.

    FILE defines int stage(struct xdp_md *ctx) in BCC's C, with its macros (BPF_HASH, BPF_ARRAY,
    BPF_HISTOGRAM, BPF_PERF_OUTPUT, BPF_RINGBUF_OUTPUT, ...). XDP_DROP drops the packet; after any
    other return value it goes on to the next stage, the balancer or the host. Tables are printed
    once per interval, events and bpf_trace_printk() lines as they arrive. Tables whose name starts
    with _ are hidden. Fields of type struct in_addr and struct in6_addr print as addresses.

    At xdp-exit, xdp_lb_verdict() returns a pointer to the balancer's verdict, or NULL: action (enum
    xdp_action), reason (XDP_LB_FORWARDED, XDP_LB_PASS_NOT_A_SERVICE, ...), egress (interface
    index), bytes.

    Without the balancer on IFACE, the stage is the interface's only XDP program and is removed when
    this process ends. With it, a stage whose process is killed keeps running; stage list shows it,
    stage stop removes it.

    Requires BCC (apt install python3-bpfcc) and kernel headers of any version.

    \b
    JSON: {time, table, kind, entries: [{key, value, per_second}], final}
          {time, table, kind, histograms: [{key, buckets}], final}
          {time, event, data}, {time, trace}, {time, lost_events}
      kind     hash, array, trie, histogram, log2_histogram
      buckets  [{low, high, count}] of a log2_histogram, else [{value, count}]
      final    true: the last one of this table

    \b
    Examples:
      # The examples are installed: xdp-lb stage examples
      xdp-lb stage run eth0 hello.c
      # Drop more than 100 SYNs per second from a /24
      xdp-lb stage run eth0 syn_rate.c -D LIMIT=100
      # Sizes of forwarded packets, as JSON
      xdp-lb stage run eth0 packet_sizes.c --at xdp-exit --json
    """
    from lb.stages.lifecycle import Request
    from lb.stages.source import Source

    gc.enable()  # other commands end before their garbage matters
    source = Source.read(file, function, defines)
    _run(Request(source, interface, at), interval_s, _printer(as_json))


def _printer(as_json: bool) -> Printer:
    from lb.stages.watch import JsonPrinter, LinePrinter, ScreenPrinter

    if as_json:
        return JsonPrinter(sys.stdout)
    return ScreenPrinter(sys.stdout, colour=wants_colour()) if sys.stdout.isatty() else LinePrinter(sys.stdout)


def _run(request: Request, interval_s: float, printer: Printer) -> None:
    from lb.stages.kernel import is_in_force
    from lb.stages.lifecycle import Records, compiled, in_place
    from lb.stages.socket import TableSocket
    from lb.stages.watch import Watch

    paths, ended = Paths.here(), _until_signal()
    with compiled(paths, request) as (found, record), _trace(request.source, record) as trace:
        asked = TableSocket(Records(paths).socket(record))
        watch = Watch(found, trace, printer, asked)
        with closing(asked), in_place(paths, record, found) as warning:
            if warning:
                _say(f"warning: {warning}")
            _say(f"stage {record.number}: {request.source.path} on {_place(record)}; Ctrl-C stops it")

            def is_over() -> bool:
                return ended() or not (record.place is None or is_in_force(paths, found.stages_fd))

            watch.until(is_over, interval_s)
        watch.finish()
    if not ended():
        raise DataplaneError(f"{record.interface}: stage stopped: the balancer was detached")


def _say(text: str) -> None:
    click.echo(f"xdp-lb: {text}", err=True)


def _place(record: Record) -> str:
    where = f"{record.interface}, at {record.at}"
    return f"{where}, standalone" if record.place is None else f"{where}, place {record.place}"


def _until_signal() -> Callable[[], bool]:
    """Whether one has come that ends the command; from now on it does so in good order only."""
    came: list[int] = []
    for number in ENDS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup(1)
            signal.signal(number, lambda got, _: came.append(got))
    return lambda: bool(came)


def _trace(source: Source, record: Record) -> closing[Trace] | nullcontext[None]:
    if not source.traces:
        return nullcontext()
    from lb.stages.trace import Trace

    try:
        return closing(Trace(record.mark))
    except OSError as error:
        _say(f"warning: lines of bpf_trace_printk() are not shown: {error.strerror}")
        return nullcontext()


@stage.command("list")
@json_option("Print JSON (keys above).")
def list_stages(as_json: bool) -> None:
    """List stages, including orphaned ones.

    A stage is orphaned if its process was killed: its program keeps running but nothing shows its
    tables. xdp-lb stage stop removes it.

    \b
    JSON: [{number, interface, at, place, file, function, pid, program_id,
            since, state}]
      place    position in the balancer's chain; null: no balancer
      state    compiling, running or orphaned

    \b
    Examples:
      xdp-lb stage list
      xdp-lb stage list --json | jq '.[].file'
    """
    from lb.client.connect import open_stages

    with open_stages(Paths.here()) as stages:
        found = stages.listed()
    click.echo(to_json(found) if as_json else "\n".join(_lines(found)))


def _lines(found: Sequence[Document]) -> list[str]:
    from lb.formats.text import Column, table

    if not found:
        return ["no stages: xdp-lb stage run IFACE FILE.c starts one"]
    headings = ("STAGE", "INTERFACE", "AT", "PLACE", "FILE", "FUNCTION", "PID", "PROGRAM", "SINCE", "STATE")
    numbers = {"STAGE", "PLACE", "PID", "PROGRAM"}
    columns = [Column(heading, number=heading in numbers) for heading in headings]
    return table(columns, [_row(each) for each in found], colour=wants_colour())


KEYS = ("number", "interface", "at", "place", "file", "function", "pid", "program_id", "since", "state")


def _row(record: Document) -> list[str]:
    return ["-" if record[key] is None else str(record[key]) for key in KEYS]


@stage.command()
@click.argument("number", type=int, metavar="STAGE")
@json_option("Print JSON (keys above).")
def tables(number: int, as_json: bool) -> None:
    """Show the current tables of a running stage.

    The stage may run in another terminal. Rates are since the last but one time its tables were
    printed there.

    \b
    JSON: [{time, table, kind, entries or histograms}], as for stage run

    \b
    Examples:
      xdp-lb stage tables 1
      xdp-lb stage tables 1 --json | jq '.[].table'
    """
    from lb.client.connect import open_stages
    from lb.stages.tables import lines

    with open_stages(Paths.here()) as stages:
        found = stages.tables(number)
    shown = [line for each in found for line in lines(each, colour=wants_colour())]
    click.echo(to_json(found) if as_json else "\n".join(shown) or "no tables")


@stage.command()
@click.argument("numbers", type=int, nargs=-1, metavar="STAGE...")
@click.option("--all", "everything", is_flag=True, help="Stop all stages of this network namespace.")
def stop(numbers: tuple[int, ...], everything: bool) -> None:
    """Stop stages by their number in xdp-lb stage list.

    Forwarding is not interrupted.

    \b
    Examples:
      xdp-lb stage stop 1
      xdp-lb stage stop --all
    """
    from lb.client.connect import open_stages

    if bool(numbers) == everything:
        raise click.UsageError("Name stages, or give --all.")
    with open_stages(Paths.here()) as stages:
        ended = stages.stop(numbers)
    lines = [f"stage {record['number']}: stopped, {record['interface']}, at {record['at']}" for record in ended]
    click.echo("\n".join(lines) or "no stages")


@stage.command()
def examples() -> None:
    """List the example stages and their paths.

    \b
    Examples:
      xdp-lb stage examples
    """
    from lb.stages.source import examples as found

    click.echo("\n".join(f"{path}\n    {summary}" for path, summary in found()))
