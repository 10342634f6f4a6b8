"""The one writer of filter rules: from the rules in force to those that are asked for.

Enters: an operator's wish, in values of lb.rules. Leaves: a FilterReport of what became of it. A change goes validate
-> compile and load -> ask the new programs about the SSH connection -> open the store's transaction -> exchange the
programs -> commit. An error on the way leaves the old rules in force, in the store and in the kernel. A process that is
killed in between leaves the old rules in the store; the next change of that hook brings the kernel back to it.

The balancer tells when it comes to an interface or leaves it: make_way(), take_over().
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

from filters import cbpf
from filters.errors import FilterError
from filters.expr import compile_expression
from filters.interfaces import Interface, netmask
from filters.pcap import file_header, record
from filters.savefile import Packet, SaveFile
from filters.selftest import check
from filters.sets import Prefixes, read_prefixes
from lb.capabilities import check_may_change
from lb.dataplane import KernelDataplane
from lb.errors import InvalidInput, NotFound
from lb.filter_dataplane import (
    HOOKS,
    Counts,
    HookKey,
    KernelFilters,
    carriers,
    check_interface,
    ifindex_of,
    own_mac,
    translated,
)
from lb.paths import Paths
from lb.rule_store import PackedSet
from lb.rules import Action, At, Clock, Deadline, Rate, Rule, Rules, SetSource, rebased
from lb.ssh import SshConnection, ssh_connection
from lb.store import Store, writer_lock

ETHERNET = 1  # DLT_EN10MB
LONGEST_EXPRESSION = 1 << 14


def clock() -> Clock:
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return Clock(boot_id, time.clock_gettime_ns(time.CLOCK_BOOTTIME), time.time_ns())


@dataclass(frozen=True, slots=True)
class Wish:
    """A rule as it is typed. `set_path` as it was given; `seconds`: for how long."""

    interface: str
    action: Action
    rate: Rate | None = None
    expression: str = ""
    set_path: str | None = None
    set_side: str = "src"
    at: At = At.XDP
    seconds: int | None = None


@dataclass(frozen=True, slots=True)
class How:
    """How a change is to be made. `force`: also if it ends the SSH connection; `selftest`: of new expressions."""

    force: bool = False
    selftest: bool = True
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class RuleChange:
    """What became of a rule: added, deleted, moved, reloaded, restored or expired. `number`: the one it has, or had."""

    what: str
    rule: Rule
    number: int
    detail: str = ""


@dataclass(frozen=True, slots=True)
class FilterReport:
    changes: tuple[RuleChange, ...] = ()
    warnings: tuple[str, ...] = ()
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class RuleStatus:
    """`left_ns`: of its time, None for a rule without end; `in_force`: a program of ours is where the rule belongs."""

    rule: Rule
    number: int
    counts: Counts
    in_force: bool
    left_ns: int | None


@dataclass(frozen=True, slots=True)
class Trial:
    """What rules would do to the packets of a file. `matched`: slot -> packets; `untested`: too short, or too long."""

    rules: tuple[Rule, ...]
    matched: Mapping[int, int]
    packets: int
    dropped: int
    untested: int


class Firewall:
    """The filter rules of one network namespace. Changes are to be made with its lock held. Raises LbError."""

    def __init__(
        self, store: Store, kernel: KernelFilters, *, ssh: Callable[[], SshConnection | None] = ssh_connection
    ) -> None:
        self._store, self._kernel, self._ssh = store, kernel, ssh

    # What an operator can ask for

    def add(self, wish: Wish, position: int | None = None, how: How | None = None) -> FilterReport:
        """Behind the last rule of its interface, or at a position."""
        how = how or How()
        check_interface(wish.interface)
        now, before = clock(), self._rules()
        rule, prefixes = _made(wish, before.free_slot(), now)
        goal = before.with_rule(rule, position)
        if how.selftest:
            with translated():
                check(cbpf.decode(rule.instructions), HOOKS[rule.at])
        sets = {} if prefixes is None else {rule.slot: prefixes}
        return self._change(goal, [rule], lambda after: RuleChange("added", rule, after.number(rule)), how, sets)

    def delete(self, interface: str, number: int, how: How | None = None) -> FilterReport:
        rules = self._rules()
        rule = rules.numbered(interface, number)
        return self._change(rules.without([rule]), [], lambda _: RuleChange("deleted", rule, number), how or How())

    def move(self, interface: str, number: int, to: int, how: How | None = None) -> FilterReport:
        rules = self._rules()
        rule = rules.numbered(interface, number)
        moved = RuleChange("moved", rule, number, f"to {to}")
        return self._change(rules.moved(rule, to), [], lambda _: moved, how or How())

    def flush(self, interface: str | None = None, how: How | None = None) -> FilterReport:
        """All rules of an interface, or (None) all."""
        rules = self._rules()
        gone = rules.all if interface is None else rules.of(interface)
        if not gone and interface is not None:
            raise NotFound(f"{interface}: has no rules: see xdp-lb filter list")
        changes = [RuleChange("deleted", rule, rules.number(rule)) for rule in gone]
        return self._change(rules.without(gone), [], lambda _: changes, how or How())

    def reload(self, interface: str, number: int, how: How | None = None) -> FilterReport:
        """Read the file of a rule's set again, and change the set in force where it differs."""
        how, rules = how or How(), self._rules()
        rule = rules.numbered(interface, number)
        if rule.set is None:
            raise InvalidInput(f"{interface}: rule {number} has no set")
        prefixes = _read(rule.set.path)
        now = replace(rule, set=replace(rule.set, prefixes=len(prefixes)))
        goal = rules.replacing(now)
        if not how.force:
            self._check_ssh(rules, goal, [(interface, rule.at)], {rule.slot: prefixes})
        if how.dry_run:
            return FilterReport((RuleChange("reloaded", now, number),), dry_run=True)
        with self._store.saving_rules(goal, {rule.slot: prefixes.packed()}):
            added, gone = self._kernel.reload_set(rule.slot, prefixes)
        return FilterReport((RuleChange("reloaded", now, number, f"{added} added, {gone} removed"),))

    def restore(self, how: How | None = None, hooks: Iterable[HookKey] | None = None) -> FilterReport:
        """Put in force what is stored, as after a boot: on these hooks, or (None) on all."""
        rules = self._rules().in_time(clock())
        changes = [RuleChange("restored", rule, rules.number(rule)) for rule in rules.all]
        return self._change(rules, [], lambda _: changes, how or How(), hooks=rules.hooks if hooks is None else hooks)

    def lost(self) -> list[HookKey]:
        """Where rules of interfaces that are there should be in force, and are not."""
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

    def test(self, interface: str, path: str, at: At | None = None, write_to: str | None = None) -> Trial:
        """What the rules of an interface do to the packets of a file: at XDP, then at tc ingress; or at one place."""
        rules = self._rules().in_time(clock())
        if not rules.of(interface):
            raise NotFound(f"{interface}: has no rules: see xdp-lb filter list")
        places = [at] if at else [At.XDP, At.TC_IN]
        return self._try([rules.hook(interface, place) for place in places], path, write_to)

    def test_wishes(self, wishes: Sequence[Wish], path: str, write_to: str | None = None) -> Trial:
        """The same for rules that are not there."""
        now = clock()
        made = [_made(wish, slot, now) for slot, wish in enumerate(wishes)]
        sets = {rule.slot: prefixes for rule, prefixes in made if prefixes is not None}
        return self._try([[rule for rule, _ in made]], path, write_to, sets)

    # The balancer, coming and going

    def make_way(self, name: str) -> None:
        self._kernel.make_way(name, self._rules().in_time(clock()))

    def take_over(self, name: str) -> None:
        self._kernel.take_over(name, self._rules().in_time(clock()))

    # How a change is made

    def _rules(self) -> Rules:
        now = clock()
        return Rules(tuple(rebased(rule, now) for rule in self._store.rules().all))

    def _change(
        self,
        goal: Rules,
        new: Sequence[Rule],
        change: Callable[[Rules], RuleChange | Sequence[RuleChange]],
        how: How,
        sets: Mapping[int, Prefixes] | None = None,
        hooks: Iterable[HookKey] = (),
    ) -> FilterReport:
        """`new`: rules that were not there; `sets`: slot -> prefixes of theirs; `hooks`: also to be put in force."""
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
        if not how.force:
            self._check_ssh(before, after, wanted, {})
        warnings = [f"interface {name}: does not exist: its rules wait" for name in _absent(wanted)]
        if how.dry_run:
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

    def _check_ssh(self, before: Rules, after: Rules, hooks: Iterable[HookKey], sets: Mapping[int, Prefixes]) -> None:
        """Raises InvalidInput where the rules would drop the connection that the command was typed in, and did not
        before."""
        connection = self._ssh()
        if connection is None:
            return
        ends = connection.server, connection.client
        names = carriers(*ends)
        covering = {slot: prefixes.covering(ends) for slot, prefixes in sets.items()}
        for name, at in hooks:
            if names and name not in names:
                continue
            culprit = self._dropped(connection, after.hook(name, at), name, at, covering)
            in_force = (name, at) in self._kernel.in_force([(name, at)])
            if culprit and not (in_force and self._dropped(connection, before.hook(name, at), name, at, {})):
                raise InvalidInput(
                    f"{name}: rule {after.number(culprit)} ({_short(culprit)}) would drop the SSH connection from"
                    f" {connection} that this was typed in: --force does it all the same"
                )

    def _dropped(
        self, connection: SshConnection, rules: Sequence[Rule], name: str, at: At, sets: Mapping[int, Prefixes]
    ) -> Rule | None:
        frames = connection.frames(to_server=at is not At.TC_OUT, own_mac=own_mac(name))
        with self._kernel.judge(rules, at, sets) as judge:
            return next(filter(None, map(judge.dropped_by, frames)), None)

    def _try(
        self,
        hooks: Sequence[Sequence[Rule]],
        path: str,
        write_to: str | None,
        sets: Mapping[int, Prefixes] | None = None,
    ) -> Trial:
        rules = tuple(rule for hook in hooks for rule in hook)
        with ExitStack() as resources:
            judges = [resources.enter_context(self._kernel.judge(hook, hook[0].at, sets)) for hook in hooks if hook]
            file = _opened(path, resources)
            keep = resources.enter_context(_writer(write_to, file.snaplen))
            packets = dropped = untested = 0
            for packet in _packets(file, path):
                packets += 1
                if not all(judge.can_run(packet.data) for judge in judges):
                    untested += 1
                elif any(judge.dropped_by(packet.data) for judge in judges):
                    dropped += 1
                    keep(packet)
            matched = {slot: count for judge in judges for slot, count in judge.matched().items()}
        return Trial(rules, matched, packets, dropped, untested)


