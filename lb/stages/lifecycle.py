"""The life of a user's stage: it is given a number and a place, compiled, put there, and taken out again.

Enters: a Source, an interface, and where on it. Leaves: a Record in a file for as long as there is anything of the
stage, so that others can list and stop it. In a place of the balancer's a program outlives its process: one that was
killed leaves an orphan, which goes on working until stop() ends it. Alone on an interface it ends with its process.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from enum import StrEnum
from pathlib import Path

from lb.errors import Busy, DataplaneError, InvalidInput, NotFound
from lb.formats.documents import Document
from lb.host.capabilities import check_may_change
from lb.paths import Paths
from lb.stages import kernel
from lb.stages.compile import Stage, check_installed, compile_stage, load_bcc
from lb.stages.kernel import AT_XDP_EXIT, Places, open_places
from lb.stages.socket import ask_tables
from lb.stages.source import Chain, Source
from lb.store.lock import writer_lock

END_WAIT_S = 10.0
END_POLL_S = 0.02


class Condition(StrEnum):
    COMPILING = "compiling"
    RUNNING = "running"
    ORPHANED = "orphaned"  # its process is gone, its program works on
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Record:
    """`place`: of enum stage, None alone on an interface. `born`: when the process started, in ticks since boot, which
    tells it from another one of its pid. `program_id`: 0 while it is compiled. `since`: ISO 8601."""

    number: int
    interface: str
    at: str
    file: str
    function: str
    pid: int
    born: int
    place: int | None
    program_id: int
    since: str

    def condition(self, occupied: dict[int, int]) -> Condition:
        if self.pid and _born(self.pid) == self.born:
            return Condition.RUNNING if self.program_id else Condition.COMPILING
        is_there = self.place is not None and occupied.get(self.place) == self.program_id
        return Condition.ORPHANED if is_there else Condition.GONE

    @property
    def mark(self) -> str:
        """How its lines of bpf_trace_printk() begin."""
        return f"xdp-lb stage {self.number}: "


def _born(pid: int) -> int | None:
    """proc_pid_stat(5), field 22; None for a process that is gone, or only waits for its parent."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else int(fields[19])


