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

from filters.cli.options import DIRECTIONS, TIME_STAMP_TYPE, USAGE, Options, UsageError, parse
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
_BUFFERS, _MIN_BUFFER, _MAX_BUFFER = 1 << 26, 1 << 20, 1 << 24


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
    """The exit status. Raises BrokenPipeError if the reader of standard output is gone."""
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
    elif options.list_link_types or options.list_time_stamp_types:
        _list_types(options)
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


def _list_types(options: Options) -> None:
    """What a capture has and no option changes, as tcpdump lists it: on standard error."""
    from filters.files.savefile import link_type_words
    from filters.interfaces import chosen

    names = ", ".join(interface.name for interface in chosen(options.interfaces))
    if options.list_link_types:
        _say(f"Data link types for {names} (use option -y to set):\n  {link_type_words(ETHERNET)}")
    else:
        _say(f"Time stamp types for {names} (use option -j to set):\n  {TIME_STAMP_TYPE} (Host)")


def _drop_privileges(options: Options, *, keep_capture: bool) -> None:
    if options.user is None:
        return
    from filters.cli.privileges import drop_privileges

    drop_privileges(options.user, keep_capture=keep_capture)
    _say(f"dropped privs to {options.user}")


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
    """Signals from the user; a second one to stop does not wait for anything."""

    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.ended = self.status_requested = False

    @contextmanager
    def caught(self) -> Iterator[None]:
        """What ends the block by an exception ends the process: its handlers stay until then."""
        before = {number: signal.signal(number, self._end) for number in self.ends}
        before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._request_status)
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

    def _request_status(self, *_: object) -> None:
        self.status_requested = True


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
        session.start()
        _drop_privileges(options, keep_capture=True)
        with Outputs(options, _origin(options, interfaces, session)) as outputs:
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
    from filters.capture.session import Session
    from filters.capture.taps import Request

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
            options.metadata,
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
    return [Statistics(numbers[name], session.start_ns, now_ns, counts[name]) for name in counts]


def _measured(options: Options) -> AbstractContextManager[None]:
    if not options.hook_stats:
        return nullcontext()
    from filters.capture.hook_stats import measured

    return measured()


def _buffer(options: Options) -> int:
    """Bytes per CPU. Printing is slow: a small buffer keeps the backlog after an interrupt short."""
    if options.prints:
        return _PRINTING_BUFFER
    return max(_MIN_BUFFER, min(_MAX_BUFFER, _BUFFERS // (os.cpu_count() or 1)))


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
    """Until the end; returns the error that caused it, if any."""
    progress = Progress() if options.verbose and not options.prints else None
    try:
        while not signals.ended and not session.is_complete:
            session.wait()
            session.deliver(outputs)
            outputs.check()
            if signals.status_requested:
                signals.status_requested = False
                _say(f"xdp-dump: {_summary(session.counts(), ', ')}")
            if progress:
                progress.show(session)
        session.finish(outputs)
    except FilesFull:
        _say(f"Maximum file limit reached: {options.files}")
    except NotWritten as error:
        return error
    except BrokenPipeError:
        pass  # the reader is gone; the decoder reports it itself
    finally:
        session.stop()
    return None


class Progress:
    """The number of packets so far, rewritten on one line once a second if it has changed."""

    def __init__(self) -> None:
        self._due, self._shown = time.monotonic() + _PROGRESS_S, -1

    def show(self, session: Session) -> None:
        if time.monotonic() < self._due:
            return
        self._due += _PROGRESS_S
        captured = session.counts().captured
        if captured != self._shown:
            self._shown = captured
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
            _drop_privileges(options, keep_capture=False)
            found = islice(filter(accepting.accepts, file.packets()), options.count)
            if options.count_only:
                _count(found)
                return 0
            return _write_all(options, file, found)


def _count(packets: Iterator[Packet]) -> None:
    """Also those before unreadable data."""
    number = 0
    try:
        for _ in packets:
            number += 1
    finally:
        print(_packets(number))


def _write_all(options: Options, file: SaveFile, packets: Iterator[Packet]) -> int:
    metadata = _file_metadata() if options.metadata else b""
    with Outputs(options, Origin(file.link_type_in_files, file.snaplen)) as outputs:
        try:
            for batch in _batches(packets, metadata):
                outputs.write([batch])
        except FilesFull:
            _say(f"Maximum file limit reached: {options.files}")
        except BrokenPipeError:
            pass
    return outputs.status


def _file_metadata() -> bytes:
    from filters.records.metadata import FILE_METADATA

    return FILE_METADATA


def _batches(packets: Iterator[Packet], metadata: bytes) -> Iterator[bytes]:
    """Records, with the same metadata in front of each packet; also those before a file's damage."""
    batch = bytearray()
    try:
        for packet in packets:
            batch += record(packet.seconds, packet.fraction, metadata + packet.data, len(metadata) + packet.length)
            if len(batch) > _BATCH:
                yield bytes(batch)
                batch.clear()
    except DamagedFile:
        yield bytes(batch)
        raise
    if batch:
        yield bytes(batch)
