"""Two balancers that share nothing, behind a router that spreads flows over both (ECMP, RFC 2992).

They serve the same configuration, in mode gue and with the same hash. The router moves open connections
from one balancer to the other, again and again, while the backends change: what one has recorded, the
other has never seen. VIPs and outer headers are of both families, mixed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest

from netns_tests.bed.servers import start_http
from netns_tests.bed.topology import Bed, Host
from netns_tests.bed.traffic import FAMILIES, RunningLoad, addresses, bracketed, go_on, loading
from netns_tests.bed.tunnelled import decap_status, end_tunnels_on

CONNECTIONS = 100  # to each of the VIPs, and as many again while a change is on
PAUSE_S = 0.25
LONGEST_STALL_S = 3  # of four retransmissions: after 0.2, 0.4, 0.8 and 1.6 s

# Documentation/networking/ip-sysctl.rst: fib_multipath_hash_policy and, for policy 3, fib_multipath_hash_fields.
BY_ADDRESSES, BY_PORTS, BY_FIELDS = 0, 1, 3
SOURCE_PORT = 0x10

Change = Callable[[Bed], list[str]]
Failures = list[dict[str, int]]


@dataclass(frozen=True)
class Spread:
    """How the router divides flows: the weight of each balancer, 0 for none, and what it hashes."""

    weights: tuple[int, int]
    policy: int = BY_PORTS


EVEN, FIRST_ONLY, SECOND_ONLY = Spread((1, 1)), Spread((1, 0)), Spread((0, 1))
MOVES = (
    FIRST_ONLY,
    SECOND_ONLY,
    EVEN,
    Spread((1, 1), BY_FIELDS),
    Spread((1, 5)),
    Spread((5, 1)),
    Spread((1, 1), BY_ADDRESSES),
    EVEN,
)


@dataclass(frozen=True)
class Pair:
    """The balancers of a bed, and what they share: services, and the router in front."""

    bed: Bed
    balancers: tuple[Host, Host]
    second_chance: bool

    def vip(self, family: str) -> str:
        return self.bed.vip4 if family == "ipv4" else self.bed.vip6

    def configure(self, backends: Sequence[str], *balancers: Host) -> None:
        """Both VIPs on these balancers, one after the other; `backends` as lb.toml has them."""
        self._apply("\n".join(self._service(family, backends) for family in FAMILIES), balancers)

    def forget(self) -> None:
        self._apply("", self.balancers)

    def route(self, spread: Spread) -> None:
        """Put it in force: flows that the router has sent to one balancer go to the other."""
        for family in FAMILIES:
            self._route(family, spread)

    def _service(self, family: str, backends: Sequence[str]) -> str:
        return (
            f'[[service]]\nvip = "{bracketed(self.vip(family))}:80"\nmode = "gue"\n'
            f"second_chance = {str(self.second_chance).lower()}\nbackends = [{', '.join(backends)}]\n"
        )

    def _apply(self, services: str, balancers: Sequence[Host]) -> None:
        path = self.bed.directory / "lb.toml"
        path.write_text(services)
        for balancer in balancers:
            self.bed.xdp_lb("apply", "--prune", "-f", str(path), "--no-vip-address", on=balancer)

    def _route(self, family: str, spread: Spread) -> None:
        router = self.bed.router
        assert router
        router.sysctl(f"net.{family}.fib_multipath_hash_fields", SOURCE_PORT)
        router.sysctl(f"net.{family}.fib_multipath_hash_policy", spread.policy)
        ways = zip(addresses(self.balancers, family), spread.weights, strict=True)
        hops = [f"nexthop via {address} weight {weight}" for address, weight in ways if weight]
        router.run(["ip", f"-{family[-1]}", "route", "replace", self.vip(family), *" ".join(hops).split()])


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    """Clients behind the router; four backends on the network of the balancers, which all end tunnels."""
    with Bed(backends=4, one_arm=True, router=True) as b:
        neighbours = f"{b.networks[1].prefix4},{b.networks[1].prefix6}"
        for backend in b.backends:
            start_http(b, backend)
            end_tunnels_on(b, backend, "--vip", f"{b.vip4},{b.vip6}", "--setup-vip", "--from", neighbours)
        yield b


@pytest.fixture(scope="module")
def balancers(bed: Bed) -> tuple[Host, Host]:
    return bed.lb, bed.add_balancer()


@pytest.fixture
def second_chance() -> bool:
    return True


@pytest.fixture
def pair(bed: Bed, balancers: tuple[Host, Host], second_chance: bool) -> Pair:
    """b1 to b3 are served, by rings that remember nothing of earlier tests."""
    made = Pair(bed, balancers, second_chance)
    made.forget()
    made.configure(three_backends(bed), *balancers)
    for balancer in balancers:
        bed.xdp_lb("attach", "eth0", "--no-vip-address", on=balancer)
    made.route(EVEN)
    return made


def three_backends(bed: Bed) -> list[str]:
    return four_backends(bed)[:3]


def four_backends(bed: Bed) -> list[str]:
    """Every other one under its IPv6 address."""
    return [f'"{host.ipv6 if number % 2 else host.ipv4}"' for number, host in enumerate(bed.backends)]


def first_drained(bed: Bed) -> list[str]:
    first, *others = three_backends(bed)
    return [f"{{ address = {first}, drain = true }}", *others]


changes = pytest.mark.parametrize("change", [four_backends, first_drained])


@contextlib.contextmanager
def clients(pair: Pair) -> Iterator[list[RunningLoad]]:
    """Connections to each VIP that stay open and go on asking."""
    with contextlib.ExitStack() as running:
        yield [
            running.enter_context(
                loading(
                    pair.bed,
                    f"http://{bracketed(pair.vip(family))}",
                    connections=CONNECTIONS,
                    keepalive=True,
                    timeout=LONGEST_STALL_S,
                    pause=PAUSE_S,
                )
            )
            for family in FAMILIES
        ]


def two_rounds(loads: Sequence[RunningLoad]) -> None:
    """Until as many requests have ended as all connections make in two rounds."""
    go_on(1, *loads)  # what is counted up to here may be older than what the test did last
    go_on(2 * CONNECTIONS, *loads)


def failures(loads: Sequence[RunningLoad]) -> Failures:
    """Ends the loads. Why requests failed, to each VIP."""
    return [dict(load.stop().reasons) for load in loads]


def second_chances(bed: Bed) -> int:
    """Packets that backends have sent on to each other."""
    return sum(decap_status(bed, backend)["sent_to_other_member"] for backend in bed.backends)


def resets(bed: Bed) -> int:
    """RST segments that backends have sent."""
    return sum(tcp_counter(backend, "OutRsts") for backend in bed.backends)


def tcp_counter(host: Host, name: str) -> int:
    """Of both families: /proc/net/snmp has names in one line, values in the next."""
    lines = host.run(["cat", "/proc/net/snmp"]).stdout.splitlines()
    names, values = (line.split() for line in lines if line.startswith("Tcp:"))
    return int(values[names.index(name)])


@contextlib.contextmanager
def unplugged(bed: Bed, host: Host) -> Iterator[None]:
    """Nothing reaches the host or comes from it."""
    port = f"{host.label}-eth0"
    bed.switch.run(["ip", "link", "set", port, "down"])
    try:
        yield
    finally:
        bed.switch.run(["ip", "link", "set", port, "up"])


@dataclass(frozen=True)
class Outcome:
    """Why requests failed on connections opened before a change, and on those opened while it was on.

    `resets`: sent by backends while the connections were open.
    """

    older: Failures
    newer: Failures
    resets: int


def change_while_flows_move(pair: Pair, backends: Sequence[str]) -> Outcome:
    """The balancers take the change one after the other; flows are moved in between, too."""
    first, second = pair.balancers
    before = resets(pair.bed)
    with clients(pair) as older:
        pair.configure(backends, first)
        for spread in (SECOND_ONLY, FIRST_ONLY, EVEN):
            pair.route(spread)
            two_rounds(older)
        pair.configure(backends, second)
        with clients(pair) as newer:
            for spread in MOVES:
                pair.route(spread)
                two_rounds([*older, *newer])
            sent = resets(pair.bed) - before
            return Outcome(failures(older), failures(newer), sent)


@changes
def test_no_connection_breaks_when_flows_move_between_balancers_while_backends_change(
    pair: Pair, change: Change
) -> None:
    before = second_chances(pair.bed)
    assert change_while_flows_move(pair, change(pair.bed)) == Outcome(older=[{}, {}], newer=[{}, {}], resets=0)
    assert second_chances(pair.bed) > before


@pytest.mark.parametrize("second_chance", [False])
def test_same_moves_reset_new_connections_and_no_older_ones_where_there_is_no_second_chance(pair: Pair) -> None:
    outcome = change_while_flows_move(pair, four_backends(pair.bed))
    assert outcome.older == [{}, {}]
    assert all("ECONNRESET" in reasons for reasons in outcome.newer)


@changes
def test_balancer_that_dies_while_backends_change_takes_no_connection_along(pair: Pair, change: Change) -> None:
    survivor, dying = pair.balancers
    with clients(pair) as older:
        pair.configure(change(pair.bed), survivor, dying)
        with clients(pair) as newer:
            before = second_chances(pair.bed)
            with unplugged(pair.bed, dying):
                pair.route(FIRST_ONLY)
                two_rounds([*older, *newer])
                assert failures(older) + failures(newer) == [{}] * 4
    assert second_chances(pair.bed) > before
