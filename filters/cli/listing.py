"""A filter as classic BPF, side by side with its translation to eBPF."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from filters.compiler import cbpf, ebpf
from filters.compiler.cbpf import Instruction
from filters.compiler.hook import XDP
from filters.selftest.selftest import load_bare
from xdp.errors import NotPermitted


def side_by_side(instructions: Sequence[Instruction]) -> str:
    """On the left what `tcpdump -d` prints, on the right what runs on a packet that is linear.

    Without permission to load the program the right column is empty.
    """
    left = cbpf.disassemble(instructions).splitlines()
    try:
        with load_bare(instructions, XDP) as program:
            right = ebpf.disassemble(program.instructions).splitlines()
            verified = program.verified_instructions
    except NotPermitted:
        return "\n".join(left)
    width = max(len(line.expandtabs()) for line in left)
    rows = [f"{a.expandtabs():<{width}}  | {b}".rstrip() for a, b in zip_longest(left, right, fillvalue="")]
    count = f"{len(program.instructions)} eBPF instructions, {verified} verified"
    return "\n".join([*rows, f"{'':<{width}}  | {count}"])
