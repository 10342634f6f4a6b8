"""`xdp-lb doctor`: facts of this host -> a table with what mends each fault, or JSON."""

from __future__ import annotations

import click
from click.exceptions import Exit

from lb.cli.common import echo_json, echo_lines, wants_colour
from lb.cli.options import interfaces_argument, json_option

EXIT_UNFIT = 1


@click.command("doctor")
@interfaces_argument(required=False)
@json_option("Print JSON (keys above).")
def doctor_command(interfaces: tuple[str, ...], as_json: bool) -> None:
    """Check this host and its interfaces, with a fix for each finding.

    Without IFACE, checks all Ethernet interfaces that are up. Nothing is changed or attached; the
    program is loaded once to run the kernel's verifier, then unloaded.

    FAIL: xdp-lb cannot run there; exit status 1. warn: xdp-lb runs slower, or some packets are
    lost.

    \b
    JSON: [{check, interface, status, value, fix}]
      interface   null: concerns the host
      status      ok, warn or FAIL
      fix         a command or an instruction; null if ok

    \b
    Examples:
      xdp-lb doctor
      xdp-lb doctor eth0 eth1
      # Only the fixes
      xdp-lb doctor --json | jq -r '.[].fix // empty'
    """
    from lb.doctor import checks, collect, text  # what other commands need not wait for
    from lb.paths import Paths

    paths = Paths.here()
    found = checks.findings(collect.read_host(paths), collect.read_interfaces(paths, interfaces))
    if as_json:
        echo_json(checks.findings_document(found))
    else:
        echo_lines(text.lines(found, colour=wants_colour()))
    if not checks.is_fit(found):
        raise Exit(EXIT_UNFIT)
