"""`xdp-lb metrics`: the state of things -> the text that Prometheus reads, on standard output or in a file."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import click

from lb.cli.common import open_balancer

SHIPPED = {"alerts": "alerts.yml", "dashboard": "grafana-dashboard.json"}
READABLE_BY_ALL = 0o644  # node_exporter is another user


@click.command("metrics")
@click.option(
    "-o",
    "--output",
    "path",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write to FILE, replaced atomically.",
)
@click.option("--alerts", "shipped", flag_value="alerts", help="Print Prometheus alerting rules instead.")
@click.option("--dashboard", "shipped", flag_value="dashboard", help="Print a Grafana dashboard instead.")
def metrics_command(path: Path | None, shipped: str | None) -> None:
    """Print metrics in the Prometheus text format.

    For the textfile collector of node_exporter, run it every 15 seconds with -o and a file name
    that ends in .prom. If the command fails, FILE is left unchanged.

    \b
    Examples:
      xdp-lb metrics
      xdp-lb metrics -o /var/lib/prometheus/node-exporter/xdp-lb.prom
      xdp-lb metrics --alerts > /etc/prometheus/xdp-lb-alerts.yml
      xdp-lb metrics --dashboard > xdp-lb.json
    """
    text = _shipped(shipped) if shipped else _current()
    if path:
        write_whole(path, text)
    else:
        click.echo(text, nl=False)


def _shipped(name: str) -> str:
    from importlib.resources import files  # 10 ms, which other commands need not wait for

    return files("lb.formats").joinpath("monitoring", SHIPPED[name]).read_text(encoding="utf-8")


def _current() -> str:
    from lb.formats.prometheus import exposition

    with open_balancer(write=False) as balancer:
        return exposition(balancer.status())


def write_whole(path: Path, text: str) -> None:
    """Who reads `path` meanwhile finds what was there before, or all of `text`. Raises OSError, which names `path`."""
    import tempfile

    try:
        file, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with open(file, "w", encoding="utf-8") as opened:
                os.fchmod(file, READABLE_BY_ALL)
                opened.write(text)
            os.replace(name, path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(name)
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
