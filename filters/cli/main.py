"""`xdp-dump`: tcpdump's command line on captures in the kernel.

Enters: argv. Leaves: packets on standard output or in files, the rest on standard error in tcpdump's words. Exit
status: 0, also after an interrupt; 1 with one line that begins with `xdp-dump: `.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import TYPE_CHECKING, NoReturn

from filters.cli.options import DIRECTIONS, USAGE, Options, UsageError, parse
from filters.cli.outputs import Origin, Outputs
from filters.compiler import cbpf
from filters.compiler.cbpf import Instruction
from filters.compiler.expr import ETHERNET, compile_expression, libpcap
from filters.errors import DamagedFile, DumpError, FilterError, NotWritten
from filters.records.pcap import FilesFull, record
from xdp.errors import NotPermitted, XdpError

if TYPE_CHECKING:  # of these a command needs one or the other
    from filters.capture.session import Session
    from filters.files.pcapng import Statistics
    from filters.files.savefile import Packet, SaveFile
    from filters.interfaces import Interface
    from filters.records.counts import Counts

_PROGRESS_S = 1.0
_PRINTING_BUFFER = 1 << 21
_BATCH = 1 << 20  # bytes of records that are written at once
# Of the rings of all CPUs together, and of one.
_BUFFERS, _LEAST_BUFFER, _MOST_BUFFER = 1 << 26, 1 << 20, 1 << 24


def main() -> NoReturn:
    """The console script."""
    try:
        status = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        _die_of_a_broken_pipe()
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    sys.exit(status)


def run(words: Sequence[str]) -> int:
    """The exit status. Raises BrokenPipeError where nobody reads what it prints."""
    try:
        return _run(parse(words))
    except UsageError as error:
        _say(f"xdp-dump: {error}\n{_version()}\n{USAGE}")
    except DamagedFile as error:
        _say(f"xdp-dump: pcap_loop: {error}")
    except (FilterError, XdpError) as error:
        _say(f"xdp-dump: {error}")
    return 1


def _run(options: Options) -> int:
    if options.show_help or options.show_version:
        print(_version() if options.show_version else f"{_version()}\n{USAGE}")
    elif options.list_interfaces:
        _list_interfaces()
    elif options.read is not None:
        return _read(options, options.read)
    else:
        return _capture(options)
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _version() -> str:
    from importlib.metadata import version

    return f"xdp-dump version {version('xdp-lb')}\n{libpcap().pcap_lib_version().decode()}"


def _die_of_a_broken_pipe() -> NoReturn:
    """As tcpdump does, which the shell tells from an error."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGPIPE)
    sys.exit(128 + signal.SIGPIPE)


def _list_interfaces() -> None:
    from filters.interfaces import all_interfaces

    for number, interface in enumerate(all_interfaces(), 1):
        print(f"{number}.{interface}")


def _compiled(options: Options, interface: Interface) -> tuple[Instruction, ...]:
    from filters.interfaces import netmask

    return compile_expression(
        options.expression, snaplen=options.snaplen, optimise=options.optimise, netmask=netmask(interface)
    )


def _show_code(instructions: Sequence[Instruction], times: int) -> None:
    from filters.cli.listing import side_by_side

    shown = {1: side_by_side, 2: cbpf.c_array}.get(times, cbpf.decimal)
    print(shown(instructions))


# From interfaces


class Signals:
    """What the user wants meanwhile; a second signal to end does not wait for anything."""

    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.ended = self.asked = False

    @contextmanager
    def caught(self) -> Iterator[None]:
        """What ends the block by an exception ends the process: its handlers stay until then."""
        before = {number: signal.signal(number, self._end) for number in self.ends}
        before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._ask)
        before[signal.SIGUSR2] = signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # asks for a flush: nothing is held back
        yield
        for number, handler in before.items():
            signal.signal(number, handler)

    def _end(self, *_: object) -> None:
        if self.ended:
            for number in self.ends:  # a third one would interrupt the cleaning up
                signal.signal(number, signal.SIG_IGN)
            raise KeyboardInterrupt
        self.ended = True

    def _ask(self, *_: object) -> None:
        self.asked = True


def _capture(options: Options) -> int:
    from filters.interfaces import chosen

    interfaces, signals = chosen(options.interfaces), Signals()
    instructions = _compiled(options, interfaces[0])
    if options.code:
        _show_code(instructions, options.code)
        return 0
    with (
        _permission_explained(interfaces),
        _measured(options),
        _session(options, instructions, interfaces) as session,
        signals.caught(),
    ):
        with Outputs(options, _origin(options, interfaces, session)) as outputs:
            session.start()
            outputs.name_reasons(session.reasons)
            _say(_listening(options, interfaces))
            failure = _deliver(options, session, outputs, signals)
        if signals.ended and options.write is None and not options.json:
            print(flush=True)
        _say(_summary(session.settled(), "\n"))
        if options.hook_stats:
            from filters.capture.hook_stats import table

            _say(table(session))
    if failure:
        _say(f"xdp-dump: {failure}")
        return 1
    return outputs.status


def _session(options: Options, instructions: Sequence[Instruction], interfaces: Sequence[Interface]) -> Session:
    from filters.capture.session import Request, Session

    ingress, egress = DIRECTIONS[options.direction]
    return Session(
        Request(
            instructions,
            interfaces,
            ingress,
            egress,
            options.at,
            options.buffer or _buffer(options),
            options.count,
            options.in_nanoseconds,
            options.promiscuous,
            options.selftest,
            options.notes,
            options.is_prompt,
        )
    )


def _origin(options: Options, interfaces: Sequence[Interface], session: Session) -> Origin:
    named = [(interface.index, interface.name) for interface in interfaces]
    return Origin(ETHERNET, options.snaplen, named, lambda: _statistics(interfaces, session))


def _statistics(interfaces: Sequence[Interface], session: Session) -> list[Statistics]:
    """So far, at the end of a file."""
    from filters.files.pcapng import Statistics

    now_ns, counts = time.time_ns(), session.counts_by_interface()
    numbers = {interface.name: number for number, interface in enumerate(interfaces)}
    return [Statistics(numbers[name], session.begun_ns, now_ns, counts[name]) for name in counts]


def _measured(options: Options) -> AbstractContextManager[None]:
    if not options.hook_stats:
        return nullcontext()
    from filters.capture.hook_stats import measured

    return measured()


def _buffer(options: Options) -> int:
    """Bytes for each CPU. What prints is slow, and shall not have much to say after an interrupt."""
    if options.prints:
        return _PRINTING_BUFFER
    return max(_LEAST_BUFFER, min(_MOST_BUFFER, _BUFFERS // (os.cpu_count() or 1)))


@contextmanager
def _permission_explained(interfaces: Sequence[Interface]) -> Iterator[None]:
    try:
        yield
    except NotPermitted as error:
        names = ", ".join(interface.name for interface in interfaces)
        words = "You don't have permission to perform this capture on that device"
        raise DumpError(f"{names}: {words}\n({error})") from error


def _listening(options: Options, interfaces: Sequence[Interface]) -> str:
    from filters.files.savefile import link_type_words

    names = "any" if "any" in options.interfaces else ", ".join(interface.name for interface in interfaces)
    line = f"listening on {names}, link-type {link_type_words(ETHERNET)}, snapshot length {options.snaplen} bytes"
    if options.write is not None or options.verbose or options.json:
        return f"xdp-dump: {line}"
    return f"xdp-dump: verbose output suppressed, use -v[v]... for full protocol decode\n{line}"


def _deliver(options: Options, session: Session, outputs: Outputs, signals: Signals) -> DumpError | None:
    """Until the end, whose reason it returns if it is a bad one."""
    progress = Progress() if options.verbose and not options.prints else None
    try:
        while not signals.ended and not session.is_complete:
            session.wait()
            session.deliver(outputs)
            outputs.check()
            if signals.asked:
                signals.asked = False
                _say(f"xdp-dump: {_summary(session.counts(), ', ')}")
            if progress:
                progress.tell(session)
        session.finish(outputs)
    except FilesFull:
        _say(f"Maximum file limit reached: {options.files}")
    except NotWritten as error:
        return error
    except BrokenPipeError:
        pass  # nobody reads any more; the decoder says so itself, and a file needs no words
    finally:
        session.stop()
    return None


class Progress:
    """How many packets there are by now, said on the same line after each second that has brought some."""

    def __init__(self) -> None:
        self._due, self._told = time.monotonic() + _PROGRESS_S, -1

    def tell(self, session: Session) -> None:
        if time.monotonic() < self._due:
            return
        self._due += _PROGRESS_S
        captured = session.counts().captured
        if captured != self._told:
            self._told = captured
            print(f"Got {captured}", end="\r", file=sys.stderr, flush=True)


def _summary(counts: Counts, separator: str) -> str:
    return separator.join(
        (
            f"{_packets(counts.captured)} captured",
            f"{_packets(counts.matched)} received by filter",
            f"{_packets(counts.lost)} dropped by kernel",
        )
    )


def _packets(number: int) -> str:
    return f"{number} packet" if number == 1 else f"{number} packets"


# From files


def _read(options: Options, path: str) -> int:
    from filters.files.savefile import SaveFile, file_filter

    with SaveFile(path, nano=options.in_nanoseconds) as file:
        words = f"link-type {file.link_type_words}, snapshot length {file.snaplen}"
        _say(f"reading from file {path}, {words}")
        instructions = file.compiled(options.expression, optimise=options.optimise)
        if options.code:
            _show_code(instructions, options.code)
            return 0
        with file_filter(instructions) as accepting:
            found = islice(filter(accepting.accepts, file.packets()), options.count)
            if options.count_only:
                _count(found)
                return 0
            return _write_all(options, file, found)


def _count(packets: Iterator[Packet]) -> None:
    """Those in front of what cannot be read, too."""
    number = 0
    try:
        for _ in packets:
            number += 1
    finally:
        print(_packets(number))


def _write_all(options: Options, file: SaveFile, packets: Iterator[Packet]) -> int:
    note = _note_of_a_file() if options.notes else b""
    with Outputs(options, Origin(file.link_type_in_files, file.snaplen)) as outputs:
        try:
            for batch in _batches(packets, note):
                outputs.write([batch])
        except FilesFull:
            _say(f"Maximum file limit reached: {options.files}")
        except BrokenPipeError:
            pass
    return outputs.status


def _note_of_a_file() -> bytes:
    from filters.records.notes import OF_A_FILE

    return OF_A_FILE


def _batches(packets: Iterator[Packet], note: bytes) -> Iterator[bytes]:
    """Records, with the same note in front of each packet; those that come before a file's damage too."""
    batch = bytearray()
    try:
        for packet in packets:
            batch += record(packet.seconds, packet.fraction, note + packet.data, len(note) + packet.length)
            if len(batch) > _BATCH:
                yield bytes(batch)
                batch.clear()
    except DamagedFile:
        yield bytes(batch)
        raise
    if batch:
        yield bytes(batch)
