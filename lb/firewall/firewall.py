"""The only writer of filter rules: from the active rules to the requested ones.

Enters: RuleSpecs and ApplyOptions (lb.model.rule_report). Leaves: a FilterReport. A change goes validate -> compile and
load -> test the operator's connection on the new programs -> open the store's transaction -> swap the programs ->
commit. On an error the old rules stay active, in the store and in the kernel. A process killed in between leaves the
old rules in the store; the next change of that hook restores the kernel.

The balancer announces that it attaches to or detaches from an interface: hand_over_to_balancer(), take_back().
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from filters.files.savefile import Packet
from filters.programs.sets import Prefixes
from lb.dataplane.programs import Programs
from lb.errors import NotFound, part
from lb.firewall.attach_points import HookKey
from lb.firewall.build import build_rule, check_has_list, given_prefixes, new_rule, parse_list, read_set_file
from lb.firewall.guard import check_connection
from lb.firewall.kernel import KernelFilters
from lb.formats.capture_file import Keep, open_capture, writer
from lb.host.capabilities import check_may_change
from lb.host.interfaces import ifindex_of
from lb.host.ssh import Connection, ssh_connection
from lb.model.rule_report import ApplyOptions, FilterReport, FilterTestResult, RuleChange, RuleSpec, RuleStatus
from lb.model.rules import At, Clock, Rule, Rules, rebased, set_file, set_of
from lb.paths import Paths
from lb.store.lock import writer_lock
from lb.store.rules import PackedSet
from lb.store.store import Store


def clock() -> Clock:
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return Clock(boot_id, time.clock_gettime_ns(time.CLOCK_BOOTTIME), time.time_ns())


class Firewall:
    """The filter rules of one network namespace. Changes are to be made with its lock held. Raises LbError."""

    def __init__(
        self, store: Store, kernel: KernelFilters, *, own_connection: Callable[[], Connection | None] = ssh_connection
    ) -> None:
        """`own_connection`: the connection that no change may drop without `force`."""
        self._store, self._kernel, self._own_connection = store, kernel, own_connection

    # Operations

    def add(self, spec: RuleSpec, position: int | None = None, options: ApplyOptions | None = None) -> FilterReport:
        """After the last rule of its interface, or at a position."""
        options, before = options or ApplyOptions(), self._rules()
        rule, prefixes = new_rule(spec, before.free_slot(), clock(), options)
        goal = before.with_rule(rule, position)
        sets = {} if prefixes is None else {rule.slot: prefixes}
        return self._change(goal, [rule], lambda after: RuleChange("added", rule, after.number(rule)), options, sets)

    def replace(self, interface: str, specs: Sequence[RuleSpec], options: ApplyOptions | None = None) -> FilterReport:
        """Replace all rules of an interface. A rule that is unchanged keeps its counters; with a set it may omit the
        prefixes, which a new rule must not."""
        options, now, before = options or ApplyOptions(), clock(), self._rules()
        left, wanted, new = list(before.in_time(now).of(interface)), list[Rule](), list[Rule]()
        sets: dict[int, Prefixes] = {}
        for place, spec in enumerate(specs):
            with part("rules", place):
                prefixes = given_prefixes(spec)
                rule = next((rule for rule in left if self._is_as_wanted(rule, spec, prefixes)), None)
                if rule:
                    left.remove(rule)
                else:
                    check_has_list(spec)
                    slot = Rules((*before.all, *new)).free_slot()
                    rule, prefixes = new_rule(spec, slot, now, options, prefixes)
                    new.append(rule)
                    sets |= {} if prefixes is None else {slot: prefixes}
                wanted.append(rule)
        goal = before.ordered(interface, wanted)
        return self._change(goal, new, lambda after: _differences(before.in_time(now), after, interface), options, sets)

    def _is_as_wanted(self, rule: Rule, spec: RuleSpec, prefixes: Prefixes | None) -> bool:
        own_set = (rule.set.path, rule.set.side) if rule.set else None
        wanted_set = (spec.set_path, spec.set_side) if spec.set_path is not None else None
        own = (rule.at, rule.action, rule.rate, rule.expression, own_set, rule.deadline and rule.deadline.unix_s)
        if own != (spec.at, spec.action, spec.rate, spec.expression, wanted_set, spec.until_s):
            return False
        return prefixes is None or prefixes == Prefixes.unpacked(*self._store.rule_set(rule.slot))

    def delete(self, interface: str, number: int, options: ApplyOptions | None = None) -> FilterReport:
        rules = self._rules()
        rule = rules.numbered(interface, number)
        return self._change(
            rules.without([rule]), [], lambda _: RuleChange("deleted", rule, number), options or ApplyOptions()
        )

    def move(self, interface: str, number: int, to: int, options: ApplyOptions | None = None) -> FilterReport:
        rules = self._rules()
        rule = rules.numbered(interface, number)
        moved = RuleChange("moved", rule, number, f"to {to}")
        return self._change(rules.moved(rule, to), [], lambda _: moved, options or ApplyOptions())

    def flush(self, interface: str | None = None, options: ApplyOptions | None = None) -> FilterReport:
        """All rules of an interface, or (None) all."""
        rules = self._rules()
        gone = rules.all if interface is None else rules.of(interface)
        if not gone and interface is not None:
            raise NotFound(f"{interface}: has no rules: see xdp-lb filter list")
        changes = [RuleChange("deleted", rule, rules.number(rule)) for rule in gone]
        return self._change(rules.without(gone), [], lambda _: changes, options or ApplyOptions())

    def reload(
        self, interface: str, number: int, options: ApplyOptions | None = None, *, set_list: str | None = None
    ) -> FilterReport:
        """Read the file of a rule's set again (or take `set_list` as its text), and update the active set."""
        options, rules = options or ApplyOptions(), self._rules()
        rule = rules.numbered(interface, number)
        source = set_of(rule, number)
        prefixes = read_set_file(set_file(rule, number)) if set_list is None else parse_list(set_list, source.path)
        now = replace(rule, set=replace(source, prefixes=len(prefixes)))
        goal = rules.replacing(now)
        if not options.force:
            self._check_connection(rules, goal, [(interface, rule.at)], {rule.slot: prefixes})
        if options.dry_run:
            return FilterReport((RuleChange("reloaded", now, number),), prefixes.warnings, dry_run=True)
        packed = {rule.slot: prefixes.packed()}
        # Prefixes first: the store is shared with the balancer and should not be locked meanwhile.
        with self._kernel.reloading_set(rule.slot, prefixes) as (added, gone), self._store.saving_rules(goal, packed):
            pass
        change = RuleChange("reloaded", now, number, f"{added} added, {gone} removed")
        return FilterReport((change,), prefixes.warnings)

    def restore(self, options: ApplyOptions | None = None, hooks: Iterable[HookKey] | None = None) -> FilterReport:
        """Load and attach the stored rules, as after a boot: on these hooks, or (None) on all."""
        rules = self._rules().in_time(clock())
        changes = [RuleChange("restored", rule, rules.number(rule)) for rule in rules.all]
        return self._change(
            rules, [], lambda _: changes, options or ApplyOptions(), hooks=rules.hooks if hooks is None else hooks
        )

    def lost(self) -> list[HookKey]:
        """Hooks of existing interfaces whose rules are not active."""
        hooks = self._rules().in_time(clock()).hooks
        in_force, absent = self._kernel.in_force(hooks), _absent(hooks)
        return [hook for hook in hooks if hook not in in_force and hook[0] not in absent]

    def status(self, interface: str | None = None) -> list[RuleStatus]:
        rules, now = self._rules(), clock()
        in_force = self._kernel.in_force(rules.hooks)
        return [
            RuleStatus(
                rule,
                rules.number(rule),
                self._kernel.counts(rule.slot),
                (rule.interface, rule.at) in in_force,
                rule.deadline.left_ns(now) if rule.deadline else None,
            )
            for rule in (rules.all if interface is None else rules.of(interface))
        ]

    def wanted(self, interface: str) -> tuple[Rule, ...]:
        """The rules of an interface that have not expired."""
        return self._rules().in_time(clock()).of(interface)

    def test(self, interface: str, path: str, at: At | None = None, write_to: str | None = None) -> FilterTestResult:
        """Run the packets of a file through the rules of an interface: at XDP, then at tc ingress; or at one hook."""
        with open_capture(path) as capture, writer(write_to, capture.snaplen) as keep:
            return self.test_packets(interface, capture.packets(), at, keep)

    def test_specs(self, specs: Sequence[RuleSpec], path: str, write_to: str | None = None) -> FilterTestResult:
        """The same for rules that are not installed."""
        with open_capture(path) as capture, writer(write_to, capture.snaplen) as keep:
            return self.test_packets_with(specs, capture.packets(), keep)

    def test_packets(self, interface: str, packets: Iterable[Packet], at: At | None, keep: Keep) -> FilterTestResult:
        rules = self._rules().in_time(clock())
        if not rules.of(interface):
            raise NotFound(f"{interface}: has no rules: see xdp-lb filter list")
        places = [at] if at else [At.XDP, At.TC_IN]
        return self._try([rules.hook(interface, place) for place in places], packets, keep)

    def test_packets_with(self, specs: Sequence[RuleSpec], packets: Iterable[Packet], keep: Keep) -> FilterTestResult:
        now = clock()
        built = [build_rule(spec, slot, now) for slot, spec in enumerate(specs)]
        sets = {rule.slot: prefixes for rule, prefixes in built if prefixes is not None}
        return self._try([[rule for rule, _ in built]], packets, keep, sets)

    # The balancer attaches or detaches

    def hand_over_to_balancer(self, name: str) -> None:
        self._kernel.hand_over_to_balancer(name, self._rules().in_time(clock()))

    def take_back(self, name: str) -> None:
        self._kernel.take_back(name, self._rules().in_time(clock()))

    # A change

    def _rules(self) -> Rules:
        now = clock()
        return Rules(tuple(rebased(rule, now) for rule in self._store.rules().all))

    def _change(
        self,
        goal: Rules,
        new: Sequence[Rule],
        change: Callable[[Rules], RuleChange | Sequence[RuleChange]],
        options: ApplyOptions,
        sets: Mapping[int, Prefixes] | None = None,
        hooks: Iterable[HookKey] = (),
    ) -> FilterReport:
        """`new`: added rules; `sets`: slot -> their prefixes; `hooks`: further hooks to load and attach."""
        now, before, given = clock(), self._rules(), sets or {}
        after = goal.in_time(now)
        every = [*before.hooks, *after.hooks]
        changed = [key for key in dict.fromkeys(every) if before.hook(*key) != after.hook(*key)]
        wanted = list(dict.fromkeys((*changed, *hooks, *self._kernel.cut_short(every))))
        done = change(after)
        changes = (*_expired(before, after, now), *([done] if isinstance(done, RuleChange) else done))
        for slot, prefixes in given.items():
            self._kernel.add_set(slot, prefixes)
        exchange = self._kernel.prepare(after, wanted, new)
        if not options.force:
            self._check_connection(before, after, wanted, {})
        warnings = [f"interface {name}: does not exist: rules stay pending" for name in _absent(wanted)]
        warnings += [warning for prefixes in given.values() for warning in prefixes.warnings]
        if options.dry_run:
            return FilterReport(changes, tuple(warnings), dry_run=True)
        packed: dict[int, PackedSet] = {slot: prefixes.packed() for slot, prefixes in given.items()}
        try:
            with self._store.saving_rules(after, packed):
                exchange.swap()
        except BaseException:
            exchange.roll_back()
            raise
        exchange.commit()
        return FilterReport(changes, (*warnings, *exchange.warnings))

    def _check_connection(
        self, before: Rules, after: Rules, hooks: Iterable[HookKey], sets: Mapping[int, Prefixes]
    ) -> None:
        """Raises InvalidInput if the rules would end the connection of the request."""
        if connection := self._own_connection():
            check_connection(self._kernel, connection, before, after, clock(), hooks, sets)

    def _try(
        self,
        hooks: Sequence[Sequence[Rule]],
        packets: Iterable[Packet],
        keep: Keep,
        sets: Mapping[int, Prefixes] | None = None,
    ) -> FilterTestResult:
        rules = tuple(rule for hook in hooks for rule in hook)
        with ExitStack() as resources:
            testers = [resources.enter_context(self._kernel.tester(hook, hook[0].at, sets)) for hook in hooks if hook]
            count = dropped = untested = 0
            for position, packet in enumerate(packets):
                count += 1
                if not all(tester.can_run(packet.data) for tester in testers):
                    untested += 1
                elif any(tester.dropped_by(packet.data) for tester in testers):
                    dropped += 1
                    keep(position, packet)
            matched = {slot: count for tester in testers for slot, count in tester.matched().items()}
        return FilterTestResult(rules, matched, count, dropped, untested)


