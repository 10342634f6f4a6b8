"""`xdp-lb top`: the balancer's figures again and again, on the whole terminal or as blocks of lines.

Each reading opens the balancer anew, as every command does: what another process attaches, changes or detaches
meanwhile is seen, and with a daemon it is the daemon that is asked.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from lb.cli.common import open_balancer

if TYPE_CHECKING:  # most commands do not wait for this
    from lb.top.rates import View

SHORTEST_INTERVAL_S, LONGEST_INTERVAL_S = 0.1, 86400.0


def _seconds(text: str) -> float:
    seconds = float(text)
    if not SHORTEST_INTERVAL_S <= seconds <= LONGEST_INTERVAL_S:  # nor is "nan"
        raise click.BadParameter(f"{text}: not from {SHORTEST_INTERVAL_S:g} to {LONGEST_INTERVAL_S:g}")
    return seconds


@click.command("top")
@click.option(
    "-d",
    "--delay",
    "delay_s",
    type=_seconds,
    metavar="SECONDS",
    default="1",
    show_default=True,
    help="Interval between samples.",
)
@click.option("-n", "--count", type=click.IntRange(min=1), metavar="COUNT", help="Exit after COUNT samples.")
@click.option("--once", is_flag=True, help="Print one sample and exit.")
def top_command(delay_s: float, count: int | None, once: bool) -> None:
    """Show live packet, bit and connection rates of services and backends.

    Full-screen on a terminal, otherwise one block of lines per sample. Columns are dropped if the
    terminal is too narrow.

    OPEN counts the connections open now (~: an estimate, -: unknown; see xdp-lb status).

    REPLY/S and the BIT/S next to it count backend to client (mode nat). STATE of a service is its
    mode; ~N: N slots are in transition. The sparkline shows recent packet rates.

    \b
    Keys:
      q              quit
      s              cycle the sort key: packets, bits, connections, name
      space          pause
      arrows, PgUp, PgDn, Home, End
                     scroll

    \b
    Examples:
      xdp-lb top
      xdp-lb top -d 5
      # Six samples into a file
      xdp-lb top -d 10 -n 6 > load.txt
    """
    gc.enable()  # this command stays for long
    if once or not (sys.stdin.isatty() and sys.stdout.isatty()):
        _print_blocks(_reader(), delay_s, 1 if once else count)
    else:
        from lb.top.session import Session

        Session(_reader(), delay_s, count).run()


def _reader() -> Callable[[], View]:
    """What gives one View after the other, each measured since the one before."""
    from lb.top.rates import Meter

    meter = Meter()

    def read() -> View:
        with open_balancer(write=False) as balancer:
            status = balancer.status()
        return meter.take(status, time.monotonic())

    return read


def _print_blocks(read: Callable[[], View], delay_s: float, count: int | None) -> None:
    from lb.top.view import Display, plain

    read()
    display, done = Display(interval_s=delay_s), 0
    while count is None or done < count:
        time.sleep(delay_s)
        lines = plain(read(), replace(display, clock=time.strftime("%H:%M:%S")))
        click.echo("\n".join([*([""] if done else []), *lines]))
        done += 1
