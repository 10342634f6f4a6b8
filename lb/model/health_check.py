"""What a service may ask of a health check (pure): its words, as the command line, lb.toml and JSON have them.

Enters: a text such as

    tcp
    http /healthz host=www.example.org status=200-299 body='all good' interval=1s
    https /healthz host=www.example.org ca=/etc/ssl/internal.pem
    udp send=ping expect=pong
    script interval=10s timeout=5s /usr/local/bin/check --deep

Leaves: a HealthCheck that is valid by construction; its text has only what is not the default. The parameters are those
of HAProxy's `check inter 2s fall 3 rise 2`, with its defaults.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from lb.errors import InvalidInput
from lb.model.regex import compiled

UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "": 1.0}
INTERVALS = (0.1, 3600.0)
TIMEOUTS = (0.01, 3600.0)
SHOWN_AS_TEXT = re.compile(rb"[\x20-\x7e]*")


class Kind(StrEnum):
    TCP = "tcp"
    HTTP = "http"
    HTTPS = "https"
    UDP = "udp"
    SCRIPT = "script"

    @property
    def is_http(self) -> bool:
        return self in (Kind.HTTP, Kind.HTTPS)


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """Times in seconds. port: instead of the backend's; 0: that. A backend that is up is down after `fall` failures in
    a row, one that is down is up after `rise` successes. jitter: intervals vary by so many percent, both ways.

    http, https: the status has to be in one of `status` (first and last of each), and the body has to contain `body`
    and match `match`. host: of the Host field and, in https, what the certificate has to be for (SNI); empty: the
    address.
    verify, ca: whether the certificate is checked, and by which file (empty: the system's).
    udp: `send` goes out; with `expect`, an answer has to come that contains it, else none that says unreachable.
    script: `command` has to end with exit code 0."""

    kind: Kind
    path: str = "/"
    method: str = "GET"
    host: str = ""
    status: tuple[tuple[int, int], ...] = ((200, 399),)
    body: str = ""
    match: str = ""
    verify: bool = True
    ca: str = ""
    send: bytes = b""
    expect: bytes = b""
    command: tuple[str, ...] = ()
    port: int = 0
    interval_s: float = 2.0
    timeout_s: float = 1.0
    rise: int = 2
    fall: int = 3
    jitter: int = 10

    def __post_init__(self) -> None:
        _check_within("interval", self.interval_s, INTERVALS, " s")
        _check_within("timeout", self.timeout_s, TIMEOUTS, " s")
        _check_within("rise", self.rise, (1, 1000))
        _check_within("fall", self.fall, (1, 1000))
        _check_within("jitter", self.jitter, (0, 100), " %")
        _check_within("port", self.port, (0, 65535))
        for name, wrong, why in (
            ("path", not re.fullmatch(r"/[!-~]*", self.path), "not a path that starts with /"),
            ("method", not re.fullmatch(r"[A-Z]+", self.method), "not a method in capital letters"),
            ("host", not re.fullmatch(r"[!-~]*", self.host), "not a host name"),
            ("status", any(not 100 <= a <= b <= 599 for a, b in self.status) or not self.status, "not from 100 to 599"),
            ("match", bool(fault := _fault_of_regex(self.match)), f"not a regular expression in RE2 syntax: {fault}"),
            (
                "host",
                self.kind is Kind.HTTPS and self.verify and not self.host,
                "missing: give the host name of the certificate, or verify=off",
            ),
            (
                "command",
                self.kind is Kind.SCRIPT and not (self.command and self.command[0].startswith("/")),
                "missing: give the script's path from the root, such as script /usr/local/bin/check",
            ),
        ):
            if wrong:
                raise InvalidInput(f"health check {self.kind}: {name}: {why}")

    @classmethod
    def parse(cls, text: str) -> HealthCheck:
        """Raises InvalidInput."""
        words = _split(text)
        if not words or words[0] not in list(Kind):
            *others, last = Kind
            raise InvalidInput(
                f"health check {words[0] if words else '(empty)'}: unknown: use {', '.join(others)} or {last}"
            )
        kind = Kind(words[0])
        return cls(kind, **_parsed(kind, words[1:]))

    def __str__(self) -> str:
        return " ".join(_words(self))


def _check_within(name: str, value: float, ends: tuple[float, float], unit: str = "") -> None:
    if not ends[0] <= value <= ends[1]:
        raise InvalidInput(f"health check: {name} {value:g}{unit}: out of range {ends[0]:g} to {ends[1]:g}{unit}")


def _fault_of_regex(text: str) -> str:
    try:
        if text:
            compiled(text)
    except ValueError as error:
        return str(error)
    return ""


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InvalidInput(f"health check {text}: {str(error).lower()}") from None


# Parameters


def parse_seconds(text: str) -> float:
    """`500ms`, `2s`, `1m`, or a number of seconds. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|)", text, re.ASCII)
    if match is None:
        raise ValueError("not a duration such as 500ms or 2s")
    return round(float(match[1]) * UNITS[match[2]], 3)


