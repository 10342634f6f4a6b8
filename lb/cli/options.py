"""The words that commands share: arguments and options of click, and those that say what a service may ask for.

Enters: a command's function. Leaves: the same with arguments and options on it. `option_words` gathers the options of a
service in one value, which becomes lb.model.options.Options once the service is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce, wraps
from typing import Any

import click

from lb.cli import completion
from lb.model.health_check import HealthCheck
from lb.model.options import DEFAULTS, FIELDS, GUE_PORT, Network, Options, parse_network
from lb.model.state import DEFAULT_RING_SIZE, Mode
from lb.model.vip import Vip

Command = Callable[..., None]
Decorator = Callable[[Command], Command]

ANY_SOURCE = ("any",)
OWN_SOURCE = ("own",)
NO_HEALTH_CHECK = "off"


def json_option(text: str) -> Decorator:
    return click.option("--json", "as_json", is_flag=True, help=text)


vip_argument = click.argument("vip", type=Vip.parse, shell_complete=completion.vips)
backend_argument = click.argument("backend", shell_complete=completion.backends)


def interfaces_argument(*, required: bool) -> Decorator:
    return click.argument(
        "interfaces",
        nargs=-1,
        required=required,
        metavar="IFACE..." if required else "[IFACE]...",
        shell_complete=completion.interfaces,
    )


backends_option = click.option(
    "--backends",
    multiple=True,
    metavar="A,B,...",
    help="Backends, ADDR[:PORT][@WEIGHT] each. May be repeated.",
)
mode_option = click.option(
    "--mode",
    type=click.Choice([str(mode) for mode in Mode]),
    metavar="MODE",
    help="How packets reach the backends: nat, dr, ipip or gue.  [default: nat]",
)
ring_size_option = click.option(
    "--ring-size",
    type=int,
    metavar="N",
    help=f"Slots of the ring, a prime from 251 to 131071.  [default: {DEFAULT_RING_SIZE}]",
)
vip_address_option = click.option(
    "--no-vip-address",
    is_flag=True,
    help="Put no address on an interface: the VIP is routed to this host.",
)
server_id_option = click.option(
    "--server-id",
    "server_ids",
    multiple=True,
    metavar="CONFIG:HEX",
    help="What names the backend in QUIC connection IDs. May be repeated.",
)


def split_list(texts: Sequence[str]) -> list[str]:
    return [word.strip() for text in texts for word in text.split(",")]


@dataclass(frozen=True, slots=True)
class OptionWords:
    """What a command line says of a service's options: numbers and switches by the fields of Options, prefixes as they
    were written. What it does not name is not there."""

    plain: Mapping[str, Any]
    allow: Sequence[str] = ()
    source: Sequence[str] = ()
    tunnel_source: Sequence[str] = ()
    health: str | None = None

    def __bool__(self) -> bool:
        return bool(self.plain or self.allow or self.source or self.tunnel_source or self.health is not None)

    def change(self, vip: Vip, options: Options = DEFAULTS) -> Options:
        """`options` of the service at `vip` with what is named here. Raises InvalidInput, click.UsageError."""
        self._check_sources(vip)
        parsed: dict[str, Any] = {}
        if sources := [*self.allow, *self.source]:
            parsed["sources"] = _prefixes(sources, ANY_SOURCE)
        if self.tunnel_source:
            parsed["tunnel_sources"] = _prefixes(self.tunnel_source, OWN_SOURCE)
        if self.health is not None:
            parsed["health"] = None if self.health == NO_HEALTH_CHECK else HealthCheck.parse(self.health)
        return replace(options, **self.plain, **parsed)

    def _check_sources(self, vip: Vip) -> None:
        if vip.set and self.allow:
            raise click.UsageError(f"--allow does not apply to member sets: for the set {vip.set}, use --source.")
        if self.source and not vip.set:
            raise click.UsageError(
                f"--source applies only to member sets, such as {replace(vip, set='eu')}: use --allow."
            )


def _prefixes(texts: Sequence[str], none: tuple[str, ...]) -> tuple[Network, ...]:
    words = tuple(split_list(texts))
    return () if words == none else tuple(map(parse_network, words))


OPTIONS = (
    click.option(
        "--affinity",
        "affinity_s",
        type=int,
        metavar="SECONDS",
        help="All of a client's connections go to one backend, until it has been silent so long.",
    ),
    click.option(
        "--allow",
        multiple=True,
        metavar="PREFIX,...",
        help="Clients from elsewhere are dropped. May be repeated; any: nobody is dropped.",
    ),
    click.option(
        "--source",
        multiple=True,
        metavar="PREFIX,...",
        help="The clients that a member set is for. May be repeated.",
    ),
    click.option("--syn-limit", type=int, metavar="N", help="New TCP connections a second, at most."),
    click.option(
        "--syn-limit-of-source",
        type=int,
        metavar="N",
        help="The same for each client network, an IPv4 /24 or IPv6 /64.",
    ),
    click.option("--mss", type=int, metavar="BYTES", help="The most that SYNs may announce for what backends send."),
    click.option("--echo/--no-echo", default=None, help="Answer echo requests (ping) to the VIP."),
    click.option(
        "--tunnel-source",
        multiple=True,
        metavar="PREFIX,...",
        help="ipip and gue: outer sources vary within it by flow; own: the host's own address.",
    ),
    click.option("--gue-port", type=int, metavar="PORT", help=f"gue: UDP port of the tunnel.  [default: {GUE_PORT}]"),
    click.option("--outer-checksum/--no-outer-checksum", default=None, help="gue: fill in the UDP checksum."),
    click.option(
        "--second-chance/--no-second-chance",
        default=None,
        help="gue: tell xdp-lb decap which other backend may know a connection.",
    ),
    click.option(
        "--health",
        metavar="CHECK",
        help="How xdp-lb serve checks the backends: tcp, 'http /healthz interval=1s', https, udp, script; or off.",
    ),
    click.option(
        "--slow-start",
        "slow_start_s",
        type=int,
        metavar="SECONDS",
        help="So long a backend that is up again takes to get its whole share.",
    ),
    click.option(
        "--fail-closed/--no-fail-closed",
        default=None,
        help="With all backends down drop packets, instead of serving as if all were up.",
    ),
)


def option_words(command: Command) -> Command:
    """The options of a service, given to the command as one `option_words`."""

    @wraps(command)
    def with_options(
        *, allow: Sequence[str], source: Sequence[str], tunnel_source: Sequence[str], health: str | None, **words: Any
    ) -> None:
        plain = {name: words.pop(name) for name in FIELDS if name in words}
        named = {name: value for name, value in plain.items() if value is not None}
        command(option_words=OptionWords(named, allow, source, tunnel_source, health), **words)

    return reduce(lambda found, option: option(found), reversed(OPTIONS), with_options)
