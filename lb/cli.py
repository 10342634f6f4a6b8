"""The command line: words of the operator -> one call of the balancer -> lines or JSON.

Each command parses its words into the model, opens the balancer for as long as the one call takes,
and prints the report. Exit status: 0; 1 with one line `xdp-lb: what: why` on standard error; 2 for
usage; 130 after Ctrl-C. `errors_explained` is the one place where errors become that line.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, cast

import click
from click.exceptions import Abort, Exit

from lb import completion, documents, output
from lb.cli_options import (
    OptionWords,
    backend_argument,
    backends_option,
    interfaces_argument,
    json_option,
    mode_option,
    option_words,
    ring_size_option,
    server_id_option,
    split_list,
    vip_address_option,
    vip_argument,
)
from lb.decap_cli import decap
from lb.doctor_cli import doctor_command
from lb.errors import InvalidInput, LbError
from lb.explain_cli import explain_command
from lb.filter_cli import filter_group
from lb.metrics_cli import metrics_command
from lb.model import DEFAULT_RING_SIZE, Backend, Interface, Mode, Service, XdpMode
from lb.progress import progress
from lb.report import Report
from lb.serve_cli import audit, serve, token
from lb.stage_cli import stage
from lb.top_cli import top_command
from lb.vip import Address, Vip

if TYPE_CHECKING:  # what imports SQLite waits until a command needs it
    from lb.balancer import Balancer

DEFAULT_PORT = 80  # of a service that is given by nothing but its backends
NO_SERVER_ID = ("none",)
EXIT_INTERRUPTED = 128 + 2  # as a shell reports a process that SIGINT ended


class Opener(Protocol):
    """Gives the balancer of this network namespace; `write` takes the lock."""

    def __call__(self, *, write: bool) -> AbstractContextManager[Balancer]: ...


def open_here(*, write: bool) -> AbstractContextManager[Balancer]:
    """Where the daemon runs, it is asked: it has the lock."""
    from lb.paths import Paths
    from lb.remote import daemon_listens, open_remote

    paths = Paths.here()
    if daemon_listens(paths.socket):
        return cast("AbstractContextManager[Balancer]", open_remote(paths.socket))
    from lb.balancer import open_balancer

    return open_balancer(paths, write=write)


def open_balancer(*, write: bool) -> AbstractContextManager[Balancer]:
    """By the opener that the caller of `cli` passed as `obj`."""
    opener: Opener = click.get_current_context().find_root().obj
    return opener(write=write)


class Failure(click.ClickException):
    """What ends the command with exit status 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"xdp-lb: {self.message}", err=True)


def explain(error: Exception) -> str:
    """One line for the operator: what, and why."""
    if isinstance(error, LbError):
        return str(error)
    if isinstance(error, PermissionError):
        return "not permitted: run as root (CAP_NET_ADMIN and CAP_BPF)"
    if isinstance(error, OSError):
        return f"{error.filename or 'operating system'}: {error.strerror or error}"
    words = " ".join(f"{type(error).__name__}: {error}".split())
    return f"internal error: {words} (XDP_LB_TRACEBACK=1 shows where)"


def is_expected(error: Exception) -> bool:
    return isinstance(error, LbError | OSError)


