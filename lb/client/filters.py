"""Filter rules by the API: the methods of lb.firewall.firewall.Firewall, over a daemon.

Enters: wishes; files are those of the host that this runs on, and travel as text. Leaves: reports. Where the change was
typed over SSH, on the daemon's own host, the daemon is told of that connection, which no rule may end unasked.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from lb.client.http import DaemonHttp, WithEtag
from lb.errors import Conflict, InvalidInput
from lb.firewall.documents import read_report, read_status, read_trial
from lb.formats.documents import Document
from lb.host.ssh import SSH_HEADER, SshConnection
from lb.model.rule_report import ApplyOptions, FilterReport, FilterTestResult, RuleSpec, RuleStatus
from lb.model.rules import At, Rules, set_file

if TYPE_CHECKING:
    from lb.formats.capture_file import Keep, Piece

CHUNK = 24 << 20  # of a capture file, in one request: a third more in base64
FILTERS = "/v1/filters"


class FilterClient:
    """`etag` of a change: raise Conflict unless the rules of the interface are as they were read."""

    def __init__(self, http: DaemonHttp, own_connection: Callable[[], SshConnection | None]) -> None:
        self._http, self._own_connection = http, own_connection

    def status(self, interface: str | None = None) -> list[RuleStatus]:
        return self._http.ask("GET", FILTERS, read_status, query={"interface": interface}).value

    def wanted(self, interface: str) -> WithEtag[list[Document]]:
        """What is asked for of an interface, as `replace` takes it back in a request of one's own."""
        return self._http.ask("GET", _path(interface), lambda document: list(document["rules"]))

    def add(
        self,
        spec: RuleSpec,
        position: int | None = None,
        options: ApplyOptions | None = None,
        *,
        etag: str | None = None,
    ) -> FilterReport:
        body = _body(_with_list(spec)) | ({} if position is None else {"position": position})
        return self._change("POST", _path(spec.interface), options, etag, body=body)

    def replace(
        self, interface: str, specs: Sequence[RuleSpec], options: ApplyOptions | None = None, *, etag: str | None = None
    ) -> FilterReport:
        """Make these all the rules of an interface; those that are there as they are wanted stay."""
        body = {"rules": [_body(spec) for spec in specs]}
        return self._change("PUT", _path(interface), options, etag, body=body)

    def delete(
        self, interface: str, number: int, options: ApplyOptions | None = None, *, etag: str | None = None
    ) -> FilterReport:
        return self._change("DELETE", _path(interface, number), options, etag)

    def move(
        self, interface: str, number: int, to: int, options: ApplyOptions | None = None, *, etag: str | None = None
    ) -> FilterReport:
        return self._change("PATCH", _path(interface, number), options, etag, body={"number": to})

    def flush(
        self, interface: str | None = None, options: ApplyOptions | None = None, *, etag: str | None = None
    ) -> FilterReport:
        return self._change("DELETE", FILTERS if interface is None else _path(interface), options, etag)

    def reload(
        self,
        interface: str,
        number: int,
        options: ApplyOptions | None = None,
        *,
        set_list: str | None = None,
        etag: str | None = None,
    ) -> FilterReport:
        """Without `set_list`, from the file on this host that the rule names."""
        text = self._list_of(interface, number) if set_list is None else set_list
        return self._change("PUT", f"{_path(interface, number)}/set", options, etag, text=text)

    def restore(self, options: ApplyOptions | None = None) -> FilterReport:
        return self._change("POST", "/v1/filter-restore", options, None)

    def _list_of(self, interface: str, number: int) -> str:
        rules = Rules(tuple(each.rule for each in self.status(interface)))
        return _text(set_file(rules.numbered(interface, number), number))

    def _change(
        self, method: str, path: str, options: ApplyOptions | None, etag: str | None, **content: Any
    ) -> FilterReport:
        wanted = options or ApplyOptions()
        said = {"force": wanted.force, "dry_run": wanted.dry_run, "selftest": not wanted.selftest}
        query = {name: name != "selftest" for name, is_other in said.items() if is_other}
        headers = {"If-Match": etag} if etag else {}
        if connection := self._own_connection():
            headers[SSH_HEADER] = connection.text
        return self._http.ask(method, path, read_report, query=query, headers=headers, **content).value

    # Trials

    def test(self, interface: str, path: str, at: At | None = None, write_to: str | None = None) -> FilterTestResult:
        return self._trial({"interface": interface, "at": at and str(at)}, path, write_to)

    def test_specs(self, specs: Sequence[RuleSpec], path: str, write_to: str | None = None) -> FilterTestResult:
        return self._trial({"rules": [_body(_with_list(spec)) for spec in specs]}, path, write_to)

    def _trial(self, body: Document, path: str, write_to: str | None) -> FilterTestResult:
        """Of a file of any size, piece by piece."""
        from lb.formats.capture_file import open_capture, pieces, writer  # with libpcap

        with open_capture(path) as capture, writer(write_to, capture.snaplen) as keep:
            return reduce(_added, (self._trial_of(piece, body, keep) for piece in pieces(capture, CHUNK)))

    def _trial_of(self, piece: Piece, body: Document, keep: Keep) -> FilterTestResult:
        packets, content = piece
        whole = {**body, "pcap": b64encode(content).decode()}
        trial, dropped = self._http.ask("POST", "/v1/filter-test", _read_answer, body=whole).value
        for position in dropped:
            keep(position, packets[position])
        return trial


def _read_answer(document: Document) -> tuple[FilterTestResult, list[int]]:
    return read_trial(document), document["dropped_packets"]


def _added(one: FilterTestResult, other: FilterTestResult) -> FilterTestResult:
    if one.rules != other.rules:
        raise Conflict("filter: rules changed during the test: repeat it")
    return replace(
        one,
        matched={slot: count + other.matched[slot] for slot, count in one.matched.items()},
        packets=one.packets + other.packets,
        dropped=one.dropped + other.dropped,
        untested=one.untested + other.untested,
    )


def _path(interface: str, number: int | None = None) -> str:
    rules = f"{FILTERS}/{quote(interface, safe='')}"
    return rules if number is None else f"{rules}/{number}"


def _body(spec: RuleSpec) -> Document:
    """Without what has its default."""
    own = {
        "rate": str(spec.rate) if spec.rate else None,
        "expression": spec.expression or None,
        "set": _set_body(spec),
        "for_s": spec.seconds,
        "until": spec.until_s,
    }
    given = {key: value for key, value in own.items() if value is not None}
    return {"at": str(spec.at), "action": str(spec.action), **given}


def _set_body(spec: RuleSpec) -> Document | None:
    if spec.set_path is None:
        return None
    text = {} if spec.set_list is None else {"list": spec.set_list}
    return {"path": spec.set_path, "side": spec.set_side, **text}


def _with_list(spec: RuleSpec) -> RuleSpec:
    """With the text of its set's file."""
    if spec.set_path is None or spec.set_list is not None:
        return spec
    path = str(Path(spec.set_path).absolute())
    return replace(spec, set_path=path, set_list=_text(path))


def _text(path: str) -> str:
    try:
        return Path(path).read_bytes().decode("latin-1")
    except OSError as error:
        raise InvalidInput(f"set {path}: {error.strerror}") from error
