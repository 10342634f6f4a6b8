"""`xdp-lb explain`: words, a capture file or hexadecimal digits -> packets -> what the live program does with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lb.cli import completion
from lb.cli.common import echo_json, echo_lines, wants_colour
from lb.cli.options import json_option
from lb.formats.documents import Document

if TYPE_CHECKING:  # what other commands need not wait for
    from lb.explain.request import ExplainService

PROTOCOLS = ("tcp", "udp", "icmp")

Explain = Callable[["ExplainService"], Iterator[Document]]


@click.command("explain")
@click.argument("protocol", type=click.Choice(PROTOCOLS), required=False, metavar="[tcp|udp|icmp]")
@click.argument("source", required=False, metavar="[SOURCE]")
@click.argument("destination", required=False, metavar="[DESTINATION]")
@click.option("--syn", is_flag=True, help="A TCP SYN, same as --flags S.")
@click.option("--flags", metavar="FLAGS", help="TCP flags: any of F S R P A U E W.  [default: A]")
@click.option(
    "--in",
    "interface",
    metavar="IFACE",
    shell_complete=completion.interfaces,
    help="Ingress interface.  [default: the interface of the route to SOURCE]",
)
@click.option(
    "--pcap", "pcap", type=click.Path(path_type=Path), metavar="FILE", help="Explain the packets of a capture file."
)
@click.option("-n", "number", type=click.IntRange(min=1), metavar="N", help="Only the Nth packet of the file.")
@click.option("--hex", "digits", metavar="TEXT", help="An Ethernet frame in hexadecimal.")
@json_option("Print JSON (keys above).")
def explain_command(
    protocol: str | None,
    source: str | None,
    destination: str | None,
    syn: bool,
    flags: str | None,
    interface: str | None,
    pcap: Path | None,
    number: int | None,
    digits: str | None,
    as_json: bool,
) -> None:
    """Show what happens to a packet, and why.

    SOURCE and DESTINATION are ADDR:PORT (IPv6 in brackets); for icmp (echo request), ADDR.

    The packet is run through the loaded program, including filters and stages, but never
    transmitted. The maps are then read to tell how the backend was chosen, and compared with what
    the program did. Flow table entries and NAT ports created by the packet are removed again;
    counters and rate limits do count it. Do not use FIN or RST of a live connection.

    \b
    JSON: [{interface, packet, action, reason, verdict, fix, ended_by, service,
            slot, source, affinity, member, reply_to, egress, out,
            disagreement, notes}]
      packet, out  {bytes, headers, hex}; out: null if nothing is sent
      action       XDP action: pass, drop, tx, redirect or aborted
      reason       as in status; null: did not reach the balancer
      ended_by     [{place, program, program_id, rule}]: filter or stage
      service      {vip, mode, found_by}
      slot         {hash, number, ring_size, current, previous, tracked};
                   current, previous: a backend, gone or null
      source       ring_current, ring_previous, flow_table, nat_table,
                   nat_reply, connection_id or fragment_table
      affinity     true: hashed by client address only
      member       {backend, resolved, mac, source_mac, interface}
      disagreement null, or how program and maps differ (a bug)

    \b
    Examples:
      # A new connection
      xdp-lb explain tcp 192.0.2.7:40000 203.0.113.10:443 --syn
      # A packet of an existing connection, received on eth1
      xdp-lb explain tcp 192.0.2.7:40000 203.0.113.10:443 --in eth1
      xdp-lb explain udp '[2001:db8::7]:40000' '[2001:db8::10]:53'
      xdp-lb explain icmp 192.0.2.7 203.0.113.10
      # The third packet of a capture
      xdp-lb explain --pcap in.pcap -n 3
      # Verdict and suggested fix of each packet
      xdp-lb explain --pcap in.pcap --json | jq -r '.[] | .verdict, .fix'
    """
    from lb.client.connect import open_explainer
    from lb.explain import output
    from lb.paths import Paths

    explain = _explain(protocol, source, destination, syn, flags, interface, pcap, number, digits)
    with open_explainer(Paths.here()) as asked:
        if as_json:
            echo_json(list(explain(asked)))
            return
        for position, told in enumerate(explain(asked)):
            echo_lines([*[""] * bool(position), *output.lines(told, colour=wants_colour())])


def _explain(
    protocol: str | None,
    source: str | None,
    destination: str | None,
    syn: bool,
    flags: str | None,
    interface: str | None,
    pcap: Path | None,
    number: int | None,
    digits: str | None,
) -> Explain:
    """What is asked for; nothing is done yet but what tells right words from wrong ones."""
    if [protocol, pcap, digits].count(None) != 2:
        raise click.UsageError("give one of: tcp, udp or icmp with two addresses; --pcap FILE; --hex TEXT.")
    if number is not None and pcap is None:
        raise click.UsageError("-n requires --pcap.")
    if (syn or flags is not None) and protocol != "tcp":
        raise click.UsageError("--syn and --flags require tcp.")
    if syn and flags is not None:
        raise click.UsageError("--syn and --flags are mutually exclusive.")
    if pcap is not None:
        return _of_file(pcap, number, interface)
    if digits is not None:
        return _of_digits(digits, interface)
    if source is None or destination is None:
        raise click.UsageError(f"{protocol} needs SOURCE and DESTINATION.")
    return _of_words(str(protocol), source, destination, "S" if syn else "A" if flags is None else flags, interface)


def _of_words(protocol: str, source: str, destination: str, flags: str, interface: str | None) -> Explain:
    from lb.explain.packet import parse_flags, parse_flow

    flow, bits = parse_flow(protocol, source, destination), parse_flags(flags) if protocol == "tcp" else 0
    return lambda asked: iter([asked.flow(flow, bits, interface)])


def _of_digits(digits: str, interface: str | None) -> Explain:
    from lb.explain.packet import check_size, parse_hex

    frame = check_size(parse_hex(digits))
    return lambda asked: iter([asked.frame(frame, interface)])


def _of_file(path: Path, number: int | None, interface: str | None) -> Explain:
    def explain(asked: ExplainService) -> Iterator[Document]:
        from lb.explain.request import explain_capture
        from lb.formats.capture_file import open_capture

        with open_capture(str(path)) as capture:
            yield from explain_capture(asked, capture, number, interface)

    return explain
