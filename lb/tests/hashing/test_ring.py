"""Slot words: each rule of a transition, and the promise that open flows stay on living members.

The promise is tested on a model of the data path's lookup (`DataPath`), through random sequences of
flows, changes, deaths and expiries.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lb.hashing.maglev import table
from lb.hashing.ring import (
    MEMBERS,
    RUN_GAP,
    TRACK,
    Plan,
    changed_runs,
    current_member,
    expire,
    is_tracked,
    pack,
    plan,
    previous_member,
    transition,
)

pytestmark = pytest.mark.usefixtures("implementation")

A, B, C, D = 1, 2, 3, 4


def stable(current: int) -> int:
    return pack(current)


def tracked(current: int) -> int:
    return pack(current, track=True)


def moving(current: int, previous: int) -> int:
    return pack(current, previous, track=True)


def ring(words: Iterable[int]) -> array[int]:
    return array("I", words)


def test_a_word_has_the_layout_that_the_data_path_reads() -> None:
    word = pack(0x1234, 0x5678, track=True)
    assert word == 0x1234 | 0x5678 << 15 | 1 << 30
    assert (current_member(word), previous_member(word), is_tracked(word)) == (0x1234, 0x5678, True)


def test_the_highest_member_fits_in_both_places() -> None:
    word = pack(MEMBERS[-1], MEMBERS[-1])
    assert (current_member(word), previous_member(word)) == (32767, 32767)
    assert not is_tracked(word)


NO_ONE: set[int] = set()
TRANSITIONS = [
    # description, old word, wanted member, living members, new word
    ("an empty slot is filled", 0, B, {B}, stable(B)),
    ("a stable slot stays", stable(B), B, {B}, stable(B)),
    ("a stable slot keeps even a dead member", stable(B), B, NO_ONE, stable(B)),
    ("a living member is replaced", stable(B), C, {B, C}, moving(C, B)),
    ("a dead member is replaced", stable(B), C, {C}, stable(C)),
    ("the last member drains", stable(B), 0, {B}, moving(0, B)),
    ("the last member dies", stable(B), 0, NO_ONE, stable(0)),
    ("a transition goes on", moving(B, A), B, {A, B}, moving(B, A)),
    ("the previous member dies", moving(B, A), B, {B}, tracked(B)),
    ("the middle member is recorded", moving(B, A), C, {A, B, C}, moving(C, A)),
    ("the middle member dies", moving(B, A), C, {A, C}, moving(C, A)),
    ("the change is taken back", moving(B, A), A, {A, B}, tracked(A)),
    ("the previous dies, the current is replaced", moving(B, A), C, {B, C}, moving(C, B)),
    ("both die", moving(B, A), C, {C}, tracked(C)),
    ("all are drained in transition", moving(B, A), 0, {A, B}, moving(0, A)),
    ("a member comes while the last drains", moving(0, A), C, {A, C}, moving(C, A)),
    ("the last member comes back", moving(0, A), A, {A}, tracked(A)),
    ("the draining last member dies", moving(0, A), 0, NO_ONE, tracked(0)),
    ("a tracked slot stays", tracked(B), B, {B}, tracked(B)),
    ("a tracked living member is replaced", tracked(B), C, {B, C}, moving(C, B)),
    ("a tracked dead member is replaced", tracked(B), C, {C}, tracked(C)),
    ("a tracked empty slot is filled", tracked(0), C, {C}, tracked(C)),
]


@pytest.mark.parametrize(
    ("word", "wanted", "alive", "expected"),
    [case[1:] for case in TRANSITIONS],
    ids=[case[0] for case in TRANSITIONS],
)
def test_transition_of_a_slot(word: int, wanted: int, alive: set[int], expected: int) -> None:
    assert transition(ring([word]), [wanted], alive) == ring([expected])


def test_no_member_counts_as_dead_even_where_zero_counts_as_alive() -> None:
    assert transition(ring([stable(B), 0]), [C, C], range(5)) == ring([moving(C, B), stable(C)])


def test_a_transition_leaves_the_old_words_as_they_are() -> None:
    old = ring([stable(A)])
    transition(old, [B], {A, B})
    assert old == ring([stable(A)])


def test_a_table_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        transition(ring([stable(A)]), [A, B], {A, B})


@pytest.mark.parametrize("member", [-1, 32768])
def test_a_member_out_of_range_is_refused(member: int) -> None:
    with pytest.raises(ValueError, match=rf"member {member}: not in 0\.\.32767"):
        transition(ring([0, 0]), [A, member], {A})


def test_expiry_ends_transitions_and_keeps_track_only_where_recorded_flows_live() -> None:
    before = ring([stable(A), moving(B, A), moving(B, A), tracked(C), tracked(C)])
    after = ring([stable(A), stable(B), tracked(B), stable(C), tracked(C)])
    assert expire(before, tracked={0, 2, 4}) == after


def test_expiry_of_a_drained_service_leaves_empty_slots() -> None:
    assert expire(ring([moving(0, A), moving(0, A)]), tracked={1}) == ring([0, tracked(0)])


def test_expiry_without_recorded_flows_makes_every_slot_stable() -> None:
    assert expire(ring([moving(B, A), tracked(C), stable(D)])) == ring([B, C, D])


def members(backends: int, size: int = 1009) -> list[int]:
    return [i + 1 for i in table({f"10.0.0.{host}:80": 1 for host in range(backends)}, size)]


def test_plan_of_an_added_backend() -> None:
    old = ring(members(9))
    new = transition(old, members(10), range(1, 11))
    cost = plan(old, new)
    gained = members(10).count(10)
    assert cost.slots == 1009
    assert cost.minimum == gained
    assert gained <= cost.moved <= gained + 50
    assert cost.in_transition == cost.moved


def test_plan_of_a_dead_backend_has_no_slot_in_transition_that_was_its_own() -> None:
    old = ring([stable(A), stable(A), stable(B), stable(C)])
    new = transition(old, [B, C, C, C], {B, C})
    assert plan(old, new) == Plan(slots=4, moved=3, minimum=2, in_transition=1)


def test_plan_of_members_that_change_places_sees_that_nothing_had_to_move() -> None:
    old = ring([stable(A), stable(B)])
    new = transition(old, [B, A], {A, B})
    assert plan(old, new) == Plan(slots=2, moved=2, minimum=0, in_transition=2)


def test_plan_of_a_new_service_fills_every_slot() -> None:
    assert plan(ring([0, 0]), ring([A, B])) == Plan(slots=2, moved=2, minimum=2, in_transition=0)


def test_plan_of_the_last_drain_empties_every_slot() -> None:
    new = ring([moving(0, A), moving(0, A)])
    assert plan(ring([A, A]), new) == Plan(slots=2, moved=2, minimum=2, in_transition=2)


def changed_at(*slots: int, size: int = 500) -> list[tuple[int, int]]:
    new = ring([0] * size)
    for slot in slots:
        new[slot] = A
    return changed_runs(ring([0] * size), new)


def test_an_unchanged_ring_has_no_run_to_write() -> None:
    assert changed_at() == []


def test_runs_are_half_open_and_reach_both_ends() -> None:
    assert changed_at(0, 499) == [(0, 1), (499, 500)]


def test_adjacent_changes_are_one_run() -> None:
    assert changed_at(7, 8, 9) == [(7, 10)]


def test_changes_less_than_a_gap_apart_are_one_run() -> None:
    assert changed_at(10, 10 + RUN_GAP) == [(10, 11 + RUN_GAP)]
    assert changed_at(10, 11 + RUN_GAP) == [(10, 11), (11 + RUN_GAP, 12 + RUN_GAP)]


def test_a_change_of_track_alone_is_written() -> None:
    assert changed_runs(ring([A]), ring([A | TRACK])) == [(0, 1)]


def test_writing_the_runs_gives_the_new_ring() -> None:
    old = ring(members(9))
    new = transition(old, members(10), range(1, 11))
    written = ring(old)
    for start, stop in changed_runs(old, new):
        written[start:stop] = new[start:stop]
    assert written == new


class DataPath:
    """What the data path does with a packet, kept obvious: the words, the flow table, who lives."""

    def __init__(self, slots: int) -> None:
        self.words = ring([0] * slots)
        self.alive: set[int] = set()
        self.recorded: dict[int, int] = {}

    def slot(self, flow: int) -> int:
        return flow % len(self.words)

    def in_transition(self, flow: int) -> bool:
        return previous_member(self.words[self.slot(flow)]) != 0

    def resolve(self, flow: int, syn: bool) -> int:
        word = self.words[self.slot(flow)]
        recorded = self.recorded.get(flow)
        if is_tracked(word) and recorded in self.alive:
            return recorded
        if previous_member(word) and not syn:
            return previous_member(word)
        return current_member(word)

    def deliver(self, flow: int, syn: bool) -> int:
        """The member a packet goes to; the flow is recorded where the word says so."""
        member = self.resolve(flow, syn)
        word = self.words[self.slot(flow)]
        if is_tracked(word) and (syn or previous_member(word)):
            self.recorded[flow] = member
        return member


SLOTS = 3
FLOW = st.integers(0, 2 * SLOTS - 1)
MEMBER = st.sampled_from([A, B, C, D])


class OpenFlowsStay(RuleBasedStateMachine):
    """`promised` holds each open flow whose member has lived since the flow began."""

    @initialize()
    def start(self) -> None:
        self.path = DataPath(SLOTS)
        self.promised: dict[int, int] = {}

    @rule(flow=FLOW)
    def open(self, flow: int) -> None:
        if flow not in self.promised:
            member = self.path.deliver(flow, syn=True)
            if member in self.path.alive:
                self.promised[flow] = member

    @rule(flow=FLOW)
    def hear(self, flow: int) -> None:
        """A packet of an open flow, or one out of the blue."""
        self.path.deliver(flow, syn=False)

    @rule(flow=FLOW)
    def close(self, flow: int) -> None:
        self.promised.pop(flow, None)

    @rule(member=MEMBER)
    def live(self, member: int) -> None:
        self.path.alive.add(member)

    @rule(member=MEMBER)
    def die(self, member: int) -> None:
        self.path.alive.discard(member)
        self.promised = {flow: on for flow, on in self.promised.items() if on != member}

    @rule(wanted=st.lists(st.sampled_from([0, A, B, C, D]), min_size=SLOTS, max_size=SLOTS))
    def change(self, wanted: list[int]) -> None:
        """Any table of living members; those left out are draining."""
        living = [member if member in self.path.alive else 0 for member in wanted]
        self.path.words = transition(self.path.words, living, self.path.alive)

    @precondition(lambda self: any(map(previous_member, self.path.words)))
    @rule(silent=st.sets(FLOW), still_tracked=st.sets(st.integers(0, SLOTS - 1)))
    def time_out(self, silent: set[int], still_tracked: set[int]) -> None:
        """By the timeout, a flow older than the change has sent a packet or is no longer open."""
        for flow in list(self.promised):
            if flow in self.path.recorded or not self.path.in_transition(flow):
                continue
            if flow in silent:
                del self.promised[flow]
            else:
                self.path.deliver(flow, syn=False)
        live_entries = self.promised.keys() & self.path.recorded.keys()
        kept = still_tracked | {self.path.slot(flow) for flow in live_entries}
        self.path.words = expire(self.path.words, kept)
        self.path.recorded = {
            flow: member for flow, member in self.path.recorded.items() if self.path.slot(flow) in kept
        }

    @invariant()
    def every_promised_flow_finds_its_member(self) -> None:
        found = {flow: self.path.resolve(flow, syn=False) for flow in self.promised}
        assert found == self.promised

    @invariant()
    def words_are_well_formed(self) -> None:
        for word in self.path.words:
            assert word < 2 * TRACK
            if previous_member(word):
                assert is_tracked(word)
                assert previous_member(word) != current_member(word)


def test_open_flows_stay_on_living_members() -> None:
    run_state_machine_as_test(OpenFlowsStay, settings=settings(max_examples=200, stateful_step_count=40, deadline=None))
