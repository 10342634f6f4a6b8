"""`xdp-lb vip`: services added, changed, removed and listed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from lb.cli.common import Request, change_options, echo_json, echo_lines, make_service, stored_state, wants_colour
from lb.cli.failures import parsing_words
from lb.cli.options import (
    OptionWords,
    backends_option,
    json_option,
    mode_option,
    option_words,
    parsed_vip,
    ring_size_option,
    vip_argument,
)
from lb.formats import documents, text
from lb.model.report import Report
from lb.model.vip import Vip

if TYPE_CHECKING:
    from lb.client.connect import BalancerLike


@click.group()
def vip() -> None:
    """Add, change, remove and list services."""


@vip.command("add")
@click.argument("vip", type=parsed_vip)
@backends_option
@mode_option
@ring_size_option
@click.option(
    "--flow-timeout",
    type=int,
    metavar="SECONDS",
    default=3600,
    show_default=True,
    help="How long an idle connection stays in the flow table.",
)
@option_words
@change_options
def vip_add(
    vip: Vip,
    backends: tuple[str, ...],
    mode: str | None,
    ring_size: int | None,
    flow_timeout: int,
    option_words: OptionWords,
    request: Request,
) -> None:
    """Add a service at VIP.

    \b
    Examples:
      xdp-lb vip add 10.0.0.100:80 --backends 10.0.0.11,10.0.0.12
      # UDP, direct routing
      xdp-lb vip add 10.0.0.100:53/udp --mode dr --backends 10.0.0.11
      # IPv6, backends on another port
      xdp-lb vip add '[2001:db8::100]:443' --backends '[2001:db8::11]:8443'
      # A prefix and a port range
      xdp-lb vip add 10.0.1.0/24:8000-8999 --mode dr --backends 10.0.0.11
      # Other backends for clients from 192.0.2.0/24
      xdp-lb vip add 10.0.0.100:80@near --source 192.0.2.0/24 \\
          --backends 10.0.0.21
      # Rate limits: 1000 new connections/s, 20/s from one /24
      xdp-lb vip add 10.0.0.100:25 --backends 10.0.0.11 \\
          --syn-limit 1000 --syn-limit-of-source 20
    """
    service = make_service(vip, backends, mode, ring_size, option_words)
    with parsing_words():
        service = replace(service, flow_timeout_s=flow_timeout)
    request.run(lambda balancer: balancer.add_service(service, dry_run=request.dry_run))


@vip.command("set")
@vip_argument
@option_words
@change_options
def vip_set(vip: Vip, option_words: OptionWords, request: Request) -> None:
    """Change options of the service at VIP. Options not given keep their values.

    To disable an option: 0 for a limit or the MSS, --no-echo and so on for a flag, --allow any,
    --tunnel-source own, --health off. Affinity of a running service can be lengthened or shortened,
    but not enabled or disabled.

    \b
    Examples:
      xdp-lb vip set 10.0.0.100:80 --echo --mss 1400
      # Health checks, run by xdp-lb serve
      xdp-lb vip set 10.0.0.100:80 --health 'http /healthz interval=1s fall=2'
      # Remove the limit
      xdp-lb vip set 10.0.0.100:80 --syn-limit 0
      # Restrict clients; then lift the restriction
      xdp-lb vip set 10.0.0.100:80 --allow 10.0.0.0/8,192.0.2.0/24
      xdp-lb vip set 10.0.0.100:80 --allow any
    """
    if not option_words:
        raise click.UsageError("no option given: name at least one.")

    def change(balancer: BalancerLike) -> Report:
        options = option_words.change(vip, balancer.state.service(vip).options)
        return balancer.set_options(vip, options, dry_run=request.dry_run)

    request.run(change)


@vip.command("remove")
@vip_argument
@change_options
def vip_remove(vip: Vip, request: Request) -> None:
    """Remove the service at VIP and its backends.

    \b
    Examples:
      xdp-lb vip remove 10.0.0.100:80
      # Show what would be removed
      xdp-lb vip remove 10.0.0.100:80 --dry-run --json
    """
    request.run(lambda balancer: balancer.remove_service(vip, dry_run=request.dry_run))


@vip.command("list")
@json_option("Print JSON (keys above).")
def vip_list(as_json: bool) -> None:
    """List stored services and their non-default options.

    \b
    JSON: [{vip, address, prefix_length, port, last_port, protocol, set, mode,
            ring_size, flow_timeout_s, options, backends}]
      options   {affinity_s, sources, syn_limit, syn_limit_of_source, mss,
                 echo, tunnel_sources, gue_port, outer_checksum,
                 second_chance, health, slow_start_s, fail_closed, vip_address}
      backends  [{backend, address, port, weight, draining, server_ids}]

    \b
    Examples:
      xdp-lb vip list
      xdp-lb vip list --json | jq -r '.[].vip'
    """
    services = stored_state().services
    if as_json:
        echo_json(documents.services_document(services))
    else:
        echo_lines(text.services_table(services, colour=wants_colour()))
