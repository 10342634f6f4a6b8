"""The capture action through BPF_PROG_TEST_RUN: records byte for byte, counters that add up, rings that wrap."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from filters.capture.fragments import FragmentFlag, fragment_flag
from filters.capture.record import Capture
from filters.capture.ring import LARGEST_RECORD, MIN_SIZE, Rings
from filters.compiler import cbpf
from filters.compiler.cbpf import Instruction
from filters.compiler.expr import compile_expression
from filters.compiler.hook import HOOKS, XDP, XDP_FRAGS, Hook
from filters.compiler.translate import translate
from filters.errors import FilterError
from filters.programs.program import Drop, LoadedProgram, Rule, assemble, load
from filters.records.counts import Counts
from filters.records.pcap import offsets
from filters.tests.packets import FRAMES
from xdp.tests.kernels import KERNEL_CONTEXT

UDP = FRAMES["udp"]
EVERYTHING = (Instruction(cbpf.RET, k=262144),)
HEADER = 16


@pytest.fixture
def rings() -> Iterator[Rings]:
    with Rings(MIN_SIZE) as made:
        yield made


@pytest.fixture(autouse=True)
def one_cpu() -> Iterator[None]:
    """So that all records come into one ring."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    yield
    os.sched_setaffinity(0, allowed)


def capturing(
    rings: Rings,
    hook: Hook = XDP,
    expression: str = "",
    snaplen: int = 262144,
    limit: int | None = None,
    flag: FragmentFlag | None = None,
) -> LoadedProgram:
    instructions = compile_expression(expression, snaplen=snaplen)
    rule = Rule(translate(instructions, hook), [Capture(rings, limit=limit, flag=flag)])
    return load("capture", hook, assemble(hook, [rule]))


@contextmanager
def harvested(rings: Rings) -> Iterator[bytes]:
    with rings.harvest() as by_cpu:
        yield b"".join(bytes(span) for spans in by_cpu for span in spans)


def packets(rings: Rings) -> list[tuple[bytes, int]]:
    """What was captured since the last time: the bytes and the length in the header."""
    with harvested(rings) as span:
        starts = [at for at, _, _ in offsets(span)]
        ends = [*starts[1:], len(span)]
    return [
        (span[start + HEADER : end], struct.unpack_from("=I", span, start + 12)[0])
        for start, end in zip(starts, ends, strict=False)
    ]


@pytest.mark.parametrize("hook", HOOKS.values(), ids=str)
def test_captured_packet_is_the_packet(rings: Rings, hook: Hook) -> None:
    with capturing(rings, hook, "udp port 53") as program:
        for name in ("udp", "tcp syn", "large udp", "ipv6 tcp"):
            assert program.test_run(FRAMES[name]).verdict == hook.pass_verdict & cbpf.WORD
    assert packets(rings) == [(FRAMES[name], len(FRAMES[name])) for name in ("udp", "large udp")]
    assert rings.settled() == Counts(matched=2, captured=2)


@pytest.mark.parametrize("hook", HOOKS.values(), ids=str)
def test_packets_of_all_lengths_are_captured_byte_for_byte(rings: Rings, hook: Hook) -> None:
    frame = UDP[:34] + bytes(range(34, 200))
    with capturing(rings, hook) as program:
        for size in range(34, len(frame) + 1):
            program.test_run(frame[:size])
    assert packets(rings) == [(frame[:size], size) for size in range(34, len(frame) + 1)]


@pytest.mark.parametrize("snaplen", [31, 32, 33, 64, 127, 128, 129])
def test_snapshot_length_cuts_between_pieces_and_within_them(rings: Rings, snaplen: int) -> None:
    frame = bytes(range(200))
    with capturing(rings, XDP_FRAGS, snaplen=snaplen) as program:
        program.test_run(frame)
        program.test_run(frame)
    assert packets(rings) == [(frame[:snaplen], len(frame))] * 2


def test_packet_in_fragments_is_captured_whole(rings: Rings) -> None:
    frame = UDP + bytes(n * 7 & 0xFF for n in range(20000))
    with capturing(rings, XDP_FRAGS) as program:
        program.test_run(frame)
    assert packets(rings) == [(frame, len(frame))]


