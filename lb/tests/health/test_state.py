"""From outcomes to conditions, and from conditions to what is in force."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lb.health.state import SUCCESS, BackendHealth, Outcome, Ramp, SavedHealth, steps_of, words_of
from lb.model.conditions import UP, Condition, in_force, left_behind
from lb.model.health_check import HealthCheck
from lb.model.options import Options
from lb.model.state import Backend, Service
from lb.model.vip import Vip

CHECK = HealthCheck.parse("tcp rise=2 fall=3")
REFUSED = Outcome("connection refused")
OPTIONS = Options(health=CHECK)
ONE, TWO, THREE = (Backend.parse(f"10.0.0.1{n}:80") for n in (1, 2, 3))
DOWN = Condition(down=True, why="connection refused", since=7)


def after(outcomes: str, health: BackendHealth | None = None) -> BackendHealth:
    """`+` is a success, `-` a failure, one a second."""
    health = health or BackendHealth(CHECK)
    for second, sign in enumerate(outcomes):
        health.record(SUCCESS if sign == "+" else REFUSED, second, 1000 + second, slow_start_s=10, steps=10)
    return health


@pytest.mark.parametrize(
    ("outcomes", "down"),
    [
        ("", False),
        ("-", True),  # nobody knew it: the first decides
        ("+", False),
        ("+--", False),
        ("+---", True),
        ("+--+--", False),  # in a row
        ("+---+", True),
        ("+---++", False),
        ("+---+-+", True),
        ("-++---", True),
    ],
)
def test_rise_and_fall_decide(outcomes: str, down: bool) -> None:
    assert after(outcomes).condition(0).down is down


def test_a_turn_is_told_once() -> None:
    health = BackendHealth(CHECK)
    turns = [health.record(REFUSED if sign == "-" else SUCCESS, 0, 0) for sign in "+----+++"]
    assert turns == [False, False, False, True, False, False, True, False]


def test_condition_says_why_and_since_when() -> None:
    health = after("+---")
    assert health.condition(3) == Condition(down=True, why="connection refused", since=1003)
    health.record(Outcome("status 503"), 4, 1004)
    assert health.condition(4) == Condition(down=True, why="status 503", since=1003)
    assert after("+---++").condition(5) == Condition(share=9, since=1005)


def left(condition: Condition, ramp: Ramp | None = None, *, known: bool = True) -> BackendHealth:
    """By an earlier process."""
    return BackendHealth.resumed(CHECK, SavedHealth("nat tcp", condition, ramp), known=known)


@pytest.mark.parametrize(("outcomes", "down"), [("+", True), ("++", False), ("+-+", True)])
def test_what_an_earlier_process_found_down_has_to_rise(outcomes: str, down: bool) -> None:
    health = left(DOWN)
    assert health.condition(0) == DOWN
    assert after(outcomes, health).condition(0).down is down


@pytest.mark.parametrize(("outcomes", "down"), [("-", False), ("--", False), ("---", True)])
def test_what_an_earlier_process_found_up_has_to_fall(outcomes: str, down: bool) -> None:
    up = Condition(since=7)
    assert left(up).condition(0) == up
    assert after(outcomes, left(up)).condition(0).down is down


@pytest.mark.parametrize(("condition", "outcome", "down"), [(DOWN, "+", False), (DOWN, "-", True), (UP, "-", True)])
def test_what_need_not_hold_any_more_is_in_force_until_one_check(
    condition: Condition, outcome: str, down: bool
) -> None:
    health = left(condition, known=False)
    assert health.condition(0) == condition
    assert after(outcome, health).condition(0).down is down


def test_a_slow_start_goes_on_in_the_next_process() -> None:
    health = left(Condition(share=10, since=7), Ramp(start_s=100, length_s=30, steps=9))
    assert [health.condition(second).share for second in (100, 115, 130)] == [10, 50, 100]


@pytest.mark.parametrize(
    ("words", "age_s", "holds"),
    [
        ("nat tcp interval=30s", 0, True),
        ("nat tcp interval=30s", 300, True),
        ("nat tcp interval=30s", 301, False),
        ("nat tcp interval=30s", -1, False),  # the clock was set back: nobody knows how old it is
        ("nat tcp", 0, False),
        ("dr tcp interval=30s", 0, False),
    ],
)
def test_what_is_remembered_holds_while_it_is_fresh_and_the_check_is_the_same(
    words: str, age_s: float, holds: bool
) -> None:
    web = replace(service(ONE), options=Options(health=HealthCheck.parse("tcp interval=30s")))
    assert SavedHealth(words, DOWN, age_s=age_s).still_holds(web) is holds


def test_of_a_service_that_is_checked_no_longer_nothing_holds() -> None:
    web = replace(service(ONE), options=Options())
    assert not SavedHealth(words_of(web), DOWN).still_holds(web)


def test_slow_start_goes_up_in_equal_steps_to_the_whole() -> None:
    ramp = Ramp(start_s=100, length_s=30, steps=9)
    shares = [ramp.share(100 + second) for second in range(32)]
    assert shares == sorted(shares)
    assert sorted(set(shares)) == [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]
    assert (shares[0], shares[29], shares[30]) == (10, 90, 100)
    assert ramp.next_step_s(100) == pytest.approx(100 + 30 / 9)


def test_slow_start_ends_and_a_failure_ends_it() -> None:
    assert after("+---++").condition(5 + 10).share == 100
    assert after("+---++---").condition(8).share == 100


@pytest.mark.parametrize(("others", "seconds", "steps"), [(1, 100, 50), (1, 30, 30), (99, 100, 10), (99, 5, 5)])
def test_no_step_moves_more_of_the_ring_than_a_hundredth_where_there_is_time(
    others: int, seconds: int, steps: int
) -> None:
    backends = tuple(Backend.parse(f"10.0.{n // 200}.{1 + n % 200}") for n in range(others + 1))
    options = replace(OPTIONS, slow_start_s=seconds)
    service = Service(Vip.parse("10.0.1.1:80"), backends=backends, options=options)
    assert steps_of(service, 1) == steps


# In force


def service(*backends: Backend, fail_closed: bool = False) -> Service:
    return Service(Vip.parse("10.0.0.1:80"), backends=backends, options=replace(OPTIONS, fail_closed=fail_closed))


def weights(met: Service) -> dict[str, int]:
    return {str(b): b.ring_weight for b in met.backends}


def test_without_a_condition_that_matters_the_service_is_the_very_same() -> None:
    web = service(ONE, TWO)
    assert in_force(web, None) is web
    assert in_force(web, {str(ONE): UP, "10.9.9.9:80": DOWN}) is web


def test_without_a_check_a_service_is_the_very_same() -> None:
    web = replace(service(ONE, TWO), options=Options())
    assert in_force(web, {str(ONE): DOWN}) is web


def test_a_backend_that_is_down_gets_nothing() -> None:
    met = in_force(service(ONE, TWO), {str(ONE): DOWN})
    assert (weights(met), [b.down for b in met.backends]) == ({str(ONE): 0, str(TWO): 1}, [True, False])


def test_with_all_down_the_service_is_as_if_all_were_up() -> None:
    web = service(ONE, TWO)
    assert in_force(web, {str(ONE): DOWN, str(TWO): DOWN}) is web


def test_with_all_down_a_service_that_fails_closed_has_nobody() -> None:
    met = in_force(service(ONE, TWO, fail_closed=True), {str(ONE): DOWN, str(TWO): DOWN})
    assert set(weights(met).values()) == {0}


def test_those_that_drain_do_not_count_as_left() -> None:
    web = service(ONE, replace(TWO, draining=True), replace(THREE, weight=0))
    assert in_force(web, {str(ONE): DOWN}) is web


@pytest.mark.parametrize(
    ("own", "other", "share", "expected"),
    [(1, 1, 25, (25, 100)), (3, 1, 50, (150, 100)), (65535, 65535, 50, (32767, 65535)), (1, 65535, 1, (1, 65535))],
)
def test_a_share_is_one_of_the_weight(own: int, other: int, share: int, expected: tuple[int, int]) -> None:
    web = service(replace(ONE, weight=own), replace(TWO, weight=other))
    assert tuple(weights(in_force(web, {str(ONE): Condition(share=share)})).values()) == expected


def test_a_quic_connection_id_leads_to_no_backend_that_is_down() -> None:
    quic = Service(
        Vip.parse("10.0.0.1:443/udp"),
        backends=(Backend.parse("10.0.0.11:443"), replace(Backend.parse("10.0.0.12:443"), server_ids=("0:0a",))),
        options=OPTIONS,
    )
    assert in_force(quic, {"10.0.0.12:443": DOWN}).quic_lengths == {}


def test_what_health_checks_have_left_behind_is_told_in_a_sentence() -> None:
    web = service(ONE, TWO, THREE)
    end = "until xdp-lb serve runs or --health off"
    slow = {str(ONE): DOWN, str(TWO): Condition(share=30)}
    assert left_behind(web, None) == left_behind(web, {str(ONE): UP}) == ""
    assert left_behind(web, {str(ONE): DOWN}) == f"{web.vip}: {ONE} (down) keeps its last health state {end}"
    assert left_behind(web, slow) == f"{web.vip}: {ONE} (down), {TWO} (at 30 %) keep their last health state {end}"
    many = tuple(Backend.parse(f"10.0.0.{n}:80") for n in range(2, 10))
    assert " and 4 more keep their " in left_behind(service(*many), {str(b): DOWN for b in many[1:]})


def test_nobody_is_left_behind_where_all_are_served_as_if_they_were_up() -> None:
    assert left_behind(service(ONE), {str(ONE): DOWN}) == ""
