"""Three hosts in a row for the benchmarks with traffic: generator, balancer, sink, each a network namespace.

In comes the way that packets take through the balancer: XDP, kernel routing, nftables or HAProxy; out go the hosts,
set up for it. The backends are a hundred addresses that all belong to the sink. All neighbours are known from the
start: no measurement waits for ARP.

    client:out 10.97.1.1  --  10.97.1.2 in:lb:out 10.97.2.2  --  10.97.2.1 in:server
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.report import BenchError
from bench.traffic import Target
from netns_tests.bed.topology import PREFIX, XDP_LB, Host, wait_until

ROOT = Path(__file__).parents[1]
VIP = "198.19.0.1"
BACKENDS = [str(ip_address("198.18.0.1") + number) for number in range(100)]
BACKEND_NETWORK = "198.18.0.0/24"
CLIENTS_NETWORK = "10.0.0.0/12"
CLIENT, LB_FRONT, LB_BACK, SERVER = "10.97.1.1", "10.97.1.2", "10.97.2.2", "10.97.2.1"
MACS = {
    CLIENT: "02:00:00:00:01:01",
    LB_FRONT: "02:00:00:00:01:02",
    LB_BACK: "02:00:00:00:02:02",
    SERVER: "02:00:00:00:02:01",
}
MAXIMUM_CONNECTIONS = 4096

_numbers = itertools.count()


class Line:
    """The hosts, as a context manager; nothing of it outlives the `with`. `port` is the VIP's."""

    def __init__(self, way: str, protocol: str, port: int) -> None:
        self.way, self.protocol, self.port = way, protocol, port
        self._name = f"{PREFIX}-{os.getpid()}-line{next(_numbers)}"
        self._resources = ExitStack()

    def __enter__(self) -> Self:
        try:
            directory = tempfile.TemporaryDirectory(prefix=f"{self._name}-")
            self.directory = Path(self._resources.enter_context(directory))
            self.client, self.lb, self.server = (self._host(label) for label in ("client", "lb", "server"))
            self._connect(self.client, CLIENT, self.lb, LB_FRONT)
            self._connect(self.server, SERVER, self.lb, LB_BACK)
            self._route()
            WAYS[self.way](self)
        except BaseException:
            self._resources.close()
            raise
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._resources.close()

    @property
    def vip(self) -> str:
        """As xdp-lb writes it."""
        return f"{VIP}:{self.port}/{self.protocol}"

    @property
    def target(self) -> Target:
        return Target(VIP, self.port, MACS[CLIENT], MACS[LB_FRONT])

    def _host(self, label: str) -> Host:
        host = Host(f"{self._name}-{label}", label)
        self._resources.callback(host.close)
        host.create()
        host.sysctl("net.ipv6.conf.default.disable_ipv6", 1)  # nobody speaks but those who are measured
        return host

    def _connect(self, end: Host, address: str, lb: Host, lb_address: str) -> None:
        """A veth with fixed neighbours, complete checksums, and NAPI, without which frames of XDP are lost."""
        near, far = ("out", "in") if end is self.client else ("in", "out")
        with end.netlink() as ip:
            peer = {"ifname": far, "net_ns_fd": lb.name, "address": MACS[lb_address]}
            ip.link("add", ifname=near, kind="veth", address=MACS[address], peer=peer)
        for host, name, own, other in ((end, near, address, lb_address), (lb, far, lb_address, address)):
            host.run(["ip", "link", "set", name, "up"])
            host.run(["ethtool", "-K", name, "tx", "off", "gro", "on"])
            host.run(["ip", "address", "add", f"{own}/24", "dev", name])
            known(host, name, [other], MACS[other])

    def _route(self) -> None:
        self.client.run(["ip", "route", "add", "default", "via", LB_FRONT])
        self.server.run(["ip", "route", "add", "default", "via", LB_BACK])
        self.server.run(["ip", "route", "add", "local", BACKEND_NETWORK, "dev", "lo"])
        self.server.run(["ip", "route", "add", "local", f"{VIP}/32", "dev", "lo"])
        self.lb.run(["ip", "route", "add", BACKEND_NETWORK, "dev", "out"])
        self.lb.run(["ip", "route", "add", CLIENTS_NETWORK, "via", CLIENT])
        known(self.lb, "out", BACKENDS, MACS[SERVER])
        self.lb.forward(True)

    def balance(self, mode: str) -> None:
        """By xdp-lb itself, in the way that its users call it."""
        self._resources.callback(self._stop_balancing)
        self.xdp_lb(
            "attach", "in", "--vip", self.vip, "--backends", ",".join(BACKENDS), "--mode", mode, "--no-vip-address"
        )

    def xdp_lb(self, *words: str) -> str:
        """What the command prints. Raises BenchError with what it says instead."""
        places = {f"XDP_LB_{name.upper()}_DIR": str(self.directory / name) for name in ("state", "run")}
        done = self.lb.run([str(XDP_LB), *words], check=False, env=os.environ | places)
        if done.returncode:
            raise BenchError(f"live: {done.stderr.strip()}")
        return done.stdout

    def _stop_balancing(self) -> None:
        self.xdp_lb("detach")

    def route_to_a_backend(self) -> None:
        """What routing alone costs."""
        self.lb.run(["ip", "route", "add", f"{VIP}/32", "via", SERVER])

    def translate(self) -> None:
        """By nftables: the client's address and port decide, as in xdp-lb, and the connection is remembered."""
        self.lb.run([installed("nft", "nftables"), "-f", "-"], input=nft_rules(self.protocol, self.port))

    def relay(self) -> None:
        """By HAProxy, in TCP mode."""
        program = installed("haproxy", "haproxy")
        self.lb.run(["ip", "address", "add", f"{VIP}/32", "dev", "lo"])
        configuration = self.directory / "haproxy.cfg"
        configuration.write_text(haproxy_configuration(self.port))
        with (self.directory / "haproxy.log").open("w") as log:
            self.lb.popen([program, "-db", "-f", str(configuration)], stdout=log, stderr=log)
        wait_until(lambda: self._listens(self.lb), "haproxy listening")

    def _listens(self, host: Host) -> bool:
        return bool(host.run(["ss", "-Hltn", f"sport = :{self.port}"]).stdout)

    def serve(self) -> None:
        """Have the server accept connections. See bench.connections."""
        self.server.popen([sys.executable, "-m", "bench.connections", str(self.port)], cwd=ROOT)
        wait_until(lambda: self._listens(self.server), "server listening")


