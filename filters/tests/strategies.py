"""Classic programs put together at random, and how many of them the fuzz tests make."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from filters.compiler import cbpf
from filters.compiler.cbpf import Instruction

PROGRAMS = int(os.environ.get("FUZZ_FILTERS", "200"))
"""How many programs each fuzz test makes: new ones where the number is given, else the same in every run."""

# A kernel's answer to frames of bytes is the same in every run: no seed is worth to be kept.
FUZZ = settings(
    max_examples=PROGRAMS,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    derandomize="FUZZ_FILTERS" not in os.environ,
)

SMALL = st.one_of(st.integers(0, 40), st.sampled_from([0, 1, 4, 12, 14, 0xF, 0xFF, 0x0F00, 0xFFFF]))
WORDS = st.one_of(
    SMALL, st.integers(0, cbpf.WORD), st.sampled_from([0x7FFFFFFF, 0x80000000, cbpf.WORD - 3, 0xFFFFFF00])
)
OFFSETS = st.one_of(
    st.integers(0, 70),
    st.integers(0, 70),
    st.sampled_from([cbpf.WORD - 3, 300, 0x7FFB, 0x7FFF, 0x8000, 0xFFF0, 0xFFFF, 0x10000, 0x80000000]),
)
LOADS = st.sampled_from([mode | size for mode in (cbpf.ABS, cbpf.IND) for size in (cbpf.W, cbpf.H, cbpf.B)])
SLOTS = st.integers(0, 3)
OPERATIONS = st.sampled_from([cbpf.ADD, cbpf.SUB, cbpf.MUL, cbpf.OR, cbpf.AND, cbpf.XOR])
ALL_OPERATIONS = st.sampled_from([o for o in cbpf.OPERATIONS if o != cbpf.NEG])

STEPS = st.one_of(
    st.builds(lambda load, k: Instruction(cbpf.LD | load, k=k), LOADS, OFFSETS).filter(
        lambda i: i.mode == cbpf.IND or i.k < cbpf.AD_OFF  # where no frame is meant
    ),
    st.builds(lambda k: Instruction(cbpf.LDX | cbpf.B | cbpf.MSH, k=k), OFFSETS),
    st.builds(lambda cls, k: Instruction(cls | cbpf.IMM, k=k), st.sampled_from([cbpf.LD, cbpf.LDX]), WORDS),
    st.builds(lambda cls: Instruction(cls | cbpf.LEN), st.sampled_from([cbpf.LD, cbpf.LDX])),
    st.builds(lambda cls, k: Instruction(cls | cbpf.MEM, k=k), st.sampled_from([cbpf.LD, cbpf.LDX]), SLOTS),
    st.builds(Instruction, st.sampled_from([cbpf.ST, cbpf.STX]), st.just(0), st.just(0), SLOTS),
    st.builds(lambda o, k: Instruction(cbpf.ALU | o, k=k), OPERATIONS, WORDS),
    st.builds(lambda o, k: Instruction(cbpf.ALU | o, k=k), st.sampled_from([cbpf.DIV, cbpf.MOD]), WORDS.filter(bool)),
    st.builds(lambda o, k: Instruction(cbpf.ALU | o, k=k), st.sampled_from([cbpf.LSH, cbpf.RSH]), st.integers(0, 31)),
    st.builds(lambda o: Instruction(cbpf.ALU | o | cbpf.X), ALL_OPERATIONS),
    st.sampled_from(
        [Instruction(cbpf.MISC | cbpf.TAX), Instruction(cbpf.MISC | cbpf.TXA), Instruction(cbpf.ALU | cbpf.NEG)]
    ),
)


@st.composite
def programs(draw: st.DrawFn) -> tuple[Instruction, ...]:
    """Valid ones: M[0] to M[3] are written first, jumps lead forward, the last two instructions return."""
    body = draw(st.lists(st.one_of(STEPS, STEPS, st.just(None)), max_size=24))
    start = draw(st.lists(st.builds(lambda k: Instruction(cbpf.LD | cbpf.IMM, k=k), WORDS), max_size=1))
    program = [*start, *(Instruction(cbpf.ST, k=slot) for slot in range(4))]
    for left, step in zip(range(len(body) + 1, 1, -1), body, strict=True):
        program.append(step or draw(jumps(left)))
    returned = draw(st.sampled_from([Instruction(cbpf.RET | cbpf.A), Instruction(cbpf.RET | cbpf.K, k=0x40000)]))
    return (*program, Instruction(cbpf.RET | cbpf.K, k=draw(st.sampled_from([0, 1, 20, 0xFFFFFFFF]))), returned)


def jumps(left: int) -> st.SearchStrategy[Instruction]:
    distances = st.integers(0, min(left, 255) - 1)
    conditions = st.sampled_from([condition | source for condition in cbpf.CONDITIONS for source in (cbpf.K, cbpf.X)])
    branch = st.builds(
        lambda c, jt, jf, k: Instruction(cbpf.JMP | c, jt, jf, k), conditions, distances, distances, WORDS
    )
    return st.one_of(branch, branch, st.builds(lambda k: Instruction(cbpf.JMP | cbpf.JA, k=k), distances))
