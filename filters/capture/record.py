"""The capture action: writes a complete pcap record of each accepted packet into the ring of its CPU.

Enters: a packet, its accepted length. Leaves: a record (seconds, fraction, captured length, length; then the bytes) as
it will be in the file, or one more packet counted as lost or over the limit. A VLAN tag that the kernel keeps out of
band is reinserted, as libpcap does.
"""

from __future__ import annotations

from dataclasses import dataclass

from filters.capture.fragments import FragmentFlag
from filters.capture.metadata_writer import MetadataWriter
from filters.capture.ring import RECORDS, CaptureCounters, Line, Rings, counter_set_offset
from filters.compiler import cbpf, ebpf
from filters.compiler.ebpf import R0, R1, R2, R3, R4, R5, R7, R8, R10, Assembler, Label, Reg
from filters.compiler.emit import ACCEPTED, CONTEXT
from filters.compiler.expr import SNAPLEN
from filters.compiler.hook import Field, Hook
from filters.compiler.vlan import TAG, TAG_END, TAG_SIZE
from filters.programs.program import load_length
from filters.records.metadata import METADATA_SIZE

RECORD_HEADER = 16

_NS_PER_SECOND = 10**9
# x // 1000 for x < 10**9, which is cheaper than a division: ceil(2**38 / 1000) and a shift.
_PER_THOUSAND, _SHIFT = 274877907, 38

# On the stack: where the record begins, its captured length.
_HEAD, _CAPLEN, _KEY = -8, -16, -20
_RING, _FRAME, _RECORD = R8, R7, R7

_PIECE, _MAX_PIECES = 32, 4  # bytes; of a packet that is copied without a helper


@dataclass(frozen=True, slots=True)
class Capture:
    """Needs Rings. `limit`: packets to capture on all CPUs together; None: no limit.

    The fraction of a second is in microseconds, or with `nano` in nanoseconds. `counter_set`: number of the counters to
    use. With `metadata` a PacketMetadata precedes each packet; both lengths in the record include it. With `flag`, for
    hooks with fragments, packets without any cost less.
    """

    rings: Rings
    nano: bool = False
    limit: int | None = None
    counter_set: int = 0
    metadata: MetadataWriter | None = None
    flag: FragmentFlag | None = None

    @property
    def _metadata_size(self) -> int:
        return METADATA_SIZE if self.metadata else 0

    def emit(self, asm: Assembler, hook: Hook) -> None:
        lost, over, done = Label(), Label(), Label()
        self._load_frame_length(asm, hook)
        self._find_ring(asm, done)
        self._count(asm, CaptureCounters.matched.offset)
        self._reserve(asm, hook, lost)
        if self.limit is not None:
            self._take_ticket(asm, self.limit, over, done)
        self._write_header(asm)
        if self.metadata:
            self.metadata.emit(asm, hook, _RECORD, RECORDS + RECORD_HEADER)
        _copy_packet(asm, hook, RECORDS + RECORD_HEADER + self._metadata_size, lost)
        self._commit(asm)
        asm.jump(done)
        for label, field in ((lost, CaptureCounters.lost), (over, CaptureCounters.over)):
            asm.place(label)
            self._count(asm, field.offset)
            asm.jump(done)
        asm.place(done)

    def _load_frame_length(self, asm: Assembler, hook: Hook) -> None:
        (self.flag.load_length if self.flag else load_length)(asm, hook, _FRAME)
        if hook.is_tc:
            _add_tag(asm, hook)

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

    def _reserve(self, asm: Assembler, hook: Hook, lost: Label) -> None:
        """Saves the start of the record and its captured length on the stack."""
        head, tail, caplen, size, end = R1, R2, R3, R4, R5
        behind, found = Label(), Label()
        _load_captured_length(asm, hook, caplen, lost)
        # In this order: Linux 6.12 refines caplen by what is made of it with a constant, and loses its upper bound.
        asm.mov(size, RECORD_HEADER + self._metadata_size)
        asm.alu(ebpf.ADD, size, caplen)
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

    def _commit(self, asm: Assembler) -> None:
        """The record belongs to the reader once the head has moved."""
        asm.load(R1, R10, _HEAD, 8)
        asm.load(R2, R10, _CAPLEN, 8)
        asm.alu(ebpf.ADD, R1, R2)
        asm.alu(ebpf.ADD, R1, RECORD_HEADER + self._metadata_size)
        asm.store(_RING, Line.head.offset, R1, 8)
        self._count(asm, CaptureCounters.captured.offset)

    def _count(self, asm: Assembler, field: int) -> None:
        offset = counter_set_offset(self.counter_set) + field
        asm.load(R1, _RING, offset, 8)
        asm.alu(ebpf.ADD, R1, 1)
        asm.store(_RING, offset, R1, 8)

    def _write_header(self, asm: Assembler) -> None:
        """From then on r7 is the record, no longer the length of the frame."""
        fraction = R3
        asm.call(ebpf.KTIME_GET_NS)
        _split_time(asm, R0, fraction)
        if not self.nano:
            asm.alu(ebpf.MUL, fraction, _PER_THOUSAND)
            asm.alu(ebpf.RSH, fraction, _SHIFT)
        asm.load(R2, R10, _HEAD, 8)
        asm.alu(ebpf.ADD, R2, _RING)
        asm.load(R4, _RING, Line.second.offset, 8)
        asm.load(R5, R10, _CAPLEN, 8)
        for length in (R5, _FRAME) if self.metadata else ():
            asm.alu(ebpf.ADD, length, METADATA_SIZE)
        for index, word in enumerate((R4, fraction, R5, _FRAME)):
            asm.store(R2, RECORDS + 4 * index, word, 4)
        asm.mov(_RECORD, R2)


