"""The served pipeline over many queries at once, without a server: for evaluation, ranker training and batch slates."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np

from recsys.data.dataset import Targets
from recsys.models.rankers.examples import RankingExamples, ranking_examples
from recsys.models.rankers.queries import RankingItems
from recsys.pipeline.build import Parts, build_selection, build_stages
from recsys.pipeline.config import PipelineConfig
from recsys.pipeline.stage import NEEDS_RETRIEVAL, RETRIEVAL, STAGES, StageName
from recsys.pipeline.users import Profile, query_of
from recsys.types import BoolArray, Candidates, Int32Array, Query

PROGRESS_S = 5.0
_BATCH_SIZE = 128
logger = logging.getLogger(__name__)


class OfflinePipeline:
    """Answers as a server with the same parts and configuration would, but for deadlines and failures: an error is an
    error.
    """

    def __init__(
        self,
        parts: Parts,
        config: PipelineConfig,
        *,
        stages: Sequence[StageName] = STAGES,
        hides: BoolArray | None = None,
    ) -> None:
        """``stages`` are those to run. ``hides`` (bool [R], see :meth:`~recsys.pipeline.users.Profile.of_target`) is
        needed where items may be repeated and users can hide some.
        """
        self.config = config
        self._hides = hides
        self._stages = build_stages(parts, config, stages)
        self._selection = build_selection(parts)

    def queries(self, targets: Targets, top_k: int) -> list[Query]:
        """What a server would have been asked just before each target happened."""
        may_repeat = self.config.repeat_after_days is not None  # else all that was seen is excluded already
        return [
            query_of(
                Profile.of_target(targets, row, self.config.max_history, self._hides),
                config=self.config,
                request_id=str(row),
                bundle_id="",
                now_ms=0 if targets.now_ms is None else int(targets.now_ms[row]),
                top_k=top_k,
                left_out=np.unique(targets.left_out.items(row)) if may_repeat else None,
            )
            for row in range(len(targets))
        ]

    def candidates(self, targets: Targets) -> list[Candidates]:
        """What comes out of the last stage, per query: ``num_candidates`` of them where the slate is not cut."""
        return [found for found, _ in self._run(self.queries(targets, self.config.num_candidates))]

    def slates(self, targets: Targets, top_k: int) -> list[Candidates]:
        """What each user would have been shown: ``top_k`` items while so many are allowed."""
        queries = self.queries(targets, top_k)
        found = self._run(queries)
        return [
            self._selection.finish(query, candidates, before, {})[0]
            for query, (candidates, before) in zip(queries, found, strict=True)
        ]

    def rank(self, targets: Targets, depth: int) -> Int32Array:
        """int32 [B, depth]: the items of each slate, best first, -1 where there are fewer."""
        ranked = np.full((len(targets), depth), -1, np.int32)
        for row, slate in enumerate(self.slates(targets, depth)):
            ranked[row, : len(slate)] = slate.item_idx
        return ranked

    def _run(self, queries: Sequence[Query]) -> list[tuple[Candidates, Candidates]]:
        """Per query what comes out of the last stage, and what went into it. Long runs log their progress."""
        results: list[tuple[Candidates, Candidates]] = []
        started = said = time.monotonic()
        for start in range(0, len(queries), _BATCH_SIZE):
            results.extend(self._run_batch(queries[start : start + _BATCH_SIZE]))
            if (now := time.monotonic()) - said > PROGRESS_S:
                said = now
                rate = len(results) / (now - started)
                left_s = (len(queries) - len(results)) / rate
                logger.info("%d of %d queries, %.0f queries/s, %.0f s left", len(results), len(queries), rate, left_s)
        return results

    def _run_batch(self, queries: Sequence[Query]) -> list[tuple[Candidates, Candidates]]:
        newcomers = {
            row for row, query in enumerate(queries) if self.config.newcomers == "popular" and not len(query.history)
        }
        found = [
            self._selection.without_retrieval(query, None, {}) if row in newcomers else Candidates.empty()
            for row, query in enumerate(queries)
        ]
        before = list(found)
        for stage in self._stages:
            rows = list(range(len(queries)))
            if stage.name == RETRIEVAL or stage.name in NEEDS_RETRIEVAL:
                rows = [row for row in rows if row not in newcomers]
            given = [found[row] for row in rows]
            for row, candidates in zip(rows, stage.run_batch([queries[row] for row in rows], given), strict=True):
                before[row], found[row] = found[row], candidates
        return list(zip(found, before, strict=True))


def retrieval_alone(parts: Parts, config: PipelineConfig, *, hides: BoolArray | None = None) -> OfflinePipeline:
    """What retrieval finds, whoever asks: newcomers, too, are answered by the model."""
    config = config.model_copy(update={"newcomers": "models"})
    return OfflinePipeline(parts, config, stages=(RETRIEVAL,), hides=hides)


def retrieved_examples(
    parts: Parts, config: PipelineConfig, targets: Targets, items: RankingItems, ranker_history: int
) -> RankingExamples:
    """What a ranker that reads ``ranker_history`` entries learns from: the candidates that retrieval finds for
    ``targets``.
    """
    logger.info("asking the retriever for candidates of %d queries", len(targets))
    candidates = retrieval_alone(parts, config).candidates(targets)
    return ranking_examples(targets, candidates, items, ranker_history)
