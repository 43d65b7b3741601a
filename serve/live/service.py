"""What one gateway replica holds: the event store, and per Bundle a recommender and the proof that it works."""

from __future__ import annotations

import asyncio
import logging
import time
import zlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from recsys.bundle import Bundle
from recsys.bundle import manifest as layout
from recsys.bundle.changes import ItemLog
from recsys.bundle.live import RuledBundle, split_id
from recsys.bundle.rule_log import RuleLog
from recsys.data.catalogue import Catalogue
from recsys.errors import BundleError, RequestError
from recsys.events import EventStore
from recsys.libraries import installed_version
from recsys.pipeline.build import Parts, build_stages, local, warm_up
from recsys.pipeline.config import pipeline_config
from recsys.pipeline.recommender import STATE, Recommender, golden_request
from recsys.pipeline.requests import HistoryItem, Recommendation, RecommendRequest
from recsys.pipeline.rules import RuleConfig
from recsys.pipeline.stage import STAGES, AsyncStage
from serve.config import ServeConfig
from serve.live.canary import Tally

_PROOF_PAUSE_S = 0.2
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Generation:
    """One Bundle, ready to answer; made by :meth:`open`."""

    bundle: Bundle
    recommender: Recommender
    proven: bool = field(default=False, init=False)
    """whether the golden query was answered as it must be"""
    num_in_flight: int = field(default=0, init=False)
    """requests that are being answered from it"""
    tally: Tally = field(default_factory=Tally, init=False)

    @classmethod
    def open(
        cls, bundle: Bundle, store: EventStore, remote: Mapping[str, AsyncStage], absent: Sequence[str] = ()
    ) -> Self:
        """Build the stages of ``bundle`` that are not ``remote``, over the users of ``store``.

        ``absent`` names stages that were looked for elsewhere and that the Bundle does not have.

        :raises BundleError: when the Bundle is not usable.
        """
        parts, settings = Parts.of_bundle(bundle), pipeline_config(bundle)
        here = build_stages(parts, settings, [name for name in STAGES if name not in remote and name not in absent])
        if not remote:
            warm_up(here)
        by_name: dict[str, AsyncStage] = {**remote, **{stage.name: local(stage, settings) for stage in here}}
        stages = [by_name[name] for name in STAGES if name in by_name]
        return cls(bundle, Recommender.of(bundle, stages, store))

    def seed(self, store: EventStore) -> None:
        """Make the histories of this Bundle what user states start from: for one that is proven, and that all get.

        :raises EventStoreError: when the store refuses.
        """
        if self.bundle.has(layout.HISTORIES):
            store.seed(self.base_id, self.bundle.histories(), self.bundle.manifest.events_watermark)

    @property
    def bundle_id(self) -> str:
        """Of the Bundle and the versions of its catalogue and its rules, see :mod:`recsys.bundle.live`."""
        return self.bundle.bundle_id

    @property
    def base_id(self) -> str:
        """Of the Bundle alone."""
        return split_id(self.bundle_id)[0]

    @property
    def own_rules(self) -> tuple[RuleConfig, ...]:
        """Those of the Bundle, whatever was changed since."""
        bundle = self.bundle.base if isinstance(self.bundle, RuledBundle) else self.bundle
        return pipeline_config(bundle).rules

    @property
    def catalogue(self) -> Catalogue:
        return self.recommender.catalogue

    @property
    def manifest(self) -> dict[str, Any]:
        """The Bundle's manifest as plain values, without the list of files."""
        return self.bundle.manifest.model_dump(mode="json", exclude={"files"})

    def titles(self, item_ids: Sequence[str]) -> list[str | None]:
        """The title of each item, None for one the catalogue does not have."""
        rows = self.catalogue.id_map.rows(item_ids)
        known = np.flatnonzero(rows >= 0)
        titles: list[str | None] = [None] * len(item_ids)
        for row, title in zip(known.tolist(), self.catalogue.titles(rows[known]), strict=True):
            titles[row] = title
        return titles

    async def prove(self, timeout_s: float) -> None:
        """Ask the Bundle's golden query until no stage is skipped any more, and compare the answer.

        The first calls of a fresh graph may be slow, and a circuit breaker may have opened meanwhile.

        :raises BundleMismatchError: when the answer is wrong.
        :raises BundleError: when stages are still skipped after ``timeout_s`` seconds.
        """
        golden = self.bundle.golden
        now_ms: int | None = None
        if golden is not None:
            request, now_ms = golden_request(golden, self.recommender.config), golden.now_ms
        else:
            # Nothing to compare with, but every stage must answer; of somebody without a history none is asked.
            (first,) = self.catalogue.id_map.take(np.zeros(1, np.int32))
            request = RecommendRequest(
                history=(HistoryItem(item_id=first),),
                deadline_ms=self.recommender.config.max_deadline_ms,
                request_id="golden",
            )
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        while (answer := await self.recommender.arecommend(request, now_ms=now_ms)).degraded:
            if loop.time() > end:
                raise BundleError(
                    f"the golden query of Bundle {self.bundle_id} is still answered without {answer.degraded}"
                )
            await asyncio.sleep(_PROOF_PAUSE_S)
        if golden is not None:
            golden.check([item.item_id for item in answer.items], [item.score for item in answer.items])
        self.proven = True

    @contextmanager
    def pinned(self) -> Generator[Self]:
        """Inside, a request is answered from this Bundle, which stays open until then."""
        self.num_in_flight += 1
        try:
            yield self
        finally:
            self.num_in_flight -= 1