class Records:
    """Of one network namespace, a file each."""

    def __init__(self, paths: Paths) -> None:
        self._folder = paths.run_dir / "stages" / paths.netns

    def all(self) -> list[Record]:
        found = (self._read(path) for path in self._folder.glob("*.json"))
        return sorted((record for record in found if record), key=lambda record: record.number)

    def write(self, record: Record) -> None:
        """Whole or not at all."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(record)
        path.with_suffix(".next").write_text(json.dumps(asdict(record)))
        path.with_suffix(".next").rename(path)

    def remove(self, record: Record) -> None:
        self._path(record).unlink(missing_ok=True)
        self.socket(record).unlink(missing_ok=True)

    def socket(self, record: Record) -> Path:
        """Where its process tells its tables."""
        return self._path(record).with_suffix(".sock")

    def _path(self, record: Record) -> Path:
        return self._folder / f"{record.number}.json"

    @staticmethod
    def _read(path: Path) -> Record | None:
        with suppress(FileNotFoundError):
            return Record(**json.loads(path.read_text()))
        return None


# Running one


@dataclass(frozen=True, slots=True)
class Request:
    source: Source
    interface: str
    at: str


@contextmanager
def compiled(paths: Paths, request: Request) -> Iterator[tuple[Stage, Record]]:
    """With a number, and on an interface of the balancer's a place, that nobody else gets meanwhile.

    Raises InvalidInput, NotInstalled, DataplaneError, Busy; then all is as it was."""
    check_may_change()
    ifindex = kernel.interface_index(request.interface)
    check_installed()
    record, chain = _reserve(paths, request)
    try:
        stage = compile_stage(load_bcc(), request.source, ifindex, chain, record.mark)
        try:
            yield stage, record
        finally:
            stage.close()
    finally:
        if record in Records(paths).all():  # was not put in place
            Records(paths).remove(record)


def _reserve(paths: Paths, request: Request) -> tuple[Record, Chain | None]:
    with _changing(paths) as (records, places):
        others = _present(records, places)
        place = _free_place(request, places, others)
        record = Record(
            number=min(set(range(1, len(others) + 2)) - {other.number for other in others}),
            interface=request.interface,
            at=request.at,
            file=str(request.source.path.resolve()),
            function=request.source.function,
            pid=os.getpid(),
            born=_born(os.getpid()) or 0,
            place=place,
            program_id=0,
            since=datetime.now().astimezone().isoformat(timespec="seconds"),
        )
        records.write(record)
        return record, places.chain(place) if places and place is not None else None


def _free_place(request: Request, places: Places | None, others: Sequence[Record]) -> int | None:
    """None: standalone on the interface."""
    if places is None or not places.serves(request.interface):
        if request.at == AT_XDP_EXIT:
            raise InvalidInput(f"{request.interface}: the balancer is not attached: use --at xdp")
        return None
    taken = places.occupied().keys() | {other.place for other in others}
    free = [place for place in places.of(request.at) if place not in taken]
    if not free:
        raise DataplaneError(
            f"all {len(places.of(request.at))} places at {request.at} are in use: see xdp-lb stage list"
        )
    return free[0]


@contextmanager
def in_place(paths: Paths, record: Record, stage: Stage) -> Iterator[str | None]:
    """Attaches the stage for the block; yields a warning or None. Raises DataplaneError, Busy."""
    record = replace(record, program_id=kernel.program_id(stage.program_fd))
    if record.place is None:
        link, warning = kernel.hold(record.interface, stage.program_fd)
        with link, _recorded(Records(paths), record):
            yield warning
        return
    with _changing(paths) as (records, places):
        if places is None:
            raise DataplaneError("the balancer was detached at the same time: repeat the command")
        records.write(record)
        places.put(record.place, stage.program_fd, stage.stages_fd)
    try:
        yield None
    finally:
        _take_out(paths, record)


@contextmanager
def _recorded(records: Records, record: Record) -> Iterator[None]:
    records.write(record)
    try:
        yield
    finally:
        records.remove(record)


def _take_out(paths: Paths, record: Record) -> None:
    """What is not there any more need not be taken out."""
    with _changing(paths) as (records, places):
        if places and record.place is not None:
            places.clear(record.place, record.program_id)
        records.remove(record)


# Others


@contextmanager
def _changing(paths: Paths) -> Iterator[tuple[Records, Places | None]]:
    with writer_lock(paths.stage_lock, paths.netns), open_places(paths) as places:
        yield Records(paths), places


def _present(records: Records, places: Places | None) -> list[Record]:
    """All but those of which nothing is left; they are forgotten."""
    occupied = places.occupied() if places else {}
    for record in records.all():
        if record.condition(occupied) is Condition.GONE:
            records.remove(record)
    return records.all()


def listed(paths: Paths) -> list[tuple[Record, Condition]]:
    """By number; nothing is changed."""
    records = Records(paths).all()
    if not records:
        return []
    with open_places(paths) as places:
        occupied = places.occupied() if places else {}
    found = [(record, record.condition(occupied)) for record in records]
    return [(record, condition) for record, condition in found if condition is not Condition.GONE]


def record_document(record: Record, condition: Condition) -> Document:
    """As `xdp-lb stage list --json` has it."""
    fields = asdict(record)
    del fields["born"]
    return fields | {"program_id": record.program_id or None, "state": str(condition)}


def tables(paths: Paths, number: int) -> list[Document]:
    """What a running stage has found up to now. Raises NotFound, DataplaneError."""
    record, condition = _running_one(paths, number)
    if condition is Condition.ORPHANED:
        raise InvalidInput(f"stage {number}: orphaned: its tables cannot be read: run xdp-lb stage stop")
    return ask_tables(Records(paths).socket(record), number)


def _running_one(paths: Paths, number: int) -> tuple[Record, Condition]:
    for record, condition in listed(paths):
        if record.number == number:
            return record, condition
    raise NotFound(f"stage {number}: not running: see xdp-lb stage list")


def stop(paths: Paths, numbers: Sequence[int]) -> list[tuple[Record, Condition]]:
    """Ends these stages, or all (no numbers), and gives them as they were. Raises NotFound before anything is done,
    Busy, DataplaneError."""
    check_may_change()
    there = {record.number: (record, condition) for record, condition in listed(paths)}
    for number in numbers:
        if number not in there:
            raise NotFound(f"stage {number}: not running: see xdp-lb stage list")
    ended = [there[number] for number in dict.fromkeys(numbers or there)]
    for record, condition in ended:
        if condition is not Condition.ORPHANED:
            _end_process(Records(paths), record)
    for record, _ in ended:
        if record.place is not None:
            _take_out_if_left(paths, record)
    return ended


def _end_process(records: Records, record: Record) -> None:
    """The process cleans up."""
    with suppress(ProcessLookupError):
        os.kill(record.pid, signal.SIGTERM)
    deadline = time.monotonic() + END_WAIT_S
    while _born(record.pid) == record.born and any(other.number == record.number for other in records.all()):
        if time.monotonic() > deadline:
            raise Busy(f"stage {record.number}: process {record.pid} does not exit: kill it and repeat the command")
        time.sleep(END_POLL_S)


def _take_out_if_left(paths: Paths, record: Record) -> None:
    """Also what a process left that ended without cleaning up, or was put in place since it was listed."""
    for left in Records(paths).all():
        if (left.number, left.pid, left.born) == (record.number, record.pid, record.born):
            _take_out(paths, left)
