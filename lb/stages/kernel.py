"""Attaching a compiled stage: in a place of the balancer's stage map, or standalone on an interface.

Enters: the program of a stage. Leaves: an entry in the balancer's map of stages, which outlives this process, or a link
to the interface, which does not. Changes of places are to be made with the lock of the balancer's changes held.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lb.dataplane.programs import Programs
from lb.errors import DataplaneError, InvalidInput
from lb.paths import Paths
from lb.stages.source import Chain
from xdp import attach as xdp_attach
from xdp import libbpf
from xdp.errors import NotSupported, Occupied, XdpError
from xdp.link import Link, hold_at_xdp
from xdp.maps import map_info
from xdp.object import LB_OBJECT, BpfObject, program_info, program_name
from xdp.pins import Pins

AT_XDP, AT_XDP_EXIT = "xdp", "xdp-exit"


def interface_index(name: str) -> int:
    """Raises InvalidInput."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        raise InvalidInput(f"{name}: no such interface") from None


def program_id(program_fd: int) -> int:
    return int(program_info(program_fd).id)


class Places:
    """Of a loaded balancer. Raises DataplaneError."""

    def __init__(self, programs: Programs, generation: Path) -> None:
        self._programs, self._generation = programs, generation
        self._stages = programs.stages

    def serves(self, interface: str) -> bool:
        return interface in self._programs.attachments()

    def of(self, at: str) -> range:
        return self._stages.exits if at == AT_XDP_EXIT else self._stages.users

    def occupied(self) -> dict[int, int]:
        """Place -> program id."""
        with _explained():
            return self._stages.occupied()

    def chain(self, place: int) -> Chain:
        """The places after this one, for the tail calls of its stage."""
        stages, verdicts = self._generation / "map_stages", self._generation / "map_verdicts"
        behind = place in self._stages.exits
        last = self._stages.exits[-1] if behind else self._stages.balance
        following = tuple(range(place + 1, last + 1))
        if not behind:
            return Chain(stages, len(self._stages.map), following)
        with BpfObject.open(LB_OBJECT) as obj:
            return Chain(stages, len(self._stages.map), following, verdicts, obj.types.enum("reason"))

    def put(self, place: int, program_fd: int, stages_fd: int) -> None:
        """`stages_fd`: the map that the program was compiled to go on through."""
        if map_info(stages_fd).id != self._stages.map.info.id:
            raise DataplaneError("the balancer was reattached at the same time: repeat the command")
        with _explained(), self._stages.alone():
            if place in self._stages.occupied():
                raise DataplaneError("another program was put in this place at the same time: repeat the command")
            self._stages.set(place, program_fd)

    def clear(self, place: int, program_id: int) -> None:
        """Where this program is still there."""
        with _explained(), self._stages.alone():
            if self._stages.occupied().get(place) == program_id:
                self._stages.clear(place)


@contextmanager
def open_places(paths: Paths) -> Iterator[Places | None]:
    """None: no balancer is loaded in this network namespace."""
    with _explained():
        generation = Pins(paths.run_dir, paths.netns).current()
    if generation is None:
        yield None
        return
    programs = Programs.open(paths)
    try:
        yield Places(programs, generation)
    finally:
        programs.close()


def is_in_force(paths: Paths, stages_fd: int) -> bool:
    """Whether this is still the balancer's map of stages: no more after a `detach`."""
    generation = Pins(paths.run_dir, paths.netns).current()
    if generation is None:
        return False
    try:
        current = libbpf.get_pinned(os.fsencode(generation / "map_stages"))
    except OSError:
        return False
    try:
        return bool(map_info(current).id == map_info(stages_fd).id)
    finally:
        os.close(current)


def hold(interface: str, program_fd: int) -> tuple[Link, str | None]:
    """Alone on an interface; with a warning where only generic XDP can be had. Raises DataplaneError."""
    ifindex = interface_index(interface)
    with _explained(interface):
        try:
            return hold_at_xdp(ifindex, program_fd), None
        except NotSupported:
            warning = f"{interface}: using generic XDP, which is slow: the driver does not support native XDP"
            return hold_at_xdp(ifindex, program_fd, generic=True), warning
        except Occupied as error:
            raise DataplaneError(f"{interface}: {_occupant(ifindex)} is attached: detach it first") from error


def _occupant(ifindex: int) -> str:
    running = xdp_attach.attached(ifindex)
    return f"XDP program {running.program_id} ({program_name(running.program_id)})" if running else "an XDP program"


@contextmanager
def _explained(interface: str = "") -> Iterator[None]:
    try:
        yield
    except XdpError as error:
        raise DataplaneError(f"{interface}: {error}" if interface else str(error)) from error
