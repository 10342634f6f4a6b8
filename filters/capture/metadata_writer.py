"""Packet metadata written by the kernel: instructions that fill a record's PacketMetadata."""

from __future__ import annotations

from dataclasses import dataclass

from filters.compiler import cbpf, ebpf
from filters.compiler.ebpf import R0, R1, R2, R10, Assembler, Label, Reg
from filters.compiler.emit import CONTEXT
from filters.compiler.hook import Field, Hook
from filters.records.metadata import NO_ACTION, CapturePoint, PacketMetadata
from xdp.maps import Map

_KEY = -20  # on the stack


@dataclass(frozen=True, slots=True)
class MetadataWriter:
    """`verdicts`: the balancer's map of that name: action, reason and egress of each CPU's packet."""

    point: CapturePoint
    verdicts: Map | None = None

    def emit(self, asm: Assembler, hook: Hook, record: Reg, at: int) -> None:
        """`record` is a register that helpers keep."""
        ifindex = hook.ancillary[cbpf.IFINDEX]
        assert isinstance(ifindex, Field)
        asm.load(R1, CONTEXT, ifindex.offset, 4)
        asm.store(record, at + PacketMetadata.ifindex.offset, R1, 4)
        asm.store_immediate(record, at + PacketMetadata.point.offset, self.point, 4)
        asm.store_immediate(record, at + PacketMetadata.action.offset, NO_ACTION, 4)
        asm.store_immediate(record, at + PacketMetadata.reason.offset, 0, 4)
        asm.store_immediate(record, at + PacketMetadata.egress.offset, 0, 4)
        if hook.returned is not None:
            asm.load(R1, CONTEXT, hook.returned, 4)
            asm.store(record, at + PacketMetadata.action.offset, R1, 4)
        if self.verdicts:
            self._copy_verdict(asm, hook, record, at, self.verdicts)

    def _copy_verdict(self, asm: Assembler, hook: Hook, record: Reg, at: int, verdicts: Map) -> None:
        unknown, verdict = Label(), verdicts.value_type
        asm.store_immediate(R10, _KEY, 0, 4)
        asm.load_map(R1, verdicts.fd)
        asm.mov(R2, R10)
        asm.alu(ebpf.ADD, R2, _KEY)
        asm.call(ebpf.MAP_LOOKUP_ELEM)
        asm.jump_if(ebpf.JEQ, R0, 0, unknown)
        asm.load(R1, R0, verdict.action.offset, 4)
        if hook.returned is not None:
            # It may be the verdict of an earlier packet, if a stage before the balancer dropped this one.
            asm.load(R2, CONTEXT, hook.returned, 4)
            asm.jump_if(ebpf.JNE, R1, R2, unknown)
            asm.store_immediate(R0, verdict.action.offset, NO_ACTION, 4)
        asm.store(record, at + PacketMetadata.action.offset, R1, 4)
        for ours, theirs in ((PacketMetadata.reason, verdict.reason), (PacketMetadata.egress, verdict.egress)):
            asm.load(R1, R0, theirs.offset, 4)
            asm.store(record, at + ours.offset, R1, 4)
        asm.place(unknown)