def _add_tag(asm: Assembler, hook: Hook) -> None:
    untagged = Label()
    asm.load(R1, CONTEXT, _offset(hook, cbpf.VLAN_TAG_PRESENT), 4)
    asm.jump_if(ebpf.JEQ, R1, 0, untagged)
    asm.alu(ebpf.ADD, _FRAME, TAG_SIZE)
    asm.place(untagged)


def _offset(hook: Hook, question: int) -> int:
    field = hook.ancillary[question]
    assert isinstance(field, Field)
    return field.offset


def _load_captured_length(asm: Assembler, hook: Hook, to: Reg, none: Label) -> None:
    """The minimum of the accepted length, the packet's, what is readable of it, and a record's maximum."""
    asm.mov(to, ACCEPTED, bits=32)
    _at_most(asm, to, _FRAME)
    if hook.readable is not None:
        asm.load(R1, CONTEXT, hook.readable, 4)
        _at_most(asm, to, R1)
    _at_most(asm, to, SNAPLEN)
    asm.jump_if(ebpf.JLT, to, 1, none)  # of `== 0` Linux 6.1 does not learn that it is not


def _at_most(asm: Assembler, value: Reg, bound: Reg | int) -> None:
    bounded = Label()
    asm.jump_if(ebpf.JLE, value, bound, bounded)
    asm.mov(value, bound)
    asm.place(bounded)


def _split_time(asm: Assembler, now: Reg, fraction: Reg) -> None:
    """Nanoseconds of CLOCK_MONOTONIC to the fraction of a second; Line.second is then the second it belongs to.

    A division is needed for the first packet of a second only.
    """
    same_second = Label()
    asm.load(R1, _RING, Line.clock_offset_ns.offset, 8)
    asm.alu(ebpf.ADD, now, R1)
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


def _copy_packet(asm: Assembler, hook: Hook, target: int, failed: Label) -> None:
    if not hook.is_tc:
        _copy_untagged(asm, hook, target, failed)
        return
    tagged, copied = Label(), Label()
    asm.load(R1, CONTEXT, _offset(hook, cbpf.VLAN_TAG_PRESENT), 4)
    asm.jump_if(ebpf.JNE, R1, 0, tagged)
    _copy_untagged(asm, hook, target, failed)
    asm.jump(copied)
    asm.place(tagged)
    _copy_tagged(asm, hook, target, failed)
    asm.place(copied)


