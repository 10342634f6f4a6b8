"""Programs of others in a packet's path, in front of the balancer and behind its verdict.

Enters: places of enum stage (xdp/bpf/lb/stage_maps.h) and loaded programs. Leaves: entries of the map `stages`, and the
flags by which the balancer knows of them. A place serves all interfaces: a program that is for one of them looks at
ingress_ifindex itself. One that lets a packet go on tail-calls all places behind its own: in front up to the
balancer's, behind it up to the end, where it then returns the action in the map `verdicts`.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from xdp.object import Loaded
from xdp.pins import run_dir

MAPS = ("stages", "verdicts")  # the same as long as a balancer is loaded: others refer to them
USERS = 4  # places for users' own stages, in front and behind


class Stages:
    """The stages of a loaded object. Methods raise XdpError."""

    def __init__(self, obj: Loaded) -> None:
        places, self._flags = obj.types.enum("stage"), obj.types.enum("stages_in_use")
        self.filter, self.balance = places["STAGE_FILTER"], places["STAGE_BALANCE"]
        self.users = range(places["STAGE_USER"], places["STAGE_USER"] + USERS)
        self.exits = range(places["STAGE_EXIT"], places["STAGE_EXIT"] + USERS)
        self.map, self.verdicts = obj.map("stages"), obj.map("verdicts")
        self._control: Any = obj.variable("control")
        self._held = 0

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process changes stages meanwhile: filters, users' stages and captures do not know of each other."""
        self._held += 1
        lock = _lock() if self._held == 1 else None
        try:
            yield
        finally:
            self._held -= 1
            if lock is not None:
                os.close(lock)

    def set(self, place: int, program_fd: int) -> None:
        """In one step, also in the place of another program."""
        with self.alone():
            self.map[place] = program_fd
            self._announce()

    def clear(self, place: int) -> None:
        """A packet may be in the program still. No error where there is none."""
        with self.alone():
            if place in self.map:
                del self.map[place]
            self._announce()

    def relay(self, program_fd: int) -> None:
        """Have another balancer take over: from one packet to the next it has them all, whatever interface they come in
        on. To be called on the stages of the one that goes, until the interfaces have the other."""
        with self.alone():
            self._control.stages |= self._flags["STAGES_RELAY"]
            self.map[self.balance] = program_fd

    def end_relay(self) -> None:
        with self.alone():
            self._control.stages &= ~self._flags["STAGES_RELAY"]

    def occupied(self) -> dict[int, int]:
        """Place -> program id, without the balancer's own."""
        return {place: self.map[place].value for place in (self.filter, *self.users, *self.exits) if place in self.map}

    @property
    def records_verdicts(self) -> bool:
        """Whether each packet's verdict is left in `verdicts` for who looks at it behind the balancer (fexit)."""
        return bool(self._control.stages & self._flags["STAGES_RECORD"])

    @records_verdicts.setter
    def records_verdicts(self, wanted: bool) -> None:
        flag = self._flags["STAGES_RECORD"]
        with self.alone():
            self._control.stages = self._control.stages & ~flag | flag * wanted

    def _announce(self) -> None:
        places = self.occupied()
        in_front = self._flags["STAGES_IN_FRONT"] * any(place < self.balance for place in places)
        behind = self._flags["STAGES_BEHIND"] * any(place > self.balance for place in places)
        others = self._flags["STAGES_RECORD"] | self._flags["STAGES_RELAY"]
        self._control.stages = self._control.stages & others | in_front | behind


def _lock() -> int:
    """The kernel gives it back with the file descriptor, however the process ends."""
    path = run_dir() / "stages.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock
