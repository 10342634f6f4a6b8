"""The command line: words of the operator -> one call of the balancer -> lines or JSON.

Each command parses its words into the model, opens the balancer for as long as the one call takes,
and prints the report. Exit status: 0; 1 with one line `xdp-lb: what: why` on standard error; 2 for
usage; 130 after Ctrl-C.
"""

from __future__ import annotations

import gc
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lb import completion, documents, output
from lb.backend_cli import backend
from lb.cli_options import (
    OptionWords,
    backends_option,
    interfaces_argument,
    json_option,
    mode_option,
    option_words,
    ring_size_option,
    split_list,
    vip_address_option,
)
from lb.command import (
    EXIT_INTERRUPTED,
    Commands,
    Request,
    change_options,
    echo_json,
    echo_lines,
    make_service,
    open_balancer,
    open_here,
    wants_colour,
)
from lb.decap_cli import decap
from lb.doctor_cli import doctor_command
from lb.errors import InvalidInput
from lb.explain_cli import explain_command
from lb.filter_cli import filter_group
from lb.metrics_cli import metrics_command
from lb.model import Backend, Interface, XdpMode
from lb.report import Report
from lb.serve_cli import audit, serve, token
from lb.stage_cli import stage
from lb.top_cli import top_command
from lb.vip import Address, Vip
from lb.vip_cli import vip

if TYPE_CHECKING:  # what imports SQLite waits until a command needs it
    from lb.balancer import Balancer

DEFAULT_PORT = 80  # of a service that is given by nothing but its backends


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)
@click.version_option(package_name="xdp-lb", message="xdp-lb %(version)s")
def cli() -> None:
    """Load-balance TCP and UDP in XDP.

    A VIP is written ADDR[/LENGTH]:PORT[-PORT][/PROTO][@SET]: an address or prefix, a port, a port
    range or 0 for any port, and tcp (the default) or udp. @SET names an additional set of backends
    for the same VIP, used for clients from given prefixes. If several VIPs match a packet, the
    longest prefix wins, then the narrowest port range.

    A backend is written ADDR[:PORT][@WEIGHT]. PORT defaults to the port of the VIP, WEIGHT to 1.

    \b
    VIPs:
      10.0.0.1:80                   TCP port 80
      [2001:db8::1]:53/udp          IPv6 goes in brackets
      10.0.0.0/24:8000-8999/tcp     256 addresses, 1000 ports
      10.0.0.1:80/tcp@eu            set eu of 10.0.0.1:80/tcp

    \b
    Examples:
      # Balance eth0's own address, port 80, over two servers
      xdp-lb attach eth0 --backends 10.0.0.11,10.0.0.12
      # Add a third backend under traffic, then drain the first
      xdp-lb backend add 10.0.0.1:80/tcp 10.0.0.13
      xdp-lb backend drain 10.0.0.1:80/tcp 10.0.0.11
      # Show counters per backend
      xdp-lb status
    """


