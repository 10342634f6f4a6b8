"""A capture session: attaches the programs, delivers their records to a file or the decoder, keeps the counters.

Enters: classic BPF, interfaces, capture points. Leaves: records in a Sink, and at the end Counts that add up.
Programs and rings are released with the process, however it ends.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Self

from filters.capture.ring import Rings
from filters.capture.taps import Request, Tap, Taps
from filters.errors import NotWritten
from filters.interfaces import promiscuous
from filters.records.counts import Counts
from filters.records.merge import in_order
from filters.records.pcap import FilesFull, Sink, count_records

_CLOCK_EVERY_S = 1.0
# How long packets may stay in the kernel: at low rates, fetching them is the main cost.
_PATIENCE_S, _PROMPT_S = 0.05, 0.01


class Session:
    """Attached programs, from start() to stop(); deliver() passes what was captured to the sink."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._resources, self._promiscuous = ExitStack(), ExitStack()
        self._rings = self._resources.enter_context(Rings(request.buffer))
        self._taps = Taps(request, self._rings)
        self._start_ns, self._clock_set = time.time_ns(), time.monotonic()
        self._written, self._is_full = 0, False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._taps.close()
        self._resources.close()

    def start(self) -> None:
        """Raises FilterError or XdpError."""
        self._taps.attach()
        if self._request.promiscuous:
            on_a_wire = [i for i in self._request.interfaces if not i.is_loopback]
            self._promiscuous.enter_context(promiscuous(on_a_wire))

    def stop(self) -> None:
        """May be called again."""
        self._promiscuous.close()
        self._taps.detach()

    def wait(self) -> None:
        """Wait for records to deliver."""
        self._rings.wait(_PROMPT_S if self._request.prompt else _PATIENCE_S)

    def deliver(self, sink: Sink) -> None:
        """Passes all captured records to the sink, ordered by time. Raises as the sink does."""
        self._keep_clock()
        with self._rings.harvest() as spans:
            try:
                sink.write(in_order(spans))
            except (NotWritten, FilesFull) as ending:
                self._written, self._is_full = ending.written, isinstance(ending, FilesFull)
                raise

    def finish(self, sink: Sink) -> None:
        """Stops and delivers the rest."""
        self.stop()
        self._rings.settled()
        self.deliver(sink)

    @property
    def is_complete(self) -> bool:
        """Whether the limit of packets has been captured."""
        limit = self._request.limit
        return limit is not None and self._rings.taken >= limit and self.counts().captured >= limit

    def counts(self) -> Counts:
        return self._rings.counts()

    def settled(self) -> Counts:
        """After stop(): the final counts. Records that the sink did not take count as lost, or as over where it was
        full."""
        counts = self._rings.settled()
        with self._rings.harvest() as by_cpu:
            left = sum(count_records(span) for spans in by_cpu for span in spans) - self._written
        lost, over = (0, left) if self._is_full else (left, 0)
        return replace(counts, captured=counts.captured - left, lost=counts.lost + lost, over=counts.over + over)

    # Counters

    @property
    def start_ns(self) -> int:
        """Start time in nanoseconds since 1970."""
        return self._start_ns

    @property
    def reasons(self) -> list[str]:
        """Reason names of the balancer, by the number in the metadata; the first stands for none."""
        return self._taps.reasons

    @property
    def taps(self) -> list[Tap]:
        return self._taps.at_work

    def counts_of(self, tap: Tap) -> Counts:
        """As the kernel has counted."""
        return self._rings.counts_of(tap.counter_set)

    def counts_by_cpu(self) -> list[Counts]:
        return self._rings.by_cpu()

    def counts_by_interface(self) -> dict[str, Counts]:
        """By name, only for interfaces that share no program with others."""
        found: dict[str, Counts] = {}
        shared = {interface.name for tap in self.taps if len(tap.interfaces) > 1 for interface in tap.interfaces}
        for tap in self.taps if self._taps.by_interface else ():
            for name in {interface.name for interface in tap.interfaces} - shared:
                found[name] = found.get(name, Counts()) + self.counts_of(tap)
        return found

    def _keep_clock(self) -> None:
        if time.monotonic() - self._clock_set > _CLOCK_EVERY_S:
            self._rings.set_clock()
            self._taps.keep_verdicts()
            self._clock_set = time.monotonic()
