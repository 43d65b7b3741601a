"""What is counted and measured, and the way to Prometheus.

Every node of Ray exports what its processes report, with ``ray_`` before each name; Prometheus finds the nodes through
the file that Ray keeps (``cluster/README.md``). Labels come from the code alone, never from a request, so the
number of series is bounded. ``cluster/monitoring/grafana.json`` shows all of it.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from weakref import WeakKeyDictionary

from recsys.pipeline.cache import Cache

_MS = (1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0, 50.0, 70.0, 100.0, 150.0, 200.0, 300.0, 500.0, 1e3, 3e3, 1e4)
_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3.6e3, 1e4, 8.64e4, 6e5, 3e6)
_SIZES = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0, 128.0)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Metric:
    """One name of :data:`METRICS`."""

    kind: Literal["counter", "gauge", "histogram"]
    description: str
    labels: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()


METRICS: Mapping[str, Metric] = {
    "recsys_requests_total": Metric("counter", "HTTP requests by route and status", ("route", "outcome")),
    "recsys_request_ms": Metric("histogram", "Time to answer an HTTP request (ms)", ("route",), _MS),
    "recsys_in_flight": Metric("gauge", "HTTP requests being answered"),
    "recsys_stage_ms": Metric(
        "histogram",
        "Time per stage (ms): total as the runner waits for it, compute inside it",
        ("stage", "component"),
        _MS,
    ),
    "recsys_stage_outcomes_total": Metric(
        "counter",
        "Stages by what became of them: ok, timeout, overloaded, failed, skipped, unasked",
        ("stage", "outcome"),
    ),
    "recsys_breaker_open": Metric("gauge", "1 while the circuit breaker of a stage is not closed", ("stage",)),
    "recsys_queue": Metric("gauge", "Calls of a stage that run or wait in this process", ("stage",)),
    "recsys_batch_size": Metric("histogram", "Queries that one call of a stage took together", ("stage",), _SIZES),
    "recsys_removed_total": Metric("counter", "Candidates that did not make it, by whom and why", ("stage", "reason")),
    "recsys_cache_total": Metric("counter", "Look-ups: hit or miss", ("cache", "outcome")),
    "recsys_bundle_age_s": Metric("gauge", "Seconds since the Bundle that answers was made"),
    "recsys_bundles_open": Metric("gauge", "Bundles this gateway has open: 1, and more while one takes over"),
    "recsys_bundles_refused": Metric("gauge", "Bundles that the store points to and this gateway does not serve"),
    "recsys_events_total": Metric(
        "counter", "Events: accepted, known already (duplicate), impression or impression_lost", ("outcome",)
    ),
    "recsys_event_lag_s": Metric(
        "histogram", "Seconds between an event and its arrival, of the oldest in each batch", (), _SECONDS
    ),
    "recsys_shown_total": Metric(
        "counter", "Items shown, by popularity: head is the first hundredth of the catalogue", ("popularity",)
    ),
    "recsys_coverage_share": Metric("gauge", "Share of the catalogue that this gateway showed in the last ten minutes"),
}

Labels = tuple[str, ...]


class Sink(Protocol):
    """Takes what is measured: the name, the value, and the labels by name."""

    def __call__(self, name: str, value: float, labels: Mapping[str, str]) -> None: ...


class Meters:
    """Collects in this process. Counters are added up here and handed on by :meth:`flush`. For several threads."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._counts: defaultdict[tuple[str, Labels], float] = defaultdict(float)
        self._lock = threading.Lock()
        self._watched: list[Callable[[], None]] = []

    def count(self, name: str, *labels: str, amount: float = 1.0) -> None:
        """Add to a counter; ``labels`` in the order of :data:`METRICS`."""
        with self._lock:
            self._counts[name, labels] += amount

    def observe(self, name: str, value: float, *labels: str) -> None:
        """One value of a histogram."""
        self._sink(name, value, _by_name(name, labels))

    def gauge(self, name: str, value: float, *labels: str) -> None:
        """What something is now."""
        self._sink(name, value, _by_name(name, labels))

    def watch(self, look: Callable[[], None]) -> None:
        """Call ``look`` at each :meth:`flush`; it sets gauges."""
        self._watched.append(look)

    def watch_caches(self, name: str, look: Callable[[], Sequence[Cache[Any, Any]]]) -> None:
        """Count the hits and misses of the caches that ``look`` names; they come and go."""
        before: WeakKeyDictionary[Cache[Any, Any], tuple[int, int]] = WeakKeyDictionary()

        def count() -> None:
            for cache in look():
                now = cache.num_hits, cache.num_misses
                for outcome, number, known in zip(("hit", "miss"), now, before.get(cache, (0, 0)), strict=True):
                    self.count("recsys_cache_total", name, outcome, amount=number - known)
                before[cache] = now

        self.watch(count)

    def flush(self) -> None:
        """Hand everything on, to be called every few seconds. What cannot be looked at is logged: nothing that is
        measured may harm what it measures.
        """
        for look in self._watched:
            try:
                look()
            except Exception:  # noqa: BLE001 see above
                _log.exception("a metric cannot be read")
        with self._lock:
            counts, self._counts = self._counts, defaultdict(float)
        for (name, labels), amount in counts.items():
            if amount:
                self._sink(name, amount, _by_name(name, labels))


def _by_name(name: str, labels: Sequence[str]) -> dict[str, str]:
    return dict(zip(METRICS[name].labels, labels, strict=True))


def ray_sink() -> Sink:
    """To the metrics agent of this node."""
    from ray.util.metrics import Counter, Gauge, Histogram

    record: dict[str, Callable[..., None]] = {}
    for name, metric in METRICS.items():
        if metric.kind == "counter":
            record[name] = Counter(name, description=metric.description, tag_keys=metric.labels).inc
        elif metric.kind == "gauge":
            record[name] = Gauge(name, description=metric.description, tag_keys=metric.labels).set
        else:
            record[name] = Histogram(
                name, description=metric.description, boundaries=list(metric.boundaries), tag_keys=metric.labels
            ).observe

    def sink(name: str, value: float, labels: Mapping[str, str]) -> None:
        record[name](value, labels)

    return sink


def no_sink(name: str, value: float, labels: Mapping[str, str]) -> None:
    """To nowhere."""
