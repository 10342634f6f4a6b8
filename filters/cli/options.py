"""The words after `xdp-dump`, read as tcpdump reads its own: getopt_long(3), options also behind the expression.

Enters: argv. Leaves: Options, or UsageError and BadOption with the words that tcpdump has for them.
"""

from __future__ import annotations

import getopt
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filters.compiler.expr import SNAPLEN, libpcap
from filters.errors import DumpError

USAGE = """\
Usage: xdp-dump [-AbdDehHJKlLnNOpqStuUvxX#] [ -B size ] [ -c count ] [--count]
                [ -C file_size ] [ -E algo:secret ] [ -F file ] [ -G seconds ]
                [ -i interface ]... [ --immediate-mode ] [ -j tstamptype ]
                [ -M secret ] [ --number ] [ --print ] [ -Q in|out|inout ]
                [ -r file ] [ -s snaplen ] [ -T type ] [ --version ]
                [ -w file ] [ -W filecount ] [ -y datalinktype ]
                [ --time-stamp-precision precision ] [ --micro ] [ --nano ]
                [ -z postrotate-command ] [ -Z user ]
                [ --at xdp|xdp-exit|tc-in|tc-out ] [ --hook-stats ] [ --json ]
                [ --no-selftest ] [ --pcapng ] [ expression ]"""

DIRECTIONS = {"in": (True, False), "out": (False, True), "inout": (True, True)}
CAPTURE_POINTS = ("xdp", "xdp-exit", "tc-in", "tc-out")

LINK_TYPE, TIME_STAMP_TYPE = "EN10MB", "host"

_FLAGS = "AbdDefhHIJKlLnNOpqStuUvxX#"
_WITH_VALUE = "BcCEFGijMQrsTVwWyzZ"
# Said to the tcpdump that decodes, with the same meaning there.
_PASSED_ON = frozenset("AbeEHKlNnqStuUvxX#MT")
# Of tcpdump's options those that xdp-dump has not, and why.
_UNSUPPORTED = {
    "f": "-f: not supported: packets are printed by tcpdump -r, which takes no -f: use -n",
    "I": "-I: not supported: frames in monitor mode have no Ethernet header",
    "V": "-V: not supported: read one file with -r, or join files with mergecap",
}

_LONG = {
    "absolute-tcp-sequence-numbers": "S",
    "at=": "",
    "buffer-size=": "B",
    "count": "",
    "direction=": "Q",
    "dont-verify-checksums": "K",
    "help": "h",
    "hook-stats": "",
    "immediate-mode": "",
    "interface=": "i",
    "json": "",
    "linktype=": "y",
    "list-data-link-types": "L",
    "list-interfaces": "D",
    "list-time-stamp-types": "J",
    "micro": "",
    "monitor-mode": "I",
    "nano": "",
    "no-optimize": "O",
    "no-promiscuous-mode": "p",
    "no-selftest": "",
    "number": "#",
    "packet-buffered": "U",
    "pcapng": "",
    "print": "",
    "relinquish-privileges=": "Z",
    "snapshot-length=": "s",
    "time-stamp-precision=": "",
    "time-stamp-type=": "j",
    "version": "",
}


class UsageError(Exception):
    """Ends with the usage text."""


@dataclass(frozen=True, slots=True)
class Options:
    """Defaults are tcpdump's. `size` is in bytes, `buffer` in bytes for each CPU (0: as fits), `decode` for tcpdump."""

    interfaces: tuple[str, ...] = ()
    expression: str = ""
    filter_file: str | None = None
    count: int | None = None
    snaplen: int = SNAPLEN
    write: str | None = None
    read: str | None = None
    size: int = 0
    seconds: int = 0
    files: int = 0
    buffer: int = 0
    direction: str = "inout"
    at: str | None = None
    code: int = 0
    verbose: int = 0
    times: int = 0
    nano: bool = False
    optimise: bool = True
    promiscuous: bool = True
    selftest: bool = True
    print_too: bool = False
    count_only: bool = False
    json: bool = False
    pcapng: bool = False
    hook_stats: bool = False
    list_interfaces: bool = False
    list_link_types: bool = False
    list_time_stamp_types: bool = False
    after_rotation: str | None = None
    user: str | None = None
    show_version: bool = False
    show_help: bool = False
    decode: tuple[str, ...] = ()

    @property
    def prints(self) -> bool:
        """Whether packets are decoded to standard output."""
        return self.write is None or self.print_too

    @property
    def is_prompt(self) -> bool:
        """Low latency: packets are printed, piped, counted or buffered one by one."""
        return self.prints or self.write == "-" or self.count is not None or "-U" in self.decode

    @property
    def writes_blocks(self) -> bool:
        """Whether the file is in the pcapng format: by its name, or by option."""
        return self.write is not None and (self.pcapng or self.write.endswith(".pcapng"))

    @property
    def metadata(self) -> bool:
        """Whether an output needs packet metadata."""
        return self.writes_blocks or (self.prints and (self.json or self.names_interfaces))

    @property
    def names_interfaces(self) -> bool:
        """Whether the text names each packet's interface and direction, as tcpdump's does for `any`."""
        return "any" in self.interfaces and self.read is None

    @property
    def in_nanoseconds(self) -> bool:
        return self.nano or self.metadata


def parse(words: Sequence[str]) -> Options:
    """Raises UsageError for what is no option, DumpError for a bad value."""
    try:
        found, rest = getopt.gnu_getopt(list(words), _short(), list(_LONG))
    except getopt.GetoptError as error:
        raise UsageError(_usage_fault(error.opt)) from None
    options = Options()
    for name, value in found:
        options = _with_option(options, name, value)
    return replace(options, expression=_expression(options, rest))


