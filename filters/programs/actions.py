"""Conditions and actions of a firewall, in addition to those of filters.programs.program: sets, deadlines, rate
limits.

Enters: maps and numbers. Leaves: Conditions and FilterActions for Rules, and the assembly of rules that are for several
interfaces into one program.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from filters.compiler import ebpf
from filters.compiler.cbpf import IFINDEX
from filters.compiler.ebpf import R0, R1, R2, R3, R4, R6, R7, R8, R10, Assembler, Instruction, Label
from filters.compiler.emit import CONTEXT, Exits
from filters.compiler.hook import Field, Hook
from filters.programs.program import Count, Drop, FilterAction, Rule, emit_rule, refused
from filters.programs.sets import Tries
from xdp import libbpf
from xdp.maps import Map

_MAP_TYPE_ARRAY = 2
_ATTEMPTS = 4


@dataclass(frozen=True, slots=True)
class Answer:
    """The program's value is this number: for test runs."""

    number: int

    def emit(self, asm: Assembler, _hook: Hook) -> None:
        asm.mov(R0, self.number, bits=32)
        asm.exit()


@dataclass(frozen=True, slots=True)
class GoOn:
    """The packet goes to the first program that is in one of these places of a PROG_ARRAY, else on its way."""

    programs: Map
    places: Sequence[int]

    def emit(self, asm: Assembler, hook: Hook) -> None:
        for place in self.places:
            asm.mov(R1, CONTEXT)
            asm.load_map(R2, self.programs.fd)
            asm.mov(R3, place)
            asm.call(ebpf.TAIL_CALL)
        asm.mov(R0, hook.pass_verdict, bits=32)
        asm.exit()


@dataclass(frozen=True, slots=True)
class Until:
    """Holds up to a moment of CLOCK_BOOTTIME, in nanoseconds."""

    deadline_ns: int

    def emit(self, asm: Assembler, _hook: Hook, otherwise: Label) -> None:
        asm.call(ebpf.KTIME_GET_BOOT_NS)
        asm.load_word(R1, self.deadline_ns)
        asm.jump_if(ebpf.JGE, R0, R1, otherwise)


# Rates


class Bucket(ctypes.Structure):
    """When the next packet would be in time if they came evenly (CLOCK_MONOTONIC). A cache line: CPUs write it."""

    _fields_ = (("due_ns", ctypes.c_uint64), ("_padding", ctypes.c_uint64 * 7))


def buckets(entries: int) -> Map:
    """An array of buckets, each shared by all CPUs. Raises NotPermitted, LoadError."""
    try:
        fd = libbpf.map_create(_MAP_TYPE_ARRAY, b"filter_buckets", 4, ctypes.sizeof(Bucket), entries, None)
    except OSError as error:
        raise refused("filter_buckets", error, []) from error
    return Map("filter_buckets", fd, ctypes.c_uint32, Bucket)


@dataclass(frozen=True, slots=True)
class Limit:
    """Packets in time go on, those above the rate are dropped, and counted in `dropped`.

    The generic cell rate algorithm (ITU-T I.371): one packet each interval, and `burst_ns` worth of them may be early.
    Where several CPUs meet at the bucket again and again, the one that loses each time drops its packet.
    """

    buckets: Map
    index: int
    interval_ns: int
    burst_ns: int
    dropped: Count

    def emit(self, asm: Assembler, hook: Hook) -> None:
        in_time, above = Label(), Label()
        asm.call(ebpf.KTIME_GET_COARSE_NS)
        asm.mov(R7, R0)
        asm.store_immediate(R10, -4, self.index, 4)
        asm.load_map(R1, self.buckets.fd)
        asm.mov(R2, R10)
        asm.alu(ebpf.ADD, R2, -4)
        asm.call(ebpf.MAP_LOOKUP_ELEM)
        asm.jump_if(ebpf.JEQ, R0, 0, in_time)
        asm.mov(R8, R0)
        asm.load(R0, R8, Bucket.due_ns.offset, 8)
        for _ in range(_ATTEMPTS):
            self._attempt(asm, in_time, above)
        asm.place(above)
        self.dropped.emit(asm, hook)
        Drop().emit(asm, hook)
        asm.place(in_time)

    def _attempt(self, asm: Assembler, in_time: Label, above: Label) -> None:
        """r0: the bucket as it was read, r7: now, r8: the bucket."""
        late = Label()
        asm.mov(R1, R0)
        asm.jump_if(ebpf.JGE, R1, R7, late)
        asm.mov(R1, R7)
        asm.place(late)
        asm.load_word(R2, self.interval_ns)
        asm.alu(ebpf.ADD, R1, R2)
        asm.load_word(R3, self.burst_ns)
        asm.alu(ebpf.ADD, R3, R7)
        asm.jump_if(ebpf.JGT, R1, R3, above)
        asm.mov(R4, R0)
        asm.compare_exchange(R8, Bucket.due_ns.offset, R1)
        asm.jump_if(ebpf.JEQ, R0, R4, in_time)


# Sets

_TAGS = 2  # VLAN tags in the frame; at tc the kernel keeps one more out of band
_ETHERTYPE, _NETWORK_HEADER, _TAG_SIZE = 12, 14, 4
_IPV4, _IPV6, _VLAN, _SERVICE_VLAN = (
    int.from_bytes(struct.pack(">H", t), "little") for t in (0x800, 0x86DD, 0x8100, 0x88A8)
)
_SIZES = {_IPV4: 4, _IPV6: 16}
_ADDRESSES = {"src": {_IPV4: 12, _IPV6: 8}, "dst": {_IPV4: 16, _IPV6: 24}}
SIDES = tuple(_ADDRESSES)

