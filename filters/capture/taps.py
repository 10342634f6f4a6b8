"""The programs of a capture, and where they hang: at XDP, tc, or on the XDP program that is there already.

Enters: a Request, interfaces, Rings. Leaves: Taps, each a program at work with an account of its own. All of them go
with the process, however it ends (of a stage in the balancer's path a relay stays that does nothing:
filters.capture.staged).
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
from filters.capture.note_writer import MetadataWriter
from filters.capture.record import Capture
from filters.capture.ring import MOST_ACCOUNTS, Rings
from filters.compiler.cbpf import Instruction
from filters.compiler.hook import TC_IN, TC_OUT, XDP, XDP_FRAGS, Hook
from filters.compiler.translate import Translation, translate
from filters.interfaces import Interface
from filters.programs.program import Entry, FilterAction, LoadedProgram, Rule, assemble, load
from filters.records.notes import CapturePoint
from filters.selftest.selftest import check
from xdp.errors import AttachError, LoadError, NotPermitted, NotSupported, Occupied, XdpError
from xdp.link import hold_at_program, hold_at_tc, hold_at_xdp
from xdp.maps import Map
from xdp.tracing import Target

if TYPE_CHECKING:  # only beside another XDP program
    from filters.capture import staged
    from filters.capture.traced import Offsets

_PROGRAM_NAME = "xdp_dump"
_PLACES = {place.words: place for place in CapturePoint}


@dataclass(frozen=True, slots=True)
class Request:
    """What to capture. `ingress` and `egress` are the ways that packets go; `at` is a place by name, instead of the
    best one for each. `buffer` is in bytes for each CPU. With `notes`, records say where a packet was seen. `prompt`:
    somebody waits for each packet, and for the first one too, before what makes later ones cheaper."""

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
    notes: bool = False
    prompt: bool = False


@dataclass(slots=True)
class Tap:
    """A program and where it is at work."""

    place: CapturePoint
    program: LoadedProgram
    account: int
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
        self._judged: list[staged.Balancer] = []
        self._checked: set[str] = set()
        self._accounts = count()
        # A program for each interface where somebody may ask what came of which, as far as there are accounts.
        self.by_interface = request.notes and 2 * len(request.interfaces) <= MOST_ACCOUNTS

    def attach(self) -> None:
        """Raises FilterError or XdpError; what is attached by then goes off with detach()."""
        for interface in self._request.interfaces:
            self._attach(interface)
        for (program_id, place), interfaces in self._staged.items():
            self._enter_stage(program_id, place, interfaces)

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
        """The balancer's words by the number in notes, the first one for none."""
        known = [balancer for balancer in self._balancers.values() if balancer]
        return known[0].reasons if known else [""]

    def keep_verdicts(self) -> None:
        """Tells balancers once more that their verdicts are looked at: another capture that ended may have said no."""
        for balancer in self._judged:
            balancer.stages.records_verdicts = True

    # Where

    def _attach(self, interface: Interface) -> None:
        request = self._request
        if request.at:
            self._at(_PLACES[request.at], interface)
            return
        if request.ingress:
            self._at_ingress(interface)
        if request.egress and not (request.ingress and interface.is_loopback):  # where all that leaves comes in
            self._at(CapturePoint.TC_OUT, interface)

    def _at(self, place: CapturePoint, interface: Interface) -> None:
        match place:
            case CapturePoint.XDP:
                self._at_xdp(interface)
            case CapturePoint.XDP_EXIT:
                self._beside(interface, CapturePoint.XDP_EXIT)
            case CapturePoint.TC_IN:
                self._at_tc(self._tap(TC_IN, place, interface), interface)
            case CapturePoint.TC_OUT:
                self._at_tc(self._tap(TC_OUT, place, interface), interface)

    def _at_ingress(self, interface: Interface) -> None:
        """Native XDP where there is such a thing, also beside somebody else's program; else tc, which costs less than
        generic XDP."""
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
            self._beside(interface, CapturePoint.XDP)

    def _at_tc(self, tap: Tap, interface: Interface) -> None:
        egress = tap.place is CapturePoint.TC_OUT
        try:
            link: Held = hold_at_tc(interface.index, tap.program.fd, egress=egress)
        except NotSupported:
            from xdp import tc  # with all of netlink, for kernels without tcx only

            link = tc.hold(interface.index, tap.program.fd, tap.program.id, tap.program.name, egress=egress)
        self._hold(link, tap, interface)

    def _hold(self, link: Held, tap: Tap, *interfaces: Interface) -> None:
        self._links.enter_context(link)
        tap.interfaces += interfaces

    # Beside another XDP program

    def _beside(self, interface: Interface, place: CapturePoint) -> None:
        """On the program itself, where the kernel lets it be traced; else, if it is the balancer's, among its stages.
        Raises Occupied."""
        from xdp.attach import attached

        running = attached(interface.index)
        if running is None:
            raise NotSupported(f"{interface.name}: no XDP program attached: --at xdp-exit requires one")
        try:
            self._trace(interface, place, running.program_id)
        except (NotSupported, NotPermitted, LoadError) as refusal:
            if self._balancer(running.program_id) is None:
                raise Occupied(f"{interface.name}: another XDP program is attached: {_why(refusal)}") from refusal
            self._staged.setdefault((running.program_id, place), []).append(interface)

    def _trace(self, interface: Interface, place: CapturePoint, program_id: int) -> None:
        from filters.capture.traced import BEFORE, BEHIND, TracedEntry, reach
        from xdp.tracing import target

        hook = BEHIND if place is CapturePoint.XDP_EXIT else BEFORE
        translation = translate(self._request.instructions, hook)
        contexts, offsets = self._traced
        entry = TracedEntry(contexts, offsets, interface.index, reach(translation))
        balancer = self._balancer(program_id) if place is CapturePoint.XDP_EXIT else None
        with target(program_id) as traced:
            verdicts = balancer.verdicts if balancer else None
            tap = self._load(place, translation, entry=entry, target=traced, verdicts=verdicts)
        self._loaded[place, interface.index] = tap
        self._hold(hold_at_program(tap.program.fd, hook.expected_attach_type), tap, interface)
        if balancer:
            self._watch_verdicts(balancer)

    @cached_property
    def _traced(self) -> tuple[Map, Offsets]:
        from filters.capture.traced import Offsets, contexts
        from xdp.tracing import kernel_types

        with kernel_types() as types:
            offsets = Offsets.of(types)
        made = contexts()
        self._resources.callback(os.close, made.fd)
        return made, offsets

    def _watch_verdicts(self, balancer: staged.Balancer) -> None:
        self._judged.append(balancer)
        balancer.stages.records_verdicts = True
        self._links.callback(setattr, balancer.stages, "records_verdicts", False)

    def _balancer(self, program_id: int) -> staged.Balancer | None:
        """None for somebody else's program, and for a balancer of another version, whose maps we do not know."""
        from filters.capture.staged import balancer

        if program_id not in self._balancers:
            try:
                self._balancers[program_id] = self._resources.enter_context(balancer(program_id))
            except LoadError:
                self._balancers[program_id] = None
        return self._balancers[program_id]

    def _enter_stage(self, program_id: int, place: CapturePoint, interfaces: list[Interface]) -> None:
        """One for all interfaces of the balancer's: there are few places."""
        balancer = self._balancer(program_id)
        assert balancer
        behind = place is CapturePoint.XDP_EXIT

        def capture(entry: staged.StagedEntry, onward: staged.Onward) -> LoadedProgram:
            translation = translate(self._request.instructions, XDP)
            verdicts = balancer.verdicts if behind else None
            tap = self._load(place, translation, entry=entry, otherwise=onward, verdicts=verdicts)
            tap.is_staged, tap.interfaces = True, interfaces
            self._loaded[place, interfaces[0].index] = tap
            return tap.program

        self._links.enter_context(balancer.holding([i.index for i in interfaces], capture, behind=behind))

    # Programs

    def _tap(self, hook: Hook, place: CapturePoint, interface: Interface) -> Tap:
        """The program for a place, loaded when it is first asked for."""
        key = place, interface.index if self.by_interface else 0
        if key not in self._loaded:
            self._loaded[key] = self._load(place, translate(self._request.instructions, hook))
        return self._loaded[key]

    def _load(
        self,
        place: CapturePoint,
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
        account = min(next(self._accounts), MOST_ACCOUNTS - 1)
        notes = MetadataWriter(place, verdicts) if request.notes else None
        flag = self._fragment_flag if hook is XDP_FRAGS and not request.prompt else None
        capture = Capture(self._rings, request.nano, request.limit, account, notes, flag)
        instructions = assemble(hook, [Rule(translation, [capture])], otherwise, entry)
        program = load(_PROGRAM_NAME, hook, instructions, target)
        return Tap(place, self._resources.enter_context(program), account)

    @cached_property
    def _fragment_flag(self) -> FragmentFlag | None:
        return fragment_flag()

    def _check(self, hook: Hook) -> None:
        """Once a hook. A tracing program cannot be test-run: what it has in common with one at XDP is."""
        testable = hook if hook.window is None else XDP
        if testable.name not in self._checked:
            check(self._request.instructions, testable)
            self._checked.add(testable.name)


Held = AbstractContextManager[object]  # a program at work, until the end of the block


def _why(refusal: XdpError) -> str:
    if isinstance(refusal, NotPermitted):
        return "this kernel does not support tracing it (fentry)"
    return str(refusal).splitlines()[0]
