"""How a command fails: one line on standard error, and its exit status."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import click

from lb.errors import InvalidInput


class Failure(click.ClickException):
    """The command was refused, or has failed: exit status 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"xdp-lb: {self.message}", err=True)


class Misuse(Failure):
    """A word of the command line is no such value: exit status 2, as for click's own usage errors."""

    exit_code = 2


@contextmanager
def parsing_words() -> Iterator[None]:
    """What is invalid in here is so whatever is served."""
    try:
        yield
    except InvalidInput as error:
        raise Misuse(str(error)) from None