def _differences(before: Rules, after: Rules, interface: str) -> list[RuleChange]:
    """Deleted, moved and added rules."""
    was, now = before.of(interface), after.of(interface)
    numbers, places = ({rule.slot: number for number, rule in enumerate(rules, 1)} for rules in (was, now))
    stay = [[rule for rule in rules if rule.slot in numbers and rule.slot in places] for rules in (was, now)]
    return [
        *(RuleChange("deleted", rule, numbers[rule.slot]) for rule in was if rule.slot not in places),
        *(
            RuleChange("moved", rule, numbers[rule.slot], f"to {places[rule.slot]}")
            for other, rule in zip(*stay, strict=True)
            if other.slot != rule.slot
        ),
        *(RuleChange("added", rule, places[rule.slot]) for rule in now if rule.slot not in numbers),
    ]


def _expired(before: Rules, after: Rules, now: Clock) -> Iterator[RuleChange]:
    for rule in before.all:
        if rule.is_expired(now) and rule not in after.all:
            yield RuleChange("expired", rule, before.number(rule))


def _absent(hooks: Iterable[HookKey]) -> list[str]:
    return list(dict.fromkeys(name for name, _ in hooks if ifindex_of(name) is None))


@contextmanager
def open_firewall(
    paths: Paths, *, write: bool, own_connection: Callable[[], Connection | None] = ssh_connection
) -> Iterator[Firewall]:
    """The filter rules of one network namespace; with `write` its lock is held until the end.

    Raises Busy, StoreError, DataplaneError.
    """
    with ExitStack() as stack:
        if write:
            check_may_change()
            stack.enter_context(writer_lock(paths.filter_lock, paths.netns))
        store = stack.enter_context(Store.open(paths.store, write))
        programs = Programs.open(paths)
        stack.callback(programs.close)
        yield stack.enter_context(firewall_of(paths, store, programs, own_connection))


@contextmanager
def firewall_of(
    paths: Paths,
    store: Store,
    programs: Programs,
    own_connection: Callable[[], Connection | None] = ssh_connection,
) -> Iterator[Firewall]:
    """For callers that have the store and the balancer's programs open."""
    with KernelFilters.open(paths, programs, partial(_stored_set, store)) as kernel:
        yield Firewall(store, kernel, own_connection=own_connection)


def _stored_set(store: Store, slot: int) -> Prefixes:
    return Prefixes.unpacked(*store.rule_set(slot))
