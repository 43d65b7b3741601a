"""The served stages over many queries at once, without a server: for evaluation, ranker training and batch slates."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from recsys.data.catalogue import Catalogue
from recsys.data.dataset import Dataset, Targets
from recsys.index.base import IndexConfig
from recsys.models.base import Retriever, VectorRetriever
from recsys.models.rankers.examples import RankingExamples, ranking_examples
from recsys.models.rankers.queries import RankingItems
from recsys.pipeline.popular import PopularItems
from recsys.pipeline.stage import Stage
from recsys.pipeline.stages.reranking import RerankingStage
from recsys.pipeline.stages.retrieval import RetrievalStage
from recsys.types import Candidates, Query

PROGRESS_S = 5.0
logger = logging.getLogger(__name__)


def queries_of(targets: Targets, *, num_candidates: int, max_history: int, top_k: int) -> list[Query]:
    """The queries a server would have been asked just before each target happened, what was seen excluded."""
    queries: list[Query] = []
    histories, times = targets.histories.last(max_history), targets.histories.timestamp_ms
    for row in range(len(targets)):
        history = histories.items(row)
        span = slice(int(histories.starts[row]), int(histories.stops[row]))
        queries.append(
            Query(
                request_id=str(row),
                bundle_id="",
                now_ms=0 if targets.now_ms is None else int(targets.now_ms[row]),
                history_item_idx=history,
                history_timestamp_ms=np.zeros(len(history), np.int64) if times is None else times[span],
                excluded_item_idx=np.unique(targets.seen.items(row)),
                top_k=top_k,
                num_candidates=num_candidates,
            )
        )
    return queries


def run_stages(stages: Sequence[Stage], queries: Sequence[Query], *, batch_size: int = 128) -> list[Candidates]:
    """What comes out of the last of ``stages``, per query. No deadline and no fallback: an error is an error.

    Long runs log their progress every few seconds.
    """
    results: list[Candidates] = []
    started = said = time.monotonic()
    for start in range(0, len(queries), batch_size):
        batch = queries[start : start + batch_size]
        candidates = [Candidates.empty() for _ in batch]
        for stage in stages:
            candidates = stage.run_batch(batch, candidates)
        results.extend(candidates)
        if (now := time.monotonic()) - said > PROGRESS_S:
            said = now
            rate = len(results) / (now - started)
            left_s = (len(queries) - len(results)) / rate
            logger.info("%d of %d queries, %.0f queries/s, %.0f s left", len(results), len(queries), rate, left_s)
    return results


def ranked_items(candidates: Sequence[Candidates], depth: int) -> NDArray[np.int32]:
    """int32 [B, depth]: the best ``depth`` items per query, -1 where there are fewer."""
    ranked = np.full((len(candidates), depth), -1, np.int32)
    for row, one in enumerate(candidates):
        best = one.item_idx[:depth]
        ranked[row, : len(best)] = best
    return ranked


def retrieval_stage(index: IndexConfig, dataset: Dataset, retriever: Retriever) -> RetrievalStage:
    """The retrieval stage as it is served, over a retriever of ``dataset``."""
    built = index.build(retriever.item_vectors()) if isinstance(retriever, VectorRetriever) else None
    return RetrievalStage("", retriever, built, Catalogue.build(dataset.items))


def staged(
    stages: Sequence[Stage],
    newcomers: PopularItems | None = None,
    /,
    *,
    num_candidates: int,
    max_history: int,
    depth: int,
) -> Callable[[Targets], NDArray[np.int32]]:
    """The system that answers with ``stages``, as a server would: targets (B) to items int32 [B, depth].

    Users without any history get ``newcomers``, reranked, where they are given.
    """

    def rank(targets: Targets) -> NDArray[np.int32]:
        queries = queries_of(targets, num_candidates=num_candidates, max_history=max_history, top_k=depth)
        found = run_stages(stages, queries)
        rows = [row for row, query in enumerate(queries) if newcomers is not None and not len(query.history_item_idx)]
        for row, candidates in zip(rows, _popular(newcomers, stages, [queries[row] for row in rows]), strict=True):
            found[row] = candidates
        return ranked_items(found, depth)

    return rank


def _popular(popular: PopularItems | None, stages: Sequence[Stage], queries: Sequence[Query]) -> list[Candidates]:
    if popular is None or not queries:
        return []
    (retrieval,) = (stage for stage in stages if isinstance(stage, RetrievalStage))
    candidates = [
        popular.best(query.num_candidates, retrieval.catalogue.allowed(query.filters, query.excluded_item_idx))
        for query in queries
    ]
    for stage in stages:
        if stage.name == RerankingStage.name:
            candidates = stage.run_batch(queries, candidates)
    return candidates


def retrieved_examples(
    stage: RetrievalStage,
    targets: Targets,
    items: RankingItems,
    *,
    num_candidates: int,
    max_history: int,
    ranker_history: int,
) -> RankingExamples:
    """What a ranker that reads ``ranker_history`` entries learns from: the candidates of ``stage`` for ``targets``."""
    queries = queries_of(targets, num_candidates=num_candidates, max_history=max_history, top_k=num_candidates)
    logger.info("asking the retriever for candidates of %d queries", len(queries))
    return ranking_examples(targets, run_stages([stage], queries), items, ranker_history)
