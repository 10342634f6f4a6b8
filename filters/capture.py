"""The tail that captures: a complete pcap record of each packet that a filter accepts, into the ring of its CPU.

Enters: a packet, its accepted length. Leaves: a record (seconds, fraction, captured length, length; then the bytes) as
it is going to be in the file, or one more packet counted as lost or as beyond the limit. A VLAN tag that the kernel
keeps beside the packet is put back, as libpcap does it.
"""

from __future__ import annotations

from dataclasses import dataclass

from filters import cbpf, ebpf
from filters.ebpf import R0, R1, R2, R3, R4, R5, R7, R8, R10, Assembler, Label, Reg
from filters.emit import ACCEPTED, CONTEXT
from filters.expr import SNAPLEN
from filters.hook import Field, Hook
from filters.program import load_length
from filters.ring import RECORDS, Line, Rings
from filters.vlan import TAG, TAG_END, TAG_SIZE

RECORD_HEADER = 16

_NS_PER_SECOND = 10**9
# x // 1000 for x < 10**9, which is cheaper than a division: ceil(2**38 / 1000) and a shift.
_PER_THOUSAND, _SHIFT = 274877907, 38

# On the stack: where the record begins, its captured length.
_HEAD, _CAPLEN, _KEY = -8, -16, -20
_RING, _FRAME, _RECORD = R8, R7, R7


@dataclass(frozen=True, slots=True)
class Capture:
    """Needs Rings. `limit` is how many packets to capture on all CPUs together; None: as many as come.

    The fraction of a second is in microseconds, or with `nano` in nanoseconds.
    """

    rings: Rings
    nano: bool = False
    limit: int | None = None

    def emit(self, asm: Assembler, hook: Hook) -> None:
        lost, over, done = Label(), Label(), Label()
        _load_frame_length(asm, hook)
        self._find_ring(asm, done)
        _count(asm, Line.matched.offset)
        self._reserve(asm, lost)
        if self.limit is not None:
            self._take_ticket(asm, self.limit, over, done)
        self._write_header(asm)
        _copy_packet(asm, hook, lost)
        _commit(asm)
        asm.jump(done)
        for label, field in ((lost, Line.lost), (over, Line.over)):
            asm.place(label)
            _count(asm, field.offset)
            asm.jump(done)
        asm.place(done)

    def _find_ring(self, asm: Assembler, missing: Label) -> None:
        asm.call(ebpf.GET_SMP_PROCESSOR_ID)
        asm.store(R10, _KEY, R0, 4)
        self._lookup(asm, missing)
        asm.mov(_RING, R0)

    def _lookup(self, asm: Assembler, missing: Label) -> None:
        asm.load_map(R1, self.rings.map.fd)
        asm.mov(R2, R10)
        asm.alu(ebpf.ADD, R2, _KEY)
        asm.call(ebpf.MAP_LOOKUP_ELEM)
        asm.jump_if(ebpf.JEQ, R0, 0, missing)

    def _reserve(self, asm: Assembler, lost: Label) -> None:
        """Where the record begins goes onto the stack, and its captured length."""
        head, tail, caplen, size, end = R1, R2, R3, R4, R5
        behind, found = Label(), Label()
        _load_captured_length(asm, caplen, lost)
        asm.mov(size, caplen)
        asm.alu(ebpf.ADD, size, RECORD_HEADER)
        asm.load(head, _RING, Line.head.offset, 8)
        asm.load(tail, _RING, Line.tail.offset, 8)
        asm.jump_if(ebpf.JLT, head, tail, behind)
        asm.jump_if(ebpf.JLT, head, self.rings.size, found)
        asm.jump_if(ebpf.JGE, size, tail, lost)
        asm.store(_RING, Line.wrap.offset, head, 8)
        asm.mov(head, 0)
        asm.jump(found)
        asm.place(behind)
        asm.mov(end, head)
        asm.alu(ebpf.ADD, end, size)
        asm.jump_if(ebpf.JGE, end, tail, lost)
        asm.jump_if(ebpf.JGE, head, self.rings.size, lost)  # never; for the verifier
        asm.place(found)
        asm.store(R10, _HEAD, head, 8)
        asm.store(R10, _CAPLEN, caplen, 8)

    def _take_ticket(self, asm: Assembler, limit: int, over: Label, missing: Label) -> None:
        asm.store_immediate(R10, _KEY, 0, 4)
        self._lookup(asm, missing)
        asm.mov(R1, 1)
        asm.fetch_add(R0, Line.taken.offset, R1)
        asm.jump_if(ebpf.JGE, R1, limit, over)

    def _write_header(self, asm: Assembler) -> None:
        """From then on r7 is the record, no longer the length of the frame."""
        fraction = R3
        asm.call(ebpf.KTIME_GET_TAI_NS)
        _split_time(asm, R0, fraction)
        if not self.nano:
            asm.alu(ebpf.MUL, fraction, _PER_THOUSAND)
            asm.alu(ebpf.RSH, fraction, _SHIFT)
        asm.load(R2, R10, _HEAD, 8)
        asm.alu(ebpf.ADD, R2, _RING)
        asm.load(R4, _RING, Line.second.offset, 8)
        asm.load(R5, R10, _CAPLEN, 8)
        for place, word in enumerate((R4, fraction, R5, _FRAME)):
            asm.store(R2, RECORDS + 4 * place, word, 4)
        asm.mov(_RECORD, R2)


