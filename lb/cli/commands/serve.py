"""`xdp-lb serve`, `token` and `audit`: the daemon, who may use it over TCP, and who has changed what.

What the daemon is made of is imported when it starts, so that no other command waits for it.
"""

from __future__ import annotations

import os
import pwd
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lb.cli.options import json_option
from lb.errors import DaemonError, InvalidInput
from lb.formats.documents import to_json
from lb.paths import Paths

if TYPE_CHECKING:
    from lb.api.access import Entry, Token

UNIT = Path(__file__).parents[2] / "daemon" / "systemd" / "xdp-lb.service"
UNIT_PROGRAM = "/usr/local/bin/xdp-lb"
HOMES = (Path("/home"), Path("/root"), Path("/run/user"))  # what ProtectHome= hides, systemd.exec(5)
ROLES = ("read", "write")
PAGE = "http://localhost:8080/"  # by ssh -L 8080:...
FILE = click.Path(path_type=Path)


@click.command()
@click.option(
    "--listen",
    multiple=True,
    metavar="ADDR:PORT",
    help="Also listen on TCP, with TLS and bearer tokens. Repeatable; IPv6 in brackets.",
)
@click.option("--tls-cert", type=FILE, metavar="FILE", help="Certificate chain, PEM.")
@click.option("--tls-key", type=FILE, metavar="FILE", help="Private key, PEM.")
@click.option("--config", type=FILE, metavar="FILE", help="Configuration, lb.toml(5), applied at start and on SIGHUP.")
@click.option(
    "--log-format",
    type=click.Choice(["console", "json"]),
    default="console",
    show_default=True,
    help="Format of log lines on standard error.",
)
@click.option(
    "--allow-host",
    multiple=True,
    metavar="NAME",
    help="Accept requests for this host name. Repeatable. Always accepted: localhost and the address connected to.",
)
@click.option("--print-unit", is_flag=True, help="Print a systemd unit for this installation and exit.")
def serve(
    listen: tuple[str, ...],
    tls_cert: Path | None,
    tls_key: Path | None,
    config: Path | None,
    log_format: str,
    allow_host: tuple[str, ...],
    print_unit: bool,
) -> None:
    """Run the daemon: REST API, health checks, reconciliation.

    Listens on a Unix socket (api.sock in the run directory, accessible to root and the process's
    group). While it runs, other commands go through it. The stored configuration is loaded at
    start. Forwarding continues when the daemon stops or is killed.

    SIGTERM: finish pending requests, then exit. SIGHUP: reload --config and the certificate.

    \b
    Examples:
      xdp-lb serve
      # Remote access, with a token
      xdp-lb token create deploy --role write
      xdp-lb serve --listen 192.0.2.1:8443 --tls-cert lb.pem --tls-key lb.key
      # As a systemd service
      xdp-lb serve --print-unit > /etc/systemd/system/xdp-lb.service
    """
    if print_unit:
        click.echo(unit(), nl=False)
        return
    if bool(tls_cert) != bool(tls_key):
        raise click.UsageError("--tls-cert and --tls-key must be given together.")
    if listen and not tls_cert:
        raise click.UsageError("--listen requires --tls-cert and --tls-key: tokens are not sent in clear text.")
    from lb.control.open import open_balancer
    from lb.daemon import logs, server
    from lb.daemon.announce import AnnounceTask
    from lb.daemon.health_task import HealthTask
    from lb.daemon.reconcile import ReconcileTask
    from lb.daemon.settle import SettleTask
    from lb.health.file import HealthFile
    from lb.health.path import RealPath
    from lb.host.events import HostEvents
    from lb.host.neighbours import FOLLOWED_TIMEOUT_S, Network

    paths = Paths.here()
    logs.configure(as_json=log_format == "json")
    addresses = tuple(map(_listen_address, listen))
    settings = server.Settings(paths.socket, paths.access, addresses, tls_cert, tls_key, config, paths, allow_host)
    checks = HealthTask(
        lambda: RealPath(Network(answer_timeout_s=FOLLOWED_TIMEOUT_S)),
        HealthFile(paths.health),
        lambda: HostEvents(neighbours=False),
    )
    tasks: list[server.Task] = [checks, ReconcileTask(HostEvents), SettleTask(), AnnounceTask()]
    server.serve(lambda: open_balancer(paths, in_daemon=True), settings, tasks)


def unit() -> str:
    """The unit file, with this very program in it, which has to be seen from within the sandbox."""
    text = UNIT.read_text().replace(UNIT_PROGRAM, str(Path(sys.argv[0]).absolute()))
    return text.replace("ProtectHome=yes", "ProtectHome=read-only") if _is_in_a_home() else text


def _is_in_a_home() -> bool:
    """Whether any of it is: the command, Python, or the modules."""
    places = [Path(name).resolve() for name in (sys.argv[0], sys.base_prefix, __file__)]
    return any(place.is_relative_to(home) for place in places for home in HOMES)


