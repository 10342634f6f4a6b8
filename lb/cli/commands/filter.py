"""`xdp-lb filter`: words of the operator -> one call of lb.firewall.firewall -> lines or JSON."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from lb.cli import completion
from lb.errors import InvalidInput
from lb.formats.documents import to_json
from lb.model.rules import Action, At, Rate, parse_duration
from lb.paths import Paths

if TYPE_CHECKING:  # brings the kernel's side along, which --help does without
    from lb.client.connect import FilterService
    from lb.model.rule_report import FilterReport, RuleSpec

SIDES = ("src", "dst")

Decorator = Callable[[Callable[..., None]], Callable[..., None]]

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON (keys above).")
dry_run_option = click.option("--dry-run", is_flag=True, help="Show what would change without changing it.")
force_option = click.option("--force", is_flag=True, help="Apply even if it would drop your own SSH connection.")
at_option = click.option(
    "--at",
    type=click.Choice([str(at) for at in At]),
    metavar="PLACE",
    default=str(At.XDP),
    help="Hook: xdp, tc-in or tc-out.  [default: xdp]",
)


def interface_argument(*, required: bool = True) -> Decorator:
    return click.argument(
        "interface",
        required=required,
        metavar="IFACE" if required else "[IFACE]",
        shell_complete=completion.interfaces,
    )


def number_argument(name: str, metavar: str) -> Decorator:
    return click.argument(name, type=int, metavar=metavar)


@click.group("filter")
def filter_group() -> None:
    """Packet filter in front of the balancer: drop, pass, count, limit.

    Rules take pcap-filter(7) expressions and run in the kernel at XDP or tc, on any Ethernet
    interface, with or without the balancer. The rules of an interface are evaluated in order; the
    first drop or pass that matches is final. Packets that match neither go on to the balancer or
    the host.
    """


@filter_group.command("add")
@interface_argument()
@click.argument("action", type=click.Choice([str(action) for action in Action]), metavar="ACTION")
@click.argument("words", nargs=-1, metavar="[RATE] [EXPRESSION]")
@click.option("--set", "set_path", metavar="FILE", help="Match addresses against a file with one prefix per line.")
@click.option(
    "--set-side",
    type=click.Choice(SIDES),
    metavar="SIDE",
    help="Address to match: src or dst.  [default: src]",
)
@at_option
@click.option("--for", "duration", metavar="TIME", help="Expire the rule after TIME: 90s, 10m, 1h30m, 2d.")
@click.option("--position", type=int, metavar="N", help="Insert as rule N.  [default: append]")
@force_option
@click.option("--no-selftest", is_flag=True, help="Skip the comparison with the kernel's classic BPF.")
@dry_run_option
@json_option
def add(
    interface: str,
    action: str,
    words: tuple[str, ...],
    set_path: str | None,
    set_side: str | None,
    at: str,
    duration: str | None,
    position: int | None,
    force: bool,
    no_selftest: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Add a rule to an interface.

    ACTION is drop, pass (accept, skip the remaining rules), count (count and continue) or limit
    RATE (drop packets above RATE, continue with the rest). RATE is packets per second, minute, hour
    or day: 1000/s, 1k/s, 60/min. Without EXPRESSION the rule matches all packets.

    A rule that would drop your own SSH connection is refused.

    \b
    JSON: {dry_run, changes: [{change, number, detail, RULE}], warnings}
      RULE      as in xdp-lb filter list, without counters

    \b
    Examples:
      xdp-lb filter add eth0 drop 'udp port 53 and src net 198.51.100.0/24'
      # At most 1000 TCP SYNs per second
      xdp-lb filter add eth0 limit 1k/s 'tcp[tcpflags] == tcp-syn'
      # A blocklist, for ten minutes
      xdp-lb filter add eth0 drop --set bad.txt --for 10m
      # Egress: packets sent by the host
      xdp-lb filter add eth0 drop 'tcp dst port 25' --at tc-out
    """
    from lb.model.rule_report import ApplyOptions

    spec = make_spec(interface, action, words, set_path, set_side, at, duration)
    options = ApplyOptions(force=force, selftest=not no_selftest, dry_run=dry_run)
    run(lambda firewall: firewall.add(spec, position, options), as_json)


