"""`xdp-lb backend`: backends of a service added, removed, drained, weighed and named."""

from __future__ import annotations

import sys
from dataclasses import replace

import click

from lb.cli import completion
from lb.cli.common import (
    Request,
    change_options,
    current_status,
    echo_json,
    echo_lines,
    parse_backends,
    wants_colour,
)
from lb.cli.drain import wait_until_idle
from lb.cli.failures import parsing_words
from lb.cli.options import (
    backend_argument,
    backends_argument,
    json_option,
    parsed_vip,
    server_id_option,
    split_list,
    vip_argument,
)
from lb.formats import documents, text
from lb.model.vip import Vip

NO_SERVER_ID = ("none",)
NO_LIMIT_S = sys.maxsize


@click.group()
def backend() -> None:
    """Add, remove, drain, re-weight and list backends.

    A command that names several backends changes all of them or none.
    """


@backend.command("add")
@vip_argument
@click.argument("backends", nargs=-1, required=True, metavar="BACKEND...")
@server_id_option
@change_options
def backend_add(vip: Vip, backends: tuple[str, ...], server_ids: tuple[str, ...], request: Request) -> None:
    """Add backends to the service at VIP. Open connections do not move.

    \b
    Examples:
      xdp-lb backend add 10.0.0.1:80 10.0.0.13
      # Three times the share of a backend of weight 1
      xdp-lb backend add 10.0.0.1:80 10.0.0.13@3
      # Show how many slots would move
      xdp-lb backend add 10.0.0.1:80 10.0.0.13 --dry-run
      # QUIC: route connection IDs that carry server ID 0a1b to it
      xdp-lb backend add 10.0.0.1:443/udp 10.0.0.13 --server-id 0:0a1b
    """
    added = parse_backends(split_list(backends), vip.fixed_port)
    if server_ids:
        if len(added) > 1:
            raise click.UsageError("--server-id names one backend: add them one by one.")
        added = (replace(added[0], server_ids=server_ids),)
    request.run(lambda balancer: balancer.add_backends(vip, added, dry_run=request.dry_run))


@backend.command("remove")
@vip_argument
@backends_argument
@change_options
def backend_remove(vip: Vip, backends: tuple[str, ...], request: Request) -> None:
    """Remove backends immediately. Their connections are lost; see drain.

    \b
    Examples:
      # Show how many open connections would end
      xdp-lb backend remove 10.0.0.1:80 10.0.0.11 --dry-run
      xdp-lb backend remove 10.0.0.1:80 10.0.0.11
    """
    names = parse_backends(split_list(backends), vip.fixed_port)
    request.run(lambda balancer: balancer.remove_backends(vip, names, dry_run=request.dry_run))


@backend.command("drain")
@vip_argument
@backends_argument
@click.option(
    "--wait",
    "timeout_s",
    type=click.IntRange(min=1),
    is_flag=False,
    flag_value=NO_LIMIT_S,
    metavar="[SECONDS]",
    help="Wait until the backends have no open connections; after SECONDS, exit with status 1.",
)
@change_options
def backend_drain(vip: Vip, backends: tuple[str, ...], timeout_s: int | None, request: Request) -> None:
    """Drain backends: no new connections, open ones continue.

    xdp-lb backend undrain ends the drain.

    \b
    Examples:
      xdp-lb backend drain 10.0.0.1:80 10.0.0.11
      # Remove it once it is idle
      xdp-lb backend drain 10.0.0.1:80 10.0.0.11 --wait 600 &&
          xdp-lb backend remove 10.0.0.1:80 10.0.0.11
    """
    if timeout_s is not None and request.dry_run:
        raise click.UsageError("--wait does not apply to --dry-run.")
    names = parse_backends(split_list(backends), vip.fixed_port)
    request.run(lambda balancer: balancer.drain_backends(vip, names, dry_run=request.dry_run))
    if timeout_s is not None:
        for name in wait_until_idle(current_status, vip, names, timeout_s):
            click.echo(f"{vip}: backend {name} idle", err=request.as_json)


@backend.command("undrain")
@vip_argument
@backends_argument
@change_options
def backend_undrain(vip: Vip, backends: tuple[str, ...], request: Request) -> None:
    """End the drain of backends: new connections again.

    \b
    Examples:
      xdp-lb backend undrain 10.0.0.1:80 10.0.0.11 10.0.0.12
    """
    names = parse_backends(split_list(backends), vip.fixed_port)
    request.run(lambda balancer: balancer.undrain_backends(vip, names, dry_run=request.dry_run))


@backend.command("weight", context_settings={"ignore_unknown_options": True})
@vip_argument
@backends_argument
@click.argument("weight", type=int)
@change_options
def backend_weight(vip: Vip, backends: tuple[str, ...], weight: int, request: Request) -> None:
    """Set the weight of backends, 0 to 65535. Ends a drain.

    \b
    Examples:
      # Three times the share of a backend of weight 1
      xdp-lb backend weight 10.0.0.1:80 10.0.0.11 3
    """
    with parsing_words():
        names = [replace(b, weight=weight) for b in parse_backends(split_list(backends), vip.fixed_port)]
    request.run(lambda balancer: balancer.set_weights(vip, names, weight, dry_run=request.dry_run))


@backend.command("server-id")
@vip_argument
@backend_argument
@click.argument("server_ids", nargs=-1, required=True, metavar="CONFIG:HEX...")
@change_options
def backend_server_id(vip: Vip, backend: str, server_ids: tuple[str, ...], request: Request) -> None:
    """Set the QUIC-LB server IDs of a backend; none removes them.

    CONFIG is the QUIC-LB config rotation codepoint, 0 to 6. HEX is the server ID, 1 to 15 bytes, as
    the server puts it into its connection IDs (plaintext algorithm). All server IDs of one CONFIG
    in a service must have the same length.

    \b
    Examples:
      xdp-lb backend server-id 10.0.0.1:443/udp 10.0.0.11 0:0a1b
      # Both IDs, while servers change over to config 1
      xdp-lb backend server-id 10.0.0.1:443/udp 10.0.0.11 0:0a1b 1:00c4d2
      xdp-lb backend server-id 10.0.0.1:443/udp 10.0.0.11 none
    """
    (name,) = parse_backends([backend], vip.fixed_port)
    ids = () if server_ids == NO_SERVER_ID else server_ids
    request.run(lambda balancer: balancer.set_server_ids(vip, name, ids, dry_run=request.dry_run))


@backend.command("list")
@click.argument("vip", type=parsed_vip, required=False, shell_complete=completion.vips)
@json_option("Print JSON (keys above).")
def backend_list(vip: Vip | None, as_json: bool) -> None:
    """List the backends and their state, of VIP or of all services.

    \b
    JSON: [{vip, backend, address, port, weight, draining, server_ids,
            resolved, state, share, why, since}]

    \b
    Examples:
      xdp-lb backend list
      xdp-lb backend list 10.0.0.1:80
    """
    status = current_status()
    if vip:
        status = status.of_service(vip)
    if as_json:
        echo_json(documents.backends_document(status))
    else:
        echo_lines(text.backends_table(status, colour=wants_colour()))