@dataclass(eq=False)
class CanaryGeneration:
    """A Bundle that some of the users get."""

    generation: Generation
    share: float
    """of the users, above 0, up to 1"""
    token: str
    """of the canary in the store"""

    def concerns(self, user_id: str | None) -> bool:
        """Whether this user is one of them; always the same ones for one Bundle. A stranger is not."""
        if user_id is None:
            return False
        place = zlib.crc32(user_id.encode("utf-8", "surrogatepass"), zlib.crc32(self.generation.base_id.encode()))
        return place < self.share * 2**32


@dataclass(eq=False)
class Service:
    """Everything the routes need. For one event loop."""

    store: EventStore
    current: Generation
    items: ItemLog | None = None
    """where changes of the catalogue go; None where one Bundle is served and no store"""
    rules: RuleLog | None = None
    """where changes of the rules go; None likewise"""
    canary: CanaryGeneration | None = field(default=None, init=False)
    retired: list[Generation] = field(default_factory=list, init=False)
    """those that answered before, until their last request is answered"""
    refused: dict[str, str] = field(default_factory=dict, init=False)
    """Bundles that the store points to and that are not served, with the reason"""

    @classmethod
    def open(cls, config: ServeConfig, remote: Mapping[str, AsyncStage], absent: Sequence[str] = ()) -> Self:
        """One Bundle and nothing else, see :meth:`Generation.open`; the Bundle of ``config.bundle_uri``, or its
        current one.
        """
        bundle = Bundle.open(config.bundle_uri)
        store = config.event_store.open()
        generation = Generation.open(bundle, store, remote, absent)
        generation.seed(store)
        return cls(store, generation)

    @property
    def version(self) -> str:
        """Of this package; 0 in a checkout that is not installed."""
        return installed_version() or "0"

    @property
    def generations(self) -> list[Generation]:
        """All that are open, the one that answers first."""
        canary = self.canary
        return [self.current, *([] if canary is None else [canary.generation]), *self.retired]

    def knowing(self, item_id: str) -> Generation:
        """The one that answers, or where only the canary has the item, that one."""
        canary = self.canary
        if canary is not None and self.current.recommender.item(item_id) is None:
            return canary.generation
        return self.current

    async def recommend(self, request: RecommendRequest) -> tuple[Recommendation, Generation]:
        """Answer from one Bundle. Where the canary cannot, the current one does.

        :raises RequestError: when the request cannot be answered as it is.
        """
        canary = self.canary
        if canary is not None and canary.concerns(request.user_id):
            try:
                return await self._answer(canary.generation, request), canary.generation
            except RequestError:
                raise
            except Exception:  # noqa: BLE001 the tally has it; this user gets what all others get
                about = {"request_id": request.request_id}
                _log.exception("request %s: the canary failed", request.request_id, extra=about)
        current = self.current
        return await self._answer(current, request), current

    async def _answer(self, generation: Generation, request: RecommendRequest) -> Recommendation:
        started = time.perf_counter()
        with generation.pinned():
            try:
                answer = await generation.recommender.arecommend(request)
            except RequestError:
                raise
            except Exception:
                generation.tally.failed()
                raise
        # Strangers never get a canary, and a deadline of the caller's own is the caller's own fault.
        if request.user_id is not None and request.deadline_ms is None:
            degraded = bool(set(answer.degraded) - {STATE})
            generation.tally.answered((time.perf_counter() - started) * 1e3, degraded=degraded)
        return answer

    def close(self) -> None:
        """Release threads and store."""
        for generation in self.generations:
            generation.recommender.close()
        self.store.close()