@contextmanager
def errors_explained() -> Iterator[None]:
    """The edge where foreign errors become a Failure. Click's own go on to click."""
    try:
        yield
    except (click.ClickException, Exit, Abort, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        raise Exit(EXIT_INTERRUPTED) from None
    except Exception as error:
        if os.environ.get("XDP_LB_TRACEBACK") == "1" and not is_expected(error):
            raise
        raise Failure(explain(error)) from error


class Commands(click.Group):
    def make_context(self, *arguments: Any, **settings: Any) -> click.Context:
        with errors_explained():
            return super().make_context(*arguments, **settings)

    def invoke(self, ctx: click.Context) -> Any:
        with errors_explained():
            return super().invoke(ctx)


# What commands share


@dataclass(frozen=True, slots=True)
class Request:
    """How a changing command was asked to run and to answer."""

    dry_run: bool
    as_json: bool

    def run(self, change: Callable[[Balancer], Report]) -> None:
        self.show(self.report(change), output.report_lines)

    def report(self, change: Callable[[Balancer], Report]) -> Report:
        with open_balancer(write=True) as balancer, progress(balancer):
            return change(balancer)

    def show(self, report: Report, lines: Callable[[Report], list[str]]) -> None:
        for warning in documents.warnings(report):
            click.echo(f"xdp-lb: warning: {warning}", err=True)
        if self.as_json:
            echo_json(documents.report_document(report))
        else:
            echo_lines(lines(report))


def change_options(command: Callable[..., None]) -> Callable[..., None]:
    """`--dry-run` and `--json`, given to the command as one `request`."""

    @wraps(command)
    def with_request(*, dry_run: bool, as_json: bool, **words: Any) -> None:
        command(request=Request(dry_run, as_json), **words)

    dry_run = click.option("--dry-run", is_flag=True, help="Say what would change; change nothing.")
    json = json_option("Print {dry_run, changes, attached, detached, notes, warnings}.")
    return dry_run(json(with_request))


def parse_backends(texts: Sequence[str], port: int) -> tuple[Backend, ...]:
    return tuple(Backend.parse(text, port) for text in texts)


def make_service(
    vip: Vip, backends: Sequence[str], mode: str | None, ring_size: int | None, option_words: OptionWords
) -> Service:
    return Service(
        vip,
        Mode(mode or Mode.NAT),
        parse_backends(split_list(backends), vip.fixed_port),
        DEFAULT_RING_SIZE if ring_size is None else ring_size,
        options=option_words.change(vip),
    )


def echo_lines(lines: Sequence[str]) -> None:
    click.echo("\n".join(lines))


def echo_json(document: object) -> None:
    click.echo(documents.to_json(document))


def wants_colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


# The commands


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)
@click.version_option(package_name="xdp-lb", message="xdp-lb %(version)s")
def cli() -> None:
    """Balance TCP and UDP over backends, in XDP.

    A VIP is written ADDR[/LENGTH]:PORT[-PORT][/PROTO][@SET]: an address or a prefix, a port, a
    range, or 0 for any port, and tcp (also where it is missing) or udp. SET is a second set of
    backends at the same VIP, for clients from certain prefixes. Of the VIPs that a packet fits,
    that of the longest prefix has it, and of those the one with the fewest ports.

    A backend is written ADDR[:PORT][@WEIGHT]; without PORT it gets the port of the VIP.

    \b
    VIPs:
      10.0.0.1:80                   TCP port 80
      [2001:db8::1]:53/udp          IPv6 stands in brackets
      10.0.0.0/24:8000-8999/tcp     256 addresses, 1000 ports
      10.0.0.1:80/tcp@eu            the set eu of 10.0.0.1:80/tcp

    \b
    Examples:
      # Balance eth0's own address, port 80, over two servers
      xdp-lb attach eth0 --backends 10.0.0.11,10.0.0.12
      # Add a third while traffic flows, then take the first out gently
      xdp-lb backend add 10.0.0.1:80/tcp 10.0.0.13
      xdp-lb backend drain 10.0.0.1:80/tcp 10.0.0.11
      # See who gets what
      xdp-lb status
    """


