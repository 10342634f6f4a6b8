"""Requests to a daemon, and its answers, for all parts of lb.client.client.

Enters: method, path and body. Leaves: what a reader makes of the answer's JSON. A problem becomes the error of
lb.errors that it was made of; all else that goes wrong DaemonError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import httpx

from lb.errors import DaemonError, LbError
from lb.formats.problems import MEDIA_TYPE, to_error

T = TypeVar("T")

CONNECT_S = 5.0
ANSWER_S = 300.0  # a whole configuration of a hundred thousand backends takes its time
TEXT = {"Content-Type": "text/plain; charset=utf-8"}


@dataclass(frozen=True, slots=True)
class WithEtag(Generic[T]):
    """What was read, and the entity tag by which a change can be bound to it."""

    value: T
    etag: str


class DaemonHttp:
    """See httpx.Client for `verify` and `transport`. All methods raise LbError."""

    def __init__(self, url: str, token: str | None, verify: Any, transport: httpx.BaseTransport | None) -> None:
        self._http = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            verify=verify,
            transport=transport,
            timeout=httpx.Timeout(ANSWER_S, connect=CONNECT_S),
            trust_env=False,
        )

    def close(self) -> None:
        self._http.close()

    def ask(
        self,
        method: str,
        path: str,
        read: Callable[[Any], T],
        *,
        body: object = None,
        text: str | None = None,
        query: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> WithEtag[T]:
        """`body` is sent as JSON, or else `text` as it is."""
        more = TEXT if text is not None else {}
        with _translated():
            response = self._http.request(
                method,
                path,
                json=body,
                content=text.encode(errors="replace") if text is not None else None,
                params=_given(query or {}),
                headers={**(headers or {}), **more},
            )
            _check(response)
            return WithEtag(read(response.json()), response.headers.get("etag", ""))

    @contextmanager
    def stream(self, path: str, headers: Mapping[str, str]) -> Iterator[Iterator[str]]:
        """The lines of an answer, as they come."""
        with _translated(), self._http.stream("GET", path, headers=headers, timeout=ANSWER_S) as response:
            _check(response)
            yield response.iter_lines()


def _given(query: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in query.items() if value is not None}


def _check(response: httpx.Response) -> None:
    """Raises the error that the daemon has answered."""
    if response.is_success:
        return
    response.read()
    if response.headers.get("content-type") == MEDIA_TYPE:
        raise to_error(response.json())
    raise DaemonError(f"daemon: unexpected response: HTTP status {response.status_code}")


@contextmanager
def _translated() -> Iterator[None]:
    """Foreign errors become DaemonError here."""
    try:
        yield
    except LbError:
        raise
    except httpx.HTTPError as error:
        raise DaemonError(f"daemon: no response: {str(error) or type(error).__name__}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise DaemonError(f"daemon: invalid response ({error}): check that its version is the same") from error
