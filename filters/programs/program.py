"""Filters with actions, assembled into one program, loaded through bpf(2).

Enters: rules, each a translated filter with actions for the packets it accepts. Leaves: a loaded program, to be
attached or test-run. Rules are tried in order; a packet without a final action goes to the next rule, and passes
after the last one.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, Self

from filters.compiler import ebpf
from filters.compiler.ebpf import R0, R1, R2, R7, R10, Assembler, Instruction, Label, Reg
from filters.compiler.emit import ACCEPTED, CONTEXT, Exits
from filters.compiler.hook import Hook
from filters.compiler.translate import Translation
from filters.errors import TooLong
from xdp import libbpf
from xdp.errors import LoadError, NotPermitted
from xdp.maps import Map
from xdp.object import Program, program_info, useful_tail
from xdp.tracing import Target

_LICENSE = b"GPL"
_LOG_SIZE = 1 << 24
_MAP_TYPE_PERCPU_ARRAY = 6


class Condition(Protocol):
    """A further condition on a packet that a filter accepts, in eBPF: jumps to `otherwise` where it does not hold.

    It may use the same registers as an action.
    """

    def emit(self, asm: Assembler, hook: Hook, otherwise: Label) -> None: ...


class FilterAction(Protocol):
    """What is done with a packet that a filter accepts, in eBPF.

    At its start r6 is the program's context and r9 the accepted length (32 bits, not zero; it may be larger than the
    packet). It keeps both, may use every other register and all of the stack, and assumes nothing about them: data and
    data_end must be loaded from the context. It ends the program (sets r0, exit()), or runs to its end, where
    the next action or the next rule follows. Maps it refers to must be open until the program is loaded.
    """

    def emit(self, asm: Assembler, hook: Hook) -> None: ...


@dataclass(frozen=True, slots=True)
class Pass:
    """The packet passes; later rules are skipped."""

    def emit(self, asm: Assembler, hook: Hook) -> None:
        _return(asm, hook.pass_verdict)


@dataclass(frozen=True, slots=True)
class Drop:
    def emit(self, asm: Assembler, hook: Hook) -> None:
        _return(asm, hook.drop_verdict)


@dataclass(frozen=True, slots=True)
class ReturnLength:
    """The program's value is the accepted length: for test runs, followed by `Reject`."""

    def emit(self, asm: Assembler, _hook: Hook) -> None:
        asm.mov(R0, ACCEPTED)
        asm.exit()


@dataclass(frozen=True, slots=True)
class Reject:
    """The program's value is 0, as for a packet that classic BPF rejects."""

    def emit(self, asm: Assembler, _hook: Hook) -> None:
        _return(asm, 0)


def _return(asm: Assembler, verdict: int) -> None:
    asm.mov(R0, verdict, bits=32)
    asm.exit()


class Counter(ctypes.Structure):
    """Packets, and their bytes from the Ethernet header on."""

    _fields_ = (("packets", ctypes.c_uint64), ("bytes", ctypes.c_uint64))


def counters(entries: int) -> Map:
    """A per-CPU array of counters; Map.total(index) sums one up. Raises NotPermitted, LoadError."""
    try:
        fd = libbpf.map_create(_MAP_TYPE_PERCPU_ARRAY, b"filter_counters", 4, ctypes.sizeof(Counter), entries, None)
    except OSError as error:
        raise refused("filter_counters", error, []) from error
    return Map("filter_counters", fd, ctypes.c_uint32, Counter)


@dataclass(frozen=True, slots=True)
class Count:
    """Adds the packet to one entry of counters()."""

    counters: Map
    index: int

    def emit(self, asm: Assembler, hook: Hook) -> None:
        missing = Label()
        load_length(asm, hook, R7)
        asm.store_immediate(R10, -4, self.index, 4)
        asm.load_map(R1, self.counters.fd)
        asm.mov(R2, R10)
        asm.alu(ebpf.ADD, R2, -4)
        asm.call(ebpf.MAP_LOOKUP_ELEM)
        asm.jump_if(ebpf.JEQ, R0, 0, missing)
        asm.load(R1, R0, Counter.packets.offset, 8)
        asm.alu(ebpf.ADD, R1, 1)
        asm.store(R0, Counter.packets.offset, R1, 8)
        asm.load(R1, R0, Counter.bytes.offset, 8)
        asm.alu(ebpf.ADD, R1, R7)
        asm.store(R0, Counter.bytes.offset, R1, 8)
        asm.place(missing)


def load_length(asm: Assembler, hook: Hook, to: Reg) -> None:
    """For actions: the packet's whole length, linear or not. Loses r0 to r5; `to` is another one."""
    if hook.length is not None:
        asm.load(to, CONTEXT, hook.length, 4)
    elif hook.load_bytes:
        asm.mov(R1, CONTEXT)
        asm.call(ebpf.XDP_GET_BUFF_LEN)
        asm.mov(to, R0)
    else:
        asm.load(to, CONTEXT, hook.data_end, 4)
        asm.load(R1, CONTEXT, hook.data, 4)
        asm.alu(ebpf.SUB, to, R1)


