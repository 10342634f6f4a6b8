"""`make demo`: the quick start of the README on a test bed, under load.

What enters is nothing; what leaves is the terminal: each command as one would type it, what it says,
and how many requests each backend answers meanwhile. Exit status 0 if none has failed, 1 otherwise.
The client has two loads under way: one opens a connection for each request, the other keeps its
connections. So a drained backend is seen to get no new ones, and to keep those it has.
"""

from __future__ import annotations

import contextlib
import json
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

    def __init__(self, bed: Bed, console: Console) -> None:
        self.bed = bed
        self.console = console
        self.vip = f"{bed.vip4}:80"
        self.done_to: dict[str, str] = {}
        self._loads: tuple[RunningLoad, ...] = ()
        self._live: Live | None = None
        self._last = time.monotonic(), Report(), Report()
        self._rates: tuple[Counter[str], Counter[str]] = (Counter(), Counter())

    def run(self) -> int:
        """The whole story; the exit status."""
        first = self.bed.backends[:3]
        self.say("3 web servers, b1 to b3, behind a balancer that forwards nothing by itself:")
        self.xdp_lb("attach", "eth0", "--vip", self.vip, "--backends", ",".join(backend.ipv4 for backend in first))
        self.done_to = dict.fromkeys((backend.label for backend in first), "")
        with self.loaded():
            self.watch()
            self.add(3)
            self.watch()
            self.drain(0)
            self.watch()
        self.xdp_lb("status", "--json")
        self.xdp_lb("status")
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
        if words == ("status", "--json"):
            json.loads(said.stdout)  # it is JSON, or this ends here
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
        """Let the traffic go on for a while, and show it."""
        until = time.monotonic() + PHASE_S
        while time.monotonic() < until:
            time.sleep(TICK_S if self._live else PHASE_S / 2)
            self.update()

    def update(self) -> None:
        """Take the next reports, and show them."""
        now, new, kept = time.monotonic(), *(load.report for load in self._loads)
        then, new_before, kept_before = self._last
        self._rates = rates(new_before, new, now - then), rates(kept_before, kept, now - then)
        self._last = now, new, kept
        if self._live:
            self._live.refresh()
        else:
            self.console.print(Text(self.line()), soft_wrap=True)

    def line(self) -> str:
        """The table, where there is no terminal to draw it on."""
        new, kept = self._rates
        shares = ", ".join(f"{label} {new[label]} + {kept[label]}" for label in self.done_to)
        return f"requests per second on new + kept connections: {shares}; {self.verdict()}"

    def table(self) -> Table:
        new, kept = self._rates
        most = max([1, *new.values(), *kept.values()])
        table = Table(title="requests per second", caption=self.verdict(), title_justify="left", expand=False)
        table.add_column("backend")
        table.add_column("on new connections", min_width=BAR_WIDTH + 8)
        table.add_column("on kept connections", min_width=BAR_WIDTH + 8)
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
    console = Console(highlight=False)
    if os.geteuid() != 0:
        console.print("demo: run as root: it makes network namespaces")
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Bed(backends=4) as bed:
            for backend in bed.backends:
                start_http(bed, backend)
            return Demo(bed, console).run()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
