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
from lb.model.rule_report import ApplyOptions, FilterReport, RuleSpec, RuleStatus, TestResult
from lb.model.rules import At, Rules, set_file

if TYPE_CHECKING:
    from lb.formats.capture_file import Keep, Piece

CHUNK = 24 << 20  # of a capture file, in one request: a third more in base64
FILTERS = "/v1/filters"


class FilterClient:
    """`etag` of a change: raise Conflict unless the rules of the interface are as they were read."""

    def __init__(self, http: DaemonHttp, asked_on: Callable[[], SshConnection | None]) -> None:
        self._http, self._asked_on = http, asked_on

    def status(self, interface: str | None = None) -> list[RuleStatus]:
        return self._http.ask("GET", FILTERS, read_status, query={"interface": interface}).value

    def wanted(self, interface: str) -> WithEtag[list[Document]]:
        """What is asked for of an interface, as `replace` takes it back in a request of one's own."""
        return self._http.ask("GET", _path(interface), lambda document: list(document["rules"]))

    def add(
        self, wish: RuleSpec, position: int | None = None, how: ApplyOptions | None = None, *, etag: str | None = None
    ) -> FilterReport:
        body = _body(_with_list(wish)) | ({} if position is None else {"position": position})
        return self._change("POST", _path(wish.interface), how, etag, body=body)

    def replace(
        self, interface: str, wishes: Sequence[RuleSpec], how: ApplyOptions | None = None, *, etag: str | None = None
    ) -> FilterReport:
        """Make these all the rules of an interface; those that are there as they are wanted stay."""
        body = {"rules": [_body(wish) for wish in wishes]}
        return self._change("PUT", _path(interface), how, etag, body=body)

    def delete(
        self, interface: str, number: int, how: ApplyOptions | None = None, *, etag: str | None = None
    ) -> FilterReport:
        return self._change("DELETE", _path(interface, number), how, etag)

    def move(
        self, interface: str, number: int, to: int, how: ApplyOptions | None = None, *, etag: str | None = None
    ) -> FilterReport:
        return self._change("PATCH", _path(interface, number), how, etag, body={"number": to})

    def flush(
        self, interface: str | None = None, how: ApplyOptions | None = None, *, etag: str | None = None
    ) -> FilterReport:
        return self._change("DELETE", FILTERS if interface is None else _path(interface), how, etag)

    def reload(
        self,
        interface: str,
        number: int,
        how: ApplyOptions | None = None,
        *,
        set_list: str | None = None,
        etag: str | None = None,
    ) -> FilterReport:
        """Without `set_list`, from the file on this host that the rule names."""
        text = self._list_of(interface, number) if set_list is None else set_list
        return self._change("PUT", f"{_path(interface, number)}/set", how, etag, text=text)

    def restore(self, how: ApplyOptions | None = None) -> FilterReport:
        return self._change("POST", "/v1/filter-restore", how, None)

    def _list_of(self, interface: str, number: int) -> str:
        rules = Rules(tuple(each.rule for each in self.status(interface)))
        return _text(set_file(rules.numbered(interface, number), number))

    def _change(
        self, method: str, path: str, how: ApplyOptions | None, etag: str | None, **content: Any
    ) -> FilterReport:
        wanted = how or ApplyOptions()
        said = {"force": wanted.force, "dry_run": wanted.dry_run, "selftest": not wanted.selftest}
        query = {name: name != "selftest" for name, is_other in said.items() if is_other}
        headers = {"If-Match": etag} if etag else {}
        if connection := self._asked_on():
            headers[SSH_HEADER] = connection.text
        return self._http.ask(method, path, read_report, query=query, headers=headers, **content).value

    # Trials

    def test(self, interface: str, path: str, at: At | None = None, write_to: str | None = None) -> TestResult:
        return self._trial({"interface": interface, "at": at and str(at)}, path, write_to)

    def test_wishes(self, wishes: Sequence[RuleSpec], path: str, write_to: str | None = None) -> TestResult:
        return self._trial({"rules": [_body(_with_list(wish)) for wish in wishes]}, path, write_to)

    def _trial(self, body: Document, path: str, write_to: str | None) -> TestResult:
        """Of a file of any size, piece by piece."""
        from lb.formats.capture_file import open_capture, pieces, writer  # with libpcap

        with open_capture(path) as capture, writer(write_to, capture.snaplen) as keep:
            return reduce(_added, (self._trial_of(piece, body, keep) for piece in pieces(capture, CHUNK)))

    def _trial_of(self, piece: Piece, body: Document, keep: Keep) -> TestResult:
        packets, content = piece
        whole = {**body, "pcap": b64encode(content).decode()}
        trial, dropped = self._http.ask("POST", "/v1/filter-test", _read_answer, body=whole).value
        for position in dropped:
            keep(position, packets[position])
        return trial


def _read_answer(document: Document) -> tuple[TestResult, list[int]]:
    return read_trial(document), document["dropped_packets"]


def _added(one: TestResult, other: TestResult) -> TestResult:
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


def _body(wish: RuleSpec) -> Document:
    """Without what has its default."""
    own = {
        "rate": str(wish.rate) if wish.rate else None,
        "expression": wish.expression or None,
        "set": _set_body(wish),
        "for_s": wish.seconds,
        "until": wish.until_s,
    }
    given = {key: value for key, value in own.items() if value is not None}
    return {"at": str(wish.at), "action": str(wish.action), **given}


def _set_body(wish: RuleSpec) -> Document | None:
    if wish.set_path is None:
        return None
    text = {} if wish.set_list is None else {"list": wish.set_list}
    return {"path": wish.set_path, "side": wish.set_side, **text}


def _with_list(wish: RuleSpec) -> RuleSpec:
    """With the text of its set's file."""
    if wish.set_path is None or wish.set_list is not None:
        return wish
    path = str(Path(wish.set_path).absolute())
    return replace(wish, set_path=path, set_list=_text(path))


def _text(path: str) -> str:
    try:
        return Path(path).read_bytes().decode("latin-1")
    except OSError as error:
        raise InvalidInput(f"set {path}: {error.strerror}") from error
