"""Filters over a copy of the packet, and captures on the balancer's own program (fentry, fexit).

The copy is made here by an XDP program too, so that filters are tested also where the kernel lets nobody trace.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import pytest

from filters.capture.metadata_writer import MetadataWriter
from filters.capture.record import Capture
from filters.capture.ring import MIN_SIZE, Rings
from filters.capture.traced import BEFORE, BEHIND, Context, Offsets, TracedEntry, contexts, reach
from filters.compiler import ebpf
from filters.compiler.cbpf import Instruction
from filters.compiler.ebpf import R0, R1, R2, R3, R4, R6, R7, R8, R10, Assembler, Label
from filters.compiler.emit import CONTEXT
from filters.compiler.expr import compile_expression
from filters.compiler.hook import XDP, Hook
from filters.compiler.translate import translate
from filters.programs.program import LoadedProgram, Reject, ReturnLength, Rule, assemble, load
from filters.records.metadata import NO_ACTION, CapturedPacket, CapturePoint, captured_packets
from filters.selftest.oracle import on_any_socket, oracle
from filters.tests.corpus import EXPRESSIONS
from filters.tests.packets import FRAMES
from xdp.errors import NotPermitted, NotSupported
from xdp.link import hold_at_program
from xdp.maps import Map
from xdp.object import LB_OBJECT, BpfObject
from xdp.stages import Stages
from xdp.tracing import kernel_types, target

COPIED = replace(BEFORE, name="copied", program_type=XDP.program_type, expected_attach_type=XDP.expected_attach_type)
LOOPBACK = socket.if_nametoindex("lo")  # where test runs have packets come in
EVERYTHING = compile_expression("")


@dataclass(frozen=True)
class CopyingEntry:
    """As TracedEntry, in a program at XDP. What lies behind the reach is not zero."""

    contexts: Map
    reach: int

    def emit(self, asm: Assembler, _hook: Hook) -> None:
        missing, entered = Label(), Label()
        asm.mov(R6, R1)
        asm.store_immediate(R10, -4, 0, 4)
        asm.load_map(R1, self.contexts.fd)
        asm.mov(R2, R10)
        asm.alu(ebpf.ADD, R2, -4)
        asm.call(ebpf.MAP_LOOKUP_ELEM)
        asm.jump_if(ebpf.JEQ, R0, 0, missing)
        asm.mov(R7, R0)
        asm.mov(R1, R6)
        asm.call(ebpf.XDP_GET_BUFF_LEN)
        asm.mov(R8, R0)
        asm.store(R7, Context.length.offset, R8, 4)
        asm.store(R7, Context.readable.offset, R8, 4)
        self._copy(asm, missing)
        asm.mov(CONTEXT, R7)
        asm.jump(entered)
        asm.place(missing)
        asm.mov(R0, 0)
        asm.exit()
        asm.place(entered)

    def _copy(self, asm: Assembler, missing: Label) -> None:
        bounded, nothing = Label(), Label()
        asm.mov(R4, R8)
        asm.jump_if(ebpf.JLE, R4, self.reach, bounded)
        asm.mov(R4, self.reach)
        asm.place(bounded)
        asm.jump_if(ebpf.JLT, R4, 1, nothing)  # Linux 6.1 learns no lower bound from an inequality
        asm.mov(R1, R6)
        asm.mov(R2, 0)
        asm.mov(R3, R7)
        asm.alu(ebpf.ADD, R3, Context.window.offset)
        asm.call(ebpf.XDP_LOAD_BYTES)
        asm.jump_if(ebpf.JNE, R0, 0, missing)
        asm.place(nothing)


@pytest.fixture(scope="module")
def context() -> Iterator[Map]:
    made = contexts()
    yield made
    os.close(made.fd)


def copied(context: Map, instructions: Sequence[Instruction]) -> LoadedProgram:
    translation = translate(instructions, COPIED)
    rule = Rule(translation, [ReturnLength()])
    entry = CopyingEntry(context, reach(translation))
    return load("copied", COPIED, assemble(COPIED, [rule], Reject(), entry))


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_filter_over_a_copy_answers_as_classic_bpf(context: Map, expression: str) -> None:
    instructions = on_any_socket(compile_expression(expression), XDP)
    value = context[0]
    value.window[:] = bytes(range(1, 256)) * 257 + b"\1"
    context[0] = value
    with copied(context, instructions) as program, oracle(instructions) as classic:
        assert {name: min(program.test_run(frame).verdict, len(frame)) for name, frame in FRAMES.items()} == {
            name: classic.accepted(frame) for name, frame in FRAMES.items()
        }


@pytest.mark.parametrize(
    ("expression", "furthest"),
    [("", 0), ("arp", 14), ("ip proto 6", 24), ("udp port 53", 14 + 60 + 4), ("ether[100:4] = 1", 104)],
)
def test_no_more_is_copied_than_the_filter_may_read(expression: str, furthest: int) -> None:
    assert reach(translate(compile_expression(expression), BEFORE)) == furthest


def test_filter_that_adds_up_an_offset_may_read_everything() -> None:
    assert reach(translate(compile_expression("ether[ether[14] * 300] = 1"), BEFORE)) == 0xFFFF


# On the balancer's program


class Balancer:
    """The balancer's program, loaded and not attached: test runs go through it, and through what looks at it."""

    def __init__(self, obj: BpfObject) -> None:
        self.program, self.stages = obj.program("xdp_lb"), Stages(obj)
        self.reasons = obj.types.enum("reason")

    def run(self, *frames: bytes) -> list[int]:
        return [self.program.test_run(frame).verdict for frame in frames]


@pytest.fixture(scope="module")
def balancer() -> Iterator[Balancer]:
    with BpfObject.open(LB_OBJECT) as obj:
        obj.load()
        yield Balancer(obj)


