"""Maglev tables: the paper's example and pseudocode, shares by weight, disruption, prime sizes."""

from __future__ import annotations

import random
from array import array
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lb.hashing.maglev import RING_SIZES, WEIGHTS, is_prime, nearest_primes, permutation, populate, table, turns

pytestmark = pytest.mark.usefixtures("implementation")

SIZE = 16381
SMALL_SIZE = 251


def backends(count: int, weight: int = 1) -> dict[str, int]:
    return {f"10.0.0.{host}:80": weight for host in range(1, count + 1)}


def owners(weights: dict[str, int], size: int = SIZE) -> list[str]:
    """The name of each slot's backend."""
    names = list(weights)
    return [names[position] for position in table(weights, size)]


def moved(before: list[str], after: list[str]) -> int:
    return sum(b != a for b, a in zip(before, after, strict=True))


def least_moved(before: list[str], after: list[str]) -> int:
    return (Counter(after) - Counter(before)).total()


def table_by_the_paper(weights: dict[str, int], size: int) -> list[str]:
    """Pseudocode 1 of the paper, word for word: whole permutations, one claim each in turn."""
    names = sorted(weights)
    starts = [permutation(name, size) for name in names]
    preferences = [[(offset + j * skip) % size for j in range(size)] for offset, skip in starts]
    entry: list[str | None] = [None] * size
    following = [0] * len(names)
    filled = 0
    while True:
        for i, name in enumerate(names):
            while entry[preferences[i][following[i]]] is not None:
                following[i] += 1
            entry[preferences[i][following[i]]] = name
            filled += 1
            if filled == size:
                return [owner for owner in entry if owner is not None]


PAPER_PERMUTATIONS = [(3, 4), (0, 2), (3, 1)]


def test_the_example_of_the_paper_is_reproduced() -> None:
    order = turns([1, 1, 1], 7)
    assert populate(order, PAPER_PERMUTATIONS, 7).tolist() == [1, 0, 1, 0, 2, 2, 0]


def test_the_example_of_the_paper_is_reproduced_after_the_removal_of_b1() -> None:
    order = [0, 2, 0, 2, 0, 2, 0]
    assert populate(order, PAPER_PERMUTATIONS, 7).tolist() == [0, 0, 0, 0, 2, 2, 2]


@pytest.mark.parametrize("count", [1, 2, 7, 20])
def test_equal_weights_give_the_table_of_the_papers_pseudocode(count: int) -> None:
    assert owners(backends(count), 1009) == table_by_the_paper(backends(count), 1009)


@pytest.mark.parametrize("weight", [2, 7, 65535])
def test_equal_weights_of_any_value_give_the_same_table(weight: int) -> None:
    assert table(backends(20, weight), SIZE) == table(backends(20), SIZE)


def test_only_the_ratio_of_weights_counts() -> None:
    weights = {"10.0.0.1:80": 1, "10.0.0.2:80": 3, "10.0.0.3:80": 4}
    thousandfold = {name: weight * 1000 for name, weight in weights.items()}
    assert table(weights, SIZE) == table(thousandfold, SIZE)


def test_every_node_computes_the_same_table_in_whatever_order_backends_are_given() -> None:
    weights = {name: 1 + i % 5 for i, name in enumerate(backends(20))}
    shuffled = list(weights.items())
    random.Random(1).shuffle(shuffled)
    assert owners(dict(shuffled)) == owners(weights)


def test_the_table_does_not_change_from_release_to_release() -> None:
    """Nodes of two releases may serve one VIP together: a new hash or order would split them."""
    assert table(backends(3), 13).tolist() == [0, 0, 0, 2, 2, 2, 0, 1, 1, 2, 1, 1, 0]


def test_the_table_holds_unsigned_shorts() -> None:
    assert table(backends(2), SMALL_SIZE).typecode == "H"


@pytest.mark.parametrize("weights", [{}, backends(3, weight=0)])
def test_no_active_backend_gives_an_empty_table(weights: dict[str, int]) -> None:
    assert table(weights, SMALL_SIZE) == array("H")


def test_a_backend_of_weight_zero_takes_no_slot_and_changes_no_other() -> None:
    drained = {"10.0.0.0:80": 0} | backends(3)
    assert owners(drained) == owners(backends(3))


def test_more_backends_than_slots_still_fill_the_table() -> None:
    assert len(set(table(backends(20), 13))) == 13


@pytest.mark.parametrize("size", [0, 1, 1000, 16384])
def test_a_size_that_is_not_a_prime_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"ring size {size}: not a prime"):
        table(backends(2), size)


@pytest.mark.parametrize("weight", [-1, 65536])
def test_a_weight_out_of_range_is_refused(weight: int) -> None:
    with pytest.raises(ValueError, match=f"10.0.0.1:80: weight {weight} is not in 0..65535"):
        table(backends(1, weight), SMALL_SIZE)


@pytest.mark.parametrize("count", [1, 2, 3, 20, 100])
def test_equal_backends_differ_by_one_slot_at_most(count: int) -> None:
    slots = Counter(owners(backends(count))).values()
    assert len(slots) == count
    assert max(slots) - min(slots) <= 1


