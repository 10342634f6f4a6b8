"""What commands share: the balancer they act on, how a change is asked for and answered, and errors as one line.

`errors_explained` is the one place where errors become that line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import click
from click.exceptions import Abort, Exit

from lb.cli.failures import Failure, parsing_words
from lb.cli.options import OptionWords, json_option, split_list
from lb.cli.progress import progress
from lb.formats import documents
from lb.formats import text as output
from lb.formats.error_text import explain, is_expected
from lb.model.report import Report
from lb.model.state import DEFAULT_RING_SIZE, Backend, Mode, Service, check_ring_size
from lb.model.vip import Vip

if TYPE_CHECKING:
    from lb.client.connect import BalancerLike, Connector
    from lb.model.report import Status
    from lb.model.state import State

EXIT_INTERRUPTED = 128 + 2  # as a shell reports a process that SIGINT ended


def open_balancer(*, write: bool) -> AbstractContextManager[BalancerLike]:
    """By the Connector that the caller of `cli` passed as `obj`."""
    return _connector().open(write=write)


def current_status() -> Status:
    with open_balancer(write=False) as balancer:
        return balancer.status()


def stored_state() -> State:
    return _connector().state()


def _connector() -> Connector:
    connector: Connector = click.get_current_context().find_root().obj
    return connector


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


@dataclass(frozen=True, slots=True)
class Request:
    """How a changing command was asked to run and to answer."""

    dry_run: bool
    as_json: bool

    def run(self, change: Callable[[BalancerLike], Report]) -> None:
        self.show(self.report(change), output.report_lines)

    def report(self, change: Callable[[BalancerLike], Report]) -> Report:
        with open_balancer(write=True) as balancer, progress(balancer):
            return change(balancer)

    def show(self, report: Report, lines: Callable[[Report], list[str]]) -> None:
        for warning in report.all_warnings:
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

    dry_run = click.option("--dry-run", is_flag=True, help="Show what would change without changing it.")
    json = json_option("Print {dry_run, changes, ending, attached, detached, notes, warnings}.")
    return dry_run(json(with_request))


def parse_backends(texts: Sequence[str], port: int) -> tuple[Backend, ...]:
    with parsing_words():
        return tuple(Backend.parse(text, port) for text in texts)


def make_service(
    vip: Vip, backends: Sequence[str], mode: str | None, ring_size: int | None, option_words: OptionWords
) -> Service:
    size = DEFAULT_RING_SIZE if ring_size is None else ring_size
    with parsing_words():
        check_ring_size(size)
    members = parse_backends(split_list(backends), vip.fixed_port)
    return Service(vip, Mode(mode or Mode.NAT), members, size, options=option_words.change(vip))


def echo_lines(lines: Sequence[str]) -> None:
    click.echo("\n".join(lines))


def echo_json(document: object) -> None:
    click.echo(documents.to_json(document))


def wants_colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
