"""A test bed of network namespaces: a client, the balancer, backends and, if wanted, a router.

What enters is a layout: how many backends, one arm or two, a router or none. What leaves is a
`Bed` whose hosts run commands and own sockets, with IPv4 and IPv6 ready. Each L2 network is a Linux
bridge in one more namespace, `switch`; each interface of a host is a veth, its peer a bridge port.

    layout             front: 10.99.1.0/24, fd99:1::/64    back: 10.99.2.0/24, fd99:2::/64
    two arms           client lb                           lb b1 b2 ...
    two arms, router   client lb router                    lb router b1 b2 ...
    one arm            client lb b1 b2 ...                 (none)
    one arm, router    client router                       router lb b1 b2 ...
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pyroute2 import IPRoute, netns
from pyroute2.ethtool.ioctl import IoctlEthtool

from netns_tests.bed import commands

PREFIX = "xlb"
XDP_LB = Path(sys.executable).with_name("xdp-lb")  # the console script, as the package installed it
CLONE_NEWNET = 0x40000000
BRIDGE_PORT_FORWARDING = 3
IFA_F_NODAD = 0x02
BPF_PROG_TYPE_XDP = 6
R0_IS_XDP_PASS, EXIT = 0x00000002_000000B7, 0x95  # struct bpf_insn, little endian

# No duplicate address detection, no router advertisements: an address is usable as soon as it is
# set. No reverse path filter: direct return sends a reply another way than its request came. Multicast listener reports
# are repeated at once: a second later they would come into the counters that a test compares.
HOST_SYSCTLS: dict[str, int | str] = {
    "net.ipv4.conf.all.rp_filter": 0,
    "net.ipv4.conf.default.rp_filter": 0,
    "net.ipv6.conf.all.accept_dad": 0,
    "net.ipv6.conf.default.accept_dad": 0,
    "net.ipv6.conf.default.accept_ra": 0,
    "net.ipv6.conf.default.mldv2_unsolicited_report_interval": 1,
    "net.ipv4.ping_group_range": "0 0",  # ICMP echo sockets for root, of both families
}
_bed_numbers = itertools.count()


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 10) -> None:
    """Return once `condition()` holds; TimeoutError naming `what` if it does not in `timeout_s`.

    To ask takes a quarter of the time at most: what is waited for needs the CPUs more than a command that looks.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        asked = time.monotonic()
        if condition():
            return
        now = time.monotonic()
        if now > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s:g} s")
        time.sleep(max(0.01, 3 * (now - asked)))


@dataclass(frozen=True)
class Network:
    """One L2 network: a bridge of this name in the switch, 10.99.N.0/24 and fd99:N::/64."""

    name: str
    number: int

    def ipv4(self, station: int) -> str:
        return f"10.99.{self.number}.{station}"

    def ipv6(self, station: int) -> str:
        return f"fd99:{self.number}::{station}"

    @property
    def prefix4(self) -> str:
        return f"{self.ipv4(0)}/24"

    @property
    def prefix6(self) -> str:
        return f"fd99:{self.number}::/64"


FRONT = Network("front", 1)
BACK = Network("back", 2)


@dataclass(frozen=True)
class Interface:
    """An interface of a host: its name there and its addresses, without prefix lengths."""

    name: str
    network: Network
    ipv4: str
    ipv6: str