# On the stack: the key of a trie (its prefix length, then the address), and an EtherType.
_KEY, _ADDRESS, _TYPE = -24, -20, -32


@dataclass(frozen=True, slots=True)
class In:
    """Holds for IPv4 and IPv6 packets with their source (`src`) or destination (`dst`) in the set, also behind tags."""

    tries: Tries
    side: str

    def emit(self, asm: Assembler, hook: Hook, otherwise: Label) -> None:
        lookups = {_IPV4: Label(), _IPV6: Label()}
        found, beyond = Label(), Label() if hook.load_bytes else otherwise
        self._emit_key(asm, _Direct(asm, hook, beyond), lookups, otherwise)
        if hook.load_bytes:
            asm.place(beyond)
            self._emit_key(asm, _ByHelper(asm, hook.load_bytes, otherwise), lookups, otherwise)
        for ethertype, trie in ((_IPV4, self.tries.ipv4), (_IPV6, self.tries.ipv6)):
            asm.place(lookups[ethertype])
            asm.store_immediate(R10, _KEY, 8 * _SIZES[ethertype], 4)
            asm.load_map(R1, trie.fd)
            asm.mov(R2, R10)
            asm.alu(ebpf.ADD, R2, _KEY)
            asm.call(ebpf.MAP_LOOKUP_ELEM)
            asm.jump_if(ebpf.JEQ, R0, 0, otherwise)
            asm.jump(found)
        asm.place(found)

    def _emit_key(
        self, asm: Assembler, frame: _Direct | _ByHelper, lookups: Mapping[int, Label], otherwise: Label
    ) -> None:
        """The address onto the stack, then to the lookup of its family."""
        frame.start()
        for tags in range(_TAGS + 1):
            following, moved = Label(), tags * _TAG_SIZE
            families = {ethertype: Label() for ethertype in lookups}
            frame.copy(_ETHERTYPE + moved, 2, _TYPE)
            asm.load(R8, R10, _TYPE, 2)
            for ethertype, family in families.items():
                asm.jump_if(ebpf.JEQ, R8, ethertype, family)
            if tags < _TAGS:
                asm.jump_if(ebpf.JEQ, R8, _VLAN, following)
                asm.jump_if(ebpf.JEQ, R8, _SERVICE_VLAN, following)
            asm.jump(otherwise)
            for ethertype, family in families.items():
                asm.place(family)
                address = _NETWORK_HEADER + moved + _ADDRESSES[self.side][ethertype]
                frame.copy(address, _SIZES[ethertype], _ADDRESS)
                asm.jump(lookups[ethertype])
            asm.place(following)


class _Direct:
    """Bytes of the linear area."""

    def __init__(self, asm: Assembler, hook: Hook, beyond: Label) -> None:
        self._asm, self._hook, self._beyond = asm, hook, beyond

    def start(self) -> None:
        self._asm.load(R1, CONTEXT, self._hook.data, 4)
        self._asm.load(R2, CONTEXT, self._hook.data_end, 4)

    def copy(self, offset: int, size: int, to: int) -> None:
        self._asm.mov(R3, R1)
        self._asm.alu(ebpf.ADD, R3, offset + size)
        self._asm.jump_if(ebpf.JGT, R3, R2, self._beyond)
        step = min(size, 4)
        for at in range(0, size, step):
            self._asm.load(R4, R1, offset + at, step)
            self._asm.store(R10, to + at, R4, step)


class _ByHelper:
    """Any bytes of the packet."""

    def __init__(self, asm: Assembler, load_bytes: int, otherwise: Label) -> None:
        self._asm, self._load_bytes, self._otherwise = asm, load_bytes, otherwise

    def start(self) -> None:
        """Nothing to be made ready."""

    def copy(self, offset: int, size: int, to: int) -> None:
        self._asm.mov(R1, CONTEXT)
        self._asm.mov(R2, offset)
        self._asm.mov(R3, R10)
        self._asm.alu(ebpf.ADD, R3, to)
        self._asm.mov(R4, size)
        self._asm.call(self._load_bytes)
        self._asm.jump_if(ebpf.JNE, R0, 0, self._otherwise)


# Several interfaces


def assemble_by_interface(
    hook: Hook, sections: Mapping[int, Sequence[Rule]], otherwise: FilterAction
) -> tuple[Instruction, ...]:
    """One program: interface index -> its rules. `otherwise` ends what no rule ended. Raises TooLong."""
    asm, end = Assembler(), Label()
    labels = {ifindex: Label() for ifindex in sections}
    source = hook.ancillary[IFINDEX]
    assert isinstance(source, Field)
    asm.mov(R6, R1)
    asm.load(R1, CONTEXT, source.offset, 4)
    for ifindex, label in labels.items():
        asm.jump_if(ebpf.JEQ, R1, ifindex, label)
    asm.jump(end)
    rest: list[tuple[Rule, Exits]] = []
    for ifindex, rules in sections.items():
        asm.place(labels[ifindex])
        rest += [(rule, emit_rule(asm, hook, rule)) for rule in rules]
        asm.jump(end)
    asm.place(end)
    otherwise.emit(asm, hook)
    for rule, exits in rest:
        rule.translation.emit_rest(asm, exits)
    return asm.assemble()
