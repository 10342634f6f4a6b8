"""Each pass over the graph alone: small programs in, graphs out."""

from __future__ import annotations

import pytest

from filters.compiler import cbpf
from filters.compiler.bounds import place_guards, upper_bounds
from filters.compiler.byte_order import NATIVE, byte_orders, in_order
from filters.compiler.cbpf import Instruction
from filters.compiler.expr import compile_expression
from filters.compiler.graph import (
    REJECT,
    A,
    Arithmetic,
    Block,
    Branch,
    Copy,
    Graph,
    Jump,
    LoadAncillary,
    LoadHeaderLength,
    LoadPacket,
    Return,
    Set,
    X,
    control_flow,
    unroll,
)
from filters.compiler.hook import TC_IN, TC_OUT, XDP
from filters.compiler.passes import liveness, prune, split, with_answers, without_dead
from filters.errors import InvalidFilter, UnsupportedPrimitive

ETHERTYPE, PROTOCOL = LoadPacket(2, 12), LoadPacket(1, 23)
ACCEPT = Block((), Return(1))


def graph_of(expression: str) -> Graph:
    return control_flow(compile_expression(expression), header=14)


def moves_x(operation: object) -> bool:
    return isinstance(operation, LoadHeaderLength) or (isinstance(operation, Copy | Set) and operation.to == X)


# control_flow


def test_program_is_cut_where_jumps_begin_and_end() -> None:
    assert graph_of("ip proto 6") == {
        0: Block((ETHERTYPE,), Branch(cbpf.JEQ, 0x800, 2, 5)),
        2: Block((PROTOCOL,), Branch(cbpf.JEQ, 6, 4, 5)),
        4: Block((), Return(262144)),
        5: REJECT,
    }


@pytest.mark.parametrize(
    ("k", "load"),
    [
        (cbpf.NET_OFF + 9, LoadPacket(1, 23)),
        (cbpf.LL_OFF + 9, LoadPacket(1, 9)),
        (0x80000000, LoadPacket(1, 0x80000000)),
    ],
)
def test_negative_offsets_count_from_headers(k: int, load: LoadPacket) -> None:
    program = (Instruction(cbpf.LD | cbpf.B | cbpf.ABS, k=k), Instruction(cbpf.RET | cbpf.A))
    assert control_flow(program, header=14) == {0: Block((load,), Return(A))}


def test_indexed_load_from_the_network_header_keeps_where_it_counts_from() -> None:
    program = (Instruction(cbpf.LD | cbpf.H | cbpf.IND, k=cbpf.NET_OFF + 2), Instruction(cbpf.RET | cbpf.A))
    assert control_flow(program, header=14)[0].operations == (LoadPacket(2, 2, indexed=True, header=14),)


# unroll


def test_loop_is_written_out_and_a_further_round_rejects_or_accepts() -> None:
    count = Instruction(cbpf.ALU | cbpf.ADD, k=1)
    leave = Instruction(cbpf.JMP | cbpf.JGE, 1, 0, 5)
    back = Instruction(cbpf.JMP | cbpf.JA, k=cbpf.WORD - 2)
    accept, reject = Instruction(cbpf.RET | cbpf.K, k=1), Instruction(cbpf.RET | cbpf.K)
    on = Instruction(cbpf.JMP | cbpf.JA)
    unrolled = (
        *(count, Instruction(cbpf.JMP | cbpf.JGE, 7, 0, 5), on),
        *(count, Instruction(cbpf.JMP | cbpf.JGE, 4, 0, 5), on),
        *(count, leave, Instruction(cbpf.JMP | cbpf.JA, k=1)),
        accept,
    )
    assert unroll([count, leave, back, accept], rounds=3, accept_longer=False) == (*unrolled, reject)
    assert unroll([count, leave, back, accept], rounds=3) == (*unrolled, accept)


def test_jumps_over_a_loop_still_lead_where_they_led() -> None:
    over = Instruction(cbpf.JMP | cbpf.JEQ, 0, 2, 7)
    loop = (Instruction(cbpf.ALU | cbpf.ADD, k=1), Instruction(cbpf.JMP | cbpf.JA, k=cbpf.WORD - 1))
    unrolled = unroll([over, *loop, Instruction(cbpf.RET | cbpf.K, k=9)], rounds=4)
    assert (unrolled[0].jt, unrolled[0].jf) == (0, 8)
    assert unrolled[9].k == 9


def test_loop_in_a_loop_is_refused() -> None:
    step = Instruction(cbpf.ALU | cbpf.ADD, k=1)
    inner = Instruction(cbpf.JMP | cbpf.JA, k=cbpf.WORD - 1)
    outer = Instruction(cbpf.JMP | cbpf.JA, k=cbpf.WORD - 3)
    with pytest.raises(InvalidFilter, match=r"^instruction 2: backward jump that is not a simple loop$"):
        unroll([step, step, inner, outer])


