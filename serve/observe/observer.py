"""What one gateway tells of itself: metrics, traces and, if wished, a line per request."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from starlette.types import Scope

from recsys.data.catalogue import Catalogue
from recsys.events import Event
from recsys.pipeline.cache import Cache
from recsys.pipeline.recommender import STATE
from recsys.pipeline.requests import Recommendation
from recsys.pipeline.runner import LocalStage
from recsys.pipeline.stage import STAGES, Stage
from recsys.pipeline.stages.retrieval import RetrievalStage
from recsys.types import Int32Array
from serve.config import GatewayConfig
from serve.live.service import Generation, Service
from serve.observe.metrics import Meters
from serve.observe.traces import describe

_HEAD_SHARE = 0.01
_COVERAGE_S = 300.0
"""coverage counts this window and the one before it"""
_log = logging.getLogger(__name__)


class Observer:
    """Sees every request and every answer of one gateway, in its event loop."""

    def __init__(self, service: Service, config: GatewayConfig, meters: Meters) -> None:
        self.traces: Cache[str, tuple[Recommendation, Catalogue]] = Cache(config.max_traces)
        """the newest answers by ``request_id``, each with the catalogue of its items"""
        self._service = service
        self.meters = meters
        self._access_log = config.access_log
        self._in_flight = 0
        self._shown: dict[str, Shown] = {}
        meters.watch(self._look)
        watch_stages(meters, service)

    def arrived(self) -> float:
        """A request is there. What is returned goes to :meth:`left`."""
        self._in_flight += 1
        return time.perf_counter()

    def left(self, scope: Scope, status: int, started: float) -> None:
        """It was answered with ``status``; 499 where the caller had gone."""
        self._in_flight -= 1
        took_ms = (time.perf_counter() - started) * 1e3
        route = getattr(scope.get("route"), "path", "none")
        self.meters.count("recsys_requests_total", route, str(status))
        self.meters.observe("recsys_request_ms", took_ms, route)
        if self._access_log:
            about = {"request_id": scope["request_id"], "route": route, "status": status, "total_ms": round(took_ms, 3)}
            _log.info("%s %d", route, status, extra=about)

    def answered(self, answer: Recommendation, generation: Generation) -> None:
        """A recommendation was made from this Bundle."""
        slate, meters = answer.slate, self.meters
        assert slate is not None, "similar items come from no stage"
        self.traces.put(answer.request_id, (answer, generation.catalogue))
        for stage, outcome in slate.outcomes.items():
            meters.count("recsys_stage_outcomes_total", stage, outcome)
        for stage, busy_ms in slate.busy_ms.items():
            meters.observe("recsys_stage_ms", busy_ms, stage, "compute")
        for stage in slate.outcomes.keys() & slate.timings_ms.keys():
            meters.observe("recsys_stage_ms", slate.timings_ms[stage], stage, "total")
        meters.observe("recsys_stage_ms", answer.timings_ms[STATE], STATE, "total")
        meters.count("recsys_stage_outcomes_total", STATE, "failed" if STATE in answer.degraded else "ok")
        for each in slate.removals():
            meters.count("recsys_removed_total", each.stage, each.reason, amount=len(each.item_idx))
        items = slate.selected.item_idx
        num_head = self._of(generation).show(items)
        meters.count("recsys_shown_total", "head", amount=num_head)
        meters.count("recsys_shown_total", "tail", amount=len(items) - num_head)

    def recorded(self, events: Sequence[Event], num_duplicates: int) -> None:
        """A batch of events is durable."""
        self.meters.count("recsys_events_total", "accepted", amount=len(events) - num_duplicates)
        self.meters.count("recsys_events_total", "duplicate", amount=num_duplicates)
        oldest_ms = min(event.timestamp_ms for event in events)
        self.meters.observe("recsys_event_lag_s", max(0.0, time.time() - oldest_ms / 1e3))

    def trace(self, request_id: str) -> dict[str, Any] | None:
        """How the answer to that request came about, or None where it was not given here or is too long ago."""
        found = self.traces.get(request_id)
        return None if found is None else describe(*found)

    def _of(self, generation: Generation) -> Shown:
        """What was shown from this Bundle, whose items have numbers of their own."""
        shown = self._shown.get(generation.bundle_id)
        if shown is None:
            shown = Shown(generation.recommender.runner.selection.popular.item_idx)
            opened = {each.bundle_id for each in self._service.generations}
            self._shown = {each: kept for each, kept in self._shown.items() if each in opened}
            self._shown[generation.bundle_id] = shown
        return shown

    def _look(self) -> None:
        current = self._service.current
        self.meters.gauge("recsys_in_flight", self._in_flight)
        self.meters.gauge("recsys_bundle_age_s", time.time() - current.bundle.manifest.created_at.timestamp())
        self.meters.gauge("recsys_coverage_share", self._of(current).coverage)
        self.meters.gauge("recsys_bundles_open", len(self._service.generations))
        self.meters.gauge("recsys_bundles_refused", len(self._service.refused))


class Shown:
    """Which items were shown lately, and how many of them are popular ones."""

    def __init__(self, popular: Int32Array) -> None:
        """``popular``: every item, the most popular first."""
        num_items = len(popular)
        self._head = np.zeros(num_items, np.bool_)
        self._head[popular[: max(1, round(_HEAD_SHARE * num_items))]] = True
        self._now = np.zeros(num_items, np.bool_)
        self._before = np.zeros(num_items, np.bool_)
        self._turned = time.monotonic()

    def show(self, item_idx: Int32Array) -> int:
        """These are; how many of them are popular."""
        self._turn()
        self._now[item_idx] = True
        return int(np.count_nonzero(self._head[item_idx]))

    @property
    def coverage(self) -> float:
        """Share of the catalogue that was shown, 0 to 1."""
        self._turn()
        return float(np.mean(self._now | self._before))

    def _turn(self) -> None:
        while time.monotonic() - self._turned > _COVERAGE_S:
            self._before, self._now = self._now, np.zeros_like(self._now)
            self._turned += _COVERAGE_S


def watch_stages(meters: Meters, service: Service) -> None:
    """Queues, breakers and caches of ``service``."""

    def local() -> list[LocalStage]:
        stages = [stage for each in service.generations for stage in each.recommender.runner.stages]
        return [stage for stage in stages if isinstance(stage, LocalStage)]

    def look() -> None:
        # All stages each time: one that the next Bundle lacks must not stay as it was.
        queued: dict[str, int] = dict.fromkeys(STAGES, 0)
        opened: dict[str, int] = dict.fromkeys(STAGES, 0)
        for stage in local():
            queued[stage.name] += stage.num_in_flight
        for each in service.generations:
            for stage, breaker in each.recommender.runner.breakers.items():
                opened[stage] |= breaker.open
        for stage in STAGES:
            meters.gauge("recsys_queue", queued[stage], stage)
            meters.gauge("recsys_breaker_open", opened[stage], stage)

    meters.watch(look)
    meters.watch_caches("profiles", lambda: [each.recommender.profiles.cache for each in service.generations])
    watch_encodings(meters, lambda: [each.stage for each in local()])


def watch_encodings(meters: Meters, stages: Callable[[], Sequence[Stage]]) -> None:
    """The caches of encoded histories of the stages that ``stages`` names when it is asked."""
    meters.watch_caches(
        "encodings", lambda: [stage.encodings for stage in stages() if isinstance(stage, RetrievalStage)]
    )
