"""Hooks on an attached XDP program: packets on entry, and on exit with the verdict (fentry, fexit).

Enters: the kernel's struct xdp_buff, which a tracing program reads but has no packet pointers into. Leaves: a Context
in a map, one for each CPU, with a copy of as much of the packet as the filter may read. Of a frame in fragments only
the first, linear part can be read.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

from filters.compiler import cbpf, ebpf
from filters.compiler.bounds import is_shared, upper_bounds
from filters.compiler.ebpf import R0, R1, R2, R3, R6, R7, R8, R9, R10, Assembler, Label
from filters.compiler.emit import CONTEXT, DirectEmitter
from filters.compiler.graph import BEYOND, Graph, LoadHeaderLength, LoadPacket, X
from filters.compiler.hook import ANYWHERE, PACKET_HOST, PROG_TYPE_TRACING, Field, FrameField, Hook
from filters.compiler.passes import split
from filters.compiler.translate import Translation
from filters.programs.program import refused
from xdp import libbpf
from xdp.link import TRACE_ENTRY, TRACE_EXIT
from xdp.maps import Map
from xdp.tracing import KernelTypes

_MAP_TYPE_ARRAY = 2
_KEY = -4  # on the stack
_FIRST_ARGUMENT, _RETURNED = 0, 8  # in the context of a tracing program


class Context(ctypes.Structure):
    """The context of a filter. `packet` is the address of the packet in the kernel."""

    _fields_ = (
        ("packet", ctypes.c_uint64),
        ("length", ctypes.c_uint32),
        ("readable", ctypes.c_uint32),
        ("ifindex", ctypes.c_uint32),
        ("queue", ctypes.c_uint32),
        ("returned", ctypes.c_uint32),
        ("_padding", ctypes.c_uint32),
        ("window", ctypes.c_uint8 * BEYOND),
    )


def _hook(name: str, attach_type: int, returned: int | None) -> Hook:
    return Hook(
        name,
        PROG_TYPE_TRACING,
        pass_verdict=0,
        drop_verdict=0,
        data=0,
        data_end=0,
        load_bytes=None,
        ancillary=ANYWHERE
        | {
            cbpf.PROTOCOL: FrameField(12),
            cbpf.IFINDEX: Field(Context.ifindex.offset),
            cbpf.QUEUE: Field(Context.queue.offset),
            cbpf.PKTTYPE: PACKET_HOST,
            cbpf.VLAN_TAG: 0,
            cbpf.VLAN_TAG_PRESENT: 0,
            cbpf.VLAN_TPID: 0,
        },
        length=Context.length.offset,
        expected_attach_type=attach_type,
        window=Context.window.offset,
        readable=Context.readable.offset,
        packet=Context.packet.offset,
        returned=returned,
    )


BEFORE = _hook("xdp-entry", TRACE_ENTRY, None)
BEHIND = _hook("xdp-exit", TRACE_EXIT, Context.returned.offset)


def contexts() -> Map:
    """One for each CPU. Raises NotPermitted, LoadError."""
    size, entries = ctypes.sizeof(Context), libbpf.possible_cpus()
    try:
        fd = libbpf.map_create(_MAP_TYPE_ARRAY, b"traced_packets", 4, size, entries, None)
    except OSError as error:
        raise refused("traced_packets", error, []) from error
    return Map("traced_packets", fd, ctypes.c_uint32, Context)


@dataclass(frozen=True, slots=True)
class Offsets:
    """In the kernel's structs."""

    data: int
    data_end: int
    queue: int
    receive_queue: int
    device: int
    ifindex: int

    @classmethod
    def of(cls, types: KernelTypes) -> Offsets:
        """Raises NotSupported."""
        return cls(
            data=types.offset("xdp_buff", "data"),
            data_end=types.offset("xdp_buff", "data_end"),
            queue=types.offset("xdp_rxq_info", "queue_index"),
            receive_queue=types.offset("xdp_buff", "rxq"),
            device=types.offset("xdp_rxq_info", "dev"),
            ifindex=types.offset("net_device", "ifindex"),
        )