def test_two_loops_one_after_the_other_are_unrolled() -> None:
    twice = unroll(compile_expression("ip6 protochain 6 or ip6 protochain 17"))
    assert all(i.cls != cbpf.JMP or i.is_branch or not i.k >> 31 for i in twice)
    cbpf.check(twice, limit=len(twice))


# prune


def test_what_can_only_reject_is_a_rejection() -> None:
    only_rejecting = {
        0: Block((ETHERTYPE,), Branch(cbpf.JEQ, 1, 1, 4)),
        1: Block((PROTOCOL,), Branch(cbpf.JEQ, 2, 2, 3)),
        2: REJECT,
        3: Block((Set(X, 1),), Return(0)),
        4: ACCEPT,
    }
    assert prune(only_rejecting) == {
        0: Block((ETHERTYPE,), Branch(cbpf.JEQ, 1, 1, 4)),
        1: REJECT,
        4: ACCEPT,
    }


def test_branch_that_decides_nothing_is_a_jump() -> None:
    same = {0: Block((PROTOCOL,), Branch(cbpf.JGT, 5, 1, 2)), 1: Block((), Jump(3)), 2: Block((), Jump(3)), 3: ACCEPT}
    assert prune(same) == {0: Block((PROTOCOL,), Jump(3)), 3: ACCEPT}


@pytest.mark.parametrize("load", [LoadPacket(4, 0xFFFC), LoadPacket(1, 0x10000), LoadHeaderLength(0xFFFFFFFF)])
def test_load_beyond_every_packet_is_a_rejection(load: LoadPacket | LoadHeaderLength) -> None:
    assert prune({0: Block((load,), Return(1))}) == {0: REJECT}


# split


def test_block_ends_where_x_changes() -> None:
    before = {0: Block((ETHERTYPE, LoadHeaderLength(14), PROTOCOL), Branch(cbpf.JEQ, 1, 3, 4)), 3: ACCEPT, 4: REJECT}
    assert split(before, moves_x) == {
        0: Block((ETHERTYPE, LoadHeaderLength(14)), Jump(1)),
        1: Block((PROTOCOL,), Branch(cbpf.JEQ, 1, 2, 3)),
        2: ACCEPT,
        3: REJECT,
    }


# liveness, without_dead


def test_variable_lives_from_where_it_is_written_to_where_it_is_read() -> None:
    graph = {
        0: Block((Copy("M1", A), ETHERTYPE), Branch(cbpf.JEQ, X, 1, 2)),
        1: Block((Copy(A, "M1"),), Return(A)),
        2: ACCEPT,
    }
    assert liveness(graph) == {0: {A, X}, 1: {"M1"}, 2: frozenset()}


def test_result_that_nobody_reads_is_not_made_but_loads_that_may_reject_stay() -> None:
    dead = {0: Block((PROTOCOL, Set(X, 5), Copy("M0", A), Arithmetic(cbpf.DIV, X), Arithmetic(cbpf.ADD, 1)), Return(1))}
    assert without_dead(dead) == {0: Block((PROTOCOL, Set(X, 5), Arithmetic(cbpf.DIV, X)), Return(1))}


# byte_orders


def test_value_that_is_only_compared_keeps_its_byte_order() -> None:
    graph = {0: Block((ETHERTYPE,), Branch(cbpf.JEQ, 1, 1, 2)), 1: Block((), Branch(cbpf.JSET, 2, 2, 3))}
    graph |= {2: ACCEPT, 3: REJECT}
    orders = byte_orders(graph)
    assert (orders.defined(0, 0), orders.used(0, 1), orders.used(1, 0)) == (2, 2, 2)


def test_masked_value_keeps_its_byte_order_too() -> None:
    graph = {0: Block((LoadPacket(4, 26), Arithmetic(cbpf.AND, 0xFFFFFF00)), Branch(cbpf.JEQ, 1, 1, 2))}
    graph |= {1: ACCEPT, 2: REJECT}
    orders = byte_orders(graph)
    assert (orders.defined(0, 0), orders.used(0, 1), orders.defined(0, 1), orders.used(0, 2)) == (4, 4, 4, 4)


@pytest.mark.parametrize(
    "block",
    [
        Block((ETHERTYPE,), Branch(cbpf.JGT, 1500, 1, 2)),
        Block((ETHERTYPE,), Branch(cbpf.JEQ, X, 1, 2)),
        Block((ETHERTYPE, Copy(X, A)), Branch(cbpf.JEQ, 1, 1, 2)),
        Block((ETHERTYPE, Arithmetic(cbpf.ADD, 1)), Branch(cbpf.JEQ, 1, 1, 2)),
        Block((ETHERTYPE, Arithmetic(cbpf.OR, X)), Branch(cbpf.JEQ, 1, 1, 2)),
        Block((ETHERTYPE,), Return(A)),
    ],
)
def test_value_that_is_counted_with_is_swapped(block: Block) -> None:
    assert byte_orders({0: block, 1: ACCEPT, 2: REJECT}).defined(0, 0) == NATIVE


