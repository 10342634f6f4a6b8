"""Status -> the text exposition format of Prometheus (version 0.0.4).

Enters: a Status. Leaves: text for a scrape, or for node_exporter's textfile collector. Counters are the kernel's own:
they survive restarts of any process and start at zero where the kernel's do (a backend removed and added again, a
detach from the last interface), which Prometheus handles as a reset.

Names and labels are stable. Every sample also has the label `netns`, except in the namespace `default`: to Prometheus a
missing label is an empty one, so `by (netns, vip)` serves both. Unknown values have no series: replies in modes whose
backends answer clients directly, SYNs of other protocols than TCP, neighbours while nothing is loaded, the health of
unchecked backends, open connections that nobody counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import version
from itertools import chain, compress

from lb.model.conditions import WHOLE
from lb.model.report import BackendStatus, InterfaceStatus, ServiceStatus, Status
from lb.model.state import Mode
from lb.model.vip import Protocol
from lb.paths import DEFAULT_NETNS

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STATES = ("active", "draining", "unresolved", "down")

TO_BACKEND, TO_CLIENT = 'direction="to_backend"', 'direction="to_client"'

Named = tuple[str, BackendStatus]  # with its labels

_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"


@dataclass(frozen=True, slots=True)
class Family:
    """All samples of one metric: the text of its labels (see `labels`) and its value, each."""

    name: str
    kind: Kind
    help: str
    samples: Iterable[tuple[str, float]]


def labels(**values: object) -> str:
    """As they stand within the braces: `vip="10.0.0.1:80/tcp",mode="nat"`."""
    return ",".join(f'{name}="{str(value).translate(_ESCAPES)}"' for name, value in values.items())


# With 10,000 backends: samples come one by one, since tuples that are kept are work for the garbage collector.


def exposition(status: Status) -> str:
    """All families of `status`, each with its help and type."""
    scope = "" if status.netns == DEFAULT_NETNS else labels(netns=status.netns)
    return "".join(_text(family, scope) for family in families(status))


def families(status: Status) -> Iterator[Family]:
    yield _gauge("xdp_lb_build_info", "Version of xdp-lb.", [(labels(version=version("xdp-lb")), 1)])
    yield _gauge("xdp_lb_loaded", "Whether programs and maps are loaded.", [(labels(), int(status.loaded))])
    yield from _of_interfaces(status.interfaces)
    yield from _of_services(status)
    yield from _of_backends(status)
    yield from _of_reasons(status)
    yield _gauge(
        "xdp_lb_map_memory_bytes",
        "Kernel memory used by a map.",
        [(labels(map=name), size) for name, size in status.maps.items()],
    )


def backend_state(status: BackendStatus, *, loaded: bool) -> str:
    """One of STATES: `unresolved` would be active if its next hop were resolved."""
    return "unresolved" if status.state == "active" and loaded and not status.resolved else status.state


def _text(family: Family, scope: str) -> str:
    lead, comma = f"{family.name}{{{scope}", "," if scope else ""
    samples = "".join([f"{lead}{comma if text else ''}{text}}} {value}\n" for text, value in family.samples])
    return f"# HELP {family.name} {family.help}\n# TYPE {family.name} {family.kind}\n{samples}"


def _gauge(name: str, text: str, samples: Iterable[tuple[str, float]]) -> Family:
    return Family(name, Kind.GAUGE, text, samples)


def _counter(name: str, text: str, samples: Iterable[tuple[str, float]]) -> Family:
    return Family(name, Kind.COUNTER, text, samples)


def _of_interfaces(interfaces: Iterable[InterfaceStatus]) -> Iterator[Family]:
    named = [(labels(interface=status.interface.name), status.attached) for status in interfaces]
    yield _gauge(
        "xdp_lb_interface_attached",
        "Whether the program is attached to a configured interface.",
        [(text, int(attached is not None)) for text, attached in named],
    )
    yield _gauge(
        "xdp_lb_interface_info",
        "XDP mode of an attached interface: native or generic.",
        [(f"{text},{labels(xdp_mode=attached.mode)}", 1) for text, attached in named if attached],
    )


def _of_services(status: Status) -> Iterator[Family]:
    named = [(labels(vip=each.service.vip), each) for each in status.services]
    yield _gauge(
        "xdp_lb_service_info",
        "Mode and protocol of a service.",
        [
            (f"{text},{labels(mode=each.service.mode, protocol=each.service.vip.protocol.label)}", 1)
            for text, each in named
        ],
    )
    yield _gauge(
        "xdp_lb_service_backends",
        "Number of backends of a service, by state.",
        _backends_by_state(named, status.loaded),
    )
    yield _gauge(
        "xdp_lb_service_ring_slots",
        "Number of slots in a service's ring.",
        [(text, each.service.ring_size) for text, each in named],
    )
    yield _gauge(
        "xdp_lb_service_slots_in_transition",
        "Ring slots whose older connections still use the backend from before the last change.",
        [(text, each.slots_in_transition) for text, each in named],
    )
    yield _gauge(
        "xdp_lb_service_flow_timeout_seconds",
        "Seconds without a further change after which a transition ends.",
        [(text, each.service.flow_timeout_s) for text, each in named],
    )


def _backends_by_state(named: Iterable[tuple[str, ServiceStatus]], loaded: bool) -> Iterator[tuple[str, int]]:
    for text, each in named:
        counts = Counter(backend_state(backend, loaded=loaded) for backend in each.backends)
        yield from ((f"{text},{labels(state=state)}", counts[state]) for state in STATES)


def _of_backends(status: Status) -> Iterator[Family]:
    named = [
        (f'{text},backend="{backend.backend}"', backend)
        for text, service in ((labels(vip=each.service.vip), each) for each in status.services)
        for backend in service.backends
    ]
    services = [each.service for each in status.services for _ in each.backends]
    yield from _of_desired_backends(named)
    yield from _of_found_backends(named, loaded=status.loaded)
    yield from _of_traffic(named, list(compress(named, (s.mode is Mode.NAT for s in services))))
    yield _gauge(
        "xdp_lb_backend_open_connections",
        "Connections open now: exact in mode nat, else an estimate.",
        ((text, b.open.number) for text, b in named if b.open.number is not None),
    )
    yield from _of_openings(named, compress(named, (s.vip.protocol is Protocol.TCP for s in services)))


def _of_desired_backends(named: Sequence[Named]) -> Iterator[Family]:
    yield _gauge(
        "xdp_lb_backend_weight", "Configured weight of a backend.", ((text, b.backend.weight) for text, b in named)
    )
    yield _gauge(
        "xdp_lb_backend_draining",
        "Whether a backend is draining.",
        ((text, int(b.backend.draining)) for text, b in named),
    )


def _of_found_backends(named: Sequence[Named], *, loaded: bool) -> Iterator[Family]:
    yield _gauge(
        "xdp_lb_backend_resolved",
        "Whether the next hop of a backend is resolved.",
        ((text, int(b.resolved)) for text, b in named if loaded),
    )
    yield _gauge(
        "xdp_lb_backend_up",
        "Whether health checks report a backend as up.",
        ((text, int(not b.condition.down)) for text, b in named if b.condition),
    )
    yield _gauge(
        "xdp_lb_backend_share_ratio",
        "Fraction of its weight that a backend gets: less than 1 during slow start.",
        ((text, b.condition.share / WHOLE) for text, b in named if b.condition),
    )


def _of_traffic(named: Sequence[Named], replying: Sequence[Named]) -> Iterator[Family]:
    yield _counter(
        "xdp_lb_backend_packets_total",
        "Packets from clients to a backend and, in mode nat, its replies.",
        chain(
            ((f"{text},{TO_BACKEND}", b.counters.packets) for text, b in named),
            ((f"{text},{TO_CLIENT}", b.counters.reply_packets) for text, b in replying),
        ),
    )
    yield _counter(
        "xdp_lb_backend_bytes_total",
        "Bytes from clients to a backend and, in mode nat, its replies.",
        chain(
            ((f"{text},{TO_BACKEND}", b.counters.bytes) for text, b in named),
            ((f"{text},{TO_CLIENT}", b.counters.reply_bytes) for text, b in replying),
        ),
    )


def _of_openings(named: Iterable[Named], of_tcp: Iterable[Named]) -> Iterator[Family]:
    yield _counter(
        "xdp_lb_backend_connections_total",
        "Connections opened: TCP SYNs or, in mode nat, flows.",
        ((text, b.counters.connections) for text, b in named),
    )
    yield _counter(
        "xdp_lb_backend_repeated_syns_total",
        "TCP SYNs retransmitted by clients.",
        ((text, b.counters.repeated_syns) for text, b in of_tcp),
    )


def _of_reasons(status: Status) -> Iterator[Family]:
    yield _by_reason("xdp_lb_dropped_packets_total", "Packets dropped, by reason.", status.drops)
    yield _by_reason("xdp_lb_passed_packets_total", "Packets passed to the host, by reason.", status.passes)
    yield _by_reason("xdp_lb_answered_packets_total", "Packets answered by the balancer, by reason.", status.answered)
    yield _by_reason("xdp_lb_noted_packets_total", "Packets forwarded with a remark, by reason.", status.noted)


def _by_reason(name: str, text: str, packets: Mapping[str, int]) -> Family:
    return _counter(name, text, [(labels(reason=reason), count) for reason, count in packets.items()])
