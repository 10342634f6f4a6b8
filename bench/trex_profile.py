"""The benchmarks' traffic as a stateless TRex profile: 64-byte packets to a VIP, from many clients.

In come tunables; out goes one stream, whose source addresses and ports are those of bench/traffic.h. TRex loads this
file by itself and brings its own scapy: `start -f trex_profile.py -t --vip 198.19.0.1 --packet udp`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from ipaddress import IPv4Address
from typing import Any

from trex.stl.api import (  # type: ignore[import-not-found, unused-ignore]
    IP,
    TCP,
    UDP,
    CTRexVmInsFixHwCs,
    Ether,
    STLPktBuilder,
    STLScVmRaw,
    STLStream,
    STLTXCont,
    STLVmFixChecksumHw,
    STLVmTupleGen,
    STLVmWrFlowVar,
)

FIRST_CLIENT = IPv4Address("10.0.0.0")
PORTS = range(1024, 1024 + (1 << 15))  # of each client's address
FRAME_SIZE = 60  # the card adds four bytes of frame check sequence
PACKETS = ("ack", "syn", "udp")


class Clients:
    """What TRex calls a profile."""

    def get_streams(self, tunables: Sequence[str] = (), **_: Any) -> list[Any]:
        asked = parser().parse_args(tunables)
        packet = STLPktBuilder(
            pkt=frame(asked.vip, asked.port, asked.packet), vm=clients(asked.addresses, asked.packet)
        )
        return [STLStream(packet=packet, mode=STLTXCont(pps=asked.rate))]


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="trex_profile.py")
    options.add_argument("--vip", default="198.19.0.1")
    options.add_argument("--port", type=int, default=80)
    options.add_argument("--packet", choices=PACKETS, default="ack")
    options.add_argument("--addresses", type=int, default=2, help=f"of clients; each has {len(PORTS)} flows")
    options.add_argument("--rate", type=float, default=1e6, help="packets a second")
    return options


def frame(vip: str, port: int, packet: str) -> Any:
    l4 = UDP(dport=port) if packet == "udp" else TCP(dport=port, flags=packet[0].upper())
    made = Ether() / IP(src=str(FIRST_CLIENT), dst=vip) / l4
    return made / (b"\0" * (FRAME_SIZE - len(made)))


def clients(addresses: int, packet: str) -> Any:
    """What changes from packet to packet."""
    l4 = "UDP" if packet == "udp" else "TCP"
    kind = CTRexVmInsFixHwCs.L4_TYPE_UDP if packet == "udp" else CTRexVmInsFixHwCs.L4_TYPE_TCP
    return STLScVmRaw(
        [
            STLVmTupleGen(
                name="client",
                ip_min=str(FIRST_CLIENT),
                ip_max=str(FIRST_CLIENT + addresses - 1),
                port_min=PORTS[0],
                port_max=PORTS[-1],
            ),
            STLVmWrFlowVar(fv_name="client.ip", pkt_offset="IP.src"),
            STLVmWrFlowVar(fv_name="client.port", pkt_offset=f"{l4}.sport"),
            STLVmFixChecksumHw(l3_offset="IP", l4_offset=l4, l4_type=kind),
        ]
    )


def register() -> Clients:
    """What TRex calls first."""
    return Clients()