def _load_frame_length(asm: Assembler, hook: Hook) -> None:
    load_length(asm, hook, _FRAME)
    if hook.is_tc:
        untagged = Label()
        asm.load(R1, CONTEXT, _offset(hook, cbpf.VLAN_TAG_PRESENT), 4)
        asm.jump_if(ebpf.JEQ, R1, 0, untagged)
        asm.alu(ebpf.ADD, _FRAME, TAG_SIZE)
        asm.place(untagged)


def _offset(hook: Hook, question: int) -> int:
    field = hook.ancillary[question]
    assert isinstance(field, Field)
    return field.offset


def _load_captured_length(asm: Assembler, to: Reg, none: Label) -> None:
    """The least of what is accepted, what there is, and what a record may hold."""
    short, bounded = Label(), Label()
    asm.mov(to, ACCEPTED, bits=32)
    asm.jump_if(ebpf.JLE, to, _FRAME, short)
    asm.mov(to, _FRAME)
    asm.place(short)
    asm.jump_if(ebpf.JLE, to, SNAPLEN, bounded)
    asm.mov(to, SNAPLEN)
    asm.place(bounded)
    asm.jump_if(ebpf.JEQ, to, 0, none)


def _split_time(asm: Assembler, now: Reg, fraction: Reg) -> None:
    """Nanoseconds of CLOCK_TAI to the fraction of a second; Line.second is then the second it belongs to.

    A division is needed for the first packet of a second only.
    """
    same_second = Label()
    asm.load(R1, _RING, Line.tai_offset_ns.offset, 8)
    asm.alu(ebpf.SUB, now, R1)
    asm.load(R1, _RING, Line.second_ns.offset, 8)
    asm.mov(fraction, now)
    asm.alu(ebpf.SUB, fraction, R1)
    asm.jump_if(ebpf.JLT, fraction, _NS_PER_SECOND, same_second)
    asm.mov(R1, now)
    asm.alu(ebpf.DIV, R1, _NS_PER_SECOND)
    asm.store(_RING, Line.second.offset, R1, 8)
    asm.alu(ebpf.MUL, R1, _NS_PER_SECOND)
    asm.store(_RING, Line.second_ns.offset, R1, 8)
    asm.mov(fraction, now)
    asm.alu(ebpf.SUB, fraction, R1)
    asm.place(same_second)


def _copy_packet(asm: Assembler, hook: Hook, failed: Label) -> None:
    if not hook.is_tc:
        asm.load(R4, R10, _CAPLEN, 8)
        _load_bytes(asm, hook, 0, RECORD_HEADER, failed)
        return
    tagged, copied = Label(), Label()
    asm.load(R1, CONTEXT, _offset(hook, cbpf.VLAN_TAG_PRESENT), 4)
    asm.jump_if(ebpf.JNE, R1, 0, tagged)
    asm.load(R4, R10, _CAPLEN, 8)
    _load_bytes(asm, hook, 0, RECORD_HEADER, failed)
    asm.jump(copied)
    asm.place(tagged)
    _copy_tagged(asm, hook, failed)
    asm.place(copied)


def _copy_tagged(asm: Assembler, hook: Hook, failed: Label) -> None:
    """Both addresses, the tag and what follows. Where less is captured, the next record covers the surplus."""
    short = Label()
    asm.mov(R4, TAG)
    _load_bytes(asm, hook, 0, RECORD_HEADER, failed)
    asm.load(R1, CONTEXT, _offset(hook, cbpf.VLAN_TPID), 4)
    asm.store(_RECORD, RECORDS + RECORD_HEADER + TAG, R1, 2)
    asm.load(R1, CONTEXT, _offset(hook, cbpf.VLAN_TAG), 4)
    asm.from_big_endian(R1, 2)  # and so the other way round
    asm.store(_RECORD, RECORDS + RECORD_HEADER + TAG + 2, R1, 2)
    asm.load(R4, R10, _CAPLEN, 8)
    asm.jump_if(ebpf.JLE, R4, TAG_END, short)
    asm.alu(ebpf.SUB, R4, TAG_END)
    _load_bytes(asm, hook, TAG, RECORD_HEADER + TAG_END, failed)
    asm.place(short)


def _load_bytes(asm: Assembler, hook: Hook, offset: int, place: int, failed: Label) -> None:
    """As many as r4 says, from an offset in the packet to a place in the record."""
    asm.mov(R1, CONTEXT)
    asm.mov(R2, offset)
    asm.mov(R3, _RECORD)
    asm.alu(ebpf.ADD, R3, RECORDS + place)
    asm.call(ebpf.SKB_LOAD_BYTES if hook.is_tc else ebpf.XDP_LOAD_BYTES)
    asm.jump_if(ebpf.JNE, R0, 0, failed)


def _commit(asm: Assembler) -> None:
    """The record is the reader's from the moment that the head moves."""
    asm.load(R1, R10, _HEAD, 8)
    asm.load(R2, R10, _CAPLEN, 8)
    asm.alu(ebpf.ADD, R1, R2)
    asm.alu(ebpf.ADD, R1, RECORD_HEADER)
    asm.store(_RING, Line.head.offset, R1, 8)
    _count(asm, Line.captured.offset)


def _count(asm: Assembler, offset: int) -> None:
    asm.load(R1, _RING, offset, 8)
    asm.alu(ebpf.ADD, R1, 1)
    asm.store(_RING, offset, R1, 8)