@KERNEL_CONTEXT
@pytest.mark.parametrize("snaplen", [40, 4000, 262144])
def test_flag_of_fragments_leaves_the_records_as_they_are(rings: Rings, snaplen: int) -> None:
    frames = [UDP, UDP + bytes(n & 0xFF for n in range(3000)), UDP + bytes(n * 7 & 0xFF for n in range(20000))]
    with capturing(rings, XDP_FRAGS, snaplen=snaplen, flag=fragment_flag()) as program:
        for frame in frames:
            program.test_run(frame)
    assert packets(rings) == [(frame[:snaplen], len(frame)) for frame in frames]


@pytest.mark.parametrize("hook", HOOKS.values(), ids=str)
@pytest.mark.parametrize("snaplen", [1, 14, 40])
def test_snapshot_length_cuts_the_packet_but_not_its_length(rings: Rings, hook: Hook, snaplen: int) -> None:
    with capturing(rings, hook, snaplen=snaplen) as program:
        program.test_run(UDP)
        program.test_run(UDP)
    assert packets(rings) == [(UDP[:snaplen], len(UDP))] * 2


def test_clock_offset_is_updated_only_when_the_clock_was_set(rings: Rings) -> None:
    told = [line.clock_offset_ns for line in rings._lines]
    for _ in range(10):
        rings.set_clock()
    assert [line.clock_offset_ns for line in rings._lines] == told
    for line in rings._lines:
        line.clock_offset_ns -= 10**9
    rings.set_clock()
    assert [line.clock_offset_ns for line in rings._lines] == pytest.approx(told, abs=10**6)


@pytest.mark.parametrize("nano", [False, True])
def test_time_is_that_of_the_day(rings: Rings, nano: bool) -> None:
    rule = Rule(translate(EVERYTHING, XDP), [Capture(rings, nano)])
    with load("capture", XDP, assemble(XDP, [rule])) as program:
        before = time.time_ns()
        for _ in range(3):
            program.test_run(UDP)
        after = time.time_ns()
    unit = 1 if nano else 1000
    with harvested(rings) as span:
        times = [seconds * 10**9 + fraction * unit for _, seconds, fraction in offsets(span)]
    assert before - unit < times[0] <= times[1] <= times[2] <= after
    assert len(times) == 3


def test_second_that_was_kept_is_given_up_when_the_clock_is_set_back(rings: Rings) -> None:
    """As when a leap second is taken out: the writer must not go on counting from the second it knows."""
    with capturing(rings) as program:
        program.test_run(UDP)
        with harvested(rings) as span:
            ((_, first, _),) = offsets(span)
        for line in rings._lines:
            line.clock_offset_ns -= 3600 * 10**9
        program.test_run(UDP)
    with harvested(rings) as span:
        ((_, second, fraction),) = offsets(span)
    assert first - second in (3599, 3600)
    assert fraction < 10**6


def numbered(number: int) -> bytes:
    """Frames of many sizes, so that records end everywhere."""
    return UDP + number.to_bytes(4, "big") + bytes(number * 37 % 1400)


def test_records_come_out_whole_and_in_order_however_often_the_ring_wraps(rings: Rings) -> None:
    sent, read = [], []
    with capturing(rings) as program:
        for number in range(1000):
            sent.append(numbered(number))
            program.test_run(sent[-1])
            if number % 23 == 0:
                read += [data for data, _ in packets(rings)]
    read += [data for data, _ in packets(rings)]
    assert sum(map(len, sent)) > 10 * MIN_SIZE
    assert read == sent
    assert rings.settled() == Counts(matched=1000, captured=1000)


def test_what_finds_no_room_is_lost_and_counted_and_the_rest_is_intact(rings: Rings) -> None:
    accepted, read = [], []
    with capturing(rings) as program:
        for number in range(600):
            before = rings.counts().captured
            program.test_run(numbered(number))
            if rings.counts().captured > before:
                accepted.append(numbered(number))
            if number in (200, 203, 400):  # not empty, and soon full again, also behind its own tail
                read += [data for data, _ in packets(rings)]
    read += [data for data, _ in packets(rings)]
    counts = rings.settled()
    assert counts == Counts(matched=600, captured=len(accepted), lost=600 - len(accepted))
    assert 100 < counts.lost < 500
    assert read == accepted