@dataclass(frozen=True, slots=True)
class TracedEntry:
    """Selects packets of one interface; returns for others. `reach`: how many bytes the filter may read."""

    contexts: Map
    offsets: Offsets
    ifindex: int
    reach: int

    def emit(self, asm: Assembler, hook: Hook) -> None:
        leave, entered = Label(), Label()
        self._read_receive_queue(asm, leave)
        self._find_context(asm, leave)
        self._describe(asm, hook)
        self._copy_window(asm, leave)
        asm.jump(entered)
        asm.place(leave)
        asm.mov(R0, 0)
        asm.exit()
        asm.place(entered)

    def _read_receive_queue(self, asm: Assembler, leave: Label) -> None:
        """r6: the program's context, r7: struct xdp_buff, r8: the interface's index, r9: the number of the queue."""
        asm.mov(R6, R1)
        asm.load(R7, R6, _FIRST_ARGUMENT, 8)
        asm.load(R1, R7, self.offsets.receive_queue, 8)
        asm.load(R9, R1, self.offsets.queue, 4)
        asm.load(R1, R1, self.offsets.device, 8)
        asm.load(R8, R1, self.offsets.ifindex, 4)
        asm.jump_if(ebpf.JNE, R8, self.ifindex, leave, bits=32)

    def _find_context(self, asm: Assembler, leave: Label) -> None:
        asm.call(ebpf.GET_SMP_PROCESSOR_ID)
        asm.store(R10, _KEY, R0, 4)
        asm.load_map(R1, self.contexts.fd)
        asm.mov(R2, R10)
        asm.alu(ebpf.ADD, R2, _KEY)
        asm.call(ebpf.MAP_LOOKUP_ELEM)
        asm.jump_if(ebpf.JEQ, R0, 0, leave)

    def _describe(self, asm: Assembler, hook: Hook) -> None:
        """From then on r8 is where the packet begins, r9 how much of it is linear."""
        asm.store(R0, Context.ifindex.offset, R8, 4)
        asm.store(R0, Context.queue.offset, R9, 4)
        if hook.returned is not None:
            asm.load(R1, R6, _RETURNED, 8)
            asm.store(R0, hook.returned, R1, 4)
        asm.mov(CONTEXT, R0)
        asm.load(R8, R7, self.offsets.data, 8)
        asm.load(R9, R7, self.offsets.data_end, 8)
        asm.alu(ebpf.SUB, R9, R8)
        asm.store(CONTEXT, Context.packet.offset, R8, 8)
        asm.store(CONTEXT, Context.readable.offset, R9, 4)
        asm.mov(R1, R7)
        asm.call(ebpf.XDP_GET_BUFF_LEN)
        asm.store(CONTEXT, Context.length.offset, R0, 4)

    def _copy_window(self, asm: Assembler, leave: Label) -> None:
        if not self.reach:
            return
        bounded = Label()
        asm.mov(R2, R9)
        asm.jump_if(ebpf.JLE, R2, self.reach, bounded)
        asm.mov(R2, self.reach)
        asm.place(bounded)
        asm.mov(R1, CONTEXT)
        asm.alu(ebpf.ADD, R1, Context.window.offset)
        asm.mov(R3, R8)
        asm.call(ebpf.PROBE_READ_KERNEL)
        asm.jump_if(ebpf.JNE, R0, 0, leave)


def reach(translation: Translation) -> int:
    """How many bytes of a packet the filter may read, from its start."""
    graph = split(translation.graph, lambda operation: DirectEmitter.moves_pointer(operation, translation.hook))
    return max(_ends(graph), default=0)


def _ends(graph: Graph) -> Iterator[int]:
    bounds = upper_bounds(graph)
    for number, block in graph.items():
        for operation in block.operations:
            match operation:
                case LoadPacket(size, offset, indexed=False, header=header):
                    yield header + offset + size
                case LoadPacket(size, offset, header=header):
                    shared = is_shared(operation, bounds[number][X])
                    yield bounds[number][X] + header + offset + size if shared else BEYOND - 1
                case LoadHeaderLength(offset):
                    yield offset + 1
