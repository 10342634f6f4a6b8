"""xdp-lb attach, detach, status, apply."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lb.cli import completion
from lb.cli.common import Request, change_options, current_status, echo_json, echo_lines, make_service, wants_colour
from lb.cli.options import (
    OptionWords,
    backends_option,
    interfaces_argument,
    json_option,
    mode_option,
    option_words,
    parsed_vip,
    ring_size_option,
    split_list,
)
from lb.errors import InvalidInput
from lb.formats import documents, text
from lb.model.report import Report
from lb.model.state import Backend, Interface, XdpMode
from lb.model.vip import Address, Vip

if TYPE_CHECKING:
    from lb.client.connect import BalancerLike

DEFAULT_PORT = 80  # of a service that is given by nothing but its backends


@click.command()
@interfaces_argument(required=True)
@click.option(
    "--vip",
    type=parsed_vip,
    metavar="VIP",
    help="Service address.  [default: first interface's own address, port 80/tcp]",
)
@backends_option
@mode_option
@click.option(
    "--xdp-mode",
    type=click.Choice([str(mode) for mode in XdpMode]),
    metavar="MODE",
    default=str(XdpMode.AUTO),
    help="native, generic, or auto (native, falling back to generic with a warning).  [default: auto]",
)
@ring_size_option
@option_words
@change_options
def attach(
    interfaces: tuple[str, ...],
    vip: Vip | None,
    backends: tuple[str, ...],
    mode: str | None,
    xdp_mode: str,
    ring_size: int | None,
    option_words: OptionWords,
    request: Request,
) -> None:
    """Attach the XDP program to interfaces and load the stored services.

    With --backends, a service is added first. Without it, the stored configuration is loaded, as
    after a reboot or after xdp-lb detach; --no-vip-address then applies to all stored services. All
    interfaces share one set of services.

    \b
    Examples:
      # Balance eth0's own address, port 80
      xdp-lb attach eth0 --backends 10.0.0.11,10.0.0.12
      # A separate VIP, direct routing, weights 1 and 3
      xdp-lb attach eth0 --vip 10.0.0.100:443 --mode dr \\
          --backends 10.0.0.11,10.0.0.12@3
      # Backends in other subnets, over GUE; they run xdp-lb decap
      xdp-lb attach eth0 --vip 10.0.0.100:443 --mode gue \\
          --backends 172.16.4.11,172.16.9.12
      # Clients on eth0, servers behind eth1
      xdp-lb attach eth0 eth1 --backends 10.1.0.11,10.1.0.12
      # Load the stored configuration again
      xdp-lb attach eth0
    """
    unaddressed = option_words == OptionWords({"vip_address": False})
    if not backends and (vip or mode or ring_size is not None or (option_words and not unaddressed)):
        raise click.UsageError("--vip, --mode and other service options require --backends.")
    wanted = [Interface(name, XdpMode(xdp_mode)) for name in dict.fromkeys(interfaces)]

    def restore(balancer: BalancerLike) -> Report:
        report = balancer.attach(wanted, own_addresses=not unaddressed, dry_run=request.dry_run)
        return with_note(report, text.extent(balancer.state.services))

    def serve(balancer: BalancerLike) -> Report:
        chosen = vip or default_vip(balancer, interfaces[0], split_list(backends)[0])
        service = make_service(chosen, backends, mode, ring_size, option_words)
        report = balancer.attach(wanted, [service], dry_run=request.dry_run)
        return report if vip else with_note(report, f"{chosen} is {interfaces[0]}'s own address")

    request.run(serve if backends else restore)


def with_note(report: Report, note: str) -> Report:
    return replace(report, notes=(note, *report.notes))


def default_vip(balancer: BalancerLike, interface: str, backend: str) -> Vip:
    """The interface's own first address of the backend's family."""
    family = Backend.parse(backend).address.version
    for address in own_addresses(balancer, interface):
        if address.version == family and not (address.is_link_local or address.is_loopback):
            return Vip(address, DEFAULT_PORT)
    raise InvalidInput(f"interface {interface}: has no IPv{family} address for a VIP: give --vip")


def own_addresses(balancer: BalancerLike, interface: str) -> list[Address]:
    if not balancer.network.interface_exists(interface):
        raise InvalidInput(f"interface {interface}: does not exist")
    return balancer.network.addresses(interface)


@click.command()
@interfaces_argument(required=False)
@change_options
def detach(interfaces: tuple[str, ...], request: Request) -> None:
    """Detach from the named interfaces, or from all of them.

    Connections through a detached interface are lost. The configuration stays stored; xdp-lb
    attach loads it again.

    \b
    Examples:
      # Detach from eth1 only
      xdp-lb detach eth1
      # Detach from all interfaces
      xdp-lb detach
    """
    request.run(lambda balancer: balancer.detach(interfaces, dry_run=request.dry_run))


@click.command()
@click.argument("vip", type=parsed_vip, required=False, shell_complete=completion.vips)
@click.option("--down", is_flag=True, help="Show only what is in trouble.")
@json_option("Print JSON (keys above).")
def status(vip: Vip | None, down: bool, as_json: bool) -> None:
    """Show interfaces, services and counters, or the service at VIP.

    Services in trouble come first: a backend is down or unresolved (no neighbour entry), or none
    takes new connections. More than 10 services are shown in a line each; VIP shows the backends.

    OPEN counts the connections open now, CONNS those opened so far. OPEN is exact in mode nat. In
    the other modes it is known only of backends that drain or are new (~: an estimate), else -.

    PACKETS and the first BYTES column count client to backend; REPLIES and the second count
    backend to client (mode nat only: in the other modes backends reply directly). RETRIES, shown
    if non-zero, counts SYN retransmissions. Numbers are rounded; --json has exact values.

    \b
    JSON: {netns, loaded, interfaces, services, answered, drops, passes,
           noted, maps, outdated, config_fault}
      interfaces  [{name, xdp_mode, attached, program_id}]
      services    [{vip, address, prefix_length, port, last_port, protocol,
                    set, mode, ring_size, flow_timeout_s, options,
                    slots_in_transition, open, COUNTERS, backends}]
      options     as in vip list
      backends    [{backend, address, port, weight, draining, server_ids,
                    resolved, state, share, why, since, open,
                    COUNTERS}]
      open        {connections, estimated}, open now; null: unknown
      COUNTERS    packets, bytes, reply_packets, reply_bytes, connections,
                  repeated_syns
      answered    {reason: packets}, answered by the balancer
      drops       {reason: packets}, dropped
      passes      {reason: packets}, passed to the host stack
      noted       {reason: packets}, forwarded, with a remark
      maps        {name: bytes}, kernel memory

    \b
    Examples:
      xdp-lb status
      # One service, with its backends
      xdp-lb status 10.0.0.1:80
      # Only detached interfaces, and services and backends in trouble
      xdp-lb status --down
      xdp-lb status --json | jq '.services[].backends[] | {backend, packets}'
    """
    now = current_status()
    lines = text.service_lines if vip else text.status_lines
    if vip:
        now = now.of_service(vip)
    if as_json:
        echo_json(documents.status_document(now.in_trouble() if down else now))
    else:
        echo_lines((text.trouble_lines if down else lines)(now, colour=wants_colour()))


@click.command()
@click.option(
    "-f",
    "--file",
    "path",
    required=True,
    type=click.Path(path_type=Path),
    help="Configuration file, lb.toml(5).",
)
@click.option("--prune", is_flag=True, help="Allow removing more than half of the services or backends.")
@click.option("--no-vip-address", is_flag=True, help="As vip_address = false in each service.")
@change_options
def apply(path: Path, prune: bool, no_vip_address: bool, request: Request) -> None:
    """Apply a configuration file and print the diff.

    Services and backends that are not in the file are removed. If that is all or more than half
    of them, as with an empty or truncated file, nothing changes unless --prune is given. The
    weight and drain of a backend that is served stay as they are unless the file gives them.

    \b
    The file:
      [[service]]
      vip = "10.0.0.1:80/tcp"
      mode = "nat"            # or "dr", "ipip", "gue"
      ring_size = 16381
      flow_timeout = 3600     # seconds
      backends = ["10.0.0.11", "10.0.0.12:8080@3",
                  {address = "10.0.0.13", weight = 2, drain = true}]
    optional keys of a service
      affinity = 300          # seconds
      sources = ["10.0.0.0/8"]
      syn_limit = 1000        # per second
      syn_limit_of_source = 20
      mss = 1400
      echo = true
      tunnel_source = ["198.18.0.0/16"]
      gue_port = 6080
      outer_checksum = true
      second_chance = true
      health = "http /healthz interval=1s"
      slow_start = 30
      fail_closed = true
      vip_address = false     # the VIP is routed to this host
    optional key of a backend table
      server_ids = ["0:0a1b"]

    \b
    Examples:
      # Show the diff only
      xdp-lb apply -f lb.toml --dry-run
      xdp-lb apply -f lb.toml
      # Also if the file has less than half of what is served
      xdp-lb apply --prune -f lb.toml
    """
    from lb.formats import config  # with tomllib, which no other command needs

    desired = config.read(path)

    def apply(balancer: BalancerLike) -> Report:
        merged = desired.over(balancer.state.services)
        report = balancer.apply(merged.services, own_addresses=not no_vip_address, prune=prune, dry_run=request.dry_run)
        return replace(report, notes=(*merged.kept, *report.notes))

    request.show(request.report(apply), coloured_diff)


DIFF_COLOURS = {"+": "green", "~": "yellow", "-": "red"}


def coloured_diff(report: Report) -> list[str]:
    lines = text.diff_lines(report)
    if not wants_colour():
        return lines
    return [click.style(line, fg=DIFF_COLOURS.get(line.lstrip()[:1])) for line in lines]
