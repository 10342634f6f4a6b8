"""`python -m bench NAME`: each benchmark is a module of this package, answers one question and has one `command`."""

from __future__ import annotations

from importlib import import_module

import click

from bench.report import BenchError
from lb.errors import LbError
from xdp.errors import XdpError

NAMES = ("dataplane", "live", "filter", "capture", "ring", "control", "trex", "generator")


class Benches(click.Group):
    """Imports a benchmark when it is asked for: some need what others do not."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(NAMES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in NAMES:
            return None
        command: click.Command = import_module(f"bench.{cmd_name}").command
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (BenchError, LbError, XdpError, OSError) as error:
            raise click.ClickException(str(error)) from error


@click.command(cls=Benches)
def main() -> None:
    """Measure xdp-lb. Figures go to standard error as a table, with --json to standard output as well."""


if __name__ == "__main__":
    main(prog_name="python -m bench")