@cli.command()
@interfaces_argument(required=True)
@click.option(
    "--vip",
    type=Vip.parse,
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
@vip_address_option
@change_options
def attach(
    interfaces: tuple[str, ...],
    vip: Vip | None,
    backends: tuple[str, ...],
    mode: str | None,
    xdp_mode: str,
    ring_size: int | None,
    option_words: OptionWords,
    no_vip_address: bool,
    request: Request,
) -> None:
    """Attach the XDP program to interfaces and load the stored services.

    With --backends, a service is added first. Without it, the stored configuration is loaded, as
    after a reboot or after xdp-lb detach. All interfaces share one set of services.

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
    if not backends and (vip or mode or ring_size is not None or option_words):
        raise click.UsageError("--vip, --mode and other service options require --backends.")
    wanted = [Interface(name, XdpMode(xdp_mode)) for name in dict.fromkeys(interfaces)]

    def restore(balancer: Balancer) -> Report:
        report = balancer.attach(wanted, own_addresses=not no_vip_address, dry_run=request.dry_run)
        return with_note(report, output.extent(balancer.state.services))

    def serve(balancer: Balancer) -> Report:
        chosen = vip or default_vip(balancer, interfaces[0], split_list(backends)[0])
        service = make_service(chosen, backends, mode, ring_size, option_words)
        report = balancer.attach(wanted, [service], own_addresses=not no_vip_address, dry_run=request.dry_run)
        return report if vip else with_note(report, f"{chosen} is {interfaces[0]}'s own address")

    request.run(serve if backends else restore)


def with_note(report: Report, note: str) -> Report:
    return replace(report, notes=(note, *report.notes))


def default_vip(balancer: Balancer, interface: str, backend: str) -> Vip:
    """The interface's own first address of the backend's family."""
    family = Backend.parse(backend).address.version
    for address in own_addresses(balancer, interface):
        if address.version == family and not (address.is_link_local or address.is_loopback):
            return Vip(address, DEFAULT_PORT)
    raise InvalidInput(f"interface {interface}: has no IPv{family} address for a VIP: give --vip")


def own_addresses(balancer: Balancer, interface: str) -> list[Address]:
    if not balancer.network.interface_exists(interface):
        raise InvalidInput(f"interface {interface}: does not exist")
    return balancer.network.addresses(interface)


@cli.command()
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


@cli.command()
@json_option("Print JSON (keys above).")
def status(as_json: bool) -> None:
    """Show interfaces, services and counters.

    PACKETS and the first BYTES column count client to backend; REPLIES and the second count
    backend to client (mode nat only: in the other modes backends reply directly). RETRIES, shown
    if non-zero, counts SYN retransmissions. Numbers are rounded; --json has exact values.

    \b
    JSON: {netns, loaded, interfaces, services, answered, drops, passes,
           noted, maps}
      interfaces  [{name, xdp_mode, attached, program_id}]
      services    [{vip, address, prefix_length, port, last_port, protocol,
                    set, mode, ring_size, flow_timeout_s, options,
                    slots_in_transition, COUNTERS, backends}]
      options     as in vip list
      backends    [{backend, address, port, weight, draining, server_ids,
                    resolved, state, share, why, since, COUNTERS}]
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
      xdp-lb status --json | jq '.services[].backends[] | {backend, packets}'
    """
    with open_balancer(write=False) as balancer:
        now = balancer.status()
    if as_json:
        echo_json(documents.status_document(now))
    else:
        echo_lines(output.status_lines(now, colour=wants_colour()))


@cli.command()
@click.option(
    "-f",
    "--file",
    "path",
    required=True,
    type=click.Path(path_type=Path),
    help="Configuration file, lb.toml(5).",
)
@vip_address_option
@change_options
def apply(path: Path, no_vip_address: bool, request: Request) -> None:
    """Apply a configuration file and print the diff.

    Services that are not in the file are removed.

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
    optional key of a backend table
      server_ids = ["0:0a1b"]

    \b
    Examples:
      # Show the diff only
      xdp-lb apply -f lb.toml --dry-run
      xdp-lb apply -f lb.toml
    """
    from lb import config  # with tomllib, which no other command needs

    services = config.read(path)
    report = request.report(
        lambda balancer: balancer.apply(services, own_addresses=not no_vip_address, dry_run=request.dry_run)
    )
    request.show(report, coloured_diff)


DIFF_COLOURS = {"+": "green", "~": "yellow", "-": "red"}


def coloured_diff(report: Report) -> list[str]:
    lines = output.diff_lines(report)
    if not wants_colour():
        return lines
    return [click.style(line, fg=DIFF_COLOURS.get(line.lstrip()[:1])) for line in lines]


@cli.command("completion")
@click.argument("shell", type=click.Choice(completion.SHELLS))
def print_completion(shell: str) -> None:
    """Print the completion script for SHELL.

    \b
    Examples:
      # bash; add this line to ~/.bashrc to make it permanent
      source <(xdp-lb completion bash)
      # zsh, in ~/.zshrc
      source <(xdp-lb completion zsh)
      # fish
      xdp-lb completion fish > ~/.config/fish/completions/xdp-lb.fish
    """
    click.echo(completion.script(cli, shell))


cli.add_command(vip)
cli.add_command(backend)
cli.add_command(doctor_command)
cli.add_command(explain_command)
cli.add_command(metrics_command)
cli.add_command(top_command)
cli.add_command(decap)
cli.add_command(filter_group)
cli.add_command(stage)
cli.add_command(serve)
cli.add_command(token)
cli.add_command(audit)


def main() -> None:
    """The console entry."""
    gc.disable()  # a command ends before its garbage matters, and looking for it takes a tenth of its time
    try:
        cli(prog_name=completion.PROGRAM, complete_var=completion.VARIABLE, obj=open_here)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
