"""Classic BPF to eBPF: the passes, in order.

Enters: a classic program and the hook it shall run at. Leaves: a Translation, which writes itself into an assembler,
the part for every packet and, apart from it, the part for packets that are not linear.

What is accepted is what the kernel's classic BPF accepts (net/core/filter.c), also where libpcap's bpf_filter()
differs: shifts by X use its low five bits. But a load that reaches byte 65,535 rejects; an index that only X makes
negative does not count from a header; and a loop, as `protochain` is, makes at most graph.LOOP_ROUNDS rounds, since
the verifier's work grows with their square. A packet that needs more is one that the filter cannot judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from filters.compiler import cbpf
from filters.compiler.cbpf import Instruction
from filters.compiler.ebpf import Assembler, Label
from filters.compiler.emit import DirectEmitter, Exits, HelperEmitter, emit_beyond
from filters.compiler.graph import Graph, control_flow, unroll
from filters.compiler.hook import NETWORK_HEADER, Hook
from filters.compiler.passes import prune, with_answers, without_dead
from filters.compiler.vlan import with_out_of_band_tag

_MAX_UNROLLED = 1 << 16


@dataclass(frozen=True, slots=True)
class Translation:
    """A filter for one hook. Expects the context in r6, leaves the accepted length in r9; uses all other registers."""

    hook: Hook
    graph: Graph

    def emit(self, asm: Assembler, accept: Label, reject: Label) -> Exits:
        """The part for every packet; it may fall through its end, where the caller places `accept`."""
        exits = Exits(accept, reject, Label() if self.hook.load_bytes else reject)
        DirectEmitter(self.graph, self.hook, asm, exits).emit()
        return exits

    def emit_rest(self, asm: Assembler, exits: Exits) -> None:
        """The part for packets that are not linear; to be placed where nothing falls into it."""
        if self.hook.load_bytes is None:
            return
        emit_beyond(asm, self.hook, exits)
        HelperEmitter(self.graph, self.hook, self.hook.load_bytes, asm, exits).emit()
        asm.jump(exits.accept)


def translate(instructions: Sequence[Instruction], hook: Hook, *, accept_unjudged: bool = True) -> Translation:
    """`accept_unjudged`: whether the filter accepts packets that it cannot judge.

    Raises InvalidFilter for what the kernel would refuse, UnsupportedPrimitive for what the hook cannot answer.
    """
    straight = unroll(instructions, accept_longer=accept_unjudged)
    cbpf.check(straight, _MAX_UNROLLED)
    graph = prune(control_flow(straight, NETWORK_HEADER))
    if hook.is_tc:
        graph = prune(with_out_of_band_tag(graph))
    graph = prune(without_dead(graph))
    return Translation(hook, with_answers(graph, hook))
