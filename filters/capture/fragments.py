"""How long a frame at XDP is, for most of them without calling a helper.

Enters: the types of the running kernel. Leaves: a FragmentFlag, where the flag lies that says whether a frame is in
fragments. It is in struct xdp_buff, the kernel's own side of the context: bpf_cast_to_kern_ctx() (Linux 6.2) leads
there, and costs nothing, since the verifier makes a move between registers of it. bpf_xdp_get_buff_len() costs 5 ns
where the kernel guards each return against speculation.
"""

from __future__ import annotations

from dataclasses import dataclass

from filters.compiler import ebpf
from filters.compiler.ebpf import R0, R1, R7, Assembler, Label, Reg
from filters.compiler.emit import CONTEXT
from filters.compiler.hook import XDP_FRAGS, Hook
from filters.programs.program import assemble, load, load_length
from xdp.errors import LoadError, NotPermitted, NotSupported
from xdp.tracing import KernelTypes, kernel_types


@dataclass(frozen=True, slots=True)
class FragmentFlag:
    """`cast` is the id of bpf_cast_to_kern_ctx(), `offset` that of a word in struct xdp_buff, `mask` a bit of it."""

    cast: int
    offset: int
    mask: int

    @classmethod
    def of(cls, types: KernelTypes) -> FragmentFlag:
        """Raises NotSupported."""
        return cls(
            cast=types.function("bpf_cast_to_kern_ctx"),
            offset=types.offset("xdp_buff", "flags"),
            mask=types.constant("xdp_buff_flags", "XDP_FLAGS_HAS_FRAGS"),
        )

    def load_length(self, asm: Assembler, hook: Hook, to: Reg) -> None:
        """As filters.programs.program.load_length()."""
        fragmented, loaded = Label(), Label()
        asm.mov(R1, CONTEXT)
        asm.call_kernel(self.cast)
        asm.load(R1, R0, self.offset, 4)
        asm.jump_if(ebpf.JSET, R1, self.mask, fragmented)
        asm.load(to, CONTEXT, hook.data_end, 4)
        asm.load(R1, CONTEXT, hook.data, 4)
        asm.alu(ebpf.SUB, to, R1)
        asm.jump(loaded)
        asm.place(fragmented)
        load_length(asm, hook, to)
        asm.place(loaded)

    def emit(self, asm: Assembler, hook: Hook) -> None:
        """The program's value is the length of the frame."""
        self.load_length(asm, hook, R7)
        asm.mov(R0, R7)
        asm.exit()


def fragment_flag() -> FragmentFlag | None:
    """Takes some 20 ms. None where the kernel has no such thing, or keeps it from us (without CAP_PERFMON)."""
    try:
        with kernel_types() as types:
            flag = FragmentFlag.of(types)
        load("fragment_flag", XDP_FRAGS, assemble(XDP_FRAGS, [], flag)).close()
    except (NotSupported, NotPermitted, LoadError):
        return None
    return flag
