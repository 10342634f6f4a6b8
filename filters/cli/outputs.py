"""Outputs of packets: a file, standard output, or both, each in the requested format.

Enters: records, with metadata where Options.metadata says so. Leaves: pcap or pcapng in files; text or JSON on standard
output. What a command does not need it does not import.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from filters.cli.options import Options
from filters.records.pcap import File, Rotation, Sink, Span, file_header

if TYPE_CHECKING:
    from filters.files.decoder import Decoder
    from filters.files.jsonlines import JsonLines
    from filters.files.pcapng import Blocks, Statistics

_LOWEST_PRIORITY = 19


@dataclass(frozen=True)
class Origin:
    """Where packets come from. `interfaces`: index and name of each; none for a capture file of another program, whose
    link type is the one of files. `statistics`: of interfaces, at the end of a file."""

    link_type: int
    snaplen: int
    interfaces: Sequence[tuple[int, str]] = ()
    statistics: Callable[[], Sequence[Statistics]] = tuple


class Outputs:
    """A Sink in front of those that Options select."""

    def __init__(self, options: Options, origin: Origin) -> None:
        self._decoder: Decoder | None = None
        self._reason_sinks: list[Blocks | JsonLines] = []  # those that name reasons
        self._sinks: list[Sink] = []
        if options.write is not None:
            self._sinks.append(self._blocks(options, origin) if options.writes_blocks else _file(options, origin))
        if options.prints:
            self._sinks.append(self._json(origin) if options.json else self._text(options, origin))

    def name_reasons(self, reasons: Sequence[str]) -> None:
        """Reason names of the balancer, by the number in the metadata; the first stands for none."""
        for sink in self._reason_sinks:
            sink.reasons = reasons

    def write(self, spans: Sequence[Span]) -> None:
        for sink in self._sinks:
            sink.write(spans)

    def check(self) -> None:
        for sink in self._sinks:
            sink.check()

    @property
    def status(self) -> int:
        """The decoder's exit status, once it is closed."""
        return self._decoder.status if self._decoder else 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._decoder and kind is KeyboardInterrupt:
            self._decoder.give_up()
        self.close()

    def close(self) -> None:
        """May be called again."""
        while self._sinks:
            self._sinks.pop().close()

    def _blocks(self, options: Options, origin: Origin) -> Sink:
        from importlib.metadata import version

        from filters.files import pcapng

        assert options.write is not None
        layout = pcapng.Layout([pcapng.Source(*interface) for interface in origin.interfaces] or [pcapng.Source(0)])
        application = f"xdp-dump {version('xdp-lb')}"
        header = pcapng.file_header(application, layout, origin.link_type, origin.snaplen, options.expression)
        file = File(
            options.write,
            header,
            _rotation(options),
            find=pcapng.offsets,
            trailer=lambda: b"".join(statistics.block() for statistics in origin.statistics()),
            rotated=_after_rotation(options),
        )
        blocks = pcapng.Blocks(file, layout)
        self._reason_sinks.append(blocks)
        return blocks

    def _json(self, origin: Origin) -> Sink:
        from filters.files.jsonlines import JsonLines

        lines = JsonLines(origin.link_type, dict(socket.if_nameindex()))
        self._reason_sinks.append(lines)
        return lines

    def _text(self, options: Options, origin: Origin) -> Sink:
        if shutil.which("tcpdump") is None:
            from filters.files.summaries import Summaries, Times

            times = Times(options.times, nano=options.in_nanoseconds)
            return _strip_metadata(options, Summaries(origin.link_type, times))
        from filters.files.decoder import Decoder

        if options.names_interfaces:
            return self._cooked_text(options, origin)
        nano = ("--nano",) if options.in_nanoseconds else ()
        self._decoder = Decoder(_header(options, origin), (*nano, *options.decode))
        return _strip_metadata(options, self._decoder)

    def _cooked_text(self, options: Options, origin: Origin) -> Sink:
        from filters.files.cooked import LINK_TYPE, Cooked
        from filters.files.decoder import Decoder

        header = file_header(LINK_TYPE, origin.snaplen, nano=options.nano)
        self._decoder = Decoder(header, (*(("--nano",) if options.nano else ()), *options.decode))
        return Cooked(self._decoder, dict(origin.interfaces), nano=options.nano)


def _file(options: Options, origin: Origin) -> Sink:
    assert options.write is not None
    header, rotated = _header(options, origin), _after_rotation(options)
    return _strip_metadata(options, File(options.write, header, _rotation(options), rotated=rotated))


def _after_rotation(options: Options) -> Callable[[str], None] | None:
    """-z: `COMMAND FILE` runs at the lowest priority, and is not waited for."""
    command = options.after_rotation
    return None if command is None else lambda file: _run_in_background(command, file)


def _run_in_background(command: str, file: str) -> None:
    try:
        process = subprocess.Popen([command, file], process_group=0)
    except OSError as error:
        print(f"xdp-dump: -z {command} {file}: {error.strerror}", file=sys.stderr, flush=True)
        return
    with suppress(OSError):  # it has ended already
        os.setpriority(os.PRIO_PROCESS, process.pid, _LOWEST_PRIORITY)


def _header(options: Options, origin: Origin) -> bytes:
    return file_header(origin.link_type, origin.snaplen, nano=options.in_nanoseconds)


def _rotation(options: Options) -> Rotation:
    return Rotation(options.size, options.seconds, options.files)


def _strip_metadata(options: Options, sink: Sink) -> Sink:
    """For sinks that take plain records."""
    if not options.metadata:
        return sink
    from filters.files.pcapng import StripMetadata

    return StripMetadata(sink)