def seconds_text(value: float) -> str:
    milliseconds = round(value * 1000)
    return f"{milliseconds}ms" if milliseconds % 1000 else f"{milliseconds // 1000}s"


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError("not a number")
    return int(text)


def _percent(text: str) -> int:
    return _number(text.removesuffix("%"))


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise ValueError("not on or off")
    return text == "on"


def _statuses(text: str) -> tuple[tuple[int, int], ...]:
    ranges = (each.partition("-") for each in text.split(","))
    return tuple((_number(first), _number(last or first)) for first, _, last in ranges)


def _statuses_text(value: tuple[tuple[int, int], ...]) -> str:
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in value)


def _bytes(text: str) -> bytes:
    """Text in UTF-8, or `0x` and hexadecimal digits."""
    return bytes.fromhex(text[2:]) if text.startswith("0x") else text.encode()


def _bytes_text(value: bytes) -> str:
    is_text = SHOWN_AS_TEXT.fullmatch(value) and not value.startswith(b"0x")
    return value.decode() if is_text else f"0x{value.hex()}"


@dataclass(frozen=True, slots=True)
class _Parameter:
    """A field's way from the text, and back; the kinds of check that have it."""

    field: str
    parse: Callable[[str], Any]
    text: Callable[[Any], str]
    kinds: Sequence[Kind] = tuple(Kind)


HTTP_KINDS = (Kind.HTTP, Kind.HTTPS)
PARAMETERS: Mapping[str, _Parameter] = {
    "method": _Parameter("method", str, str, HTTP_KINDS),
    "host": _Parameter("host", str, str, HTTP_KINDS),
    "status": _Parameter("status", _statuses, _statuses_text, HTTP_KINDS),
    "body": _Parameter("body", str, str, HTTP_KINDS),
    "match": _Parameter("match", str, str, HTTP_KINDS),
    "verify": _Parameter("verify", _switch, lambda value: "on" if value else "off", (Kind.HTTPS,)),
    "ca": _Parameter("ca", str, str, (Kind.HTTPS,)),
    "send": _Parameter("send", _bytes, _bytes_text, (Kind.UDP,)),
    "expect": _Parameter("expect", _bytes, _bytes_text, (Kind.UDP,)),
    "port": _Parameter("port", _number, str, (Kind.TCP, *HTTP_KINDS, Kind.UDP)),
    "interval": _Parameter("interval_s", parse_seconds, seconds_text),
    "timeout": _Parameter("timeout_s", parse_seconds, seconds_text),
    "rise": _Parameter("rise", _number, str),
    "fall": _Parameter("fall", _number, str),
    "jitter": _Parameter("jitter", _percent, lambda value: f"{value}%"),
}


def _parsed(kind: Kind, words: Sequence[str]) -> dict[str, Any]:
    """Of a script, all that follows its path is its own."""
    found: dict[str, Any] = {}
    for position, word in enumerate(words):
        if kind is Kind.SCRIPT and word.startswith("/"):
            return found | {"command": tuple(words[position:])}
        if kind.is_http and word.startswith("/") and "path" not in found:
            found["path"] = word
        else:
            found |= _parameter(kind, word, found)
    return found


def _parameter(kind: Kind, word: str, found: Mapping[str, Any]) -> dict[str, Any]:
    name, equals, value = word.partition("=")
    parameter = PARAMETERS.get(name)
    if parameter is None or not equals or kind not in parameter.kinds:
        allowed = ", ".join(f"{key}=" for key, each in PARAMETERS.items() if kind in each.kinds)
        raise InvalidInput(f"health check {kind}: {word}: unknown option: known options are {allowed}")
    if parameter.field in found:
        raise InvalidInput(f"health check {kind}: {name}: given twice")
    try:
        return {parameter.field: parameter.parse(value)}
    except ValueError as error:
        raise InvalidInput(f"health check {kind}: {name} {value or '(empty)'}: {_words_of(error)}") from None


def _words_of(error: ValueError) -> str:
    return "not hexadecimal digits" if "fromhex" in str(error) else str(error)


_DEFAULTS = {field.name: field.default for field in fields(HealthCheck)}


def _words(check: HealthCheck) -> Iterator[str]:
    yield str(check.kind)
    if check.kind.is_http:
        yield shlex.quote(check.path)
    for name, parameter in PARAMETERS.items():
        value = getattr(check, parameter.field)
        if value != _DEFAULTS[parameter.field]:
            yield f"{name}={shlex.quote(parameter.text(value))}"
    yield from map(shlex.quote, check.command)