def _listen_address(text: str) -> tuple[str, int]:
    from lb.model.vip import split_port

    address, port = split_port(text, f"listen {text}")
    if port is None:
        raise InvalidInput(f"listen {text}: a port is missing: ADDR:PORT")
    return str(address), port


@click.command("web")
@click.option("--url", metavar="URL", default=PAGE, show_default=True, help="Where the browser reaches the daemon.")
def web(url: str) -> None:
    """Print a link that logs the web page in, once, within 5 minutes.

    For a browser that reaches the daemon's Unix socket through ssh -L, where the page would ask for
    a token. The session has full access, except for script health checks, and ends after 12 hours
    or with the daemon.

    \b
    Examples:
      # Logged in by ssh -L 8080:/run/xdp-lb/default/api.sock root@HOST
      xdp-lb web
    """
    from lb.client.client import Client
    from lb.client.connect import daemon_listens

    path = Paths.here().socket
    if not daemon_listens(path):
        raise DaemonError("daemon: not running: start xdp-lb serve")
    with Client.unix(path) as client:
        click.echo(f"{url.rstrip('/')}/#code={client.web_code()}")


@click.group()
def token() -> None:
    """Manage bearer tokens for the API over TCP."""


@token.command("create")
@click.argument("name")
@click.option(
    "--role",
    type=click.Choice(ROLES),
    default="read",
    show_default=True,
    help="read: read-only; write: full access.",
)
@json_option("Print {name, role, token}.")
def token_create(name: str, role: str, as_json: bool) -> None:
    """Create a token and print it. It cannot be shown again.

    \b
    Examples:
      xdp-lb token create prometheus
      xdp-lb token create deploy --role write
    """
    from lb.api.access import Access, Role

    with Access.open(Paths.here().access) as access:
        secret = access.create(name, Role(role))
        access.record(_entry("token create", name, f"role {role}"))
    click.echo(to_json({"name": name, "role": role, "token": secret}) if as_json else secret)


@token.command("list")
@json_option("Print [{name, role, created_s}].")
def token_list(as_json: bool) -> None:
    """List tokens: name, role, time of creation.

    \b
    Examples:
      xdp-lb token list
    """
    from lb.api.access import Access

    with Access.open(Paths.here().access) as access:
        found = access.tokens()
    if as_json:
        click.echo(to_json([{"name": t.name, "role": str(t.role), "created_s": t.created_s} for t in found]))
    else:
        click.echo("\n".join(_tokens_table(found)))


@token.command("revoke")
@click.argument("name")
def token_revoke(name: str) -> None:
    """Revoke a token, effective immediately.

    \b
    Examples:
      xdp-lb token revoke deploy
    """
    from lb.api.access import Access

    with Access.open(Paths.here().access) as access:
        access.revoke(name)
        access.record(_entry("token revoke", name, ""))
    click.echo(f"token {name}: revoked")


def _entry(method: str, name: str, change: str) -> Entry:
    from lb.api.access import Entry

    try:
        user = f" ({pwd.getpwuid(os.getuid()).pw_name})"
    except KeyError:
        user = ""
    return Entry(time.time(), f"uid {os.getuid()}{user}", "local", method, name, change, "done")


def _tokens_table(tokens: list[Token]) -> list[str]:
    from lb.formats.text import Column, table

    if not tokens:
        return ["no tokens: create one with xdp-lb token create"]
    rows = [(t.name, str(t.role), _when(t.created_s)) for t in tokens]
    return table([Column("TOKEN"), Column("ROLE"), Column("CREATED")], rows, colour=False)


def _when(time_s: float) -> str:
    return datetime.fromtimestamp(time_s).strftime("%Y-%m-%d %H:%M:%S")


@click.command()
@click.option(
    "-n", "count", type=click.IntRange(1), metavar="N", default=50, show_default=True, help="Show the last N entries."
)
@json_option("Print [{time_s, who, address, method, path, change, outcome}].")
def audit(count: int, as_json: bool) -> None:
    """Show the audit log of changes made through the daemon, latest last.

    WHO is a local user or a token. Failed authentication is logged too. The last 100,000 entries
    are kept.

    \b
    Examples:
      xdp-lb audit
      xdp-lb audit -n 1000 --json | jq '.[] | select(.who == "token deploy")'
    """
    from dataclasses import asdict

    from lb.api.access import Access

    with Access.open(Paths.here().access) as access:
        entries = access.entries(count)
    if as_json:
        click.echo(to_json([asdict(entry) for entry in entries]))
    else:
        click.echo("\n".join(_audit_table(entries)))


def _audit_table(entries: list[Entry]) -> list[str]:
    from lb.formats.text import Column, table

    if not entries:
        return ["no entries: changes made through xdp-lb serve are recorded"]
    headings = ("TIME", "WHO", "FROM", "REQUEST", "CHANGE", "OUTCOME")
    rows = [(_when(e.time_s), e.who, e.address, f"{e.method} {e.path}", e.change or "-", e.outcome) for e in entries]
    return table([Column(heading) for heading in headings], rows, colour=False)
