"""The kernel side of filter rules: the rules of a hook compiled into one program, which is replaced atomically.

Enters: rules. Leaves: attached programs, counters, sets. Where the balancer is attached, the rules of all its
interfaces are one program among its stages; other interfaces have a program of their own at XDP. At tc each interface
has one per direction. Counters, buckets and sets are maps that outlive the programs: a rule keeps its own when others
change.

    RUN_DIR/filter/bpf/NETNS/1/    map_counters, map_buckets, set4_SLOT, set6_SLOT,
                                   prog_front, prog_IFINDEX_xdp, ..., and during a change prog_..._next
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Self

from filters.compiler import cbpf, ebpf
from filters.compiler.hook import TC_IN, TC_OUT, XDP, XDP_FRAGS, Hook
from filters.compiler.translate import Translation, translate
from filters.programs.actions import Answer, Bucket, GoOn, In, Limit, Until, assemble_by_interface, buckets
from filters.programs.program import (
    Condition,
    Count,
    Counter,
    Drop,
    FilterAction,
    LoadedProgram,
    Pass,
    assemble,
    counters,
    load,
)
from filters.programs.program import Rule as CompiledRule
from filters.programs.sets import Prefixes, Tries
from lb.dataplane.errors import translated
from lb.dataplane.programs import PROGRAM as BALANCER
from lb.dataplane.programs import Programs
from lb.errors import DataplaneError
from lb.firewall.attach_points import FOLDER, NAME, TC_PLACES, AttachPoint, HookKey, StageAttach, TcAttach, XdpAttach
from lb.firewall.trial import RuleTester, test_actions
from lb.host.interfaces import ifindex_of
from lb.model.rule_report import Counts
from lb.model.rules import MAX_RULES, Action, At, Rule, Rules
from lb.paths import Paths
from xdp import attach as xdp_attach
from xdp import libbpf, tc
from xdp.errors import XdpError
from xdp.maps import Map
from xdp.object import Program, pinned_program, program_by_id
from xdp.pins import Pins

NEXT = "_next"
# Hooks that rules are tested on: those of interfaces without the balancer, where frames may have fragments.
HOOKS: Mapping[At, Hook] = {At.XDP: replace(XDP_FRAGS, name=str(At.XDP)), At.TC_IN: TC_IN, At.TC_OUT: TC_OUT}


# Replacing programs


class ProgramSwap:
    """Loaded programs and their attach points: nothing changes before swap(), and roll_back() reverts it."""

    def __init__(self, kernel: KernelFilters, goals: Mapping[AttachPoint, LoadedProgram | None], rules: Rules) -> None:
        self._kernel, self._goals, self._rules = kernel, goals, rules
        self._swapped: list[tuple[AttachPoint, Program | None, LoadedProgram | None]] = []
        self.warnings: list[str] = []

    def swap(self) -> None:
        """Raises DataplaneError after a rollback."""
        try:
            with translated():
                self._kernel.keep_sets(self._rules)
                for point, after in self._goals.items():
                    self._swap(point, after)
        except BaseException:
            self.roll_back()
            raise

    def _swap(self, point: AttachPoint, after: LoadedProgram | None) -> None:
        before = self._kernel.in_place(point)
        if after:
            self._kernel.pin(after.fd, f"{point.pin}{NEXT}")
        self._swapped.append((point, before, after))
        if warning := point.exchange(before, after):
            self.warnings.append(warning)

    def commit(self) -> None:
        for point, _, after in self._swapped:
            self._kernel.settle(point.pin, installed=after is not None)
        self._kernel.forget_sets(self._rules)

    def roll_back(self) -> None:
        for point, before, after in reversed(self._swapped):
            with suppress(XdpError):
                point.exchange(after, before)
            self._kernel.unpin(f"{point.pin}{NEXT}")
        self._swapped.clear()


class KernelFilters:
    """Every method raises DataplaneError, and InvalidInput for rules that do not fit into a program.

    `stored_set` gives the prefixes of a stored rule by its slot, for sets that the kernel does not have.
    """

    def __init__(self, paths: Paths, programs: Programs, stored_set: Callable[[int], Prefixes]) -> None:
        self._pins, self._balancer_pins = Pins(paths.run_dir / FOLDER, paths.netns), Pins(paths.run_dir, paths.netns)
        self._programs, self._stored_set = programs, stored_set
        self._resources = ExitStack()
        self._tries: dict[int, Tries] = {}
        self._unpinned_sets: set[int] = set()
        self._maps: tuple[Map, Map] | None = None

    @classmethod
    @contextmanager
    def open(cls, paths: Paths, programs: Programs, stored_set: Callable[[int], Prefixes]) -> Iterator[Self]:
        kernel = cls(paths, programs, stored_set)
        with kernel._resources:
            yield kernel

    # Status

    def in_force(self, hooks: Iterable[HookKey]) -> set[HookKey]:
        """The hooks where our program is attached and no change was interrupted."""
        with translated():
            return {key for key in hooks if self._is_in_force(*key)}

    def _is_in_force(self, interface: str, at: At) -> bool:
        ifindex = ifindex_of(interface)
        if ifindex is None or (folder := self._pins.current()) is None:
            return False
        point = self._attach_point(interface, ifindex, at)
        if (folder / f"{point.pin}{NEXT}").exists():
            return False
        if isinstance(point, StageAttach):
            return point.programs.stages.filter in point.programs.stages.occupied()
        if isinstance(point, TcAttach):
            return tc.is_attached(point.ifindex, TC_PLACES[at])
        return self.in_place(point) is not None

    def counts(self, slot: int) -> Counts:
        """Zero for a rule that was never active since boot."""
        with translated():
            if self._maps is None and self._pins.current() is None:
                return Counts()
            counted, _ = self._held_maps()
            matched, dropped = counted.total(2 * slot), counted.total(2 * slot + 1)
            return Counts(matched.packets, matched.bytes, dropped.packets, dropped.bytes)

    def cut_short(self, hooks: Iterable[HookKey]) -> set[HookKey]:
        """Hooks whose last change was interrupted by the end of the process."""
        folder = self._pins.current()
        points = (
            (key, self._attach_point(key[0], ifindex, key[1])) for key in hooks if (ifindex := ifindex_of(key[0]))
        )
        return {key for key, point in points if folder and (folder / f"{point.pin}{NEXT}").exists()}

    # Changes

    def prepare(self, rules: Rules, hooks: Iterable[HookKey], new: Iterable[Rule] = ()) -> ProgramSwap:
        """Load the programs for these hooks. `new`: rules whose slots may have been used before."""
        with translated():
            for rule in new:
                self._reset(rule.slot)
            return self._exchange(rules, dict.fromkeys(self._attach_point(*key) for key in self._existing(hooks)))

    def _existing(self, hooks: Iterable[HookKey]) -> Iterator[tuple[str, int, At]]:
        for name, at in hooks:
            if ifindex := ifindex_of(name):
                yield name, ifindex, at

    def _attach_point(self, interface: str, ifindex: int, at: At) -> AttachPoint:
        if at is not At.XDP:
            return TcAttach(ifindex, at)
        return StageAttach(self._programs) if interface in self._programs.attachments() else XdpAttach(ifindex)

    def _exchange(
        self, rules: Rules, points: Iterable[AttachPoint], balanced: Iterable[str] | None = None
    ) -> ProgramSwap:
        names = list(self._programs.attachments() if balanced is None else balanced)
        goals = {point: self._program(rules, point, names) for point in points}
        return ProgramSwap(self, goals, rules)

    def _program(self, rules: Rules, point: AttachPoint, balanced: Sequence[str]) -> LoadedProgram | None:
        """None where there are no rules."""
        if isinstance(point, StageAttach):
            return self._front_program(rules, balanced)
        at = At.XDP if isinstance(point, XdpAttach) else point.at
        own = [rule for name in rules.interfaces if ifindex_of(name) == point.ifindex for rule in rules.hook(name, at)]
        if not own:
            return None
        hook = HOOKS[at]
        return self._load(hook, assemble(hook, [self._compiled(rule, hook, Pass()) for rule in own]))

    def _front_program(self, rules: Rules, balanced: Sequence[str]) -> LoadedProgram | None:
        stages = self._programs.stages
        go_on = GoOn(stages.map, (*stages.users, stages.balance))
        sections = {
            ifindex: [self._compiled(rule, XDP, go_on) for rule in rules.hook(name, At.XDP)]
            for name in balanced
            if rules.hook(name, At.XDP) and (ifindex := ifindex_of(name))
        }
        return self._load(XDP, assemble_by_interface(XDP, sections, go_on)) if sections else None

    def _load(self, hook: Hook, instructions: Sequence[ebpf.Instruction]) -> LoadedProgram:
        return self._resources.enter_context(load(NAME, hook, instructions))

    def _compiled(self, rule: Rule, hook: Hook, go_on: FilterAction) -> CompiledRule:
        counted, bucket = self._held_maps()
        actions: list[FilterAction] = [Count(counted, 2 * rule.slot)]
        dropped = Count(counted, 2 * rule.slot + 1)
        if rule.action is Action.DROP:
            actions += [dropped, Drop()]
        elif rule.action is Action.PASS:
            actions.append(go_on)
        elif rule.rate:
            actions.append(Limit(bucket, rule.slot, rule.rate.interval_ns, rule.rate.burst_ns, dropped))
        conditions: list[Condition] = [In(self._tries_of(rule), rule.set.side)] if rule.set else []
        if rule.deadline:
            conditions.append(Until(rule.deadline.boot_ns))
        return CompiledRule(_translation(rule, hook), actions, conditions)

    # Sets

    def add_set(self, slot: int, prefixes: Prefixes) -> None:
        """For a new rule, before prepare()."""
        with translated():
            self._tries[slot] = self._new_tries(slot, prefixes)

    @contextmanager
    def reloading_set(self, slot: int, prefixes: Prefixes) -> Iterator[tuple[int, int]]:
        """Update the active set to this one, prefix by prefix. Yields how many were added and removed. Reverted if the
        body fails."""
        with translated():
            tries = self._pinned_tries(slot)
            if tries is None:
                yield len(prefixes), 0
                return
            held = tries.held()
            added, gone = prefixes.without(held), held.without(prefixes)
            try:
                tries.add(added)
                tries.remove(gone)
                yield len(added), len(gone)
            except BaseException:
                with suppress(XdpError):
                    tries.add(gone)
                    tries.remove(added)
                raise

    def _tries_of(self, rule: Rule) -> Tries:
        if rule.slot not in self._tries:
            tries = self._pinned_tries(rule.slot) or self._new_tries(rule.slot, self._stored_set(rule.slot))
            self._tries[rule.slot] = tries
        return self._tries[rule.slot]

    def _new_tries(self, slot: int, prefixes: Prefixes) -> Tries:
        tries = Tries.create()
        self._resources.callback(tries.close)
        self._unpinned_sets.add(slot)
        tries.add(prefixes)
        return tries

    def _pinned_tries(self, slot: int) -> Tries | None:
        folder = self._pins.current()
        if folder is None or not (folder / f"set4_{slot}").exists():
            return None
        tries = Tries.of(_get(folder / f"set4_{slot}"), _get(folder / f"set6_{slot}"))
        self._resources.callback(tries.close)
        return tries

    def keep_sets(self, rules: Rules) -> None:
        """Pin the sets that these rules refer to."""
        for slot in self._unpinned_sets & {rule.slot for rule in rules.all}:
            self.pin(self._tries[slot].ipv4.fd, f"set4_{slot}")
            self.pin(self._tries[slot].ipv6.fd, f"set6_{slot}")
        self._unpinned_sets.clear()

    def forget_sets(self, rules: Rules) -> None:
        """Unpin sets without a rule; with the last rule, everything."""
        if not rules.all:
            self._pins.remove()
            self._maps = None
            return
        slots = {str(rule.slot) for rule in rules.all if rule.set}
        for path in self._folder().glob("set[46]_*"):
            if path.name.partition("_")[2] not in slots:
                path.unlink()

    # With the balancer

    def hand_over_to_balancer(self, name: str, rules: Rules) -> None:
        """Before the balancer is attached to an interface: its rules move into a stage, without a gap.

        The stage is set first, then the balancer's program replaces ours on the interface atomically.
        """
        if not rules.hook(name, At.XDP) or (ifindex := ifindex_of(name)) is None:
            return
        with translated():
            names = dict.fromkeys((*self._programs.attachments(), name))
            self._swap_now(self._exchange(rules, [StageAttach(self._programs)], names))
            plain = XdpAttach(ifindex)
            if ours := self.in_place(plain):
                balancer = self._balancer()
                xdp_attach.attach(ifindex, balancer.fd, balancer.id, replace_fd=ours.fd)
            self.unpin(plain.pin)

    def take_back(self, name: str, rules: Rules) -> None:
        """Before the balancer is detached from an interface: a program with its rules replaces it."""
        ifindex, attachments = ifindex_of(name), self._programs.attachments()
        if not rules.hook(name, At.XDP) or ifindex is None or name not in attachments:
            return
        with translated():
            plain = XdpAttach(ifindex)
            program = self._program(rules, plain, ())
            assert program
            self.pin(program.fd, plain.pin)
            replaced = self._running(attachments[name].program_id)
            xdp_attach.attach(ifindex, program.fd, program.id, replace_fd=replaced.fd)
            self._swap_now(self._exchange(rules, [StageAttach(self._programs)], [n for n in attachments if n != name]))

    def _swap_now(self, exchange: ProgramSwap) -> None:
        exchange.swap()
        exchange.commit()

    def _running(self, program_id: int) -> Program:
        """Usually the balancer's own; opening any other by id requires CAP_SYS_ADMIN."""
        pinned = self._balancer()
        return pinned if pinned.id == program_id else program_by_id(program_id)

    def _balancer(self) -> Program:
        return pinned_program(str(self._balancer_pins.current()), BALANCER)

    # Tests

    @contextmanager
    def tester(self, rules: Sequence[Rule], at: At, sets: Mapping[int, Prefixes] | None = None) -> Iterator[RuleTester]:
        """The rules of one hook, to test frames with. `sets`: slot -> prefixes, instead of the active ones."""
        with translated(), ExitStack() as resources:
            tries = {}
            for slot, prefixes in (sets or {}).items():
                tries[slot] = Tries.create()
                resources.callback(tries[slot].close)
                tries[slot].add(prefixes)
            counted = counters(max(1, len(rules)))
            resources.callback(os.close, counted.fd)
            hook = HOOKS[at]
            compiled = [
                CompiledRule(
                    _translation(rule, hook),
                    [Count(counted, number), *test_actions(rule, number)],
                    [In(tries.get(rule.slot) or self._tries_of(rule), rule.set.side)] if rule.set else [],
                )
                for number, rule in enumerate(rules)
            ]
            program = resources.enter_context(load("filter_test", hook, assemble(hook, compiled, Answer(0))))
            yield RuleTester(program, rules, counted)

    # Pins and maps

    def _folder(self) -> Path:
        """The folder with the maps that all programs share; a new one is created atomically."""
        if folder := self._pins.current():
            return folder
        folder = self._pins.prepare()
        try:
            for name, map_ in (("map_counters", counters(2 * MAX_RULES)), ("map_buckets", buckets(MAX_RULES))):
                self._resources.callback(os.close, map_.fd)
                libbpf.pin(map_.fd, os.fsencode(folder / name))
        except BaseException:
            self._pins.discard(folder)
            raise
        self._pins.put_in_force(folder)
        return folder

    def _held_maps(self) -> tuple[Map, Map]:
        """Counters, two for each slot: matched and dropped. Buckets."""
        if self._maps is None:
            folder = self._folder()
            counted = Map("filter_counters", _get(folder / "map_counters"), ctypes.c_uint32, Counter)
            self._resources.callback(os.close, counted.fd)
            held = Map("filter_buckets", _get(folder / "map_buckets"), ctypes.c_uint32, Bucket)
            self._resources.callback(os.close, held.fd)
            self._maps = counted, held
        return self._maps

    def _reset(self, slot: int) -> None:
        counted, held = self._held_maps()
        for index in (2 * slot, 2 * slot + 1):
            counted.set_total(index, Counter())
        held[slot] = Bucket()

    def in_place(self, point: AttachPoint) -> Program | None:
        """Our attached program. After an interrupted change both are pinned; at XDP the interface has the id of one."""
        programs = list(self._pinned(point.pin))
        if isinstance(point, XdpAttach):
            running = xdp_attach.attached(point.ifindex)
            programs = [program for program in programs if running and program.id == running.program_id]
        return programs[0] if programs else None

    def _pinned(self, name: str) -> Iterator[Program]:
        folder = self._pins.current()
        for pin in (f"{name}{NEXT}", name):
            if folder and (folder / pin).exists():
                program = Program(pin, _get(folder / pin))
                self._resources.callback(os.close, program.fd)
                yield program

    def pin(self, fd: int, name: str) -> None:
        self.unpin(name)
        libbpf.pin(fd, os.fsencode(self._folder() / name))

    def unpin(self, name: str) -> None:
        if folder := self._pins.current():
            (folder / name).unlink(missing_ok=True)

    def settle(self, name: str, *, installed: bool) -> None:
        """The change is done: rename the pin of its program."""
        if installed:
            self.unpin(name)
            (self._folder() / f"{name}{NEXT}").rename(self._folder() / name)
        else:
            self.unpin(f"{name}{NEXT}")
            self.unpin(name)


def _get(path: Path) -> int:
    try:
        fd: int = libbpf.get_pinned(os.fsencode(path))
    except OSError as error:
        raise DataplaneError(f"pin {path}: {error.strerror}") from error
    return fd


def _translation(rule: Rule, hook: Hook) -> Translation:
    """A packet that the filter cannot judge is not let through: it matches, except where that would pass it."""
    return translate(cbpf.decode(rule.instructions), hook, accept_unjudged=rule.action is not Action.PASS)
