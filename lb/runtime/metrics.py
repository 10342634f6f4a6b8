"""What the daemon counts of itself: how long its API takes to answer, and what its changes moved.

Enters: each request that passes through, and reports of changes. Leaves: text of Prometheus' exposition format, which
follows that of lb.formats.prometheus. Times are to the start of the answer: a stream of events has no end of its own.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

from lb.model.report import Report
from lb.runtime.rejections import REASONS

BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class DaemonMetrics:
    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._answers = Histogram(
            "xdp_lb_api_request_duration_seconds",
            "Seconds from a request to the start of its response.",
            ["method", "route", "status"],
            buckets=BUCKETS_S,
            registry=self._registry,
        )
        self._changes = Counter(
            "xdp_lb_changes", "Services added, changed and removed by the daemon.", ["change"], registry=self._registry
        )
        self._moved = Counter(
            "xdp_lb_ring_slots_moved", "Ring slots that changes assigned to another backend.", registry=self._registry
        )

        self._refused = Gauge(
            "xdp_lb_upgrade_refused",
            "Whether the last upgrade of the program failed and the older one is still running.",
            registry=self._registry,
        )

        self._config_loaded = Gauge(
            "xdp_lb_config_last_reload_successful",
            "Whether the configuration file was applied when it was last read.",
            registry=self._registry,
        )
        self._config_loaded.set(1)
        self._rejected = Counter(
            "xdp_lb_api_rejected",
            "Connections and requests that the API rejected.",
            ["reason"],
            registry=self._registry,
        )
        for reason in REASONS:
            self._rejected.labels(reason)

    def config_loaded(self, loaded: bool) -> None:
        self._config_loaded.set(loaded)

    def rejected(self, reason: str) -> None:
        self._rejected.labels(reason).inc()

    def upgrade_refused(self, refused: bool) -> None:
        self._refused.set(refused)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        self._answers.labels(method, route, str(status)).observe(seconds)

    def changed(self, report: Report) -> None:
        for change in () if report.dry_run else report.changes:
            self._changes.labels(str(change.kind)).inc()
            self._moved.inc(change.plan.moved if change.plan else 0)

    def exposition(self) -> str:
        return generate_latest(self._registry).decode()
