"""The command line: words of the operator -> one call of the balancer -> lines or JSON.

Each command parses its words into the model, opens the balancer for as long as the one call takes,
and prints the report. Exit status: 0; 1 with one line `xdp-lb: what: why` on standard error; 2 for
usage, with the line or click's; 130 after Ctrl-C.
"""

from __future__ import annotations

import gc
import sys

import click

from lb.cli import completion
from lb.cli.commands.backend import backend
from lb.cli.commands.balancer import apply, attach, detach, status
from lb.cli.commands.decap import decap
from lb.cli.commands.doctor import doctor_command
from lb.cli.commands.explain import explain_command
from lb.cli.commands.filter import filter_group
from lb.cli.commands.metrics import metrics_command
from lb.cli.commands.serve import audit, serve, token, web
from lb.cli.commands.stage import stage
from lb.cli.commands.top import top_command
from lb.cli.commands.vip import vip
from lb.cli.common import EXIT_INTERRUPTED, Commands
from lb.client.connect import HostConnector


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


for each in (attach, detach, status, apply):
    cli.add_command(each)
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
cli.add_command(web)


def main() -> None:
    """The console entry."""
    gc.disable()  # a command ends before its garbage matters, and looking for it takes a tenth of its time
    try:
        cli(prog_name=completion.PROGRAM, complete_var=completion.VARIABLE, obj=HostConnector())
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
