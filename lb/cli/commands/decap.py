"""`xdp-lb decap`: words of the operator on a backend -> one call of lb.decap.decap -> lines or JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from lb.cli import completion
from lb.formats.documents import to_json
from lb.model.state import Interface, XdpMode
from lb.paths import Paths

if TYPE_CHECKING:  # most commands are of the balancer, and do not wait for this
    from lb.decap.values import DecapReport, Prefix

DEFAULT_GUE_PORT = 6080  # IANA

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON (keys above).")


def interfaces_argument(*, required: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    metavar = "IFACE..." if required else "[IFACE]..."
    return click.argument(
        "interfaces", nargs=-1, required=required, metavar=metavar, shell_complete=completion.interfaces
    )


@click.group()
def decap() -> None:
    """Decapsulate IPIP and GUE on a backend."""


@decap.command()
@interfaces_argument(required=True)
@click.option(
    "--vip",
    "vips",
    multiple=True,
    required=True,
    metavar="ADDR[/LEN],...",
    help="Inner destination addresses to decapsulate for. Repeatable.",
)
@click.option(
    "--from",
    "sources",
    multiple=True,
    metavar="PREFIX,...",
    help="Allowed outer sources: balancers and, with second chance, the other backends.  [default: any]",
)
@click.option(
    "--gue-port", type=int, metavar="PORT", default=DEFAULT_GUE_PORT, show_default=True, help="UDP port of GUE."
)
@click.option(
    "--setup-vip",
    is_flag=True,
    help="Add the VIPs to lo, set arp_ignore and arp_announce; undone by detach.",
)
@click.option(
    "--xdp-mode",
    type=click.Choice([str(mode) for mode in XdpMode]),
    metavar="MODE",
    default=str(XdpMode.AUTO),
    help="native, generic, or auto (native, falling back to generic with a warning).  [default: auto]",
)
@json_option
def attach(
    interfaces: tuple[str, ...],
    vips: tuple[str, ...],
    sources: tuple[str, ...],
    gue_port: int,
    setup_vip: bool,
    xdp_mode: str,
    as_json: bool,
) -> None:
    """Decapsulate IPIP and GUE received on interfaces, for the given VIPs.

    IPv4 and IPv6, inner and outer in any combination, without a tunnel device. Running it again
    replaces the configuration on all attached interfaces without packet loss.

    Second chance (mode gue, while slots are in transition): TCP packets for which this host has no
    socket are forwarded to the other backend named in the GUE header, out of the ingress interface.
    Packets with a VLAN tag are not.

    \b
    JSON: {attached: [{name, xdp_mode, program_id}], detached, destinations,
           sources, gue_port, notes, warnings}

    \b
    Examples:
      # One VIP, added to lo
      xdp-lb decap attach eth0 --vip 10.0.0.100 --setup-vip
      # Both families, outer sources restricted to the balancers
      xdp-lb decap attach eth0 --vip 10.0.0.100,2001:db8::100 \\
          --from 10.0.0.0/24,2001:db8::/64
    """
    from lb.decap.decap import open_decap
    from lb.decap.values import DecapConfig

    config = DecapConfig(_prefixes(vips, "vip"), _prefixes(sources, "source"), gue_port)
    wanted = [Interface(name, XdpMode(xdp_mode)) for name in dict.fromkeys(interfaces)]
    with open_decap(Paths.here(), write=True) as opened:
        _show(opened.attach(wanted, config, setup_vip=setup_vip), as_json)


@decap.command()
@interfaces_argument(required=False)
@json_option
def detach(interfaces: tuple[str, ...], as_json: bool) -> None:
    """Stop decapsulating on the named interfaces, or on all.

    Detaching the last interface undoes --setup-vip.

    \b
    JSON: as for xdp-lb decap attach

    \b
    Examples:
      xdp-lb decap detach eth1
      xdp-lb decap detach
    """
    from lb.decap.decap import open_decap

    with open_decap(Paths.here(), write=True) as opened:
        _show(opened.detach(interfaces), as_json)


@decap.command()
@json_option
def status(as_json: bool) -> None:
    """Show interfaces, VIPs and counters.

    \b
    JSON: {netns, loaded, interfaces, destinations, sources, gue_port, tunnels,
           sent_to_other_member, drops, passes, noted}
      interfaces  [{name, xdp_mode, program_id}]
      tunnels     {kind: {packets, bytes}}; ipip_4_in_6: IPv4 in IPv6
      drops       {reason: packets}, dropped
      passes      {reason: packets}, passed to the host unchanged
      noted       {reason: packets}, decapsulated, with a remark

    \b
    Examples:
      xdp-lb decap status
      xdp-lb decap status --json | jq .tunnels
    """
    from lb.decap.decap import open_decap
    from lb.decap.output import status_document, status_lines

    with open_decap(Paths.here(), write=False) as opened:
        now = opened.status()
    click.echo(to_json(status_document(now)) if as_json else "\n".join(status_lines(now)))


def _prefixes(texts: Sequence[str], what: str) -> tuple[Prefix, ...]:
    from lb.model.options import parse_network

    words = [word.strip() for text in texts for word in text.split(",")]
    return tuple(dict.fromkeys(parse_network(word, what) for word in words))


def _show(report: DecapReport, as_json: bool) -> None:
    from lb.decap.output import report_document, report_lines

    for warning in report.warnings:
        click.echo(f"xdp-lb: warning: {warning}", err=True)
    click.echo(to_json(report_document(report)) if as_json else "\n".join(report_lines(report)))