def test_loads_of_different_sizes_that_meet_are_swapped() -> None:
    graph: Graph = {
        0: Block((ETHERTYPE,), Branch(cbpf.JEQ, 1, 1, 2)),
        1: Block((LoadPacket(4, 0),), Jump(2)),
        2: Block((), Branch(cbpf.JEQ, 3, 3, 4)),
        3: ACCEPT,
        4: REJECT,
    }
    orders = byte_orders(graph)
    assert orders.defined(0, 0) == orders.defined(1, 0) == NATIVE


def test_constant_changes_places_with_the_bytes_of_the_value() -> None:
    assert [in_order(0x12345678, size) for size in (1, 2, 4)] == [0x12345678, 0x12347856, 0x78563412]


# upper_bounds, place_guards


def test_values_are_known_to_be_small_where_they_are() -> None:
    graph = {
        0: Block((LoadPacket(1, 0), Arithmetic(cbpf.MUL, 8), Copy(X, A), Arithmetic(cbpf.SUB, 1)), Jump(1)),
        1: ACCEPT,
    }
    assert upper_bounds(graph)[1] == {A: cbpf.WORD, X: 255 * 8}


@pytest.mark.parametrize(
    ("operation", "operand", "bound"),
    [
        (cbpf.ADD, 1, 256),
        (cbpf.ADD, cbpf.WORD, cbpf.WORD),
        (cbpf.MUL, 4, 1020),
        (cbpf.AND, 0xF, 0xF),
        (cbpf.OR, 0x100, 0x1FF),
        (cbpf.XOR, 3, 255),
        (cbpf.DIV, 2, 127),
        (cbpf.DIV, X, 255),
        (cbpf.MOD, 10, 9),
        (cbpf.MOD, X, 255),
        (cbpf.LSH, 2, 1020),
        (cbpf.LSH, X, cbpf.WORD),
        (cbpf.RSH, 4, 15),
        (cbpf.RSH, X, 255),
        (cbpf.SUB, 1, cbpf.WORD),
    ],
)
def test_result_of_arithmetic_on_a_byte_is_at_most(operation: int, operand: int | str, bound: int) -> None:
    graph = {0: Block((LoadPacket(1, 0), Arithmetic(operation, operand)), Jump(1)), 1: ACCEPT}
    assert upper_bounds(graph)[1][A] == bound


def test_one_check_covers_all_that_every_accepted_packet_needs() -> None:
    guards = place_guards(graph_of("ip proto 6 and src host 10.1.2.3"), moves_x)
    assert [size for size in guards.packet.values() if size] == [30]


def test_check_is_not_made_before_a_branch_that_accepts_without_it() -> None:
    graph = {
        0: Block((ETHERTYPE,), Branch(cbpf.JEQ, 1, 1, 2)),
        1: Block((LoadPacket(1, 99),), Branch(cbpf.JEQ, 1, 2, 3)),
        2: ACCEPT,
        3: REJECT,
    }
    assert place_guards(graph, moves_x).packet == {0: 14, 1: 100, 2: 0, 3: 0}


def test_check_through_x_is_void_when_x_changes() -> None:
    through_x = LoadPacket(2, 14, indexed=True)
    graph = {
        0: Block((LoadHeaderLength(14),), Jump(1)),
        1: Block((through_x, LoadHeaderLength(14)), Jump(2)),
        2: Block((through_x,), Return(A)),
    }
    guards = place_guards(graph, moves_x)
    assert guards.indexed == {0: 0, 1: 16, 2: 16}
    assert guards.pointers == {0, 1}
    assert not guards.pointer_at_start


def test_load_through_an_x_that_may_be_anything_checks_for_itself() -> None:
    through_x = LoadPacket(2, 14, indexed=True)
    graph = {0: Block((LoadPacket(4, 0), Copy(X, A)), Jump(1)), 1: Block((through_x,), Return(A))}
    guards = place_guards(graph, moves_x)
    assert not guards.is_shared(through_x, 1)
    assert guards.indexed == {0: 0, 1: 0}


# with_answers


def test_question_that_has_one_answer_is_not_asked() -> None:
    asks = {0: Block((LoadAncillary(cbpf.PKTTYPE),), Return(A))}
    assert with_answers(asks, TC_OUT) == {0: Block((Set(A, 4),), Return(A))}
    assert with_answers(asks, TC_IN) == asks
    assert with_answers(asks, XDP) == {0: Block((Set(A, 0),), Return(A))}
    protocol = {0: Block((LoadAncillary(cbpf.PROTOCOL),), Return(A))}
    assert with_answers(protocol, XDP) == {0: Block((ETHERTYPE,), Return(A))}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (cbpf.MARK, "[mark]: not available at xdp"),
        (cbpf.NLATTR, "[nla]: not available at xdp"),
        (cbpf.HATYPE, "[hatype]: not available at xdp"),
    ],
)
def test_question_that_nobody_answers_is_named(what: int, message: str) -> None:
    with pytest.raises(UnsupportedPrimitive) as refusal:
        with_answers({0: Block((LoadAncillary(what),), Return(A))}, XDP)
    assert str(refusal.value) == message
