"""What `xdp-lb explain` works out against what the program does: drawn services, events and frames, as for the model.

Each frame goes through the program twice: once to be explained, which must agree with the outcome and leave every table
of flows as it was; and once as a packet that has really come, so that the next one meets what it leaves.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

from lb.explain.packet import read
from lb.explain.reasons import Outcome as Explained
from lb.explain.reasons import choose, disagreement, members_reached
from lb.explain.tables import KernelTables
from netns_tests.oracle.generator import Run, Step, World, damaged, frame_of, told
from netns_tests.oracle.model import Undetermined
from netns_tests.oracle.program import FLOW_TABLES, LoadedProgram
from xdp.object import BpfObject

SEEDS = range(60)
ACTIONS = ("aborted", "drop", "pass", "tx", "redirect")


class TablesAt(KernelTables):
    """With the test's clock."""

    def __init__(self, obj: BpfObject, now_ns: int) -> None:
        for service in obj.map("services").view():
            if not service.first_port:
                service.last_port = 0  # any port, as the product writes it; no program reads it
        super().__init__(obj)
        self._now_ns = now_ns

    @property
    def now_ns(self) -> int:
        return self._now_ns


class ExplainedWorld(World):
    """sources: where members were found, of the packets that were sent on."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.sources = Counter[str]()

    def take(self, step: Step) -> None:
        if step.event:
            self.change(step.event)
        frame = damaged(frame_of(step.sent, self.flow(step.sent)), step.damage)
        ingress = self.interfaces[step.interface]
        self.explain(frame, ingress)
        self.program.run(frame, ingress)
        self.model.receive(frame, ingress)

    def explain(self, frame: bytes, ingress: int) -> None:
        tables, packet = TablesAt(self.program.bpf, self.model.now_ns), read(frame)
        if packet is None:
            return
        before, choice = self.flows(), choose(packet, tables)
        with tables.leaving_no_trace(packet, choice):
            got = self.program.run(frame, ingress)
        assert self.flows() == before, told("leaves a trace", got)
        outcome = Explained(ACTIONS[got.verdict], got.reason.lower(), got.frame, egress(got.frame, choice))
        reached = members_reached(outcome, packet, choice.service, tables) if choice.service else []
        assert disagreement(choice, outcome, reached) is None, f"{choice}\n{told('program', got)}"
        if got.reason == "FORWARDED":
            assert choice.source
            self.sources[choice.source] += 1

    def flows(self) -> dict[str, dict[bytes, bytes]]:
        return {name: {bytes(key): bytes(value) for key, value in self.program.entries(name)} for name in FLOW_TABLES}


def egress(frame: bytes, choice: Any) -> tuple[int, str] | None:
    """The test run does not say it; the member with this MAC address has it."""
    member = choice.member
    return (member.ifindex, "") if member and frame[:6] == member.destination_mac else None


def test_explanation_agrees_with_the_program_and_leaves_no_trace(
    drawn_program: LoadedProgram, interfaces: tuple[int, int]
) -> None:
    sources: Counter[str] = Counter()
    for seed in SEEDS:
        run = Run.drawn(seed)
        world = ExplainedWorld(drawn_program, interfaces, run.offers, run.echo)
        with contextlib.suppress(Undetermined):
            for step in run.steps:
                world.take(step)
        sources += world.sources
    assert set(sources) == {
        "ring_current",
        "ring_previous",
        "flow_table",
        "nat_table",
        "nat_reply",
        "connection_id",
        "fragment_table",
    }
