"""A traffic generator of some ten million packets a second, in the network namespace it is started in.

In come an interface, a VIP and a kind of packet; out go frames, each from the next of many clients, and how many of
them. bench/generator.bpf.c writes the frames, in the kernel; here they are made a batch after the other, for as long
and as fast as was asked for.
"""

from __future__ import annotations

import ctypes
import math
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Self

import click

from bench import report
from bench.report import BenchError, Result
from bench.traffic import CLIENTS, PACKETS, SHUFFLED, Target, aim
from xdp import libbpf
from xdp.netlink import NetlinkError, route_socket, translate
from xdp.object import BpfObject

OBJECT = Path(__file__).with_name("generator.bpf.o")

FRAME_SIZES = {4: 60, 6: 74}  # 64 bytes on the wire, with the frame check sequence that a card adds; IPv6 takes more
LIVE_FRAMES = 2  # BPF_F_TEST_XDP_LIVE_FRAMES, <linux/bpf.h>
FIRST_CALL = 1 << 12  # frames
MAX_PER_CALL = 1 << 24
CALL_S = 0.25  # a call costs the kernel some 30 ms beside what it sends, and cannot be ended early
UNFINISHED_CLIENTS = {4: "0.0.0.0", 6: CLIENTS[6]}  # the last word of the address is still 0
MAX_FLOWS = 1 << 20
MAX_SECONDS = 600


@dataclass(frozen=True)
class Sent:
    """Frames made, and the time it took."""

    packets: int
    seconds: float

    @property
    def rate(self) -> float:
        """Packets a second."""
        return self.packets / self.seconds


class Generator:
    """Sends by one interface of this network namespace. Raises XdpError, BenchError."""

    def __init__(self, interface: str) -> None:
        ifindex = index(interface)
        self._obj = BpfObject.open(OBJECT)
        self._obj.load()
        self._way = self._obj.variable("way")
        self._way.ifindex = ifindex
        self._frame = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._obj.close()

    def aim(self, target: Target, packet: str, flows: int, order: tuple[int, int] = SHUFFLED) -> None:
        """From now on packets of one of PACKETS, each from the next of `flows` clients, a power of two."""
        self._frame = target.frame(packet, UNFINISHED_CLIENTS[target.family], FRAME_SIZES[target.family])
        self._way.udp = packet == "udp"
        aim(self._obj.variable("traffic"), self._frame, flows, order)

    def send(self, packets: int) -> Sent:
        """So many at once, as fast as they go. The time is the kernel's, to the nanosecond a packet."""
        before = self._way.made
        frame = ctypes.create_string_buffer(self._frame, len(self._frame))
        opts = libbpf.TestRunOpts(
            sz=ctypes.sizeof(libbpf.TestRunOpts),
            data_in=ctypes.addressof(frame),
            data_size_in=len(self._frame),
            repeat=packets,
            flags=LIVE_FRAMES,
        )
        try:
            libbpf.program_test_run(self._obj.program("generate").fd, ctypes.byref(opts))
        except OSError as error:
            raise BenchError(f"generator: no live frames from this kernel (Linux 5.18 has them): {error}") from error
        made = int(self._way.made - before)
        if made != packets:
            raise BenchError(f"generator: made {made} packets of {packets}")
        return Sent(packets, packets * opts.duration / 1e9)

    def send_for(self, seconds: float, rate: float = math.inf) -> Sent:
        """For that long; at most `rate` packets a second on the whole, in bursts. The time is the clock's."""
        start, sent, packets = time.monotonic(), 0, FIRST_CALL
        while (elapsed := time.monotonic() - start) < seconds:
            last = self.send(min(packets, math.ceil(rate * CALL_S)) if rate < math.inf else packets)
            sent += last.packets
            packets = lasting(min(CALL_S, seconds - elapsed), last)
            time.sleep(max(0.0, sent / rate - (time.monotonic() - start)))
        return Sent(sent, elapsed)


def lasting(seconds: float, like: Sent) -> int:
    """How many packets take that long if they go like those."""
    return min(MAX_PER_CALL, max(1, int(like.rate * seconds)))


def next_hop_mac(address: str, ifindex: int) -> str:
    """Of the neighbour that the routes send `address` to. Raises BenchError where they lead elsewhere."""
    with route_socket() as ip, said(f"generator: {address}"):
        route = ip.route("get", dst=address)[0]
        gateway = route.get_attr("RTA_GATEWAY") or address
        found = [entry.get_attr("NDA_LLADDR") for entry in ip.get_neighbours(dst=gateway, ifindex=ifindex)]
    if route.get_attr("RTA_OIF") != ifindex or not found or not found[0]:
        raise BenchError(f"generator: {address}: no neighbour there is known that leads to it: ping it, or give --mac")
    return str(found[0])


@contextmanager
def said(subject: str) -> Iterator[None]:
    try:
        yield
    except NetlinkError as error:
        raise translate(error, subject) from error


def own_mac(interface: str) -> str:
    with route_socket() as ip:
        return str(ip.link("get", ifname=interface)[0].get_attr("IFLA_ADDRESS"))


def transmitted(interface: str) -> int:
    """Frames that the interface itself counts as sent."""
    with route_socket() as ip:
        return int(ip.link("get", ifname=interface)[0].get_attr("IFLA_STATS64")["tx_packets"])


def index(interface: str) -> int:
    try:
        return socket.if_nametoindex(interface)
    except OSError:
        raise BenchError(f"generator: interface {interface}: does not exist in this network namespace") from None


def target(interface: str, vip: str, port: int, destination: str | None) -> Target:
    return Target(vip, port, own_mac(interface), destination or next_hop_mac(vip, index(interface)))


def an_address(_: click.Context, __: click.Parameter, value: str) -> str:
    try:
        return str(ip_address(value))
    except ValueError:
        raise click.BadParameter(f"{value} is not an address.") from None


@report.command
@click.argument("interface")
@click.option("--vip", default="198.19.0.1", show_default=True, callback=an_address, help="Where packets go.")
@click.option("--port", type=click.IntRange(1, 65535), default=80, show_default=True)
@click.option("--mac", "destination", help="The next hop's MAC address; without it, what the routes say.")
@click.option("--packet", type=click.Choice(PACKETS), default="ack", show_default=True)
@click.option(
    "--flows", type=click.IntRange(1, MAX_FLOWS), default=1 << 16, show_default=True, callback=report.power_of_two
)
@click.option("--seconds", type=click.FloatRange(0, MAX_SECONDS, min_open=True), default=1.0, show_default=True)
@click.option("--rate", type=click.FloatRange(0, min_open=True), default=math.inf, help="At most, in packets/s.")
def command(
    interface: str,
    vip: str,
    port: int,
    destination: str | None,
    packet: str,
    flows: int,
    seconds: float,
    rate: float,
) -> Iterator[Result]:
    """Send packets from many clients to a VIP, by INTERFACE of this network namespace."""
    with Generator(interface) as generator:
        aimed = target(interface, vip, port, destination)
        generator.aim(aimed, packet, flows)
        before = transmitted(interface)
        sent = generator.send_for(seconds, rate)
        taken = transmitted(interface) - before
    case = f"family={aimed.family} packet={packet} flows={flows}"
    yield Result("generator", case, sent.rate, "packets/s")
    yield Result("generator", f"{case} metric=loss", report.percent_lost(sent.packets, taken), "%")
