"""Filter rules as values: words that are understood or refused, the order of rules, and when their time is over."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lb.errors import InvalidInput, LbError, NotFound
from lb.model.rules import (
    LONGEST_S,
    MAX_RULES,
    Action,
    At,
    Clock,
    Deadline,
    Rate,
    Rule,
    Rules,
    SetSource,
    parse_duration,
    rebased,
    set_file,
)

NS = 1_000_000_000
NOW = Clock("boot-1", 1000 * NS, 1_700_000_000 * NS)


def rule(slot: int, interface: str = "eth0", at: At = At.XDP) -> Rule:
    return Rule(slot, interface, at, Action.DROP, f"udp port {slot}", b"")


RULES = Rules((rule(0), rule(1), rule(2, "eth1"), rule(3, at=At.TC_IN), rule(4)))


def slots(rules: Rules, interface: str = "eth0") -> list[int]:
    return [one.slot for one in rules.of(interface)]


@pytest.mark.parametrize(
    ("text", "said", "interval_ns", "burst_ns"),
    [
        ("1000/s", "1k/s", 1_000_000, NS),
        ("10k/s", "10k/s", 100_000, NS),
        ("1500/second", "1500/s", 666_666, NS),
        ("2M/s", "2M/s", 500, NS),
        ("60/min", "60/min", NS, 5 * NS),
        ("1/h", "1/h", 3600 * NS, 5 * 3600 * NS),
        ("3/day", "3/d", 28_800 * NS, 5 * 28_800 * NS),
        ("4/s", "4/s", NS // 4, 5 * NS // 4),
    ],
)
def test_rate_is_an_interval_and_a_burst(text: str, said: str, interval_ns: int, burst_ns: int) -> None:
    rate = Rate.parse(text)
    assert (str(rate), rate.interval_ns, rate.burst_ns) == (said, interval_ns, burst_ns)
    assert Rate.parse(said) == rate


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("0/s", "rate 0/s: passes no packets: use drop"),
        ("11M/s", "rate 11M/s: more than 10M/s"),
        *(
            (text, "such as 1000/s, 10k/s or 60/min")
            for text in ("", "1000", "1000/", "/s", "-1/s", "1.5/s", "1/y", "1K/s", "1/s ")
        ),
    ],
)
def test_rate_that_is_none_is_refused(text: str, why: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        Rate.parse(text)
    assert str(refusal.value).endswith(why)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("10m", 600), ("1h30m", 5400), ("1h30", 3630), ("2d", 172_800), ("1w", 604_800)],
)
def test_time_is_understood(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0s", "m", "10x", "1m 5s", "-5m", "1.5h", "4000d", "99999999999"])
def test_time_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"^time "):
        parse_duration(text)


def test_rules_are_numbered_by_interface() -> None:
    assert [RULES.numbered("eth0", n).slot for n in (1, 2, 3, 4)] == [0, 1, 3, 4]
    assert [RULES.number(one) for one in RULES.all] == [1, 2, 1, 3, 4]
    assert [one.slot for one in RULES.hook("eth0", At.XDP)] == [0, 1, 4]
    assert RULES.hooks == [("eth0", At.XDP), ("eth1", At.XDP), ("eth0", At.TC_IN)]


@pytest.mark.parametrize(("position", "order"), [(None, [0, 1, 3, 4, 9]), (1, [9, 0, 1, 3, 4]), (3, [0, 1, 9, 3, 4])])
def test_new_rule_stands_where_it_was_asked_for(position: int | None, order: list[int]) -> None:
    added = RULES.with_rule(rule(9), position)
    assert (slots(added), slots(added, "eth1")) == (order, [2])


@pytest.mark.parametrize(("number", "to", "order"), [(1, 4, [1, 3, 4, 0]), (4, 1, [4, 0, 1, 3]), (2, 2, [0, 1, 3, 4])])
def test_moved_rule_gets_the_number_asked_for(number: int, to: int, order: list[int]) -> None:
    assert slots(RULES.moved(RULES.numbered("eth0", number), to)) == order


def test_number_that_is_not_there_is_refused() -> None:
    for number in (0, 5, -1):
        with pytest.raises(NotFound, match=rf"^eth0: no rule {number}: the last is 4: see xdp-lb filter list eth0$"):
            RULES.numbered("eth0", number)
        with pytest.raises(LbError):
            RULES.moved(RULES.all[0], number)
    with pytest.raises(NotFound, match=r"^eth7: has no rules"):
        RULES.numbered("eth7", 1)
    with pytest.raises(InvalidInput, match=r"^eth0: position 6: out of range 1 to 5$"):
        RULES.with_rule(rule(9), 6)


def test_slot_of_a_deleted_rule_is_used_again() -> None:
    assert RULES.free_slot() == 5
    assert RULES.without([RULES.all[1]]).free_slot() == 1


def test_there_is_a_most_of_rules() -> None:
    with pytest.raises(InvalidInput, match=rf"limit of {MAX_RULES} rules reached"):
        Rules(tuple(rule(slot) for slot in range(MAX_RULES))).free_slot()


def test_rule_is_over_when_its_time_has_passed() -> None:
    timed = replace(rule(0), deadline=Deadline.after(60, NOW))
    assert not timed.is_expired(replace(NOW, boot_ns=NOW.boot_ns + 59 * NS))
    later = replace(NOW, boot_ns=NOW.boot_ns + 60 * NS)
    assert timed.is_expired(later)
    assert Rules((timed, rule(1))).in_time(later) == Rules((rule(1),))
    assert not rule(1).is_expired(later)


def test_time_of_day_that_is_set_back_does_not_lengthen_a_rule() -> None:
    timed = replace(rule(0), deadline=Deadline.after(60, NOW))
    assert timed.is_expired(replace(NOW, boot_ns=NOW.boot_ns + 61 * NS, unix_ns=0))


def test_after_a_boot_the_time_of_day_counts() -> None:
    timed = replace(rule(0), deadline=Deadline.after(3600, NOW))
    booted = Clock("boot-2", 20 * NS, NOW.unix_ns + 600 * NS)
    moved = rebased(timed, booted)
    assert moved.deadline == Deadline("boot-2", 3020 * NS, NOW.unix_ns + 3600 * NS)
    assert not timed.is_expired(booted)
    assert timed.is_expired(replace(booted, unix_ns=NOW.unix_ns + 3600 * NS))
    assert rebased(moved, booted) is moved


def test_deadline_at_a_time_of_day_is_one_by_the_clock_of_the_boot() -> None:
    deadline = Deadline.at(1_700_000_060, NOW)
    assert deadline == Deadline.after(60, NOW)
    assert deadline.unix_s == 1_700_000_060
    assert replace(deadline, unix_ns=deadline.unix_ns - 1).unix_s == 1_700_000_060


@pytest.mark.parametrize("unix_s", [0, 1_700_000_000, 1_700_000_000 + LONGEST_S + 1])
def test_deadline_that_has_passed_or_is_too_far_is_refused(unix_s: int) -> None:
    with pytest.raises(InvalidInput, match=f"until {unix_s}: not within 3650d from now"):
        Deadline.at(unix_s, NOW)


def test_only_a_set_that_was_read_from_a_file_has_one() -> None:
    assert set_file(replace(rule(0), set=SetSource("/etc/bad.txt", "src")), 1) == "/etc/bad.txt"
    for other, words in ((None, "rule 1 has no set"), (SetSource("bad", "src"), "set bad: not read from a file")):
        with pytest.raises(InvalidInput, match=words):
            set_file(replace(rule(0), set=other), 1)