def _copy_untagged(asm: Assembler, hook: Hook, target: int, failed: Label) -> None:
    too_long, copied = Label(), Label()
    if hook.packet is None:
        _copy_short(asm, hook, target, too_long, copied)
    asm.place(too_long)
    asm.load(R4, R10, _CAPLEN, 8)
    _load_bytes(asm, hook, 0, target, failed)
    asm.place(copied)


def _copy_short(asm: Assembler, hook: Hook, target: int, other: Label, copied: Label) -> None:
    """Short packets of at least one piece, in pieces: for 64 bytes 20 ns faster than the helper.

    The last piece ends with the packet, so it overlaps the one before it.
    """
    data, end, last, pointer = R1, R2, R4, R3
    asm.load(last, R10, _CAPLEN, 8)
    asm.jump_if(ebpf.JGT, last, _MAX_PIECES * _PIECE, other)
    asm.jump_if(ebpf.JLT, last, _PIECE, other)
    asm.alu(ebpf.SUB, last, _PIECE)
    asm.load(data, CONTEXT, hook.data, 4)
    asm.load(end, CONTEXT, hook.data_end, 4)
    asm.mov(pointer, data)
    asm.alu(ebpf.ADD, pointer, last)
    _check_piece(asm, pointer, 0, end, other)
    asm.mov(R5, _RECORD)
    asm.alu(ebpf.ADD, R5, last)
    _copy_piece(asm, R5, target, pointer, 0)
    for offset in range(0, (_MAX_PIECES - 1) * _PIECE, _PIECE):
        asm.jump_if(ebpf.JLE, last, offset, copied)
        _check_piece(asm, data, offset, end, other)
        _copy_piece(asm, _RECORD, target + offset, data, offset)
    asm.jump(copied)


def _check_piece(asm: Assembler, pointer: Reg, offset: int, end: Reg, missing: Label) -> None:
    asm.mov(R5, pointer)
    asm.alu(ebpf.ADD, R5, offset + _PIECE)
    asm.jump_if(ebpf.JGT, R5, end, missing)


def _copy_piece(asm: Assembler, to: Reg, target: int, pointer: Reg, offset: int) -> None:
    for at in range(0, _PIECE, 8):
        asm.load(R0, pointer, offset + at, 8)
        asm.store(to, target + at, R0, 8)


def _copy_tagged(asm: Assembler, hook: Hook, target: int, failed: Label) -> None:
    """Both addresses, the tag and the rest. Where less is captured, the next record overwrites the surplus."""
    short = Label()
    asm.mov(R4, TAG)
    _load_bytes(asm, hook, 0, target, failed)
    asm.load(R1, CONTEXT, _offset(hook, cbpf.VLAN_TPID), 4)
    asm.store(_RECORD, target + TAG, R1, 2)
    asm.load(R1, CONTEXT, _offset(hook, cbpf.VLAN_TAG), 4)
    asm.from_big_endian(R1, 2)  # and so the other way round
    asm.store(_RECORD, target + TAG + 2, R1, 2)
    asm.load(R4, R10, _CAPLEN, 8)
    asm.jump_if(ebpf.JLE, R4, TAG_END, short)
    asm.alu(ebpf.SUB, R4, TAG_END)
    _load_bytes(asm, hook, TAG, target + TAG_END, failed)
    asm.place(short)


def _load_bytes(asm: Assembler, hook: Hook, offset: int, target: int, failed: Label) -> None:
    """r4 bytes, from an offset in the packet to an offset in the record."""
    if hook.packet is not None:
        asm.mov(R1, _RECORD)
        asm.alu(ebpf.ADD, R1, target)
        asm.mov(R2, R4)
        asm.load(R3, CONTEXT, hook.packet, 8)
        asm.call(ebpf.PROBE_READ_KERNEL)
    else:
        asm.mov(R1, CONTEXT)
        asm.mov(R2, offset)
        asm.mov(R3, _RECORD)
        asm.alu(ebpf.ADD, R3, target)
        asm.call(ebpf.SKB_LOAD_BYTES if hook.is_tc else ebpf.XDP_LOAD_BYTES)
    asm.jump_if(ebpf.JNE, R0, 0, failed)
