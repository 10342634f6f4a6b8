"""One packet through the balancer's live program, and the reason that the program gave for what it did with it.

Enters: a loaded object, a frame, an interface. Leaves: a Run. The frame carries a mark in front of it, in what XDP
calls its metadata, by which a program of ours behind the verdict tells it from all others: no matter how many packets
come through meanwhile, the reason is this one's.
"""

from __future__ import annotations

import ctypes
import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from filters.capture.staged import Balancer, Onward, StagedEntry
from filters.compiler import ebpf
from filters.compiler.ebpf import R0, R1, R2, R3, R4, R7, R10, Assembler, Label
from filters.compiler.emit import CONTEXT
from filters.compiler.hook import XDP, Hook
from filters.programs.program import LoadedProgram, assemble, load, refused
from xdp import libbpf
from xdp.maps import Map
from xdp.object import BpfObject, XdpMd

PROBE = "xdp_lb_explain"
MARK_SIZE = 8
_MAP_TYPE_ARRAY = 2
_KEY = -4  # on the stack
ACTIONS = ("aborted", "drop", "pass", "tx", "redirect")  # enum xdp_action


@dataclass(frozen=True, slots=True)
class Run:
    """action: what the whole path returned. reason, egress: what the balancer did; None if it never came to that."""

    action: str
    frame: bytes
    reason: str | None
    balancer_action: str | None
    egress: int


@dataclass(frozen=True, slots=True)
class _Note:
    """Copies the verdict of the marked packet; then, as all others, on with it."""

    mark: int
    noted: Map
    verdicts: Map
    onward: Onward

    def emit(self, asm: Assembler, hook: Hook) -> None:
        others = Label()
        asm.load(R1, CONTEXT, XdpMd.data_meta.offset, 4)
        asm.load(R2, CONTEXT, hook.data, 4)
        asm.mov(R3, R1)
        asm.alu(ebpf.ADD, R3, MARK_SIZE)
        asm.jump_if(ebpf.JGT, R3, R2, others)
        asm.load(R3, R1, 0, MARK_SIZE)
        asm.load_word(R4, self.mark)
        asm.jump_if(ebpf.JNE, R3, R4, others)
        self._look_up(asm, self.verdicts, others)
        asm.mov(R7, R0)
        self._look_up(asm, self.noted, others)
        for at in range(0, ctypes.sizeof(self.verdicts.value_type), 4):
            asm.load(R1, R7, at, 4)
            asm.store(R0, at, R1, 4)
        asm.place(others)
        self.onward.emit(asm, hook)

    @staticmethod
    def _look_up(asm: Assembler, table: Map, otherwise: Label) -> None:
        asm.store_immediate(R10, _KEY, 0, 4)
        asm.load_map(R1, table.fd)
        asm.mov(R2, R10)
        asm.alu(ebpf.ADD, R2, _KEY)
        asm.call(ebpf.MAP_LOOKUP_ELEM)
        asm.jump_if(ebpf.JEQ, R0, 0, otherwise)


class Probe:
    """Ready to send packets of one interface through the program. run() raises OSError where the kernel refuses it."""

    def __init__(self, balancer: Balancer, obj: BpfObject, ifindex: int, mark: int, noted: Map) -> None:
        self._program, self._reasons = obj.program("xdp_lb"), balancer.reasons
        self._ifindex, self._mark, self._noted = ifindex, mark.to_bytes(MARK_SIZE, "little"), noted

    def run(self, frame: bytes) -> Run:
        self._noted[0] = self._noted.value_type()
        test_run = self._program.test_run(frame, ingress_ifindex=self._ifindex, metadata=self._mark)
        verdict = self._noted[0]
        reached = bool(verdict.reason)
        return Run(
            action=ACTIONS[test_run.verdict] if test_run.verdict < len(ACTIONS) else str(test_run.verdict),
            frame=test_run.data,
            reason=self._reasons[verdict.reason] if reached else None,
            balancer_action=ACTIONS[verdict.action] if reached else None,
            egress=verdict.egress,
        )


@contextmanager
def probing(obj: BpfObject, ifindex: int) -> Iterator[Probe]:
    """A probe behind the balancer, to the end of the block; killed before, it does nothing any more, and the next
    capture there takes it away. Raises NotSupported if all places behind the balancer are taken."""
    balancer, mark = Balancer(obj), secrets.randbits(8 * MARK_SIZE)
    with _array_of_one(balancer.verdicts) as noted, ExitStack() as loaded:

        def program(entry: StagedEntry, onward: Onward) -> LoadedProgram:
            note = _Note(mark, noted, balancer.verdicts, onward)
            return loaded.enter_context(load(PROBE, XDP, assemble(XDP, [], note, entry)))

        with balancer.holding([ifindex], program, behind=True):
            yield Probe(balancer, obj, ifindex, mark, noted)


@contextmanager
def _array_of_one(like: Map) -> Iterator[Map]:
    try:
        fd = libbpf.map_create(_MAP_TYPE_ARRAY, PROBE.encode(), 4, ctypes.sizeof(like.value_type), 1, None)
    except OSError as error:
        raise refused(PROBE, error, []) from error
    try:
        yield Map(PROBE, fd, ctypes.c_uint32, like.value_type)
    finally:
        os.close(fd)
