"""What was shown, in the event log: one ``impression`` per item of a slate, with its place and its propensity.

Answers do not wait for it. What has not been written when a gateway is killed is lost, and what cannot be written is
counted (``recsys_events_total`` with the outcome ``impression_lost``): an impression was never acknowledged to anybody.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Executor

from recsys.errors import EventStoreError, RequestError
from recsys.events import Event, EventStore
from recsys.events.base import check_events
from recsys.pipeline.requests import Recommendation
from recsys.pipeline.rules.exploration import PROPENSITY
from serve.config import IMPRESSION
from serve.observe.metrics import Meters

_BATCH = 1000
_MAX_WAITING = 100_000
_log = logging.getLogger(__name__)


class Impressions:
    """Of one gateway, in its event loop."""

    def __init__(self, store: EventStore, executor: Executor, meters: Meters) -> None:
        self._store = store
        self._executor = executor
        self._meters = meters
        self._waiting: list[Event] = []
        self._task: asyncio.Task[None] | None = None

    def shown(self, answer: Recommendation, now_ms: int, surface: str | None) -> None:
        """A slate for somebody with an id; a stranger's is of no use in a log by user."""
        if answer.user_id is None:
            return
        if len(self._waiting) + len(answer.items) > _MAX_WAITING:
            self._meters.count("recsys_events_total", "impression_lost", amount=len(answer.items))
            return
        shown = [
            Event(
                f"{IMPRESSION}:{answer.request_id}:{item.rank}",
                answer.user_id,
                item.item_id,
                IMPRESSION,
                now_ms,
                item.stage_scores.get(PROPENSITY, 1.0),
                answer.request_id,
                item.rank,
                surface or None,
            )
            for item in answer.items
        ]
        try:
            check_events(shown)  # one that no log can hold must not take others with it
        except RequestError as error:
            self._meters.count("recsys_events_total", "impression_lost", amount=len(shown))
            _log.warning("request %s: its impressions cannot be logged: %s", answer.request_id, error)
            return
        self._waiting += shown
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._write())

    async def written(self) -> None:
        """Wait until nothing waits any more."""
        if self._task is not None:
            await self._task

    async def _write(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:_BATCH], self._waiting[_BATCH:]
            try:
                result = await asyncio.get_running_loop().run_in_executor(self._executor, self._store.append, batch)
            except EventStoreError as error:
                self._meters.count("recsys_events_total", "impression_lost", amount=len(batch))
                _log.warning("%d impressions were not written: %s", len(batch), error)
            else:
                self._meters.count("recsys_events_total", IMPRESSION, amount=result.accepted)
