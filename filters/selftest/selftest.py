"""A translated filter against the kernel's own classic BPF, before it is attached.

Enters: classic instructions and the hook. Leaves: the frames that the two do not answer alike; there should be none. It
takes some tens of milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from filters.compiler.cbpf import Instruction
from filters.compiler.graph import has_loops
from filters.compiler.hook import Hook
from filters.compiler.translate import translate
from filters.errors import SelftestFailed
from filters.programs.program import LoadedProgram, Reject, ReturnLength, Rule, assemble, load
from filters.selftest.frames import SHORTEST, chains, frames
from filters.selftest.oracle import on_any_socket, oracle

_FRAMES = 64
_SHORTEST_AT_TC = {b"\x08\x00": 14 + 20, b"\x86\xdd": 14 + 40}


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A frame of which classic BPF accepts `expected` bytes and the translation `actual`."""

    frame: bytes
    expected: int
    actual: int

    def __str__(self) -> str:
        return (
            f"frame {self.frame.hex()}: classic BPF accepts {self.expected} bytes, the translated filter {self.actual}"
        )


def load_bare(instructions: Sequence[Instruction], hook: Hook) -> LoadedProgram:
    """A program whose value is the accepted length, 0 for a rejected packet. Raises as translate() and load() do."""
    rule = Rule(translate(instructions, hook), [ReturnLength()])
    return load("filter", hook, assemble(hook, [rule], Reject()))


def selftest(
    instructions: Sequence[Instruction], hook: Hook, extra: Iterable[bytes] = (), count: int = _FRAMES
) -> list[Mismatch]:
    """Runs both on `count` frames made for the filter, and on `extra` ones (14 to 3,520 bytes).

    Fields of the packet that are not in the frame (interface, type, random number) count as 0 on both sides.
    """
    plain = on_any_socket(instructions, hook)
    with load_bare(plain, hook) as program, oracle(plain) as classic:
        return [
            Mismatch(frame, expected, actual)
            for frame in (*frames(plain, count), *_chains(plain), *extra)
            if is_runnable(frame, hook)
            and (expected := classic.accepted(frame)) != (actual := accepted(program, frame))
        ]


def _chains(instructions: Sequence[Instruction]) -> Iterable[bytes]:
    return chains(instructions) if has_loops(instructions) else ()


def is_runnable(frame: bytes, hook: Hook) -> bool:
    """Whether BPF_PROG_TEST_RUN takes the frame: at tc a packet must have all of its IP header (net/bpf/test_run.c)."""
    if not hook.is_tc:
        return len(frame) >= SHORTEST
    return len(frame) >= _SHORTEST_AT_TC.get(frame[12:14], SHORTEST + 1)


def accepted(program: LoadedProgram, frame: bytes) -> int:
    """How many bytes of a frame the program that load_bare() made accepts."""
    return min(program.test_run(frame).verdict, len(frame))


def check(instructions: Sequence[Instruction], hook: Hook) -> None:
    """Raises SelftestFailed if the translation answers otherwise than classic BPF."""
    mismatches = selftest(instructions, hook)
    if mismatches:
        raise SelftestFailed(
            f"self-test failed: the translated filter differs from classic BPF ({len(mismatches)} of {_FRAMES} frames):"
            f" {mismatches[0]}: please report this; --no-selftest skips the test"
        )