@pytest.mark.parametrize("read_before", [1, 2])
def test_full_ring_is_not_taken_for_an_empty_one(rings: Rings, read_before: int) -> None:
    """Records of 64 bytes, so that the head would come to lie exactly where the tail is."""
    in_all = MIN_SIZE // 64
    with capturing(rings, snaplen=48) as program:
        for _ in range(read_before):
            program.test_run(UDP)
        assert len(packets(rings)) == read_before
        for _ in range(in_all):
            program.test_run(UDP)
    assert packets(rings) == [(UDP[:48], len(UDP))] * (in_all - 1)
    assert rings.settled() == Counts(matched=in_all + read_before, captured=in_all + read_before - 1, lost=1)


def test_largest_packet_fits_behind_the_last_record(rings: Rings) -> None:
    """It begins before the end of the ring and ends in the room behind it."""
    largest = UDP + bytes(60000)
    with capturing(rings, XDP_FRAGS) as program:
        for _ in range(3):
            program.test_run(largest)
    assert MIN_SIZE < 2 * (len(largest) + HEADER) < MIN_SIZE + LARGEST_RECORD
    assert packets(rings) == [(largest, len(largest))] * 2
    assert rings.counts().lost == 1


def test_nothing_is_captured_beyond_the_limit(rings: Rings) -> None:
    with capturing(rings, expression="udp", limit=3) as program:
        for _ in range(5):
            program.test_run(UDP)
    assert len(packets(rings)) == 3
    assert rings.settled() == Counts(matched=5, captured=3, over=2)


def test_packet_that_is_lost_does_not_count_towards_the_limit(rings: Rings) -> None:
    with capturing(rings, XDP_FRAGS, limit=3) as program:
        for _ in range(4):
            program.test_run(UDP + bytes(60000))
        packets(rings)
        for _ in range(3):
            program.test_run(UDP)
    assert len(packets(rings)) == 1
    assert rings.settled() == Counts(matched=7, captured=3, lost=2, over=2)


def test_limit_holds_for_all_cpus_together(rings: Rings) -> None:
    cpus = range(os.cpu_count() or 1)
    with capturing(rings, limit=3) as program:
        for cpu in [*cpus] * 3:
            os.sched_setaffinity(0, {cpu})
            program.test_run(UDP)
    assert rings.settled() == Counts(matched=3 * len(cpus), captured=3, over=3 * len(cpus) - 3)


def test_what_comes_behind_the_capture_finds_the_packet_as_it_was(rings: Rings) -> None:
    rule = Rule(translate(compile_expression("udp", snaplen=60), XDP), [Capture(rings), Capture(rings), Drop()])
    with load("twice", XDP, assemble(XDP, [rule])) as program:
        assert program.test_run(UDP).verdict == XDP.drop_verdict
    assert packets(rings) == [(UDP[:60], len(UDP))] * 2


def test_harvest_that_fails_leaves_the_records_for_the_next(rings: Rings) -> None:
    with capturing(rings) as program:
        program.test_run(UDP)
    with pytest.raises(ZeroDivisionError), rings.harvest():
        raise ZeroDivisionError
    assert packets(rings) == [(UDP, len(UDP))]


def test_hook_without_lengths_of_fragments_counts_its_linear_area(rings: Rings) -> None:
    with capturing(rings, replace(XDP_FRAGS, load_bytes=None)) as program:
        program.test_run(UDP)
    assert packets(rings) == [(UDP, len(UDP))]


@pytest.mark.parametrize("size", [MIN_SIZE - 1, 1 << 30])
def test_buffer_of_an_impossible_size_is_refused(size: int) -> None:
    with pytest.raises(FilterError, match=rf"^buffer size {size}: out of range 65536 to 268435456 bytes per CPU$"):
        Rings(size)


def test_closing_gives_every_descriptor_back() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        Rings(MIN_SIZE).close()
    assert len(os.listdir("/proc/self/fd")) == before
