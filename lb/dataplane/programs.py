"""The balancer's programs: which object is in force, how the next one takes its place, and where it is attached.

Enters: sizes of maps, interfaces. Leaves: one pinned generation of programs and maps, attached or not. A process that
is killed in the middle of an exchange leaves either the old program in force or the new one, and the next one to write
goes on from there.
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from lb.dataplane import clock
from lb.dataplane.allocation import Sizes
from lb.dataplane.errors import MORE_DESCRIPTORS, lacks_descriptors, translated
from lb.dataplane.lookup import TABLES
from lb.errors import DataplaneError
from lb.model.forwarding import Attachment
from lb.model.state import Interface
from lb.paths import Paths
from xdp import attach as xdp_attach
from xdp.errors import CannotCarry, LoadError, NotPermitted, XdpError
from xdp.migrate import Succession, catch_up, check_meanings
from xdp.object import (
    LB_OBJECT,
    BpfObject,
    Loaded,
    PinnedObject,
    Program,
    RunningObject,
    fingerprint,
    in_one_line,
    pinned_program,
    program_name,
)
from xdp.pins import Pins
from xdp.stages import MAPS as STAGE_MAPS
from xdp.stages import Stages

PROGRAM, BEHIND_STAGES, CARRY = "xdp_lb", "xdp_balance", "xdp_carry"
REFUSED = "upgrade to the installed program failed, the running program is kept"
LOST = "{0}: the attached program has lost its pins and is not of this version ({1}): run ip link set dev {0} xdp off"
WRITTEN_MAPS = ("services", "members", "counters", "rings", *TABLES)  # by lb.dataplane.service_maps
MAX_CATCHING_UP_NS = 2_000_000_000  # packets of no flow wait no longer than this, whatever becomes of the process


class Programs:
    """The part of lb.control.contracts.Dataplane that is about programs. Every method raises DataplaneError.

    Opened alone, it is for who needs no more of the balancer than where it runs and the places in its path.
    """

    def __init__(self, pins: Pins) -> None:
        self._pins = pins
        self._object: Loaded | None = None
        self._pinned_in: Path | None = None  # the object's generation
        self._unusable: XdpError | None = None
        self._is_only_generation = False  # that is pinned, as this process has seen
        self._unpinned: list[Program] = []  # of ours, on interfaces
        if generation := self._generation_in_force():
            self._adopt(generation)

    @classmethod
    @translated()
    def open(cls, paths: Paths) -> Self:
        """What an earlier process pinned, or nothing yet; either way nothing is written."""
        return cls(Pins(paths.run_dir, paths.netns))

    def use(self, obj: Loaded) -> None:
        """Makes a loaded or adopted object the one that all methods work on."""
        self._object, self._unusable = obj, None

    @property
    def loaded(self) -> bool:
        return self._object is not None or self._unusable is not None

    @property
    def usable_obj(self) -> Loaded | None:
        """What is in force; None where nothing is, or what this version cannot work on."""
        return None if self._unusable else self._object

    @property
    def obj(self) -> Loaded:
        """Likewise; raises DataplaneError where there is none."""
        if self._unusable:
            can_follow = self._object and not isinstance(self._unusable, CannotCarry)
            mend = "run xdp-lb attach IFACE" if can_follow else "run xdp-lb detach, then xdp-lb attach IFACE"
            raise DataplaneError(f"the loaded programs are of another version of xdp-lb ({self._unusable}): {mend}")
        if self._object is None:
            raise DataplaneError("no program loaded: run xdp-lb attach IFACE")
        return self._object

    @property
    def stages(self) -> Stages:
        return Stages(self.obj)

    @property
    def _program(self) -> Program:
        return self.obj.program(PROGRAM)

    @property
    def _control(self) -> Any:
        return self.obj.variable("control")

    def _generation_in_force(self) -> Path | None:
        """The one that balances: a process that was killed may have left it to be made `current`."""
        current = self._pins.current()
        if current is None:
            return None
        return next((each for each in self._pins.others() if _balances(each)), current)

    def _adopt(self, generation: Path) -> None:
        """Of another version's, `upgrade` knows what to do, or if they are incomplete, detach() and unload()."""
        self._pinned_in = generation
        try:
            self._object = PinnedObject.open(str(generation), LB_OBJECT)
            if self.outdated:
                _check_meanings(self._object)
            for name in WRITTEN_MAPS:
                self._object.map(name)
            self.use(self._object)
        except NotPermitted:
            raise
        except XdpError as error:
            if lacks_descriptors(error):  # which says nothing about the version
                raise DataplaneError(f"{in_one_line(error)}: {MORE_DESCRIPTORS}") from error
            self._unusable = error

    @translated()
    def load(self, sizes: Sizes) -> None:
        """Have programs in force, with maps of these sizes, and no other generation beside them."""
        if not self.loaded:
            self._install(sizes)
        elif sizes != Sizes.held_by(self.obj):
            self._replace(sizes)
        if not self._is_only_generation and self._pins.others():
            self._leave_older_generations()
        self._is_only_generation = True

    def _install(self, sizes: Sizes) -> None:
        """Where there is nothing yet."""
        obj = _sized(sizes)
        obj.load()
        self._is_only_generation = False
        generation = self._pins.prepare()
        obj.pin(str(generation))
        self._pins.put_in_force(generation)
        self._pinned_in = generation
        self.use(obj)
        self._balance_behind_stages()

    def _balance_behind_stages(self) -> None:
        self.stages.set(self.stages.balance, self.obj.program(BEHIND_STAGES).fd)

    @translated()
    def restore_stages(self) -> list[str]:
        """Have packets come to the balancer behind the stages, where others have taken it out: sentences of that."""
        balance = self.stages.map.get(self.stages.balance)
        if balance is not None and balance.value == self.obj.program(BEHIND_STAGES).id:
            return []
        self._balance_behind_stages()
        return ["stages: the balancer was missing at the end of the chain"]

    # Without pins

    @translated()
    def recover(self, interfaces: Collection[Interface]) -> None:
        """What runs is replaced by the same program, on the same maps. For another version's it is someone else's.

        Its map `stages` is empty: the kernel clears a program array that no process holds and nothing pins.
        """
        if self.loaded:
            return
        names = {each.name for each in interfaces}
        running = {name: each.program_id for name, each in xdp_attach.all_attached().items() if name in names}
        lost = [name for name, number in running.items() if program_name(number) == PROGRAM]
        if not lost:
            return
        try:
            self._go_on_from(running[lost[0]])
        except LoadError as error:
            raise DataplaneError(LOST.format(lost[0], in_one_line(error))) from error

    def _go_on_from(self, program_id: int) -> None:
        with BpfObject.open(LB_OBJECT) as installed, RunningObject(installed) as running:
            running.find(PROGRAM, program_id)
            self._object, self._unpinned = running, [running.program(PROGRAM)]
            try:
                self._replace(Sizes.held_by(running))
            finally:
                self._unpinned = []
                if self._object is running:
                    self._object = None

    @translated()
    def restore_pins(self) -> list[str]:
        assert self._object
        assert self._pinned_in
        if self._pins.current() == self._pinned_in and self._object.is_pinned(str(self._pinned_in)):
            return []
        generation = self._pins.prepare()
        self._object.pin(str(generation))
        self._pins.put_in_force(generation)
        self._pinned_in = generation
        for other in self._pins.others():
            self._pins.discard(other)
        return [f"pins: removed by another process: pinned again in {generation}"]

    # From one program to the next

    @property
    def outdated(self) -> str:
        if self._object is None or self._object.fingerprint == fingerprint(LB_OBJECT):
            return ""
        return self._object.version

    @translated()
    def upgrade(self) -> bool:
        if not self.outdated:
            return False
        assert self._object
        try:
            self._replace(Sizes.held_by(self._object))
        except CannotCarry as error:
            raise DataplaneError(f"{REFUSED}: {error}: run xdp-lb detach, then xdp-lb attach IFACE") from error
        except XdpError as error:
            raise DataplaneError(f"{REFUSED}: {in_one_line(error)}") from error
        return True

    def _replace(self, sizes: Sizes) -> None:
        """The installed program, on maps of these sizes with the same contents, in the place of the one in force: no
        packet is lost, and none is counted twice or never. If it fails, nothing has changed."""
        old, new = self._object, _sized(sizes)
        assert old
        self._is_only_generation = False
        generation = None
        try:
            succession = Succession(old, new, STAGE_MAPS)
            new.load()
            if isinstance(old, RunningObject) and not old.is_of(new):
                raise LoadError("other instructions")
            succession.copy()
            generation = self._pins.prepare()
            new.pin(str(generation))
            catch_up(old, new)  # with what came while all was copied: what is left for later takes a moment
        except BaseException:
            new.close()
            if generation:
                self._pins.discard(generation)
            raise
        self._take_over(old, new, succession, generation)

    def _take_over(self, old: Loaded, new: BpfObject, succession: Succession, generation: Path) -> None:
        """From the relay on, the new program has all packets. A process that is killed before is forgotten; one that is
        killed behind it, the next one goes on for."""
        control = new.variable("control")
        if succession.has_to_catch_up:
            control.whole_ns = clock.now_ns() + MAX_CATCHING_UP_NS
        Stages(old).relay(new.program(BEHIND_STAGES).fd)
        self._pinned_in = generation
        self.use(new)
        self._leave_older_generations()
        for name, index, more in succession.counted_since():
            _add(new, name, index, more)
        old.close()

    def _leave_older_generations(self) -> None:
        """Have all our interfaces run the program in force; also ends an exchange that was cut short."""
        assert self._pinned_in
        if self._pins.current() != self._pinned_in:
            self._pins.put_in_force(self._pinned_in)
        self._catch_up()
        for name in self.attachments():
            self.attach(Interface(name))
        self._balance_behind_stages()
        self.stages.end_relay()
        for generation in self._pins.others():
            self._pins.discard(generation)

    def _catch_up(self) -> None:
        """With the tables of flows of the generations before."""
        assert self._pinned_in
        before = (each for each in self._pins.others() if int(each.name) < int(self._pinned_in.name))
        for generation in before:
            with suppress(LoadError), PinnedObject(str(generation)) as old:
                catch_up(old, self.obj)
        self._control.whole_ns = 0

    def close(self) -> None:
        """Gives up this process's hold; what is pinned and attached stays."""
        if self._object:
            self._object.close()
            self._object = None

    @translated()
    def unload(self) -> None:
        self.close()
        self._unusable = self._pinned_in = None
        self._pins.remove()

    @property
    def generation(self) -> int:
        return int(self._control.generation) if self.loaded else 0

    @generation.setter
    def generation(self, value: int) -> None:
        if self._object:
            self._control.generation = value

    # Interfaces

    def _our_programs(self) -> dict[int, Program]:
        """By id: ours, and what is still pinned of other generations."""
        own = [self._program] if self._object and not self._unusable else []
        own += self._unpinned
        mine = [self._pinned_in] if own else []
        pinned = (each for each in (self._pins.current(), *self._pins.others()) if each not in mine)
        return {program.id: program for program in (*own, *self._pinned_programs(pinned))}

    @staticmethod
    def _pinned_programs(generations: Iterable[Path | None]) -> Iterator[Program]:
        """Where there is none, the process that should have pinned it was killed before it could be attached."""
        for generation in filter(None, generations):
            with suppress(LoadError):
                yield pinned_program(str(generation), PROGRAM)

    @translated()
    def attach(self, interface: Interface) -> Attachment:
        ifindex = socket.if_nametoindex(interface.name)
        running = xdp_attach.attached(ifindex)
        ours = self._our_programs()
        done = xdp_attach.attach(
            ifindex,
            self._program.fd,
            self._program.id,
            interface.xdp_mode.value,
            replace_fd=ours[running.program_id].fd if running and running.program_id in ours else None,
            describe=lambda number: f"id {number}, name {program_name(number)}",
        )
        return Attachment(interface.name, done.mode, done.program_id, done.warning)

    @translated()
    def detach(self, name: str) -> None:
        try:
            ifindex = socket.if_nametoindex(name)
        except OSError:
            return
        running = xdp_attach.attached(ifindex)
        if running and running.program_id in (ours := self._our_programs()):
            xdp_attach.detach(ifindex, ours[running.program_id].fd)

    @translated()
    def attachments(self) -> Mapping[str, Attachment]:
        if not self.loaded:
            return {}
        ours = self._our_programs()
        return {
            name: Attachment(name, running.mode, running.program_id)
            for name, running in xdp_attach.all_attached().items()
            if running.program_id in ours
        }

    @translated()
    def program_ids(self) -> Mapping[str, int]:
        """Interface name -> the id of the XDP program there, ours or not."""
        return {name: running.program_id for name, running in xdp_attach.all_attached().items()}


def _sized(sizes: Sizes) -> BpfObject:
    """The installed object, its maps of these sizes, not loaded yet."""
    obj = BpfObject.open(LB_OBJECT)
    for name, entries in sizes.by_map().items():
        obj.resize(name, entries)
    return obj


def _check_meanings(old: Loaded) -> None:
    with BpfObject.open(LB_OBJECT) as installed:
        check_meanings(old.types, installed.types)


def _balances(generation: Path) -> bool:
    """Whether packets that are relayed go to this generation's program."""
    try:
        with PinnedObject(str(generation)) as obj:
            stages = Stages(obj)
            place = stages.map.get(stages.balance)
            return place is not None and place.value == obj.program(BEHIND_STAGES).id
    except LoadError:  # it is not complete, so it was never in force
        return False


def _add(obj: Loaded, name: str, index: int, more: Any) -> None:
    """To what the program counts, while it does so."""
    is_reason = name == "reasons"
    carried = obj.types.struct("carried")(is_reason=is_reason, index=index)
    if is_reason:
        carried.more.packets = more
    else:
        carried.more = more
    obj.program(CARRY).run_syscall(carried)