def _made(wish: Wish, slot: int, now: Clock) -> tuple[Rule, Prefixes | None]:
    instructions = cbpf.encode(_compiled(wish))
    prefixes = _read(wish.set_path) if wish.set_path is not None else None
    source = None
    if wish.set_path is not None and prefixes is not None:
        source = SetSource(str(Path(wish.set_path).absolute()), wish.set_side, len(prefixes))
    deadline = Deadline.after(wish.seconds, now) if wish.seconds is not None else None
    rule = Rule(slot, wish.interface, wish.at, wish.action, wish.expression, instructions, wish.rate, source, deadline)
    return rule, prefixes


def _compiled(wish: Wish) -> tuple[cbpf.Instruction, ...]:
    """libpcap's optimiser takes minutes for what is several times longer than the longest that is taken here."""
    mask = netmask(Interface(wish.interface)) if ifindex_of(wish.interface) else 0
    try:
        length = len(compile_expression(wish.expression, netmask=mask, optimise=False))
        if length > LONGEST_EXPRESSION:
            raise InvalidInput(
                f"expression {wish.expression[:40]}...: {length} instructions of classic BPF, the most is"
                f" {LONGEST_EXPRESSION}: put addresses into a file and say --set FILE"
            )
        return compile_expression(wish.expression, netmask=mask)
    except FilterError as error:
        raise InvalidInput(f"expression {wish.expression!r}: {' '.join(str(error).split())}") from error


