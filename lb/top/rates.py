"""Status after status -> what happens a second: the figures of `xdp-lb top` (pure).

Enters: a Status and the time it was taken. Leaves: a View, services and backends with the rates since the Status
before. A counter that has decreased was reset, so a rate is never negative.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from lb.formats.prometheus import backend_state
from lb.model.forwarding import Counters, OpenConnections
from lb.model.report import BackendStatus, ServiceStatus, Status
from lb.model.vip import Vip

KEPT = 200  # values of a sparkline, more than a terminal shows


class Order(StrEnum):
    """What rows are sorted by: rates from the highest down, names as VIPs and addresses are ordered."""

    PACKETS = "packets"
    BITS = "bits"
    CONNECTIONS = "connections"
    NAME = "name"

    @property
    def next(self) -> Order:
        orders = list(Order)
        return orders[(orders.index(self) + 1) % len(orders)]


@dataclass(frozen=True, slots=True)
class Rates:
    """A second's worth, to the backends and (mode nat) back to the clients."""

    connections: float = 0
    packets: float = 0
    bits: float = 0
    reply_packets: float = 0
    reply_bits: float = 0
    repeated_syns: float = 0

    def __add__(self, other: Rates) -> Rates:
        return Rates(
            self.connections + other.connections,
            self.packets + other.packets,
            self.bits + other.bits,
            self.reply_packets + other.reply_packets,
            self.reply_bits + other.reply_bits,
            self.repeated_syns + other.repeated_syns,
        )

    def by(self, order: Order) -> float:
        """How busy it is, replies included."""
        if order is Order.PACKETS:
            return self.packets + self.reply_packets
        return self.bits + self.reply_bits if order is Order.BITS else self.connections


@dataclass(frozen=True, slots=True)
class BackendRow:
    name: str
    state: str  # one of lb.formats.prometheus.STATES
    rates: Rates
    open: OpenConnections


@dataclass(frozen=True, slots=True)
class ServiceRow:
    """history: packets a second in both directions, one for each Status so far, the latest last."""

    name: str
    mode: str
    slots_in_transition: int
    rates: Rates
    open: OpenConnections
    backends: tuple[BackendRow, ...]
    history: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ReasonRow:
    """Why packets were not balanced: how many a second, and how many ever."""

    name: str
    rate: float
    packets: int


@dataclass(frozen=True, slots=True)
class View:
    """interfaces: name -> XDP mode, None: detached. measured: rates are known: from the second Status on. repeats:
    some backend has ever had a SYN twice."""

    netns: str
    interfaces: Mapping[str, str | None]
    services: tuple[ServiceRow, ...]
    reasons: tuple[ReasonRow, ...]
    measured: bool
    repeats: bool

    @property
    def total(self) -> Rates:
        return sum((service.rates for service in self.services), Rates())

    def rate_of(self, prefix: str) -> float:
        """Of all reasons whose names start so, together."""
        return sum(reason.rate for reason in self.reasons if reason.name.startswith(prefix))

    def ordered(self, order: Order) -> list[ServiceRow]:
        if order is Order.NAME:
            return list(self.services)
        return sorted(self.services, key=lambda row: -row.rates.by(order))


def ordered_backends(service: ServiceRow, order: Order) -> list[BackendRow]:
    if order is Order.NAME:
        return list(service.backends)
    return sorted(service.backends, key=lambda row: -row.rates.by(order))


class Meter:
    """Remembers the Status before, and the recent past of each service."""

    def __init__(self) -> None:
        self._taken_s = 0.0
        self._counters: dict[tuple[Vip, str], Counters] | None = None
        self._reasons: Mapping[str, int] = {}
        self._histories: dict[Vip, deque[float]] = {}

    def take(self, status: Status, now_s: float) -> View:
        """The rates from the Status before to this one, taken at `now_s` of a clock that is never set."""
        seconds = now_s - self._taken_s if self._counters is not None else 0.0
        services = tuple(self._service(each, status.loaded, seconds) for each in status.services)
        reasons = {**status.answered, **status.drops, **status.passes, **status.noted}
        view = View(
            status.netns,
            {i.interface.name: i.attached.mode if i.attached else None for i in status.interfaces},
            services,
            tuple(ReasonRow(name, self._reason_rate(name, n, seconds), n) for name, n in reasons.items()),
            measured=seconds > 0,
            repeats=any(each.counters.repeated_syns for service in status.services for each in service.backends),
        )
        self._remember(status, reasons, now_s)
        return view

    def _remember(self, status: Status, reasons: Mapping[str, int], now_s: float) -> None:
        self._taken_s, self._reasons = now_s, reasons
        self._counters = {
            (service.service.vip, str(each.backend)): each.counters
            for service in status.services
            for each in service.backends
        }
        served = {service.service.vip for service in status.services}
        self._histories = {vip: history for vip, history in self._histories.items() if vip in served}

    def _service(self, status: ServiceStatus, loaded: bool, seconds: float) -> ServiceRow:
        vip = status.service.vip
        backends = tuple(self._backend(vip, each, loaded, seconds) for each in status.backends)
        rates = sum((each.rates for each in backends), Rates())
        history = self._histories.setdefault(vip, deque(maxlen=KEPT))
        if seconds:
            history.append(rates.by(Order.PACKETS))
        return ServiceRow(
            str(vip),
            str(status.service.mode),
            status.slots_in_transition,
            rates,
            status.open,
            backends,
            tuple(history),
        )

    def _backend(self, vip: Vip, status: BackendStatus, loaded: bool, seconds: float) -> BackendRow:
        name = str(status.backend)
        before = (self._counters or {}).get((vip, name), Counters())
        rates = _rates(before, status.counters, seconds)
        return BackendRow(name, backend_state(status, loaded=loaded), rates, status.open)

    def _reason_rate(self, name: str, packets: int, seconds: float) -> float:
        return _increase(self._reasons.get(name, 0), packets) / seconds if seconds else 0.0


def _increase(before: int, after: int) -> int:
    return after - before if after >= before else after


def _rates(before: Counters, after: Counters, seconds: float) -> Rates:
    if not seconds:
        return Rates()
    start = Counters() if _is_new(before, after) else before
    return Rates(
        (after.connections - start.connections) / seconds,
        (after.packets - start.packets) / seconds,
        8 * (after.bytes - start.bytes) / seconds,
        (after.reply_packets - start.reply_packets) / seconds,
        8 * (after.reply_bytes - start.reply_bytes) / seconds,
        (after.repeated_syns - start.repeated_syns) / seconds,
    )


def _is_new(before: Counters, after: Counters) -> bool:
    """All counters of a backend are reset together: one that has decreased implies the others."""
    return (
        after.packets < before.packets
        or after.bytes < before.bytes
        or after.reply_packets < before.reply_packets
        or after.reply_bytes < before.reply_bytes
        or after.connections < before.connections
        or after.repeated_syns < before.repeated_syns
    )