class Host:
    """A network namespace: `label` is its part in the bed (`lb`, `b1`), `name` the namespace's.

    `create()` makes it, `close()` ends every process in it and removes it.
    """

    def __init__(self, name: str, label: str) -> None:
        self.name = name
        self.label = label
        self.interfaces: list[Interface] = []
        self._processes: list[subprocess.Popen[str]] = []

    def create(self) -> None:
        _create_namespace(self.name)
        for sysctl, value in HOST_SYSCTLS.items():
            self.sysctl(sysctl, value)
        self.forward(False)
        with self.netlink() as ip:
            ip.link("set", index=1, state="up")

    @property
    def ipv4(self) -> str:
        """Address of the first interface."""
        return self.interfaces[0].ipv4

    @property
    def ipv6(self) -> str:
        """Address of the first interface."""
        return self.interfaces[0].ipv6

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Move the calling thread into the namespace; a socket opened meanwhile stays in it."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            netns.setns(self.name, flags=0)
            try:
                yield
            finally:
                netns.setns(home)
        finally:
            os.close(home)

    @contextlib.contextmanager
    def netlink(self) -> Iterator[IPRoute]:
        with self.entered(), IPRoute() as ip:
            yield ip

    def sysctl(self, name: str, value: int | str) -> None:
        """Set `net.*` here; `name` is dotted. OSError for an unknown name or value."""
        with self.entered():
            Path("/proc/sys", *name.split(".")).write_text(f"{value}\n")

    def forward(self, on: bool) -> None:
        """Let the kernel route packets of both families through this host, or not."""
        self.sysctl("net.ipv4.ip_forward", int(on))
        self.sysctl("net.ipv6.conf.all.forwarding", int(on))

    def run(self, argv: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command to its end here, within 60 s, its output captured as text.

        `options` go to `subprocess.run`. CalledProcessError carries stderr as a note.
        """
        defaults = {"check": True, "capture_output": True, "text": True, "timeout": 60}
        try:
            return commands.run(self.name, argv, **(defaults | options))
        except subprocess.CalledProcessError as error:
            error.add_note(f"{self.label}: {error.stderr}")
            raise

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start a command here; it is ended with the host. `options` go to `subprocess.Popen`."""
        process = commands.popen(self.name, argv, **({"text": True} | options))
        self._processes.append(process)
        return process

    def pings(self, address: str, timeout_s: float = 2, size: int = 8) -> bool:
        """Whether one ICMP echo request of `size` bytes, its header included, is answered in time, and whole."""
        family, protocol, echo_request = (
            (socket.AF_INET6, socket.IPPROTO_ICMPV6, 128)
            if ":" in address
            else (socket.AF_INET, socket.IPPROTO_ICMP, 8)
        )
        with self.entered():
            echo = socket.socket(family, socket.SOCK_DGRAM, protocol)
        with echo:
            echo.settimeout(timeout_s)
            try:
                echo.sendto(bytes([echo_request, 0, 0, 0, 0, 0, 0, 1]) + bytes(size - 8), (address, 0))
                return len(echo.recv(size + 1)) == size
            except OSError:  # unreachable, or no answer in time
                return False

    def learnt_mtu(self, destination: str) -> int | None:
        """What ICMP has told the kernel of the way to an address; None: nothing."""
        (route,) = json.loads(self.run(["ip", "-j", "route", "get", destination]).stdout)
        return next((metric["mtu"] for metric in route.get("metrics", []) if "mtu" in metric), None)

    def forget_mtus(self) -> None:
        for family in ("-4", "-6"):
            self.run(["ip", family, "route", "flush", "cache"])

    def close(self) -> None:
        _end_processes(self._processes)
        if self.name in netns.listnetns():
            _remove_namespace(self.name)


class Bed:
    """The hosts of a layout, as a context manager; nothing of it outlives the `with`.

    The gateway between the networks is the router if there is one, else the balancer; `forward`
    lets the balancer's kernel route. Off, nothing passes the balancer but what XDP sends on.
    `directory` is for the files of servers in the bed and goes with it.
    """

    client: Host
    lb: Host
    switch: Host
    directory: Path

    def __init__(
        self,
        backends: int = 2,
        *,
        one_arm: bool = False,
        router: bool = False,
        forward: bool = False,
    ) -> None:
        self.name = f"{own_prefix()}{next(_bed_numbers)}"
        self.networks = [FRONT] if one_arm and not router else [FRONT, BACK]
        self.backends: list[Host] = []
        self.router: Host | None = None
        self._balancers = 1
        self._layout = (backends, one_arm, router, forward)
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> Self:
        _sweep_stale_beds()
        atexit.register(self.close)
        try:
            self._build(*self._layout)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def vip4(self) -> str:
        """A free address of the network on which the balancer meets its clients."""
        return self.lb.interfaces[0].network.ipv4(100)

    @property
    def vip6(self) -> str:
        return self.lb.interfaces[0].network.ipv6(100)

    def add_backend(self) -> Host:
        """One more backend, on the network of the others, ready to be reached."""
        number = len(self.backends) + 1
        backend = self._host(f"b{number}", [self.networks[-1]], station=10 + number)
        self._route(backend)
        self.backends.append(backend)
        self._wait_for_links()
        return backend

    def add_balancer(self) -> Host:
        """One more balancer, on the networks of the first, which stays the one that `lb` names."""
        self._balancers += 1
        networks = [interface.network for interface in self.lb.interfaces]
        balancer = self._host(f"lb{self._balancers}", networks, station=1 + self._balancers)
        self._route(balancer)
        self._wait_for_links()
        return balancer

    def own_vip(self, backend: Host) -> None:
        """Put both VIPs on the backend's loopback, as direct return wants, unanswered on the wire.

        For IPv4 that takes two settings; IPv6 answers neighbour solicitations per interface anyway.
        """
        backend.sysctl("net.ipv4.conf.all.arp_ignore", 1)
        backend.sysctl("net.ipv4.conf.all.arp_announce", 2)
        with backend.netlink() as ip:
            ip.addr("add", index=1, address=self.vip4, prefixlen=32)
            ip.addr("add", index=1, address=self.vip6, prefixlen=128)
        # The kernel adds an IPv6 address to its routes a moment later, on a workqueue.
        wait_until(lambda: backend.pings(self.vip6, timeout_s=0.2), f"{self.vip6} on {backend.label}")

    def xdp_lb(self, *words: str, check: bool = True, on: Host | None = None) -> subprocess.CompletedProcess[str]:
        """Run the real command on the (or that) balancer, its state and its pins kept in the bed's directory.

        CalledProcessError, unless `check` is off, for an exit status other than 0.
        """
        places = {
            "XDP_LB_STATE_DIR": str(self.directory / "state"),
            "XDP_LB_RUN_DIR": str(self.directory / "run"),
        }
        return (on or self.lb).run([str(XDP_LB), *words], check=check, env=os.environ | places)

    def close(self) -> None:
        """End the bed's processes, remove its namespaces, pins and files. May be called again."""
        self._resources.close()
        atexit.unregister(self.close)

    def _build(self, backends: int, one_arm: bool, router: bool, forward: bool) -> None:
        directory = tempfile.TemporaryDirectory(prefix=f"{self.name}-")
        self.directory = Path(self._resources.enter_context(directory))
        self._build_switch()
        self.client = self._host("client", [FRONT], station=1)
        self.lb = self._host("lb", self.networks[-1:] if one_arm else self.networks, station=2)
        self.lb.forward(forward)
        self._resources.callback(self._unload)
        if router:
            self.router = self._host("router", self.networks, station=254)
            self.router.forward(True)
        self._route(self.client)
        self._route(self.lb)
        for _ in range(backends):
            self.add_backend()
        self._wait_for_links()

    def _unload(self) -> None:
        """Give up what xdp-lb has pinned, also where a test left it broken."""
        if (self.directory / "run").exists():
            self.xdp_lb("detach", check=False)
            _unmount_below(self.directory)

    def _build_switch(self) -> None:
        self.switch = self._namespace("switch")
        with self.switch.netlink() as ip:
            for network in self.networks:
                # Without a querier, snooping may withhold the multicasts of neighbour discovery.
                ip.link("add", ifname=network.name, kind="bridge", br_mcast_snooping=0)
                ip.link("set", ifname=network.name, state="up")

    def _namespace(self, label: str) -> Host:
        host = Host(f"{self.name}-{label}", label)
        self._resources.callback(host.close)
        host.create()
        return host

    def _host(self, label: str, networks: list[Network], station: int) -> Host:
        host = self._namespace(label)
        for network in networks:
            self._plug(host, network, station)
        return host

    def _plug(self, host: Host, network: Network, station: int) -> None:
        """Join the host to the network with a veth, its peer a port of the network's bridge."""
        name = f"eth{len(host.interfaces)}"
        port = f"{host.label}-{name}"
        with self.switch.netlink() as ip:
            peer = {"ifname": name, "net_ns_fd": host.name}
            ip.link("add", ifname=port, kind="veth", peer=peer)
            (bridge,) = ip.link_lookup(ifname=network.name)
            ip.link("set", ifname=port, master=bridge, state="up")
        # XDP rewrites frames as it finds them: their checksums must be complete on every veth.
        _set_offload(self.switch, port, "tx-checksumming", on=False)
        _set_offload(host, name, "tx-checksumming", on=False)
        # The kernel drops what XDP redirects into a veth whose peer has neither a program nor NAPI,
        # and what XDP_TX sends lies there until something else wakes a peer without a program.
        _set_offload(self.switch, port, "generic-receive-offload", on=True)
        if host.label.startswith("lb"):
            _attach_pass_program(self.switch, port)
        interface = Interface(name, network, network.ipv4(station), network.ipv6(station))
        _configure(host, interface)
        host.interfaces.append(interface)

    def _route(self, host: Host) -> None:
        """Routes to the networks the host is not on."""
        gateway = self.router or self.lb
        here = host.interfaces[0].network
        for network in self.networks:
            if network not in [interface.network for interface in host.interfaces]:
                via = next(i for i in gateway.interfaces if i.network == here)
                with host.netlink() as ip:
                    ip.route("add", dst=network.prefix4, gateway=via.ipv4)
                    ip.route("add", dst=network.prefix6, gateway=via.ipv6)

    def _wait_for_links(self) -> None:
        wait_until(self._ports_forward, f"{self.name}: ports of the switch forwarding")

    def _ports_forward(self) -> bool:
        with self.switch.netlink() as ip:
            states = [
                link.get_nested("IFLA_LINKINFO", "IFLA_INFO_SLAVE_DATA", "IFLA_BRPORT_STATE")
                for link in ip.get_links(kind="veth")
            ]
        return all(state == BRIDGE_PORT_FORWARDING for state in states)


def remaining_namespaces() -> list[str]:
    """Namespaces of this process's beds that still exist."""
    return [name for name in netns.listnetns() if name.startswith(own_prefix())]


def own_prefix() -> str:
    """How the names of this process's beds, their namespaces and folders begin."""
    return f"{PREFIX}-{os.getpid()}-"


def _create_namespace(name: str) -> None:
    """A thread of its own enters the new namespace and ends: no fork, and this thread stays."""

    def unshare_and_name() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNET) != 0:
            errno = ctypes.get_errno()
            raise OSError(errno, f"network namespace {name}: {os.strerror(errno)}")
        netns.attach(name, "thread-self")

    with ThreadPoolExecutor(max_workers=1) as executor:
        executor.submit(unshare_and_name).result()