@cli.command()
@interfaces_argument(required=True)
@click.option(
    "--vip",
    type=Vip.parse,
    metavar="VIP",
    help="What clients connect to.  [default: the first interface's address, port 80/tcp]",
)
@backends_option
@mode_option
@click.option(
    "--xdp-mode",
    type=click.Choice([str(mode) for mode in XdpMode]),
    metavar="MODE",
    default=str(XdpMode.AUTO),
    help="native, generic, or auto: native, else generic with a warning.  [default: auto]",
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
    """Attach to interfaces, and serve what is stored.

    With --backends it adds a service first. Without, it starts what is stored: after a reboot, or
    after xdp-lb detach. All interfaces share one set of services.

    \b
    Examples:
      # Balance eth0's own address, port 80
      xdp-lb attach eth0 --backends 10.0.0.11,10.0.0.12
      # A VIP of its own, direct return, weights 1 and 3
      xdp-lb attach eth0 --vip 10.0.0.100:443 --mode dr \\
          --backends 10.0.0.11,10.0.0.12@3
      # Backends anywhere, through tunnels that xdp-lb decap ends there
      xdp-lb attach eth0 --vip 10.0.0.100:443 --mode gue \\
          --backends 172.16.4.11,172.16.9.12
      # Clients on eth0, servers behind eth1
      xdp-lb attach eth0 eth1 --backends 10.1.0.11,10.1.0.12
      # Start again what is stored
      xdp-lb attach eth0
    """
    if not backends and (vip or mode or ring_size is not None or option_words):
        raise click.UsageError("--vip, --mode and the other options of a service need --backends.")
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
    """Detach from interfaces, or from all. Services stay stored.

    Connections through a detached interface end. xdp-lb attach starts the services again.

    \b
    Examples:
      # Stop balancing on eth1 alone
      xdp-lb detach eth1
      # Stop altogether
      xdp-lb detach
    """
    request.run(lambda balancer: balancer.detach(interfaces, dry_run=request.dry_run))


@cli.command()
@json_option("Print JSON, as above.")
def status(as_json: bool) -> None:
    """Show interfaces, services and counters.

    PACKETS and the BYTES beside them come from clients, REPLIES and the BYTES beside them go back
    to clients (mode nat: in the others, backends answer directly). RETRIES, where there are any,
    are SYNs that came again, since nobody answered. Numbers are exact in --json.

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
      answered    {reason: packets}, by the balancer itself
      drops       {reason: packets}, dropped
      passes      {reason: packets}, left to the host
      noted       {reason: packets}, forwarded, but worth knowing
      maps        {name: bytes}, of kernel memory

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


@cli.group()
def vip() -> None:
    """Add, change, remove and list services."""


@vip.command("add")
@click.argument("vip", type=Vip.parse)
@backends_option
@mode_option
@ring_size_option
@click.option(
    "--flow-timeout",
    type=int,
    metavar="SECONDS",
    default=3600,
    show_default=True,
    help="How long an idle connection is remembered.",
)
@option_words
@vip_address_option
@change_options
def vip_add(
    vip: Vip,
    backends: tuple[str, ...],
    mode: str | None,
    ring_size: int | None,
    flow_timeout: int,
    option_words: OptionWords,
    no_vip_address: bool,
    request: Request,
) -> None:
    """Add a service at VIP.

    \b
    Examples:
      xdp-lb vip add 10.0.0.100:80 --backends 10.0.0.11,10.0.0.12
      # UDP, and direct return
      xdp-lb vip add 10.0.0.100:53/udp --mode dr --backends 10.0.0.11
      # IPv6, servers on another port
      xdp-lb vip add '[2001:db8::100]:443' --backends '[2001:db8::11]:8443'
      # All addresses of a prefix, a range of ports
      xdp-lb vip add 10.0.1.0/24:8000-8999 --mode dr --backends 10.0.0.11
      # Other backends for clients from 192.0.2.0/24
      xdp-lb vip add 10.0.0.100:80@near --source 192.0.2.0/24 \\
          --backends 10.0.0.21
      # No more than 1000 new connections a second, 20 from one network
      xdp-lb vip add 10.0.0.100:25 --backends 10.0.0.11 \\
          --syn-limit 1000 --syn-limit-of-source 20
    """
    service = make_service(vip, backends, mode, ring_size, option_words)
    service = replace(service, flow_timeout_s=flow_timeout)
    request.run(lambda balancer: balancer.add_service(service, own_address=not no_vip_address, dry_run=request.dry_run))


@vip.command("set")
@vip_argument
@option_words
@change_options
def vip_set(vip: Vip, option_words: OptionWords, request: Request) -> None:
    """Change options of the service at VIP. What is not named stays as it is.

    0 switches a limit or the MSS off, --no-echo and the like a switch, --allow any the list of
    clients, --tunnel-source own the prefix, --health off the check. While the service is in force,
    the affinity can be made longer or shorter, but not begin or end.

    \b
    Examples:
      xdp-lb vip set 10.0.0.100:80 --echo --mss 1400
      # Check the backends while xdp-lb serve runs
      xdp-lb vip set 10.0.0.100:80 --health 'http /healthz interval=1s fall=2'
      # No limit any more
      xdp-lb vip set 10.0.0.100:80 --syn-limit 0
      # Who may connect; then everybody again
      xdp-lb vip set 10.0.0.100:80 --allow 10.0.0.0/8,192.0.2.0/24
      xdp-lb vip set 10.0.0.100:80 --allow any
    """
    if not option_words:
        raise click.UsageError("no option named: say what to change.")

    def change(balancer: Balancer) -> Report:
        options = option_words.change(vip, balancer.state.service(vip).options)
        return balancer.set_options(vip, options, dry_run=request.dry_run)

    request.run(change)


@vip.command("remove")
@vip_argument
@change_options
def vip_remove(vip: Vip, request: Request) -> None:
    """Remove the service at VIP, with its backends.

    \b
    Examples:
      xdp-lb vip remove 10.0.0.100:80
      # What would go
      xdp-lb vip remove 10.0.0.100:80 --dry-run --json
    """
    request.run(lambda balancer: balancer.remove_service(vip, dry_run=request.dry_run))


@vip.command("list")
@json_option("Print JSON, as above.")
def vip_list(as_json: bool) -> None:
    """List the services that are stored, and the options that are not the default.

    \b
    JSON: [{vip, address, prefix_length, port, last_port, protocol, set, mode,
            ring_size, flow_timeout_s, options, backends}]
      options   {affinity_s, sources, syn_limit, syn_limit_of_source, mss,
                 echo, tunnel_sources, gue_port, outer_checksum,
                 second_chance, health, slow_start_s, fail_closed}
      backends  [{backend, address, port, weight, draining, server_ids}]

    \b
    Examples:
      xdp-lb vip list
      xdp-lb vip list --json | jq -r '.[].vip'
    """
    services = stored_services()
    if as_json:
        echo_json(documents.services_document(services))
    else:
        echo_lines(output.services_table(services, colour=wants_colour()))


def stored_services() -> tuple[Service, ...]:
    with open_balancer(write=False) as balancer:
        return balancer.state.services


@cli.group()
def backend() -> None:
    """Add, remove, drain, weigh and name backends."""


@backend.command("add")
@vip_argument
@click.argument("backends", nargs=-1, required=True, metavar="BACKEND...")
@server_id_option
@change_options
def backend_add(vip: Vip, backends: tuple[str, ...], server_ids: tuple[str, ...], request: Request) -> None:
    """Add backends to the service at VIP. Connections stay where they are.

    \b
    Examples:
      xdp-lb backend add 10.0.0.1:80 10.0.0.13
      # Three times the share of the others
      xdp-lb backend add 10.0.0.1:80 10.0.0.13@3
      # How many slots would move
      xdp-lb backend add 10.0.0.1:80 10.0.0.13 --dry-run
      # QUIC connections that it gave a connection ID with 0a1b stay with it
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
@backend_argument
@change_options
def backend_remove(vip: Vip, backend: str, request: Request) -> None:
    """Remove a backend at once. Its connections end; see drain.

    \b
    Examples:
      xdp-lb backend remove 10.0.0.1:80 10.0.0.11
    """
    name = Backend.parse(backend, vip.fixed_port)
    request.run(lambda balancer: balancer.remove_backend(vip, name, dry_run=request.dry_run))


@backend.command("drain")
@vip_argument
@backend_argument
@change_options
def backend_drain(vip: Vip, backend: str, request: Request) -> None:
    """Give a backend no new connections. Those it has go on.

    xdp-lb backend weight ends the drain.

    \b
    Examples:
      xdp-lb backend drain 10.0.0.1:80 10.0.0.11
    """
    name = Backend.parse(backend, vip.fixed_port)
    request.run(lambda balancer: balancer.drain_backend(vip, name, dry_run=request.dry_run))


@backend.command("weight", context_settings={"ignore_unknown_options": True})
@vip_argument
@backend_argument
@click.argument("weight", type=int)
@change_options
def backend_weight(vip: Vip, backend: str, weight: int, request: Request) -> None:
    """Set a backend's share of new connections, 0 to 65535. Ends a drain.

    \b
    Examples:
      # Three times the share of a backend of weight 1
      xdp-lb backend weight 10.0.0.1:80 10.0.0.11 3
    """
    name = replace(Backend.parse(backend, vip.fixed_port), weight=weight)
    request.run(lambda balancer: balancer.set_weight(vip, name, weight, dry_run=request.dry_run))


@backend.command("server-id")
@vip_argument
@backend_argument
@click.argument("server_ids", nargs=-1, required=True, metavar="CONFIG:HEX...")
@change_options
def backend_server_id(vip: Vip, backend: str, server_ids: tuple[str, ...], request: Request) -> None:
    """Set what names a backend in QUIC connection IDs; none: nothing.

    CONFIG is the config rotation codepoint of QUIC-LB, 0 to 6, and HEX the server ID, 1 to 15
    bytes, as the server writes it into its connection IDs in plaintext. All IDs of one CONFIG in a
    service have one length.

    \b
    Examples:
      xdp-lb backend server-id 10.0.0.1:443/udp 10.0.0.11 0:0a1b
      # While the servers go over to the next configuration
      xdp-lb backend server-id 10.0.0.1:443/udp 10.0.0.11 0:0a1b 1:00c4d2
      xdp-lb backend server-id 10.0.0.1:443/udp 10.0.0.11 none
    """
    name = Backend.parse(backend, vip.fixed_port)
    ids = () if server_ids == NO_SERVER_ID else server_ids
    request.run(lambda balancer: balancer.set_server_ids(vip, name, ids, dry_run=request.dry_run))


@backend.command("list")
@click.argument("vip", type=Vip.parse, required=False, shell_complete=completion.vips)
@json_option("Print JSON, as above.")
def backend_list(vip: Vip | None, as_json: bool) -> None:
    """List the backends that are stored, of VIP or of all services.

    \b
    JSON: [{vip, backend, address, port, weight, draining, server_ids}]

    \b
    Examples:
      xdp-lb backend list
      xdp-lb backend list 10.0.0.1:80
    """
    with open_balancer(write=False) as balancer:
        state = balancer.state
    services = (state.service(vip),) if vip else state.services
    if as_json:
        echo_json(documents.backends_document(services))
    else:
        echo_lines(output.backends_table(services, colour=wants_colour()))


@cli.command()
@click.option(
    "-f",
    "--file",
    "path",
    required=True,
    type=click.Path(path_type=Path),
    help="The services wanted, in TOML.",
)
@vip_address_option
@change_options
def apply(path: Path, no_vip_address: bool, request: Request) -> None:
    """Make the services those of a file, and print the difference.

    Services that the file does not name are removed.

    \b
    The file:
      [[service]]
      vip = "10.0.0.1:80/tcp"
      mode = "nat"            # or "dr", "ipip", "gue"
      ring_size = 16381
      flow_timeout = 3600     # seconds
      backends = ["10.0.0.11", "10.0.0.12:8080@3",
                  {address = "10.0.0.13", weight = 2, drain = true}]
    and where wanted
      affinity = 300          # seconds
      sources = ["10.0.0.0/8"]
      syn_limit = 1000        # a second
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
    and in the table of a backend
      server_ids = ["0:0a1b"]

    \b
    Examples:
      # What would change
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
    """Print the script that makes SHELL complete xdp-lb's words.

    \b
    Examples:
      # bash, in this shell; for all, put the line into ~/.bashrc
      source <(xdp-lb completion bash)
      # zsh, in ~/.zshrc
      source <(xdp-lb completion zsh)
      # fish
      xdp-lb completion fish > ~/.config/fish/completions/xdp-lb.fish
    """
    click.echo(completion.script(cli, shell))


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
