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
from lb.cli.failures import parsing_words
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


def parsed_vip(text: str) -> Vip:
    with parsing_words():
        return Vip.parse(text)


vip_argument = click.argument("vip", type=parsed_vip, shell_complete=completion.vips)
backend_argument = click.argument("backend", shell_complete=completion.backends)
backends_argument = click.argument(
    "backends", nargs=-1, required=True, metavar="BACKEND...", shell_complete=completion.backends
)


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
    help="Backends, each ADDR[:PORT][@WEIGHT]. Repeatable.",
)
mode_option = click.option(
    "--mode",
    type=click.Choice([str(mode) for mode in Mode]),
    metavar="MODE",
    help="Forwarding mode: nat, dr, ipip or gue.  [default: nat]",
)
ring_size_option = click.option(
    "--ring-size",
    type=int,
    metavar="N",
    help=f"Slots in the Maglev ring, a prime from 251 to 131071.  [default: {DEFAULT_RING_SIZE}]",
)
server_id_option = click.option(
    "--server-id",
    "server_ids",
    multiple=True,
    metavar="CONFIG:HEX",
    help="QUIC-LB server ID of the backend. Repeatable.",
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
        """`options` of the service at `vip` with what is named here. Raises Misuse, click.UsageError."""
        self._check_sources(vip)
        with parsing_words():
            return self._changed(options)

    def _changed(self, options: Options) -> Options:
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
        help="Source-address affinity: a client keeps its backend until idle this long. 0: off.",
    ),
    click.option(
        "--allow",
        multiple=True,
        metavar="PREFIX,...",
        help="Drop clients outside these prefixes. Repeatable; any: no restriction.",
    ),
    click.option(
        "--source",
        multiple=True,
        metavar="PREFIX,...",
        help="Client prefixes that use this set (VIP@SET). Repeatable.",
    ),
    click.option("--syn-limit", type=int, metavar="N", help="Rate limit: new TCP connections per second."),
    click.option(
        "--syn-limit-of-source",
        type=int,
        metavar="N",
        help="The same per client network (IPv4 /24, IPv6 /64).",
    ),
    click.option("--mss", type=int, metavar="BYTES", help="Clamp the MSS option of client SYNs."),
    click.option("--echo/--no-echo", default=None, help="Answer ICMP echo requests (ping) to the VIP."),
    click.option(
        "--tunnel-source",
        multiple=True,
        metavar="PREFIX,...",
        help="ipip, gue: outer source addresses, chosen per flow; own: the host's address.",
    ),
    click.option("--gue-port", type=int, metavar="PORT", help=f"gue: UDP destination port.  [default: {GUE_PORT}]"),
    click.option("--outer-checksum/--no-outer-checksum", default=None, help="gue: compute the outer UDP checksum."),
    click.option(
        "--second-chance/--no-second-chance",
        default=None,
        help="gue: name the slot's other backend in the header, for xdp-lb decap to forward to.",
    ),
    click.option(
        "--health",
        metavar="CHECK",
        help="Health check run by xdp-lb serve: tcp, 'http /healthz interval=1s', https, udp, script; or off.",
    ),
    click.option(
        "--slow-start",
        "slow_start_s",
        type=int,
        metavar="SECONDS",
        help="Ramp a recovered backend up to its full weight over this time.",
    ),
    click.option(
        "--fail-closed/--no-fail-closed",
        default=None,
        help="Drop packets while all backends are down, instead of using all of them.",
    ),
    click.option(
        "--vip-address/--no-vip-address",
        default=None,
        help="Configure the VIP on an interface; no: it is routed to this host.",
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
