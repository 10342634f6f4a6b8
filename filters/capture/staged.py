"""Captures in the balancer's own packet path: a stage in front of it or behind its verdict, for kernels on which its
program cannot be traced.

Enters: the id of an attached program, and a capture program. Leaves: the program in a place of the map `stages`
(xdp.stages), as long as somebody holds it there. What stands in that place is a relay, which goes on to the capture
through an array of one program. That array the kernel empties when the process ends, however it ends; then the relay
does nothing but to hand packets on, until the next capture takes it off.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from filters.compiler import ebpf
from filters.compiler.cbpf import IFINDEX
from filters.compiler.ebpf import R0, R1, R2, R3, R10, Assembler, Label
from filters.compiler.emit import CONTEXT
from filters.compiler.hook import XDP, Field, Hook
from filters.programs.program import LoadedProgram, assemble, load, refused
from xdp import libbpf
from xdp.errors import NotSupported
from xdp.maps import Map, map_info
from xdp.object import LB_OBJECT, BpfObject, program_info
from xdp.pins import generation_of, run_dir
from xdp.stages import Stages

BALANCER = "xdp_lb"
RELAY = "xdp_dump_relay"
_MAP_TYPE_PROG_ARRAY = 3
_KEY = -4  # on the stack


@dataclass(frozen=True, slots=True)
class Onward:
    """To the first program in one of these places; else out: in front of the balancer the packet passes, behind it the
    verdict is carried out."""

    programs: Map
    places: Sequence[int]
    verdicts: Map | None = None

    def emit(self, asm: Assembler, hook: Hook) -> None:
        for place in self.places:
            asm.mov(R1, CONTEXT)
            asm.load_map(R2, self.programs.fd)
            asm.mov(R3, place)
            asm.call(ebpf.TAIL_CALL)
        if self.verdicts:
            self._return_verdict(asm, self.verdicts)
        asm.mov(R0, hook.pass_verdict, bits=32)
        asm.exit()

    def _return_verdict(self, asm: Assembler, verdicts: Map) -> None:
        missing = Label()
        asm.store_immediate(R10, _KEY, 0, 4)
        asm.load_map(R1, verdicts.fd)
        asm.mov(R2, R10)
        asm.alu(ebpf.ADD, R2, _KEY)
        asm.call(ebpf.MAP_LOOKUP_ELEM)
        asm.jump_if(ebpf.JEQ, R0, 0, missing)
        asm.load(R0, R0, verdicts.value_type.action.offset, 4)
        asm.exit()
        asm.place(missing)


@dataclass(frozen=True, slots=True)
class StagedEntry:
    """Packets of these interfaces; those of others go on."""

    ifindexes: Sequence[int]
    onward: Onward

    def emit(self, asm: Assembler, hook: Hook) -> None:
        ifindex, entered = hook.ancillary[IFINDEX], Label()
        assert isinstance(ifindex, Field)
        asm.mov(CONTEXT, R1)
        asm.load(R1, CONTEXT, ifindex.offset, 4)
        for number in self.ifindexes:
            asm.jump_if(ebpf.JEQ, R1, number, entered)
        self.onward.emit(asm, hook)
        asm.place(entered)


@dataclass(frozen=True, slots=True)
class Relay:
    """Tail call to the one program of an array, if any."""

    captures: Map

    def emit(self, asm: Assembler, hook: Hook) -> None:
        asm.mov(R1, CONTEXT)
        asm.load_map(R2, self.captures.fd)
        asm.mov(R3, 0)
        asm.call(ebpf.TAIL_CALL)


Captures = Callable[[StagedEntry, Onward], LoadedProgram]


class Balancer:
    """A balancer at work. Methods raise XdpError."""

    def __init__(self, obj: BpfObject) -> None:
        self._object, self.stages = obj, Stages(obj)

    @property
    def verdicts(self) -> Map:
        return self.stages.verdicts

    @property
    def reasons(self) -> list[str]:
        """By number; the first stands for none."""
        names = self._object.types.enum("reason")
        return ["", *(name.lower() for name in names if names[name])]

    @contextmanager
    def holding(self, ifindexes: Sequence[int], capture: Captures, *, behind: bool) -> Iterator[None]:
        """A capture of these interfaces in a place of its own, to the end of the block. Raises NotSupported if none is
        free."""
        with ExitStack() as cleanup:
            captures = cleanup.enter_context(_array_of_one_program())
            with self.stages.alone():
                self._clear_stale()
                place = self._free_place(behind)
                onward = self._onward(place)
                program = capture(StagedEntry(ifindexes, onward), onward)
                captures[0] = program.fd
                relay = cleanup.enter_context(load(RELAY, XDP, assemble(XDP, [], _Both(Relay(captures), onward))))
                self.stages.set(place, relay.fd)
            cleanup.callback(self.stages.clear, place)
            yield

    def _free_place(self, behind: bool) -> int:
        """The last free one: programs that steer packets come first."""
        occupied = self.stages.occupied()
        free = [place for place in (self.stages.exits if behind else self.stages.users) if place not in occupied]
        if not free:
            where = "behind" if behind else "in front of"
            raise NotSupported(f"all places {where} the balancer are in use: see `xdp-lb stage list`")
        return free[-1]

    def _onward(self, place: int) -> Onward:
        if place in self.stages.exits:
            return Onward(self.stages.map, range(place + 1, self.stages.exits.stop), self.verdicts)
        return Onward(self.stages.map, range(place + 1, self.stages.balance + 1))

    def _clear_stale(self) -> None:
        for place, program_id in self.stages.occupied().items():
            if _is_stale_relay(program_id):
                self.stages.clear(place)


@dataclass(frozen=True, slots=True)
class _Both:
    first: Relay
    second: Onward

    def emit(self, asm: Assembler, hook: Hook) -> None:
        self.first.emit(asm, hook)
        self.second.emit(asm, hook)


@contextmanager
def balancer(program_id: int) -> Iterator[Balancer | None]:
    """The balancer whose program this is; None for a foreign program. Raises LoadError for one of another
    version."""
    generation = generation_of(program_id, BALANCER, run_dir())
    if generation is None:
        yield None
        return
    with BpfObject.open(LB_OBJECT) as obj:
        obj.adopt(str(generation))
        yield Balancer(obj)


@contextmanager
def _array_of_one_program() -> Iterator[Map]:
    try:
        fd = libbpf.map_create(_MAP_TYPE_PROG_ARRAY, b"xdp_dump", 4, 4, 1, None)
    except OSError as error:
        raise refused("xdp_dump", error, []) from error
    try:
        yield Map("xdp_dump", fd, ctypes.c_uint32, ctypes.c_uint32)
    finally:
        os.close(fd)


def _is_stale_relay(program_id: int) -> bool:
    """Whether it is a relay whose process is gone: then its array is empty."""
    with suppress(OSError), _closing(libbpf.program_fd_by_id(program_id)) as program:  # else it is already gone
        if program_info(program).name.decode(errors="replace") == RELAY:
            return any(_is_empty_array_of_one(map_id) for map_id in _map_ids(program))
    return False


def _is_empty_array_of_one(map_id: int) -> bool:
    with _closing(libbpf.map_fd_by_id(map_id)) as fd:
        info = map_info(fd)
        own = info.type == _MAP_TYPE_PROG_ARRAY and info.max_entries == 1
        return own and 0 not in Map("xdp_dump", fd, ctypes.c_uint32, ctypes.c_uint32)


def _map_ids(program_fd: int) -> list[int]:
    ids = (ctypes.c_uint32 * program_info(program_fd).nr_map_ids)()
    info = libbpf.ProgramInfo(nr_map_ids=len(ids), map_ids=ctypes.addressof(ids))
    libbpf.info_by_fd(program_fd, ctypes.byref(info), ctypes.c_uint32(ctypes.sizeof(info)))
    return list(ids)


@contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)