def _remove_namespace(name: str) -> None:
    """End what still runs in the namespace (children of what was started there), then remove it."""
    wait_until(lambda: not _kill_processes_in(name), f"{name}: processes ended")
    netns.remove(name)


def _kill_processes_in(name: str) -> list[int]:
    """The pids found in the namespace, each sent SIGKILL; zombies are in none any more."""
    pids: list[int] = netns.ns_pids().get(name, [])
    if os.getpid() in pids:
        raise RuntimeError(f"network namespace {name} is this process's own")
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return pids


def _end_processes(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream:
                stream.close()
    processes.clear()


def _sweep_stale_beds() -> None:
    """Remove the beds, files included, of processes that are gone (killed), and no others."""
    for name in filter(_is_stale, netns.listnetns()):
        with contextlib.suppress(FileNotFoundError):  # another run sweeps too
            _remove_namespace(name)
    for directory in Path(tempfile.gettempdir()).glob(f"{PREFIX}-*"):
        if _is_stale(directory.name):
            _unmount_below(directory)
            shutil.rmtree(directory, ignore_errors=True)


def _unmount_below(directory: Path) -> None:
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for mount in mounts:
        if Path(mount).is_relative_to(directory):
            subprocess.run(["umount", mount], check=False)


def _is_stale(name: str) -> bool:
    owner = re.match(rf"{PREFIX}-(\d+)-", name)
    return owner is not None and not Path("/proc", owner[1]).exists()


def _set_offload(host: Host, interface: str, name: str, *, on: bool) -> None:
    with host.entered(), contextlib.closing(IoctlEthtool(interface)) as ethtool:
        ethtool.set_offload_flag(name, on)


def _attach_pass_program(host: Host, interface: str) -> None:
    instructions = (ctypes.c_uint64 * 2)(R0_IS_XDP_PASS, EXIT)
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    fd = libbpf.bpf_prog_load(BPF_PROG_TYPE_XDP, b"pass", b"GPL", instructions, len(instructions), None)
    if fd < 0:
        raise OSError(-fd, f"{interface}: {os.strerror(-fd)}: a program that passes everything")
    try:
        with host.entered():
            error = -libbpf.bpf_xdp_attach(socket.if_nametoindex(interface), fd, 0, None)
    finally:
        os.close(fd)
    if error:
        raise OSError(error, f"{interface}: {os.strerror(error)}: attaching a program")


def _configure(host: Host, interface: Interface) -> None:
    with host.netlink() as ip:
        (index,) = ip.link_lookup(ifname=interface.name)
        ip.link("set", index=index, state="up")
        ip.addr("add", index=index, address=interface.ipv4, prefixlen=24)
        ip.addr("add", index=index, address=interface.ipv6, prefixlen=64, flags=IFA_F_NODAD)
