"""`protochain` behind 1 to 40 extension headers answers as libpcap does, and safely behind more."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest

from filters.compiler.cbpf import Instruction
from filters.compiler.expr import compile_expression
from filters.compiler.graph import unroll
from filters.compiler.hook import TC_IN, XDP, XDP_FRAGS, Hook
from filters.compiler.translate import translate
from filters.errors import SelftestFailed
from filters.files.savefile import Packet, file_filter
from filters.programs.program import LoadedProgram, Reject, ReturnLength, Rule, assemble, load
from filters.selftest.selftest import accepted, check, load_bare
from filters.tests.libpcap import bpf_filter

FOLLOWED = 40
EXPRESSIONS = ["ip6 protochain 17", "ip6 protochain 17 or ip6", "not ip6 protochain 6", "ip6 protochain 6"]
HOOKS = [XDP, XDP_FRAGS, TC_IN]


def udp_behind(headers: int) -> bytes:
    """A UDP packet to port 53 with so many destination options headers of eight bytes."""
    protocols = [60] * headers + [17]
    options = b"".join(struct.pack(">BBBB4x", following, 0, 1, 4) for following in protocols[1:])
    payload = options + struct.pack(">HHHH", 4000, 53, 12, 0) + b"test"
    ip6 = struct.pack(">IHBB", 6 << 28, len(payload), protocols[0], 64) + bytes(15) + b"\1" + bytes(15) + b"\2"
    return bytes(12) + b"\x86\xdd" + ip6 + payload


@pytest.mark.parametrize("hook", HOOKS, ids=str)
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_number_of_headers_up_to_40_is_followed(expression: str, hook: Hook) -> None:
    instructions = compile_expression(expression)
    frames = [udp_behind(headers) for headers in range(FOLLOWED + 1)]
    with load_bare(instructions, hook) as program:
        assert [accepted(program, frame) for frame in frames] == [
            min(bpf_filter(instructions, frame), len(frame)) for frame in frames
        ]


@pytest.mark.parametrize("hook", HOOKS, ids=str)
@pytest.mark.parametrize("expression", EXPRESSIONS[2:])
def test_more_headers_than_are_followed_match_where_a_match_drops_or_captures(expression: str, hook: Hook) -> None:
    frame = udp_behind(FOLLOWED + 1)
    with program_of(expression, hook, accept_unjudged=True) as program:
        assert accepted(program, frame) == len(frame)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_more_headers_than_are_followed_do_not_match_where_a_match_passes(expression: str) -> None:
    with program_of(expression, XDP, accept_unjudged=False) as program:
        assert accepted(program, udp_behind(FOLLOWED + 1)) == 0


def program_of(expression: str, hook: Hook, *, accept_unjudged: bool) -> LoadedProgram:
    translation = translate(compile_expression(expression), hook, accept_unjudged=accept_unjudged)
    return load("filter", hook, assemble(hook, [Rule(translation, [ReturnLength()])], Reject()))


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_in_files_there_is_no_limit(expression: str) -> None:
    instructions = compile_expression(expression)
    frames = [udp_behind(headers) for headers in (0, 1, 8, FOLLOWED, FOLLOWED + 1, 180, 1100)]
    with file_filter(instructions) as found:
        assert [found.accepts(Packet(0, 0, len(frame), frame)) for frame in frames] == [
            bpf_filter(instructions, frame) > 0 for frame in frames
        ]


@pytest.mark.parametrize("hook", HOOKS, ids=str)
def test_headers_that_lead_round_in_circles_match(hook: Hook) -> None:
    """Behind an authentication header libpcap goes on at its length from the IP header, here at itself, for ever."""
    instructions = compile_expression("ip6 protochain 17")
    frame = bytearray(udp_behind(0))
    frame[20], frame[54:56] = 51, bytes((51, 8))
    with file_filter(instructions) as found, load_bare(instructions, hook) as program:
        assert found.accepts(Packet(0, 0, len(frame), bytes(frame)))
        assert accepted(program, bytes(frame)) == len(frame)


def test_selftest_finds_a_loop_that_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    def shorter(instructions: Sequence[Instruction], *, accept_longer: bool) -> tuple[Instruction, ...]:
        return unroll(instructions, 8, accept_longer=accept_longer)

    monkeypatch.setattr("filters.compiler.translate.unroll", shorter)
    with pytest.raises(SelftestFailed, match=r"^self-test failed: "):
        check(compile_expression("ip6 protochain 6"), XDP)
