"""The programs of a capture and where they are attached: at XDP, at tc, or to an XDP program already attached.

Enters: a Request, interfaces, Rings. Leaves: Taps, each an attached program with its own counters. All are detached
when the process ends, however it ends (of a stage in the balancer's path an idle relay stays: filters.capture.staged).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING

from filters.capture.fragments import FragmentFlag, fragment_flag
from filters.capture.metadata_writer import MetadataWriter
from filters.capture.record import Capture
from filters.capture.ring import MAX_COUNTER_SETS, Rings
from filters.compiler.cbpf import Instruction
from filters.compiler.hook import TC_IN, TC_OUT, XDP, XDP_FRAGS, Hook
from filters.compiler.translate import Translation, translate
from filters.interfaces import Interface
from filters.programs.program import Entry, FilterAction, LoadedProgram, Rule, assemble, load
from filters.records.metadata import CapturePoint
from filters.selftest.selftest import check
from xdp.errors import AttachError, LoadError, NotPermitted, NotSupported, Occupied, XdpError
from xdp.link import hold_at_program, hold_at_tc, hold_at_xdp
from xdp.maps import Map
from xdp.tracing import Target

if TYPE_CHECKING:  # only with another XDP program
    from filters.capture import staged
    from filters.capture.traced import Offsets

_PROGRAM_NAME = "xdp_dump"
_CAPTURE_POINTS = {point.words: point for point in CapturePoint}


@dataclass(frozen=True, slots=True)
class Request:
    """What to capture. `ingress`, `egress`: directions. `at`: a capture point by name; None: the best for each.
    `buffer`: bytes per CPU. `metadata`: records say where a packet was seen. `prompt`: low latency for each packet,
    the first one too, before throughput."""

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
    metadata: bool = False
    prompt: bool = False


@dataclass(slots=True)
class Tap:
    """A program and where it is attached."""

    point: CapturePoint
    program: LoadedProgram
    counter_set: int
    interfaces: list[Interface] = field(default_factory=list)
    is_staged: bool = False


class Taps:
    """From attach() to detach()."""

    def __init__(self, request: Request, rings: Rings) -> None:
        self._request, self._rings = request, rings
        self._resources, self._links = ExitStack(), ExitStack()
        self._loaded: dict[tuple[CapturePoint, int], Tap] = {}
        self._balancers: dict[int, staged.Balancer | None] = {}
        self._staged: dict[tuple[int, CapturePoint], list[Interface]] = {}
        self._verdict_sources: list[staged.Balancer] = []
        self._checked: set[str] = set()
        self._counter_sets = count()
        # One program per interface where counters by interface may be wanted, as long as there are counters.
        self.by_interface = request.metadata and 2 * len(request.interfaces) <= MAX_COUNTER_SETS

    def attach(self) -> None:
        """Raises FilterError or XdpError; detach() removes what was attached by then."""
        for interface in self._request.interfaces:
            self._attach(interface)
        for (program_id, point), interfaces in self._staged.items():
            self._enter_stage(program_id, point, interfaces)

    def detach(self) -> None:
        self._links.close()

    def close(self) -> None:
        self._links.close()
        self._resources.close()

    @property
    def at_work(self) -> list[Tap]:
        return [tap for tap in self._loaded.values() if tap.interfaces]

    @property
    def reasons(self) -> list[str]:
        """Reason names of the balancer, by the number in the metadata; the first stands for none."""
        known = [balancer for balancer in self._balancers.values() if balancer]
        return known[0].reasons if known else [""]

    def keep_verdicts(self) -> None:
        """Has balancers record verdicts again: another capture may have turned it off when it ended."""
        for balancer in self._verdict_sources:
            balancer.stages.records_verdicts = True

    # Where

    def _attach(self, interface: Interface) -> None:
        request = self._request
        if request.at:
            self._at(_CAPTURE_POINTS[request.at], interface)
            return
        if request.ingress:
            self._at_ingress(interface)
        if request.egress and not (request.ingress and interface.is_loopback):  # whatever it sends is received on it
            self._at(CapturePoint.TC_OUT, interface)

    def _at(self, point: CapturePoint, interface: Interface) -> None:
        match point:
            case CapturePoint.XDP:
                self._at_xdp(interface)
            case CapturePoint.XDP_EXIT:
                self._attach_to_program(interface, CapturePoint.XDP_EXIT)
            case CapturePoint.TC_IN:
                self._at_tc(self._tap(TC_IN, point, interface), interface)
            case CapturePoint.TC_OUT:
                self._at_tc(self._tap(TC_OUT, point, interface), interface)

    def _at_ingress(self, interface: Interface) -> None:
        """Native XDP where supported, also with another program attached; else tc, which is cheaper than generic
        XDP."""
        try:
            self._at_native_xdp(interface)
        except (NotSupported, AttachError):
            self._at(CapturePoint.TC_IN, interface)

    def _at_xdp(self, interface: Interface) -> None:
        try:
            self._at_native_xdp(interface)
        except NotSupported:
            tap = self._tap(XDP_FRAGS, CapturePoint.XDP, interface)
            self._hold(hold_at_xdp(interface.index, tap.program.fd, generic=True), tap, interface)

    def _at_native_xdp(self, interface: Interface) -> None:
        tap = self._tap(XDP_FRAGS, CapturePoint.XDP, interface)
        try:
            self._hold(hold_at_xdp(interface.index, tap.program.fd), tap, interface)
        except Occupied:
            self._attach_to_program(interface, CapturePoint.XDP)

    def _at_tc(self, tap: Tap, interface: Interface) -> None:
        egress = tap.point is CapturePoint.TC_OUT
        try:
            link: Held = hold_at_tc(interface.index, tap.program.fd, egress=egress)
        except NotSupported:
            from xdp import tc  # with all of netlink, for kernels without tcx only

            link = tc.hold(interface.index, tap.program.fd, tap.program.id, tap.program.name, egress=egress)
        self._hold(link, tap, interface)

    def _hold(self, link: Held, tap: Tap, *interfaces: Interface) -> None:
        self._links.enter_context(link)
        tap.interfaces += interfaces

    # With another XDP program attached

    def _attach_to_program(self, interface: Interface, point: CapturePoint) -> None:
        """Traces the program where the kernel supports it; else, if it is the balancer, runs as one of its stages.
        Raises Occupied."""
        from xdp.attach import attached

        running = attached(interface.index)
        if running is None:
            raise NotSupported(f"{interface.name}: no XDP program attached: --at xdp-exit requires one")
        try:
            self._trace(interface, point, running.program_id)
        except (NotSupported, NotPermitted, LoadError) as refusal:
            if self._balancer(running.program_id) is None:
                raise Occupied(f"{interface.name}: another XDP program is attached: {_why(refusal)}") from refusal
            self._staged.setdefault((running.program_id, point), []).append(interface)

    def _trace(self, interface: Interface, point: CapturePoint, program_id: int) -> None:
        from filters.capture.traced import BEFORE, BEHIND, TracedEntry, reach
        from xdp.tracing import target

        hook = BEHIND if point is CapturePoint.XDP_EXIT else BEFORE
        translation = translate(self._request.instructions, hook)
        contexts, offsets = self._traced
        entry = TracedEntry(contexts, offsets, interface.index, reach(translation))
        balancer = self._balancer(program_id) if point is CapturePoint.XDP_EXIT else None
        with target(program_id) as traced:
            verdicts = balancer.verdicts if balancer else None
            tap = self._load(point, translation, entry=entry, target=traced, verdicts=verdicts)
        self._loaded[point, interface.index] = tap
        self._hold(hold_at_program(tap.program.fd, hook.expected_attach_type), tap, interface)
        if balancer:
            self._watch_verdicts(balancer)

    @cached_property
    def _traced(self) -> tuple[Map, Offsets]:
        from filters.capture.traced import Offsets, contexts
        from xdp.tracing import kernel_types

        with kernel_types() as types:
            offsets = Offsets.of(types)
        contexts_map = contexts()
        self._resources.callback(os.close, contexts_map.fd)
        return contexts_map, offsets

    def _watch_verdicts(self, balancer: staged.Balancer) -> None:
        self._verdict_sources.append(balancer)
        balancer.stages.records_verdicts = True
        self._links.callback(setattr, balancer.stages, "records_verdicts", False)

    def _balancer(self, program_id: int) -> staged.Balancer | None:
        """None for a foreign program, and for a balancer of another version, whose maps are unknown."""
        from filters.capture.staged import balancer

        if program_id not in self._balancers:
            try:
                self._balancers[program_id] = self._resources.enter_context(balancer(program_id))
            except LoadError:
                self._balancers[program_id] = None
        return self._balancers[program_id]

    def _enter_stage(self, program_id: int, point: CapturePoint, interfaces: list[Interface]) -> None:
        """One for all interfaces of the balancer: there are few places."""
        balancer = self._balancer(program_id)
        assert balancer
        behind = point is CapturePoint.XDP_EXIT

        def capture(entry: staged.StagedEntry, onward: staged.Onward) -> LoadedProgram:
            translation = translate(self._request.instructions, XDP)
            verdicts = balancer.verdicts if behind else None
            tap = self._load(point, translation, entry=entry, otherwise=onward, verdicts=verdicts)
            tap.is_staged, tap.interfaces = True, interfaces
            self._loaded[point, interfaces[0].index] = tap
            return tap.program

        self._links.enter_context(balancer.holding([i.index for i in interfaces], capture, behind=behind))

    # Programs

    def _tap(self, hook: Hook, point: CapturePoint, interface: Interface) -> Tap:
        """The program for a capture point, loaded on first use."""
        key = point, interface.index if self.by_interface else 0
        if key not in self._loaded:
            self._loaded[key] = self._load(point, translate(self._request.instructions, hook))
        return self._loaded[key]

    def _load(
        self,
        point: CapturePoint,
        translation: Translation,
        *,
        entry: Entry | None = None,
        otherwise: FilterAction | None = None,
        target: Target | None = None,
        verdicts: Map | None = None,
    ) -> Tap:
        request, hook = self._request, translation.hook
        if request.selftest:
            self._check(hook)
        counter_set = min(next(self._counter_sets), MAX_COUNTER_SETS - 1)
        metadata = MetadataWriter(point, verdicts) if request.metadata else None
        flag = self._fragment_flag if hook is XDP_FRAGS and not request.prompt else None
        capture = Capture(self._rings, request.nano, request.limit, counter_set, metadata, flag)
        instructions = assemble(hook, [Rule(translation, [capture])], otherwise, entry)
        program = load(_PROGRAM_NAME, hook, instructions, target)
        return Tap(point, self._resources.enter_context(program), counter_set)

    @cached_property
    def _fragment_flag(self) -> FragmentFlag | None:
        return fragment_flag()

    def _check(self, hook: Hook) -> None:
        """Once per hook. A tracing program cannot be test-run: the XDP translation is tested instead."""
        testable = hook if hook.window is None else XDP
        if testable.name not in self._checked:
            check(self._request.instructions, testable)
            self._checked.add(testable.name)


Held = AbstractContextManager[object]  # a program attached until the end of the block


def _why(refusal: XdpError) -> str:
    if isinstance(refusal, NotPermitted):
        return "this kernel does not support tracing it (fentry)"
    return str(refusal).splitlines()[0]
