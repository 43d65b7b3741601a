"""The front of everything in process: a request goes in, a recommendation comes out.

In a notebook, without a server::

    recommender = Recommender.load("runs/bundles")
    recommender.recommend(user_id="42", top_k=5)
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import time
import uuid
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import pyarrow as pa

from recsys.bundle import Bundle, GoldenQuestion
from recsys.bundle import manifest as layout
from recsys.bundle.slates import Slates
from recsys.bundle.store import open_newest
from recsys.data.catalogue import Catalogue
from recsys.data.positives import PositivePolicy
from recsys.errors import BundleError, EventStoreError, RequestError
from recsys.events import UserState
from recsys.pipeline.build import Parts, build_runner, build_stages, local, warm_up
from recsys.pipeline.config import PipelineConfig, pipeline_config
from recsys.pipeline.popular import CATALOGUE, POPULAR
from recsys.pipeline.requests import (
    Recommendation,
    RecommendedItem,
    RecommendRequest,
    SearchRequest,
    SimilarRequest,
)
from recsys.pipeline.rules.pin import PINNED
from recsys.pipeline.runner import LocalStage, Runner
from recsys.pipeline.search import SEARCH, TextSearch
from recsys.pipeline.similarity import ItemSimilarity
from recsys.pipeline.stage import AsyncStage
from recsys.pipeline.users import NOBODY, HistoriesTable, Profile, Profiles, UserStates, query_of
from recsys.types import NO_FILTERS, Candidates, Filters, HistoryItem, Int32Array, Query

ResultT = TypeVar("ResultT")
STATE = "state"
_READERS = 16
"""reads of a remote event store that wait at the same time"""
_MAX_REASONS = 2
_MIN_COSINE = 0.1
"""below this two items have too little in common to name one as the reason for the other"""
_log = logging.getLogger(__name__)


class Recommender:
    """Answers requests.

    ``recommend`` and ``similar`` may be called from any thread, also from a notebook, where an event loop is running;
    ``arecommend`` is the coroutine that servers await in their own loop.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        runner: Runner,
        users: UserStates | None,
        policy: PositivePolicy,
        bundle_id: str,
        config: PipelineConfig | None = None,
        similarity: ItemSimilarity | None = None,
        slates: Slates | None = None,
        words: TextSearch | None = None,
    ) -> None:
        """``users`` None knows nobody; ``similarity`` None compares items by their categories; ``slates`` are shown
        while retrieval fails; without ``words`` nothing is found by them.
        """
        self.catalogue = catalogue
        self.runner = runner
        self.users = users
        self.policy = policy
        self.bundle_id = bundle_id
        self.config = config or PipelineConfig()
        self.similarity = similarity or ItemSimilarity(catalogue)
        self.slates = slates
        self.words = words
        self.profiles = Profiles(
            catalogue, policy, max_history=self.config.max_history, cache_size=self.config.user_cache
        )
        self._loop: _LoopThread | None = None
        self._lock = threading.Lock()
        self._readers: ThreadPoolExecutor | None = None

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        stages: Sequence[AsyncStage] | None = None,
        users: UserStates | None = None,
        *,
        config: PipelineConfig | None = None,
    ) -> Self:
        """The recommender of ``bundle`` over ``stages``, local or remote; None computes all of them in the event loop.

        ``users`` None knows nobody; ``config`` defaults to the Bundle's.
        """
        parts, config = Parts.of_bundle(bundle), config or pipeline_config(bundle)
        index = bundle.index() if bundle.has(layout.INDEX) else None
        return cls(
            parts.catalogue,
            build_runner(parts, config, stages),
            users,
            bundle.positive_policy,
            bundle.bundle_id,
            config,
            ItemSimilarity(parts.catalogue, parts.item_embeddings(), index),
            bundle.slates() if bundle.has(layout.SLATES) else None,
            TextSearch(bundle.text_index(), bundle.words()) if bundle.knows_words else None,
        )

    @classmethod
    def load(
        cls,
        uri: str | Path,
        store: UserStates | None = None,
        *,
        config: PipelineConfig | None = None,
        inline: bool = False,
    ) -> Self:
        """Open the Bundle at ``uri``, or the current one of the store there with all changes of items and rules up to
        now, and run its stages in this process.

        ``store`` says what is known of users; without one it is the histories in the Bundle, read-only. ``inline``
        computes in the event loop instead of threads: faster for one caller, but no deadline can interrupt a stage.

        :raises BundleError: when there is no usable Bundle.
        """
        bundle = open_newest(uri)
        config = config or pipeline_config(bundle)
        if store is None and bundle.has(layout.HISTORIES):
            store = HistoriesTable(bundle.histories())
        stages = build_stages(Parts.of_bundle(bundle), config)
        warm_up(stages)
        return cls.of(bundle, [local(stage, config, inline=inline) for stage in stages], store, config=config)

    def recommend(
        self,
        request: RecommendRequest | None = None,
        *,
        history: Sequence[HistoryItem | str] = (),
        filters: Filters = NO_FILTERS,
        **fields: Any,
    ) -> Recommendation:
        """Recommend, from ordinary code. Give a :class:`RecommendRequest`, or its fields by name; ``history`` may then
        be plain item ids.

        :raises RequestError: when the request cannot be answered as it is; its ``field`` says what is wrong.
        """
        if request is None:
            items = [HistoryItem(item) if isinstance(item, str) else item for item in history]
            try:
                request = RecommendRequest(history=items, filters=filters, **fields)
            except TypeError as error:
                raise RequestError(f"recommend() has no such field: {error}") from error
        return self._wait(self.arecommend(request))

    async def arecommend(self, request: RecommendRequest, *, now_ms: int | None = None) -> Recommendation:
        """Recommend, from a coroutine. ``now_ms`` pins the time of the request (milliseconds since 1970 UTC).

        A stage that fails is skipped and named in the answer; it is never an error.

        :raises RequestError: see :meth:`recommend`.
        """
        started = time.perf_counter()
        request.check(self.config)
        now_ms = time.time_ns() // 1_000_000 if now_ms is None else now_ms
        request_id = request.request_id or uuid.uuid4().hex
        degraded: tuple[str, ...] = ()
        try:
            profile = self.profiles.of(await self._state_in_time(request))
        except EventStoreError as error:
            extra = {"request_id": request_id, "stage": STATE}
            _log.warning("request %s: nothing is known of its user: %s", request_id, error, extra=extra)
            profile, degraded = NOBODY, (STATE,)
        told, unknown_items = self._told(request.history, now_ms) if request.history else (NOBODY, 0)
        query = query_of(
            profile,
            told,
            config=self.config,
            request_id=request_id,
            bundle_id=self.bundle_id,
            now_ms=now_ms,
            top_k=request.top_k,
            exclude_seen=request.exclude_seen,
            left_out=self._named(request.exclude_items) if request.exclude_items else None,
            filters=request.filters,
            diversity=request.diversity,
        )
        state_ms = (time.perf_counter() - started) * 1e3
        deadline_ms = self.config.deadline_ms if request.deadline_ms is None else request.deadline_ms
        spare = None
        if self.slates is not None and request.user_id is not None:
            spare = functools.partial(self.slates.of, request.user_id)
        slate = await self.runner.run(query, deadline_ms - state_ms, spare)
        reasons = self._reasons(query, slate.selected) if request.explain else None
        items = self._items(slate.selected, reasons)
        timings_ms = {**slate.timings_ms, STATE: state_ms, "total": (time.perf_counter() - started) * 1e3}
        return Recommendation(
            request_id,
            self.bundle_id,
            request.user_id,
            items,
            degraded + slate.degraded,
            timings_ms,
            unknown_items,
            slate,
        )

    def answer_golden(self, golden: GoldenQuestion) -> Recommendation:
        """The answer to a Bundle's golden query, no stage skipped.

        :raises BundleError: when a stage was skipped.
        """
        answer = self._wait(self.arecommend(golden_request(golden, self.config), now_ms=golden.now_ms))
        if answer.degraded:
            raise BundleError(f"Bundle {self.bundle_id}: the golden query was answered without {answer.degraded}")
        return answer

    def similar(self, request: SimilarRequest | str, top_k: int = 10) -> Recommendation:
        """The available items most like one item, itself left out; scores are cosines.

        :raises RequestError: when ``top_k`` is out of range, or no item has this id (``details["unknown"]``).
        """
        started = time.perf_counter()
        if isinstance(request, str):
            request = SimilarRequest(request, top_k)
        request.check(self.config)
        row = self._item_idx(request.item_id)
        if row is None:
            raise RequestError(f"item_id {request.item_id!r} is not in the catalogue", field="item_id", unknown=True)
        allowed = self.catalogue.allowed(Filters(), np.array([row], np.int32))
        item_idx, cosines = self.similarity.neighbours(row, request.top_k, allowed)
        items = self._items(Candidates.from_source("similar", item_idx, cosines, stage="similarity"), None)
        timings_ms = {"total": (time.perf_counter() - started) * 1e3}
        return Recommendation(request.request_id or uuid.uuid4().hex, self.bundle_id, None, items, (), timings_ms)

    def search(self, request: SearchRequest | str, top_k: int = 10) -> Recommendation:
        """The available items whose texts are nearest to some words; scores are cosines.

        :raises RequestError: when the request cannot be answered as it is, or the Bundle has no text encoder.
        """
        started = time.perf_counter()
        if isinstance(request, str):
            request = SearchRequest(request, top_k)
        request.check(self.config)
        if self.words is None:
            raise RequestError(f"Bundle {self.bundle_id} was trained on ids alone and knows no words", field="query")
        allowed = self.catalogue.allowed(request.filters, self._named(request.exclude_items))
        item_idx, cosines = self.words.find(request.query, request.top_k, allowed)
        items = self._items(Candidates.from_source(SEARCH, item_idx, cosines, stage=SEARCH), None)
        timings_ms = {"total": (time.perf_counter() - started) * 1e3}
        return Recommendation(request.request_id or uuid.uuid4().hex, self.bundle_id, None, items, (), timings_ms)

    def user(self, user_id: str) -> UserState | None:
        """What is known of a user, or None."""
        return self._state(user_id)

    def item(self, item_id: str) -> dict[str, Any] | None:
        """The catalogue's row of an item as plain values (``created_at`` is a datetime), or None."""
        row = self._item_idx(item_id)
        return None if row is None else self.catalogue.item(row)

    def close(self) -> None:
        """Stop the threads of this object. The event store is its owner's to close."""
        with self._lock:
            if self._loop is not None:
                self._loop.close()
                self._loop = None
            if self._readers is not None:
                self._readers.shutdown(wait=False, cancel_futures=True)
                self._readers = None
        for stage in self.runner.stages:
            if isinstance(stage, LocalStage):
                stage.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _state(self, user_id: str | None) -> UserState | None:
        return None if user_id is None or self.users is None else self.users.user(user_id)

    async def _state_in_time(self, request: RecommendRequest) -> UserState | None:
        user_id = request.user_id
        if user_id is None or self.users is None or not self.users.is_remote:
            return self._state(user_id)
        with self._lock:
            if self._readers is None:
                self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="state")
            reading = asyncio.get_running_loop().run_in_executor(self._readers, self._state, user_id)
        # Of a short deadline the stages must get something, too. What a long one has over theirs goes to the state:
        # without it, what was seen or hidden would be shown.
        deadline_ms = self.config.deadline_ms if request.deadline_ms is None else request.deadline_ms
        budgets = self.config.budgets_ms
        spare_ms = deadline_ms - budgets.stages
        budget_ms = max(spare_ms, min(budgets.state, deadline_ms / 4))
        try:
            async with asyncio.timeout(budget_ms / 1e3):
                return await reading
        except TimeoutError as error:
            raise EventStoreError(f"the event store did not answer within {budget_ms:g} ms") from error

    def _named(self, item_ids: Sequence[str]) -> Int32Array:
        """int32: the known ones among items that a request wants to leave out."""
        rows = self.catalogue.id_map.rows(item_ids)
        return rows[rows >= 0]

    def _item_idx(self, item_id: str) -> int | None:
        row = int(self.catalogue.id_map.rows([item_id])[0])
        return None if row < 0 or self.catalogue.is_removed(row) else row

    def _told(self, history: Sequence[HistoryItem], now_ms: int) -> tuple[Profile, int]:
        """What a request tells of its user, and how many entries are unknown. One without an event is a positive."""
        rows = self.catalogue.id_map.rows([item.item_id for item in history])
        times = np.array([now_ms if h.timestamp_ms is None else h.timestamp_ms for h in history], np.int64)
        events = pa.array([item.event for item in history], pa.string())
        weights, negative = self.policy.judge(events, pa.array([item.value for item in history], pa.float32()))
        plain = np.array([item.event is None for item in history])
        told = Profile.resolve(rows, times, plain | (weights > 0), negative, self.config.max_history)
        return told, int(np.count_nonzero(rows < 0))

    def _items(self, selected: Candidates, reasons: list[tuple[str, ...]] | None) -> tuple[RecommendedItem, ...]:
        if not len(selected):
            return ()
        ids = self.catalogue.id_map.take(selected.item_idx)
        titles = self.catalogue.titles(selected.item_idx)
        scores = selected.score.tolist()
        stages = [(stage, values.tolist()) for stage, values in selected.stage_scores.items()]
        sources: dict[int, tuple[str, ...]] = {}
        items: list[RecommendedItem] = []
        for rank, bits in enumerate(selected.source_bits.tolist()):
            if bits not in sources:
                sources[bits] = tuple(selected.sources_of(rank))
            # A stage that did not see the item has NaN for it, which is no score.
            stage_scores = {stage: values[rank] for stage, values in stages if values[rank] == values[rank]}
            why = None if reasons is None else reasons[rank]
            items.append(
                RecommendedItem(ids[rank], titles[rank], scores[rank], rank, sources[bits], stage_scores, why)
            )  # fmt: skip
        return tuple(items)

    def _reasons(self, query: Query, selected: Candidates) -> list[tuple[str, ...]]:
        """For each item, the entries of the history most like it, and what its source says."""
        history = np.unique(query.history.item_idx)
        cosines = self.similarity.cosines(selected.item_idx, history) if len(history) and len(selected) else None
        titles = self.catalogue.titles(history) if len(history) else []
        reasons: list[tuple[str, ...]] = []
        for row in range(len(selected)):
            found: list[str] = []
            sources = selected.sources_of(row)
            if PINNED in sources:
                found.append("placed here by a rule")
            if cosines is not None:
                best = np.argsort(-cosines[row], kind="stable")[:_MAX_REASONS]
                found += [f"because of {titles[i]}" for i in best.tolist() if cosines[row, i] >= _MIN_COSINE]
            if POPULAR in sources:
                found.append("popular now")
            if CATALOGUE in sources:
                found.append("from the catalogue, as nothing better matches")
            if not found:
                found.append("fits the history as a whole" if len(history) else "a good start for someone new")
            reasons.append(tuple(found))
        return reasons

    def _wait(self, coroutine: Coroutine[Any, Any, ResultT]) -> ResultT:
        with self._lock:
            if self._loop is None:
                self._loop = _LoopThread()
            loop = self._loop
        return loop.wait(coroutine)


class _LoopThread:
    """An event loop in a thread of its own, so that blocking calls work where a loop is running already."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="recommender", daemon=True)
        self._thread.start()

    def wait(self, coroutine: Coroutine[Any, Any, ResultT]) -> ResultT:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def golden_request(golden: GoldenQuestion, config: PipelineConfig) -> RecommendRequest:
    """The request that a golden query stands for; its time is given to ``arecommend`` beside it."""
    return RecommendRequest(
        history=golden.history,
        top_k=golden.top_k,
        filters=golden.filters,
        exclude_seen=golden.exclude_seen,
        deadline_ms=config.max_deadline_ms,
        request_id="golden",
    )