def make_spec(
    interface: str,
    action: str,
    words: Sequence[str],
    set_path: str | None = None,
    set_side: str | None = None,
    at: str = str(At.XDP),
    duration: str | None = None,
) -> RuleSpec:
    from lb.model.rule_report import RuleSpec

    if set_side and set_path is None:
        raise click.UsageError("--set-side requires --set.")
    rate = None
    if action == Action.LIMIT:
        if not words:
            raise click.UsageError("limit needs a RATE, such as 1000/s.")
        rate, words = Rate.parse(words[0]), words[1:]
    seconds = None if duration is None else parse_duration(duration)
    side = set_side or SIDES[0]
    return RuleSpec(interface, Action(action), rate, " ".join(words).strip(), set_path, side, At(at), seconds)


@filter_group.command("list")
@interface_argument(required=False)
@json_option
def list_rules(interface: str | None, as_json: bool) -> None:
    """List rules and their counters.

    PACKETS and BYTES count matches; DROPPED counts the matched packets that the rule dropped.

    \b
    JSON: [{RULE, packets, bytes, dropped_packets, dropped_bytes, in_force,
            expired, left_s}]
      RULE      interface, number, at, action, rate, expression,
                set: {path, side, prefixes}
      left_s    seconds until it expires, null: never

    \b
    Examples:
      xdp-lb filter list
      xdp-lb filter list eth0 --json | jq '.[] | {number, dropped_packets}'
    """
    from lb.client.connect import open_filters
    from lb.firewall.documents import status_document
    from lb.firewall.text import status_lines

    with open_filters(Paths.here(), write=False) as firewall:
        rules = firewall.status(interface)
    click.echo(to_json(status_document(rules)) if as_json else "\n".join(status_lines(rules, colour=_wants_colour())))


@filter_group.command()
@interface_argument()
@number_argument("number", "N")
@number_argument("to", "M")
@force_option
@dry_run_option
@json_option
def move(interface: str, number: int, to: int, force: bool, dry_run: bool, as_json: bool) -> None:
    """Move rule N to position M. Its counters are kept.

    \b
    JSON: as for xdp-lb filter add

    \b
    Examples:
      xdp-lb filter move eth0 3 1
    """
    from lb.model.rule_report import ApplyOptions

    run(lambda firewall: firewall.move(interface, number, to, ApplyOptions(force=force, dry_run=dry_run)), as_json)


@filter_group.command("del")
@interface_argument()
@number_argument("number", "N")
@force_option
@dry_run_option
@json_option
def delete(interface: str, number: int, force: bool, dry_run: bool, as_json: bool) -> None:
    """Delete rule N.

    \b
    JSON: as for xdp-lb filter add

    \b
    Examples:
      xdp-lb filter del eth0 2
    """
    from lb.model.rule_report import ApplyOptions

    run(lambda firewall: firewall.delete(interface, number, ApplyOptions(force=force, dry_run=dry_run)), as_json)


@filter_group.command()
@interface_argument(required=False)
@click.option("--all", "everywhere", is_flag=True, help="Flush all interfaces.")
@force_option
@dry_run_option
@json_option
def flush(interface: str | None, everywhere: bool, force: bool, dry_run: bool, as_json: bool) -> None:
    """Delete all rules of an interface, or of all interfaces.

    \b
    JSON: as for xdp-lb filter add

    \b
    Examples:
      xdp-lb filter flush eth0
      xdp-lb filter flush --all
    """
    from lb.model.rule_report import ApplyOptions

    if everywhere == (interface is not None):
        raise click.UsageError("Give an interface or --all.")
    run(lambda firewall: firewall.flush(interface, ApplyOptions(force=force, dry_run=dry_run)), as_json)