def _short() -> str:
    return _FLAGS + "".join(f"{letter}:" for letter in _WITH_VALUE)


def _usage_fault(name: str) -> str:
    if len(name) == 1:
        return f"option requires an argument -- '{name}'" if name in _WITH_VALUE else f"invalid option -- '{name}'"
    candidates = [option for option in _LONG if option.startswith(name)]
    if len(candidates) > 1 and name not in _LONG and f"{name}=" not in _LONG:
        return f"option '--{name}' is ambiguous"
    if not candidates:
        return f"unrecognized option '--{name}'"
    takes_value = candidates[0].endswith("=")
    return f"option '--{name}' requires an argument" if takes_value else f"option '--{name}' doesn't allow an argument"


def _with_option(options: Options, name: str, value: str) -> Options:
    letter = name[1:] if not name.startswith("--") else _letter_of(name[2:])
    if letter in _UNSUPPORTED:
        raise DumpError(_UNSUPPORTED[letter])
    if letter in _PASSED_ON:
        options = replace(options, decode=(*options.decode, f"-{letter}{value}"))
    set_option = _SETTERS.get(letter or name[2:])
    return replace(options, **set_option(options, value)) if set_option else options


def _letter_of(long_name: str) -> str:
    return _LONG.get(long_name) or _LONG.get(f"{long_name}=", "")


def _expression(options: Options, words: Sequence[str]) -> str:
    """-F's file goes before the words, as with tcpdump."""
    if options.filter_file is None:
        return " ".join(words)
    try:
        return Path(options.filter_file).read_text(errors="surrogateescape")
    except OSError as error:
        raise DumpError(f"can't open {options.filter_file}: {error.strerror}") from error


def _number(what: str, value: str, least: int = 1) -> int:
    if not value.isascii() or not value.isdecimal() or not least <= int(value) < 1 << 31:
        raise DumpError(f"invalid {what} {value}")
    return int(value)


def _snaplen(value: str) -> int:
    if not value.isascii() or not value.isdecimal() or int(value) > SNAPLEN:
        raise DumpError(f"invalid snaplen {value} (must be >= 0 and <= {SNAPLEN})")
    return int(value) or SNAPLEN


def _direction(value: str) -> str:
    if value not in DIRECTIONS:
        raise DumpError(f"unknown capture direction `{value}'")
    return value


def _capture_point(value: str) -> str:
    if value not in CAPTURE_POINTS:
        raise DumpError(f"unknown capture point `{value}': use one of {', '.join(CAPTURE_POINTS)}")
    return value


def _check_link_type(value: str) -> dict[str, Any]:
    if value.upper() == LINK_TYPE:
        return {}
    if libpcap().pcap_datalink_name_to_val(value.encode()) < 0:
        raise DumpError(f"invalid data link type {value}")
    raise DumpError(f"-y {value}: not supported: use {LINK_TYPE} (Ethernet)")


def _check_time_stamp_type(value: str) -> dict[str, Any]:
    if value == TIME_STAMP_TYPE:
        return {}
    if libpcap().pcap_tstamp_type_name_to_val(value.encode()) < 0:
        raise DumpError(f"invalid time stamp type {value}")
    raise DumpError(f"-j {value}: not supported: use {TIME_STAMP_TYPE}")


def _is_nano(precision: str) -> bool:
    if precision not in ("micro", "nano"):
        raise DumpError("unsupported time stamp precision")
    return precision == "nano"


def _times(options: Options) -> int:
    if options.times == 5:
        raise DumpError("only -t, -tt, -ttt, -tttt and -ttttt are supported")
    return options.times + 1


_SETTERS: dict[str, Callable[[Options, str], dict[str, Any]]] = {
    "i": lambda options, value: {"interfaces": (*options.interfaces, value)},
    "F": lambda _, value: {"filter_file": value},
    "c": lambda _, value: {"count": _number("packet count", value)},
    "s": lambda _, value: {"snaplen": _snaplen(value)},
    "w": lambda _, value: {"write": value},
    "r": lambda _, value: {"read": value},
    "C": lambda _, value: {"size": _number("file size", value) * 10**6},
    "G": lambda _, value: {"seconds": _number("number of seconds", value, least=0)},
    "W": lambda _, value: {"files": _number("number of output files", value)},
    "B": lambda _, value: {"buffer": _number("packet buffer size", value) << 10},
    "Q": lambda _, value: {"direction": _direction(value)},
    "at": lambda _, value: {"at": _capture_point(value)},
    "d": lambda options, _: {"code": options.code + 1},
    "v": lambda options, _: {"verbose": options.verbose + 1},
    "t": lambda options, _: {"times": _times(options)},
    "y": lambda _, value: _check_link_type(value),
    "j": lambda _, value: _check_time_stamp_type(value),
    "L": lambda *_: {"list_link_types": True},
    "J": lambda *_: {"list_time_stamp_types": True},
    "z": lambda _, value: {"after_rotation": value},
    "Z": lambda _, value: {"user": value},
    "time-stamp-precision": lambda _, value: {"nano": _is_nano(value)},
    "nano": lambda *_: {"nano": True},
    "micro": lambda *_: {"nano": False},
    "O": lambda *_: {"optimise": False},
    "p": lambda *_: {"promiscuous": False},
    "no-selftest": lambda *_: {"selftest": False},
    "print": lambda *_: {"print_too": True},
    "count": lambda *_: {"count_only": True},
    "json": lambda *_: {"json": True},
    "pcapng": lambda *_: {"pcapng": True},
    "hook-stats": lambda *_: {"hook_stats": True},
    "D": lambda *_: {"list_interfaces": True},
    "version": lambda *_: {"show_version": True},
    "h": lambda *_: {"show_help": True},
}
