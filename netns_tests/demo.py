"""`make demo`: the quick start of the README on a test bed, under load.

    python -m netns_tests.demo [--json]

Prints each command as one would type it, its output, the status table after each change, and how many requests each
backend answers meanwhile. --json prints `xdp-lb status --json` too. Exit status 0 if no request has failed, else 1.
The client runs two loads: one opens a connection for each request, the other keeps its connections open. So a drained
backend is seen to get no new connections, and to keep those it has.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from netns_tests.bed.load import Report
from netns_tests.bed.servers import start_http
from netns_tests.bed.topology import Bed
from netns_tests.bed.traffic import RunningLoad, loading

PHASE_S = 3.0
TICK_S = 0.5
BAR_WIDTH = 24
EXIT_INTERRUPTED = 128 + signal.SIGINT


class Demo:
    """The bed, the terminal, and what is known of the backends: label -> what was done to it."""

    def __init__(self, bed: Bed, console: Console, *, as_json: bool) -> None:
        self.bed = bed
        self.console = console
        self.as_json = as_json
        self.vip = f"{bed.vip4}:80"
        self.done_to: dict[str, str] = {}
        self._loads: tuple[RunningLoad, ...] = ()
        self._live: Live | None = None
        self._last = time.monotonic(), Report(), Report()
        self._rates: tuple[Counter[str], Counter[str]] = (Counter(), Counter())

    def run(self) -> int:
        """Everything; the exit status."""
        first = self.bed.backends[:3]
        self.say("3 web servers, b1 to b3, behind a host with IP forwarding off:")
        self.xdp_lb("attach", "eth0", "--vip", self.vip, "--backends", ",".join(backend.ipv4 for backend in first))
        self.done_to = dict.fromkeys((backend.label for backend in first), "")
        with self.loaded():
            self.watch()
            self.xdp_lb("status")
            self.say("A fourth server, under load. Open connections stay where they are:")
            self.add(3)
            self.watch()
            self.xdp_lb("status")
            self.say("The first server drains: no new connections, open ones continue:")
            self.drain(0)
            self.watch()
            self.xdp_lb("status")
        if self.as_json:
            self.xdp_lb("status", "--json")
        return self.result()

    # What is done

    def add(self, number: int) -> None:
        backend = self.bed.backends[number]
        self.xdp_lb("backend", "add", self.vip, backend.ipv4)
        self.done_to[backend.label] = "added"

    def drain(self, number: int) -> None:
        backend = self.bed.backends[number]
        self.xdp_lb("backend", "drain", self.vip, backend.ipv4)
        self.done_to[backend.label] = "draining"

    def xdp_lb(self, *words: str) -> None:
        self.console.print(Text(f"$ {shlex.join(['xdp-lb', *words])}", style="bold"), soft_wrap=True)
        said = self.bed.xdp_lb(*words)
        self.console.print(Text(said.stderr.rstrip(), style="dim"), soft_wrap=True, end="\n" if said.stderr else "")
        self.console.print(Text(said.stdout), soft_wrap=True)

    def say(self, text: str) -> None:
        self.console.print(Text(text, style="italic"))

    # What is seen

    @contextlib.contextmanager
    def loaded(self) -> Iterator[None]:
        """Both loads under way, and on a terminal the table below all that is printed."""
        url = f"http://{self.vip}/"
        with (
            loading(self.bed, url, connections=20) as new,
            loading(self.bed, url, connections=20, keepalive=True) as kept,
            self.live_table(),
        ):
            self._loads = (new, kept)
            yield
            for load in self._loads:
                load.stop()
            self.update()

    @contextlib.contextmanager
    def live_table(self) -> Iterator[None]:
        if not self.console.is_terminal:
            yield
            return
        with Live(get_renderable=self.table, console=self.console, auto_refresh=False) as self._live:
            yield
        self._live = None

    def watch(self) -> None:
        """Let the traffic go on for a while, and show it: rates from now on, without what a command took."""
        self._last = self.reports()
        until = time.monotonic() + PHASE_S
        while time.monotonic() < until:
            time.sleep(TICK_S if self._live else PHASE_S)
            self.update()

    def update(self) -> None:
        """Take the next reports, and show them."""
        now, new, kept = self.reports()
        then, new_before, kept_before = self._last
        self._rates = rates(new_before, new, now - then), rates(kept_before, kept, now - then)
        self._last = now, new, kept
        if self._live:
            self._live.refresh()
        else:
            self.console.print(Text(self.line()), soft_wrap=True)

    def reports(self) -> tuple[float, Report, Report]:
        """When, and what both loads have done by then."""
        new, kept = self._loads
        return time.monotonic(), new.report, kept.report

    def line(self) -> str:
        """The table, without a terminal."""
        new, kept = self._rates
        shares = ", ".join(f"{label} {new[label]} + {kept[label]}" for label in self.done_to)
        return f"requests per second, new + open connections: {shares}; {self.verdict()}"

    def table(self) -> Table:
        new, kept = self._rates
        most = max([1, *new.values(), *kept.values()])
        table = Table(title="requests per second", caption=self.verdict(), title_justify="left", expand=False)
        table.add_column("backend")
        table.add_column("new connections", min_width=BAR_WIDTH + 8)
        table.add_column("open connections", min_width=BAR_WIDTH + 8)
        for label, done in self.done_to.items():
            table.add_row(
                Text.assemble(label, (f" {done}", "yellow")),
                bar(new[label], most, "green"),
                bar(kept[label], most, "cyan"),
            )
        return table

    def verdict(self) -> str:
        _, *reports = self._last
        return f"{sum(r.failed for r in reports)} failed of {sum(r.requests for r in reports)}"

    def result(self) -> int:
        _, *reports = self._last
        reasons = sum((report.reasons for report in reports), Counter())
        self.console.print(Text(f"{self.verdict()} requests", style="bold red" if reasons else "bold green"))
        for reason, count in reasons.items():
            self.console.print(Text(f"  {reason}: {count}"))
        return 1 if reasons else 0


def rates(before: Report, after: Report, seconds: float) -> Counter[str]:
    """Answers per second, by backend."""
    return Counter({label: round(n / seconds) for label, n in (after.backends - before.backends).items()})


def bar(rate: int, most: int, colour: str) -> Text:
    return Text.assemble(f"{rate:6d} ", ("━" * round(BAR_WIDTH * rate / most), colour))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m netns_tests.demo")
    parser.add_argument("--json", action="store_true", help="print xdp-lb status --json at the end, too")
    as_json = parser.parse_args().json
    console = Console(highlight=False)
    if os.geteuid() != 0:
        console.print("demo: run as root: it creates network namespaces")
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Bed(backends=4) as bed:
            for backend in bed.backends:
                start_http(bed, backend)
            return Demo(bed, console, as_json=as_json).run()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