@filter_group.command()
@interface_argument()
@number_argument("number", "N")
@force_option
@dry_run_option
@json_option
def reload(interface: str, number: int, force: bool, dry_run: bool, as_json: bool) -> None:
    """Reload the prefix file of rule N.

    Only prefixes that differ are updated, in place.

    \b
    JSON: as for xdp-lb filter add

    \b
    Examples:
      xdp-lb filter reload eth0 1
    """
    from lb.model.rule_report import ApplyOptions

    run(lambda firewall: firewall.reload(interface, number, ApplyOptions(force=force, dry_run=dry_run)), as_json)


@filter_group.command()
@force_option
@dry_run_option
@json_option
def restore(force: bool, dry_run: bool, as_json: bool) -> None:
    """Load all stored rules, as after a boot.

    Sets are restored as last read; their files are not needed.

    \b
    JSON: as for xdp-lb filter add

    \b
    Examples:
      xdp-lb filter restore
    """
    from lb.model.rule_report import ApplyOptions

    run(lambda firewall: firewall.restore(ApplyOptions(force=force, dry_run=dry_run)), as_json)


@filter_group.command()
@interface_argument(required=False)
@click.option(
    "--rule",
    "rules",
    multiple=True,
    metavar="'ACTION [RATE] [EXPRESSION]'",
    help="Test this rule instead of the interface's. Repeatable.",
)
@click.option(
    "-r", "--read", "path", required=True, metavar="FILE.pcap", help="Capture file to test; - for standard input."
)
@click.option("-w", "--write", "write_to", metavar="FILE.pcap", help="Write the dropped packets to this file.")
@click.option(
    "--at",
    type=click.Choice([str(at) for at in At]),
    metavar="PLACE",
    help="Hook: xdp, tc-in or tc-out.  [default: xdp, then tc-in]",
)
@json_option
def test(
    interface: str | None,
    rules: tuple[str, ...],
    path: str,
    write_to: str | None,
    at: str | None,
    as_json: bool,
) -> None:
    """Show what rules would drop from a capture file.

    The rules are test-run in the kernel on these packets only; loaded rules and counters are not
    affected. limit rules drop nothing here, as the test has no packet timing.

    \b
    JSON: {packets, dropped, untested, rules: [{RULE, matched}]}
      untested  too short or too long for BPF_PROG_TEST_RUN

    \b
    Examples:
      xdp-lb filter test eth0 -r web.pcap -w dropped.pcap
      # Before adding the rule
      xdp-lb filter test --rule 'drop udp port 53' -r web.pcap
    """
    from lb.client.connect import open_filters
    from lb.firewall.documents import trial_document
    from lb.firewall.text import trial_lines

    if bool(rules) == (interface is not None):
        raise click.UsageError("Give an interface or --rule.")
    specs = [make_spec("", *_split(text), at=at or str(At.XDP)) for text in rules]
    with open_filters(Paths.here(), write=False) as firewall:
        if interface is None:
            trial = firewall.test_specs(specs, path, write_to)
        else:
            trial = firewall.test(interface, path, At(at) if at else None, write_to)
    click.echo(to_json(trial_document(trial)) if as_json else "\n".join(trial_lines(trial)))


def _wants_colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _split(text: str) -> tuple[str, list[str]]:
    try:
        action, *words = shlex.split(text)
        return Action(action).value, words
    except ValueError:
        raise InvalidInput(f"rule {text!r}: no action: begin with drop, pass, count or limit RATE") from None


def run(change: Callable[[FilterService], FilterReport], as_json: bool) -> None:
    from lb.client.connect import open_filters
    from lb.firewall.documents import report_document
    from lb.firewall.text import report_lines

    with open_filters(Paths.here(), write=True) as firewall:
        report = change(firewall)
    for warning in report.warnings:
        click.echo(f"xdp-lb: warning: {warning}", err=True)
    click.echo(to_json(report_document(report)) if as_json else "\n".join(report_lines(report)))