WAYS: dict[str, Callable[[Line], None]] = {
    "sink": Line.route_to_a_backend,
    "xdp-dr": lambda line: line.balance("dr"),
    "xdp-nat": lambda line: line.balance("nat"),
    "forward": Line.route_to_a_backend,
    "nftables": Line.translate,
    "haproxy": Line.relay,
}


def known(host: Host, interface: str, addresses: list[str], mac: str) -> None:
    """Permanent neighbours, all with the same MAC address."""
    lines = "".join(f"neighbour replace {a} lladdr {mac} dev {interface} nud permanent\n" for a in addresses)
    host.run(["ip", "-batch", "-"], input=lines)


def installed(program: str, package: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise BenchError(f"live: {program}: not installed: make bench does it, or apt-get install {package}")
    return found


def nft_rules(protocol: str, port: int) -> str:
    choices = ", ".join(f"{number} : {address}" for number, address in enumerate(BACKENDS))
    chosen = f"jhash ip saddr . {protocol} sport mod {len(BACKENDS)} map {{ {choices} }}"
    return f"""
        table ip balancer {{
            chain prerouting {{
                type nat hook prerouting priority dstnat
                ip daddr {VIP} {protocol} dport {port} dnat to {chosen}
            }}
        }}
    """


def haproxy_configuration(port: int) -> str:
    servers = "\n".join(f"    server s{number} {address}:{port}" for number, address in enumerate(BACKENDS))
    return f"""
global
    nbthread 1
    maxconn {MAXIMUM_CONNECTIONS}
defaults
    mode tcp
    timeout connect 5s
    timeout client 30s
    timeout server 30s
listen vip
    bind {VIP}:{port} backlog {MAXIMUM_CONNECTIONS}
    balance roundrobin
{servers}
"""
