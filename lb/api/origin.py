"""What a browser may be made to send by a page of another origin (pure): nothing.

Enters: the headers of a request, and the daemon's names. Leaves: a Problem, or nothing. A name that DNS has rebound to
this host shows in Host; a request that another page has made shows in Sec-Fetch-Site (W3C Fetch Metadata) or Origin
(RFC 6454), which browsers set and scripts cannot.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from lb.formats.problems import Problem

UNIX_NAMES = frozenset({"xdp-lb", "localhost", "127.0.0.1", "::1"})  # of the client, and of a forwarded socket
OWN_SITES = (b"same-origin", b"none")  # none: typed in, or a bookmark
SHOWN = 80  # characters of what was sent
BY_BROWSERS = frozenset({b"origin", b"sec-fetch-site", b"sec-fetch-mode"})

Headers = Iterable[tuple[bytes, bytes]]


def is_of_browser(headers: Headers) -> bool:
    return any(name in BY_BROWSERS for name, _ in headers)


def check_host(headers: Headers, names: Collection[str]) -> None:
    """Raises Problem. HTTP/1.0 has no Host; browsers do not speak it."""
    fields = dict(headers)
    if b"host" not in fields:
        return
    name = host_name(fields[b"host"].decode("latin-1"))
    if name not in names:
        shown = name[:SHOWN] or "(empty)"
        raise Problem(421, f"host {shown}: not a name of this daemon: start it with --allow-host {shown}")


def host_name(host: str) -> str:
    """Of Host: without port, brackets and the root's dot."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.lower().removesuffix(".")


def check_site(headers: Headers) -> None:
    """Raises Problem."""
    fields = dict(headers)
    if fields.get(b"sec-fetch-site", b"none") not in OWN_SITES:
        raise Problem(403, "cross-site request: use the page of this daemon, or a client that is no browser")
    origin = fields.get(b"origin")
    if origin is not None and origin.partition(b"://")[2].lower() != fields.get(b"host", b"").lower():
        shown = origin.decode("latin-1")[:SHOWN] or "(empty)"
        raise Problem(403, f"cross-site request from {shown}: use the page of this daemon")