@dataclass(frozen=True, slots=True)
class Rule:
    """A filter, further conditions, and the actions on what meets them."""

    translation: Translation
    actions: Sequence[FilterAction]
    conditions: Sequence[Condition] = ()


class Entry(Protocol):
    """The start of a program: from the kernel's context in r1 it makes the hook's context in r6."""

    def emit(self, asm: Assembler, hook: Hook) -> None: ...


class KernelContext:
    """The hook's context is the kernel's."""

    def emit(self, asm: Assembler, _hook: Hook) -> None:
        asm.mov(CONTEXT, R1)


def assemble(
    hook: Hook, rules: Sequence[Rule], otherwise: FilterAction | None = None, entry: Entry | None = None
) -> tuple[Instruction, ...]:
    """One program. `otherwise`: action for packets without a final action; they pass without one. Raises TooLong."""
    asm = Assembler()
    (entry or KernelContext()).emit(asm, hook)
    exits = [emit_rule(asm, hook, rule) for rule in rules]
    for action in (otherwise, Pass()):
        if action:
            action.emit(asm, hook)
    for rule, exit_labels in zip(rules, exits, strict=True):
        rule.translation.emit_rest(asm, exit_labels)
    return asm.assemble()


def emit_rule(asm: Assembler, hook: Hook, rule: Rule) -> Exits:
    """Packets without a final action fall through. Call its translation's emit_rest() with the result."""
    accept, onward = Label(), Label()
    exits = rule.translation.emit(asm, accept, onward)
    asm.place(accept)
    for condition in rule.conditions:
        condition.emit(asm, hook, onward)
    for action in rule.actions:
        action.emit(asm, hook)
    asm.place(onward)
    return exits


class LoadedProgram(Program):
    """A program in the kernel; it dies with close() unless it is attached or pinned by then."""

    def __init__(self, name: str, fd: int, hook: Hook, instructions: Sequence[Instruction]) -> None:
        super().__init__(name, fd)
        self.hook, self.instructions = hook, tuple(instructions)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self.fd)

    @cached_property
    def verified_instructions(self) -> int:
        """How many instructions the verifier went through, of at most 1,000,000."""
        return int(program_info(self.fd).verified_insns)


def load(name: str, hook: Hook, instructions: Sequence[Instruction], target: Target | None = None) -> LoadedProgram:
    """`name`: at most 15 of [a-zA-Z0-9_.]. `target`: what a tracing program looks at.

    Raises NotPermitted, TooLong, or LoadError with the end of the log.
    """
    log = ctypes.create_string_buffer(1)
    try:
        return LoadedProgram(name, _load(name, hook, instructions, target, log, level=0), hook, instructions)
    except OSError as error:
        refusal = error
    log = ctypes.create_string_buffer(_LOG_SIZE)
    try:
        return LoadedProgram(name, _load(name, hook, instructions, target, log, level=1), hook, instructions)
    except OSError:
        raise refused(name, refusal, log.value.decode(errors="replace").splitlines()) from refusal


def _load(
    name: str,
    hook: Hook,
    instructions: Sequence[Instruction],
    target: Target | None,
    log: ctypes.Array[ctypes.c_char],
    level: int,
) -> int:
    opts = libbpf.ProgramLoadOpts(
        sz=ctypes.sizeof(libbpf.ProgramLoadOpts),
        expected_attach_type=hook.expected_attach_type,
        prog_flags=hook.program_flags,
        attach_prog_fd=target.fd if target else 0,
        attach_btf_id=target.function if target else 0,
        log_level=level,
        log_size=len(log) if level else 0,
        log_buf=ctypes.addressof(log) if level else None,
    )
    raw = ebpf.encode(instructions)
    fd: int = libbpf.program_load(
        hook.program_type, name.encode(), _LICENSE, raw, len(instructions), ctypes.byref(opts)
    )
    return fd


def refused(name: str, error: OSError, log: list[str]) -> Exception:
    """What to raise for a program or map of ours that the kernel refuses."""
    if error.errno == errno.EPERM:
        return NotPermitted("not permitted to use BPF programs: run as root (CAP_BPF and CAP_NET_ADMIN)")
    if error.errno == errno.E2BIG:
        return TooLong(f"{name}: exceeds the verifier's limit of 1,000,000 processed instructions: split the filter")
    if error.errno == errno.EFAULT:  # of the verifier's push_stack()
        return TooLong(f"{name}: exceeds the verifier's limit of 8,192 pending branches: split the filter")
    return LoadError(f"{name}: rejected by the kernel: {error.strerror}{useful_tail(log)}")