@pytest.fixture
def rings() -> Iterator[Rings]:
    with Rings(MIN_SIZE) as made:
        yield made


@contextmanager
def tracing(
    balancer: Balancer, rings: Rings, hook: Hook, expression: str = "", ifindex: int = LOOPBACK, snaplen: int = 262144
) -> Iterator[None]:
    """Skips where rejected by the kernel to everybody."""
    with ExitStack() as cleanup:
        types = cleanup.enter_context(kernel_types())
        packets = contexts()
        cleanup.callback(os.close, packets.fd)
        translation = translate(compile_expression(expression, snaplen=snaplen), hook)
        point = CapturePoint.XDP if hook is BEFORE else CapturePoint.XDP_EXIT
        metadata = MetadataWriter(point, balancer.stages.verdicts if hook is BEHIND else None)
        rule = Rule(translation, [Capture(rings, nano=True, metadata=metadata)])
        entry = TracedEntry(packets, Offsets.of(types), ifindex, reach(translation))
        traced = cleanup.enter_context(target(balancer.program.id))
        try:
            program = load("traced", hook, assemble(hook, [rule], entry=entry), traced)
        except NotPermitted:
            pytest.skip("this kernel does not support tracing programs (fentry)")
        cleanup.enter_context(program)
        cleanup.enter_context(hold_at_program(program.fd, hook.expected_attach_type))
        yield


def captured(rings: Rings) -> list[CapturedPacket]:
    with rings.harvest() as by_cpu:
        return [
            replace(packet, data=memoryview(bytes(packet.data)))
            for spans in by_cpu
            for span in spans
            for packet in captured_packets(span)
        ]


@pytest.mark.parametrize("expression", ["", "udp port 53", "tcp[tcpflags] & tcp-syn != 0", "ip6", "greater 100"])
def test_what_comes_to_the_program_is_captured(balancer: Balancer, rings: Rings, expression: str) -> None:
    with oracle(compile_expression(expression)) as classic:
        wanted = [frame for frame in FRAMES.values() if classic.accepted(frame)]
    with tracing(balancer, rings, BEFORE, expression):
        balancer.run(*FRAMES.values())
    found = captured(rings)
    assert [bytes(packet.data) for packet in found] == wanted
    assert {(p.metadata.ifindex, p.metadata.point, p.metadata.action) for p in found} == {
        (LOOPBACK, CapturePoint.XDP, NO_ACTION)
    }


def test_what_leaves_the_program_has_its_verdict_and_the_balancers_reason(balancer: Balancer, rings: Rings) -> None:
    frames = {"tcp syn": "PASS_NOT_A_SERVICE", "arp": "PASS_NOT_IP", "vrrp": "PASS_NOT_TCP_OR_UDP"}
    with tracing(balancer, rings, BEHIND):
        balancer.stages.records_verdicts = True
        verdicts = balancer.run(*(FRAMES[name] for name in frames))
        balancer.stages.records_verdicts = False
        unrecorded = balancer.run(FRAMES["arp"])
    found = captured(rings)
    assert [p.metadata.action for p in found] == verdicts + unrecorded
    assert [p.metadata.reason for p in found] == [*(balancer.reasons[reason] for reason in frames.values()), 0]
    assert {p.metadata.point for p in found} == {CapturePoint.XDP_EXIT}


def test_packets_of_other_interfaces_are_not_captured(balancer: Balancer, rings: Rings) -> None:
    with tracing(balancer, rings, BEFORE, ifindex=LOOPBACK + 1):
        balancer.run(FRAMES["udp"])
    assert captured(rings) == []


def test_snapshot_length_cuts_a_traced_packet(balancer: Balancer, rings: Rings) -> None:
    with tracing(balancer, rings, BEFORE, snaplen=20):
        balancer.run(FRAMES["udp"])
    assert [(bytes(p.data), p.length) for p in captured(rings)] == [(FRAMES["udp"][:20], len(FRAMES["udp"]))]


def test_program_without_types_cannot_be_traced() -> None:
    bare = Rule(translate(EVERYTHING, XDP), [])
    with (
        load("bare", XDP, assemble(XDP, [bare])) as program,
        pytest.raises(NotSupported, match=rf"^program {program.id} \(bare\): has no BTF: cannot be traced$"),
    ):
        target(program.id)


def test_struct_that_the_kernel_does_not_have_is_named() -> None:
    with kernel_types() as types:
        with pytest.raises(NotSupported, match=r"^struct nonesuch: not in the kernel's BTF$"):
            types.offset("nonesuch", "member")
        with pytest.raises(NotSupported, match=r"^struct xdp_buff: has no member in the kernel's BTF$"):
            types.offset("xdp_buff", "member")


def test_member_of_a_struct_without_a_name_counts_from_the_outer_one() -> None:
    """struct iphdr keeps its addresses in such a one, in a union (<linux/ip.h>)."""
    with kernel_types() as types:
        assert [types.offset("iphdr", member) for member in ("check", "saddr", "daddr")] == [10, 12, 16]


def test_constant_of_an_enum_is_its_value() -> None:
    with kernel_types() as types:
        assert types.constant("xdp_action", "XDP_REDIRECT") == 4
        with pytest.raises(NotSupported, match=r"^enum nonesuch: not in the kernel's BTF$"):
            types.constant("nonesuch", "XDP_REDIRECT")
        with pytest.raises(NotSupported, match=r"^enum xdp_action: has no XDP_LOST in the kernel's BTF$"):
            types.constant("xdp_action", "XDP_LOST")


def test_function_that_the_kernel_does_not_have_is_named() -> None:
    with kernel_types() as types, pytest.raises(NotSupported, match=r"^function nonesuch: not in the kernel's BTF$"):
        types.function("nonesuch")