def _read(path: str) -> Prefixes:
    with translated():
        return read_prefixes(Path(path))


def _expired(before: Rules, after: Rules, now: Clock) -> Iterator[RuleChange]:
    for rule in before.all:
        if rule.is_expired(now) and rule not in after.all:
            yield RuleChange("expired", rule, before.number(rule))


def _absent(hooks: Iterable[HookKey]) -> list[str]:
    return list(dict.fromkeys(name for name, _ in hooks if ifindex_of(name) is None))


def _short(rule: Rule) -> str:
    words = f"{rule.action} {rule.expression}".strip()
    return f"{words} --set {rule.set.path}" if rule.set else words


# Files


def _opened(path: str, resources: ExitStack) -> SaveFile:
    try:
        file = resources.enter_context(SaveFile(path, nano=True))
    except FilterError as error:
        words = str(error)
        raise InvalidInput(words if words.startswith(f"{path}: ") else f"{path}: {words}") from error
    if file.link_type != ETHERNET:
        raise InvalidInput(f"{path}: has no Ethernet frames, but {file.link_type_words}")
    return file


def _packets(file: SaveFile, path: str) -> Iterator[Packet]:
    try:
        yield from file.packets()
    except FilterError as error:
        raise InvalidInput(f"{path}: {error}") from error


@contextmanager
def _writer(path: str | None, snaplen: int) -> Iterator[Callable[[Packet], None]]:
    """What keeps a packet. Raises InvalidInput for a file that cannot be written."""
    if path is None:
        yield lambda _: None
        return
    try:
        with open(path, "wb") as out:
            out.write(file_header(ETHERNET, snaplen, nano=True))
            yield lambda packet: _keep(out, packet)
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror}") from error


def _keep(out: BinaryIO, packet: Packet) -> None:
    out.write(record(packet.seconds, packet.fraction, packet.data, packet.length))


@contextmanager
def open_firewall(paths: Paths, *, write: bool) -> Iterator[Firewall]:
    """The filter rules of one network namespace; to `write` is to hold its lock until the end.

    Raises Busy, StoreError, DataplaneError.
    """
    with ExitStack() as stack:
        if write:
            check_may_change()
            stack.enter_context(writer_lock(paths.filter_lock, paths.netns))
        store = stack.enter_context(Store.open(paths.store, write))
        dataplane = KernelDataplane.open(paths)
        stack.callback(dataplane.close)
        yield stack.enter_context(firewall_of(paths, store, dataplane))


@contextmanager
def firewall_of(paths: Paths, store: Store, dataplane: KernelDataplane) -> Iterator[Firewall]:
    """For who has the store and the balancer's programs open."""
    with KernelFilters.open(paths, dataplane, partial(_stored_set, store)) as kernel:
        yield Firewall(store, kernel)


def _stored_set(store: Store, slot: int) -> Prefixes:
    return Prefixes.unpacked(*store.rule_set(slot))
