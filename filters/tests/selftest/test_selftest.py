"""The selftest finds a translation that is wrong; the frames it makes go down every branch; the oracles."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.compiler import cbpf, ebpf, emit
from filters.compiler.cbpf import Instruction
from filters.compiler.expr import compile_expression
from filters.compiler.hook import HOOKS, XDP
from filters.errors import InvalidFilter, SelftestFailed
from filters.selftest import selftest
from filters.selftest.frames import LONGEST, SHORTEST, frames, run
from filters.selftest.oracle import InterpretedFilter, KernelFilter, on_any_socket, oracle
from filters.tests.corpus import EXPRESSIONS
from filters.tests.libpcap import bpf_filter
from filters.tests.packets import FRAMES
from filters.tests.strategies import FUZZ, programs

IDENTITIES = ["udp port 53", "tcp[13] & 2 != 0 and host 10.1.2.3", "ip[2:2] > 576", "ip6 protochain 17"]


@pytest.mark.parametrize("expression", IDENTITIES)
def test_right_translation_passes_at_every_hook(expression: str) -> None:
    for hook in HOOKS.values():
        selftest.check(compile_expression(expression), hook)


def test_wrong_translation_is_refused_with_a_frame_that_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(emit._CONDITIONS, cbpf.JGT, ebpf.JGE)
    monkeypatch.setitem(emit._OPPOSITES, cbpf.JGT, ebpf.JLT)
    with pytest.raises(SelftestFailed, match=r"classic BPF accepts \d+ bytes, the translated filter \d+"):
        selftest.check(compile_expression("ip[2:2] > 576"), XDP)


def test_mismatch_says_what_was_expected_of_which_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(emit._CONDITIONS, cbpf.JEQ, ebpf.JNE)
    monkeypatch.setitem(emit._OPPOSITES, cbpf.JEQ, ebpf.JEQ)
    wrong = selftest.selftest(compile_expression("ip"), XDP, [FRAMES["udp"]], count=0)
    size = len(FRAMES["udp"])
    assert wrong == [selftest.Mismatch(FRAMES["udp"], size, 0)]
    assert str(wrong[0]).endswith(f"classic BPF accepts {size} bytes, the translated filter 0")


# The frames


@pytest.mark.parametrize("expression", [e for e in EXPRESSIONS if len(e) > 30 and "1 or src" not in e])
def test_frames_are_accepted_and_rejected(expression: str) -> None:
    instructions = on_any_socket(compile_expression(expression), XDP)
    accepted = [run(instructions, frame).accepted > 0 for frame in frames(instructions, 64)]
    assert True in accepted
    assert False in accepted


def test_frames_go_down_every_branch() -> None:
    instructions = compile_expression("udp port 53 or (tcp and len > 300)")
    branches = [(n, way) for n, i in enumerate(instructions) if i.is_branch for way in (True, False)]
    runs = [run(instructions, frame) for frame in frames(instructions, 96)]
    taken = {(c.place, c.taken) for trace in runs for c in trace.comparisons}
    assert sorted(set(branches) - taken) == []


def test_frames_are_the_same_each_time_and_within_what_a_test_run_takes() -> None:
    instructions = compile_expression("ether[1000] = 1 and len < 5000")
    made = frames(instructions, 40)
    assert made == frames(instructions, 40)
    assert len(set(made)) == len(made)
    assert all(SHORTEST <= len(frame) <= LONGEST for frame in made)
    assert max(map(len, made)) > 1000


# The oracles


@FUZZ
@given(program=programs(), samples=st.lists(st.sampled_from(list(FRAMES.values())), min_size=1, max_size=4))
def test_interpreter_answers_as_the_kernel(program: tuple[Instruction, ...], samples: list[bytes]) -> None:
    with KernelFilter(program) as kernel, InterpretedFilter(program) as interpreted:
        assert [interpreted.accepted(frame) for frame in samples] == [kernel.accepted(frame) for frame in samples]


def test_program_that_the_kernel_does_not_take_is_interpreted() -> None:
    long = (*[Instruction(cbpf.LD | cbpf.LEN)] * cbpf.MAX_INSTRUCTIONS, Instruction(cbpf.RET | cbpf.A))
    with oracle(long) as classic:
        assert classic.accepted(FRAMES["udp"]) == bpf_filter(long, FRAMES["udp"]) == len(FRAMES["udp"])
    with pytest.raises(InvalidFilter, match=r"^4097 instructions: rejected by the kernel: Invalid argument$"):
        KernelFilter(long)


def test_program_that_a_socket_has_no_memory_for_is_interpreted() -> None:
    """net.core.optmem_max, 128 KB as a rule, is less than the longest program takes once the kernel has it."""
    load = Instruction(cbpf.LD | cbpf.W | cbpf.ABS, k=14)
    long = (*[load] * (cbpf.MAX_INSTRUCTIONS - 1), Instruction(cbpf.RET | cbpf.K, k=cbpf.WORD))
    with pytest.raises(InvalidFilter, match=r"^4096 instructions: rejected by the kernel: Cannot allocate memory$"):
        KernelFilter(long)
    with oracle(long) as classic:
        assert classic.accepted(FRAMES["udp"]) == len(FRAMES["udp"])


def test_what_only_a_hook_knows_becomes_a_constant() -> None:
    from_header = Instruction(cbpf.LD | cbpf.B | cbpf.ABS, k=cbpf.NET_OFF + 9)
    interface = Instruction(cbpf.LD | cbpf.ABS, k=cbpf.AD_OFF + cbpf.IFINDEX)
    protocol = Instruction(cbpf.LD | cbpf.ABS, k=cbpf.AD_OFF + cbpf.PROTOCOL)
    assert on_any_socket((from_header, interface, protocol), XDP) == (
        Instruction(cbpf.LD | cbpf.B | cbpf.ABS, k=23),
        Instruction(cbpf.LD | cbpf.IMM, k=0),
        Instruction(cbpf.LD | cbpf.H | cbpf.ABS, k=12),
    )
