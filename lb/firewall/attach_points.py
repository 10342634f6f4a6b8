"""Attach points of filter programs: the balancer's stage map, XDP, tc."""

from __future__ import annotations

from dataclasses import dataclass

from lb.dataplane.programs import Programs
from lb.model.rules import At
from xdp import attach as xdp_attach
from xdp import tc
from xdp.errors import Occupied
from xdp.object import Program, program_name

FOLDER, NAME = "filter", "xdp_lb_filter"
TC_PLACES = {At.TC_IN: tc.LAST_IN, At.TC_OUT: tc.LAST_OUT}
HookKey = tuple[str, At]
"""Interface name and hook."""


@dataclass(frozen=True, slots=True)
class StageAttach:
    """A stage of the balancer, for all interfaces that it is attached to."""

    programs: Programs
    pin: str = "prog_front"

    def exchange(self, _before: Program | None, after: Program | None) -> str | None:
        stages = self.programs.stages
        if after:
            stages.set(stages.filter, after.fd)
        elif self.programs.loaded:
            stages.clear(stages.filter)
        return None


@dataclass(frozen=True, slots=True)
class XdpAttach:
    ifindex: int

    @property
    def pin(self) -> str:
        return f"prog_{self.ifindex}_xdp"

    def exchange(self, before: Program | None, after: Program | None) -> str | None:
        if after is None:
            if before:
                xdp_attach.detach(self.ifindex, before.fd)
            return None
        try:
            done = xdp_attach.attach(
                self.ifindex,
                after.fd,
                after.id,
                replace_fd=before.fd if before else None,
                describe=lambda number: f"id {number}, name {program_name(number)}",
            )
        except Occupied as error:
            raise Occupied(f"{error}, or use --at tc-in") from error
        return done.warning if done.mode == xdp_attach.GENERIC and not before else None


@dataclass(frozen=True, slots=True)
class TcAttach:
    ifindex: int
    at: At

    @property
    def pin(self) -> str:
        return f"prog_{self.ifindex}_{self.at.replace('-', '_')}"

    def exchange(self, _before: Program | None, after: Program | None) -> str | None:
        if after:
            tc.attach(self.ifindex, after.fd, NAME, TC_PLACES[self.at])
        else:
            tc.detach(self.ifindex, TC_PLACES[self.at])
        return None


AttachPoint = StageAttach | XdpAttach | TcAttach
