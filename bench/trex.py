"""The same traffic from a TRex box, for those who have one: what it sends to the VIP and what comes back to it.

In come a running TRex server in stateless mode and the Python client that it brings; out go the packets a second that
its first port sent, and how much of that its second port, where the backends would be, did not receive.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from bench import report
from bench.report import BenchError, Result, percent_lost

CLIENT = Path("automation", "trex_control_plane", "interactive")  # below the folder that TRex is unpacked to
SENDER, RECEIVER = PORTS = (0, 1)
PACKETS = ("ack", "udp")
HOW_TO_GET_IT = (
    "trex: its Python client is not there: unpack a release of TRex (https://trex-tgn.cisco.com), start its server"
    " with ./t-rex-64 -i, and give --trex FOLDER"
)


def client_library(folder: Path | None) -> Any:
    """TRex's own trex.stl.api. Raises BenchError."""
    if folder:
        sys.path.insert(0, str(folder / CLIENT))
    if not find_spec("trex"):
        raise BenchError(HOW_TO_GET_IT)
    return import_module("trex.stl.api")


def measure(client: Any, packet: str, vip: str, rate: float, seconds: int) -> Iterator[Result]:
    """Packets a second sent, and the loss in percent."""
    profile = import_module("bench.trex_profile").register()
    client.reset(ports=list(PORTS))
    client.add_streams(profile.get_streams(["--vip", vip, "--packet", packet, "--rate", str(rate)]), ports=[SENDER])
    client.clear_stats()
    client.start(ports=[SENDER], duration=seconds)
    client.wait_on_traffic(ports=[SENDER])
    stats = client.get_stats()
    sent, arrived = stats[SENDER]["opackets"], stats[RECEIVER]["ipackets"]
    if not sent:
        raise BenchError(f"trex: packet={packet}: nothing was sent")
    yield Result("trex", f"packet={packet}", sent / seconds, "packets/s")
    yield Result("trex", f"packet={packet} metric=loss", percent_lost(sent, arrived), "%")


@report.command
@click.option("--trex", "folder", type=click.Path(path_type=Path), envvar="TREX", help="Where TRex is unpacked.")
@click.option("--server", default="127.0.0.1", show_default=True, help="The host that t-rex-64 runs on.")
@click.option("--vip", default="198.19.0.1", show_default=True)
@click.option("--rate", type=click.FloatRange(0, min_open=True), default=1e6, show_default=True, help="Packets/s.")
@click.option("--seconds", type=click.IntRange(1, 600), default=10, show_default=True)
def command(folder: Path | None, server: str, vip: str, rate: float, seconds: int) -> Iterator[Result]:
    """The same packets from a TRex box (optional; stateless mode)."""
    library = client_library(folder)
    client = library.STLClient(server=server)
    try:
        client.connect()
        for packet in PACKETS:
            yield from measure(client, packet, vip, rate, seconds)
    except library.STLError as error:
        raise BenchError(f"trex: {' '.join(str(error).split())}") from error
    finally:
        client.disconnect()
