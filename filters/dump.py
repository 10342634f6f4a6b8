"""A capture from interfaces: programs put on, their records brought to a file or to the decoder, accounts kept.

Enters: classic instructions, interfaces, where to look. Leaves: records in a Sink, and at the end Counts that add up.
Programs and rings go with the process, however it ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Self

from filters.capture import Capture
from filters.cbpf import Instruction
from filters.errors import NotWritten
from filters.hook import TC_IN, TC_OUT, XDP_FRAGS, Hook
from filters.interfaces import Interface, promiscuous
from filters.merge import in_order
from filters.pcap import FilesFull, Sink, count_records
from filters.program import LoadedProgram, Rule, assemble, load
from filters.ring import Counts, Rings
from filters.selftest import check
from filters.translate import translate
from xdp.errors import AttachError, NotSupported
from xdp.link import hold_at_tc, hold_at_xdp

_CLOCK_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Request:
    """What to capture. `ingress` and `egress` are the ways that packets go; `at` is a hook by name, instead of the best
    one for each. `buffer` is in bytes for each CPU."""

    instructions: Sequence[Instruction]
    interfaces: Sequence[Interface]
    ingress: bool = True
    egress: bool = True
    at: str | None = None
    buffer: int = 1 << 22
    limit: int | None = None
    nano: bool = False
    promiscuous: bool = True
    selftest: bool = True


class Session:
    """Programs at work, from start() to stop(); deliver() brings what has come in to the sink."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._resources, self._links = ExitStack(), ExitStack()
        self._rings = self._resources.enter_context(Rings(request.buffer))
        self._programs: dict[str, LoadedProgram] = {}
        self._clock_set = time.monotonic()
        self._written, self._is_full = 0, False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._links.close()
        self._resources.close()

    def start(self) -> None:
        """Raises FilterError or XdpError; nothing is attached then."""
        for interface in self._request.interfaces:
            self._attach(interface)
        if self._request.promiscuous:
            on_a_wire = [i for i in self._request.interfaces if not i.is_loopback]
            self._links.enter_context(promiscuous(on_a_wire))

    def stop(self) -> None:
        self._links.close()

    def deliver(self, sink: Sink) -> None:
        """Hands over all that has been captured, in the order of time. Raises as the sink does."""
        self._keep_clock()
        with self._rings.harvest() as spans:
            try:
                sink.write(in_order(spans))
            except (NotWritten, FilesFull) as ending:
                self._written, self._is_full = ending.written, isinstance(ending, FilesFull)
                raise

    def finish(self, sink: Sink) -> None:
        """Stops, and delivers the rest."""
        self.stop()
        self._rings.settled()
        self.deliver(sink)

    @property
    def is_complete(self) -> bool:
        """Whether as many packets have been captured as were asked for."""
        return self._request.limit is not None and self.counts().captured >= self._request.limit

    def counts(self) -> Counts:
        return self._rings.counts()

    def settled(self) -> Counts:
        """After stop(): the counts at the end. Records that the sink did not take are not captured, but lost; or over,
        where it was full."""
        counts = self._rings.settled()
        with self._rings.harvest() as by_cpu:
            left = sum(count_records(span) for spans in by_cpu for span in spans) - self._written
        lost, over = (0, left) if self._is_full else (left, 0)
        return replace(counts, captured=counts.captured - left, lost=counts.lost + lost, over=counts.over + over)

    def _keep_clock(self) -> None:
        if time.monotonic() - self._clock_set > _CLOCK_EVERY_S:
            self._rings.set_clock()
            self._clock_set = time.monotonic()

    def _attach(self, interface: Interface) -> None:
        request = self._request
        if request.at:
            self._hold(_AT[request.at](interface, self._program))
            return
        if request.ingress:
            self._hold(_at_ingress(interface, self._program))
        if request.egress and not (request.ingress and interface.is_loopback):  # where all that leaves comes in
            self._hold(_at_tc_out(interface, self._program))

    def _hold(self, held: Held) -> None:
        self._links.enter_context(held)

    def _program(self, hook: Hook) -> LoadedProgram:
        """The program for a hook, loaded when it is first asked for."""
        if hook.name not in self._programs:
            request = self._request
            if request.selftest:
                check(request.instructions, hook)
            rule = Rule(translate(request.instructions, hook), [Capture(self._rings, request.nano, request.limit)])
            program = load("xdp_dump", hook, assemble(hook, [rule]))
            self._programs[hook.name] = self._resources.enter_context(program)
        return self._programs[hook.name]


Programs = Callable[[Hook], LoadedProgram]
Held = AbstractContextManager[object]  # a program on an interface, until the end of the block


def _at_ingress(interface: Interface, program: Programs) -> Held:
    """Native XDP where there is such a thing and nobody else's program, else tc, which costs less than generic XDP."""
    try:
        return hold_at_xdp(interface.index, program(XDP_FRAGS).fd)
    except (NotSupported, AttachError):
        return _at_tc_in(interface, program)


def _at_xdp(interface: Interface, program: Programs) -> Held:
    try:
        return hold_at_xdp(interface.index, program(XDP_FRAGS).fd)
    except NotSupported:
        return hold_at_xdp(interface.index, program(XDP_FRAGS).fd, generic=True)


def _at_tc_in(interface: Interface, program: Programs) -> Held:
    return _at_tc(interface, program(TC_IN), egress=False)


def _at_tc_out(interface: Interface, program: Programs) -> Held:
    return _at_tc(interface, program(TC_OUT), egress=True)


def _at_tc(interface: Interface, program: LoadedProgram, *, egress: bool) -> Held:
    try:
        return hold_at_tc(interface.index, program.fd, egress=egress)
    except NotSupported:
        from xdp import tc  # with all of netlink, for kernels without tcx only

        return tc.hold(interface.index, program.fd, program.id, program.name, egress=egress)


_AT = {"xdp": _at_xdp, "tc-in": _at_tc_in, "tc-out": _at_tc_out}