@settings(deadline=None)
@given(
    weights=st.lists(st.integers(1, WEIGHTS[-1]), min_size=1, max_size=30),
    size=st.sampled_from([31, 251, 1009]),
)
def test_slots_are_in_proportion_to_weights_rounded_up(weights: list[int], size: int) -> None:
    """Adams' apportionment: no backend's next turn was due before the last turn of another."""
    slots = Counter(turns(weights, size))
    assert slots.total() == size
    for i, weight in enumerate(weights):
        for j, other in enumerate(weights):
            assert (slots[i] - 1) * other <= slots[j] * weight


@settings(deadline=None)
@given(weights=st.lists(st.integers(1, WEIGHTS[-1]), min_size=1, max_size=30))
def test_the_smallest_weight_gets_a_slot_and_no_backend_more_than_its_share_plus_one(
    weights: list[int],
) -> None:
    slots = Counter(turns(weights, SMALL_SIZE))
    for i, weight in enumerate(weights):
        assert 1 <= slots[i] <= SMALL_SIZE * weight // sum(weights) + 1


def test_turns_of_the_largest_weights_are_in_exact_order() -> None:
    """65535 and 65534 drift apart by one turn in 65535: fixed-point times must still see it."""
    order = turns([65535, 65534], 131071)
    assert order[:4] == [0, 1, 0, 1]
    assert Counter(order) == {0: 65536, 1: 65535}


def test_a_changed_weight_leaves_the_turns_of_the_others_in_order() -> None:
    def without_last(order: list[int]) -> list[int]:
        return [backend for backend in order if backend != 3]

    before, after = without_last(turns([3, 4, 5, 1], SIZE)), without_last(turns([3, 4, 5, 9], SIZE))
    assert before[: len(after)] == after


@pytest.mark.parametrize("count", [5, 20, 100])
def test_removing_a_backend_moves_few_slots_of_the_others(count: int) -> None:
    all_of_them = backends(count)
    for gone in list(all_of_them)[:5]:
        rest = {name: weight for name, weight in all_of_them.items() if name != gone}
        before, after = owners(all_of_them), owners(rest)
        assert moved(before, after) - least_moved(before, after) <= SIZE * 0.02


def test_adding_a_backend_moves_as_many_slots_as_removing_it() -> None:
    assert moved(owners(backends(20)), owners(backends(21))) <= SIZE / 21 + SIZE * 0.02


@pytest.mark.parametrize("weight", [5, 9, 11, 20, 100])
def test_changing_a_weight_moves_few_slots_of_the_others(weight: int) -> None:
    weights = backends(20, weight=10)
    before, after = owners(weights), owners(weights | {"10.0.0.7:80": weight})
    assert moved(before, after) - least_moved(before, after) <= SIZE * 0.02


PAPER_SIZE, PAPER_BACKENDS = 65537, 1000  # section 5.3 of the paper


def paper_backends() -> dict[str, int]:
    return {f"10.0.{i // 250}.{i % 250}:80": 1 for i in range(PAPER_BACKENDS)}


def test_a_thousand_backends_share_the_ring_almost_perfectly() -> None:
    """Within 1 % of the mean: the efficiency that figure 11 of the paper gives to Maglev."""
    shares = Counter(owners(paper_backends(), PAPER_SIZE)).values()
    assert len(shares) == PAPER_BACKENDS
    assert {*shares} == {65, 66}


@pytest.mark.parametrize(("failures", "percent"), [(1, 0.7), (5, 2.0), (10, 2.5), (20, 3.0)])
def test_failures_among_a_thousand_backends_move_few_slots_of_the_others(failures: int, percent: float) -> None:
    """The experiment of figure 12: that many fail at once; `percent` of the table may change without need."""
    weights = paper_backends()
    gone = random.Random(failures).sample([*weights], failures)
    before = owners(weights, PAPER_SIZE)
    after = owners({name: 1 for name in weights if name not in gone}, PAPER_SIZE)
    needless = moved(before, after) - sum(name in gone for name in before)
    assert needless <= PAPER_SIZE * percent / 100


def test_labels_stand_for_the_backends() -> None:
    weights = {"c": 1, "a": 0, "b": 3}
    labelled = table(weights, SMALL_SIZE, labels=[30, 10, 20])
    assert labelled == array("H", [(30, 10, 20)[position] for position in table(weights, SMALL_SIZE)])
    assert {*labelled} == {30, 20}


def test_a_label_for_each_backend_is_wanted() -> None:
    with pytest.raises(ValueError, match="zip"):
        table({"a": 1, "b": 1}, SMALL_SIZE, labels=[7])


def test_primes_are_told_from_other_numbers() -> None:
    assert [n for n in range(-3, 30) if is_prime(n)] == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]
    assert not is_prime(127 * 127)


def test_the_limits_of_ring_sizes_are_primes() -> None:
    assert is_prime(RING_SIZES[0])
    assert is_prime(RING_SIZES[-1])


@pytest.mark.parametrize(
    ("n", "nearest"),
    [
        (1000, (997, 1009)),
        (16384, (16381, 16411)),
        (252, (251, 257)),
        (131070, (131063, 131071)),
        (1009, (1009, 1009)),
        (7, (251, 251)),
        (200000, (131071, 131071)),
    ],
)
def test_nearest_primes_are_ring_sizes_to_offer(n: int, nearest: tuple[int, int]) -> None:
    assert nearest_primes(n) == nearest
