"""What a ranker is asked and what it may read of the items: queries, batches of them, and the items' side of features.

Shape legend: B queries, C candidates, L history length (cut to the ranker's ``max_history``), F features, N items, D
dimension, E content dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from recsys.data.features import NUM_FEATURES, ItemFeatures, candidate_features, fixed_size_list, matrix
from recsys.errors import ModelError
from recsys.files import map_arrow, write_arrow
from recsys.models.base import check_items
from recsys.types import FloatArray, History, Int32Array, Int64Array

PADDING = -1
"""``item_idx`` of a slot that holds no candidate or no history entry"""


@dataclass(frozen=True)
class RankingBatch:
    """Candidates and histories of B queries, padded to the longest of each."""

    candidate_item_idx: Int32Array
    """int32 [B, C], ``PADDING`` where a query has fewer"""
    history_item_idx: Int32Array
    """int32 [B, L], the newest entry last (right-aligned), ``PADDING`` before the first"""
    history_age_ms: FloatArray
    """float32 [B, L]: how long before the request each entry was; 0 where the data has order only"""
    features: FloatArray
    """float32 [B, C, F]; see ``recsys.data.features.FEATURE_NAMES``; column 0 is the retrieval score"""

    def __len__(self) -> int:
        return len(self.candidate_item_idx)

    def __getitem__(self, rows: slice | Int64Array) -> RankingBatch:
        return RankingBatch(
            self.candidate_item_idx[rows], self.history_item_idx[rows], self.history_age_ms[rows], self.features[rows]
        )


@dataclass(frozen=True)
class RankingItems:
    """The item side of the features: rebuilt for each Bundle, while the network's weights stay."""

    features: ItemFeatures
    unit_vectors: FloatArray
    """float32 [N, D]: the retriever's item vectors, scaled to unit length"""

    @classmethod
    def of(cls, features: ItemFeatures, item_embeddings: FloatArray) -> RankingItems:
        norm = np.linalg.norm(item_embeddings, axis=1, keepdims=True)
        return cls(features, (item_embeddings / np.maximum(norm, 1e-12)).astype(np.float32))


@dataclass(frozen=True)
class RankingCatalogue:
    """All that a ranker may read of the items of a Bundle."""

    items: RankingItems
    content: FloatArray
    """float32 [N, E]: text vector (where items have text) beside the category row; see :func:`item_content`"""
    table: pa.Table
    """``ITEMS`` rows in order of ``item_idx``"""


def item_content(text_vectors: FloatArray | None, features: ItemFeatures) -> FloatArray:
    """float32 [N, E]: text vector (unit length, where items have text) beside the category row."""
    if text_vectors is None:
        return features.categories
    return np.concatenate([text_vectors, features.categories], axis=1)


@dataclass(frozen=True)
class RankingQuery:
    """One query before its features are computed."""

    history: History
    candidate_item_idx: Int32Array
    retrieval_score: FloatArray
    now_ms: int | None
    """milliseconds since 1970 UTC; None where times are not to be read"""


def ranking_batch(queries: list[RankingQuery], items: RankingItems, max_history: int) -> RankingBatch:
    """Compute features and pad. A row's features depend on its own candidate and the user only.

    :raises ModelError: for an ``item_idx`` outside the catalogue, and for a retrieval score that is not finite.
    """
    num_candidates = max((len(query.candidate_item_idx) for query in queries), default=0)
    candidates = np.full((len(queries), num_candidates), PADDING, np.int32)
    history = np.full((len(queries), max_history), PADDING, np.int32)
    age = np.zeros((len(queries), max_history), np.float32)
    features = np.zeros((len(queries), num_candidates, NUM_FEATURES), np.float32)
    for row, query in enumerate(queries):
        newest = query.history.item_idx[-max_history:]
        times = None if query.now_ms is None else query.history.timestamp_ms[-max_history:]
        count = len(query.candidate_item_idx)
        _check(query, newest, len(items.unit_vectors))
        candidates[row, :count] = query.candidate_item_idx
        if len(newest):
            history[row, -len(newest) :] = newest
            if times is not None and query.now_ms is not None:
                age[row, -len(newest) :] = np.maximum(query.now_ms - times, 0)
        if count:
            features[row, :count] = candidate_features(
                items.features,
                items.unit_vectors,
                history_item_idx=newest,
                history_timestamp_ms=times,
                candidate_item_idx=query.candidate_item_idx,
                retrieval_score=query.retrieval_score,
                now_ms=query.now_ms,
            )
    return RankingBatch(candidates, history, age, features)


def _check(query: RankingQuery, newest: Int32Array, num_items: int) -> None:
    for what, item_idx in (("candidate", query.candidate_item_idx), ("history entry", newest)):
        check_items(item_idx, num_items, f"a {what} is")
    if not np.isfinite(query.retrieval_score).all():
        row = int(np.argmin(np.isfinite(query.retrieval_score)))
        raise ModelError(f"the retrieval score of item_idx {query.candidate_item_idx[row]} is not finite")


def save_ranking_items(items: RankingItems, folder: Path) -> None:
    """Write ``features.arrow`` and ``vectors.arrow``."""
    items.features.save(folder / "features.arrow")
    write_arrow(folder / "vectors.arrow", pa.table({"vector": fixed_size_list(items.unit_vectors)}))


def load_ranking_items(folder: Path) -> RankingItems:
    """What :func:`save_ranking_items` wrote, memory-mapped."""
    vectors = matrix(map_arrow(folder / "vectors.arrow")["vector"])
    return RankingItems(ItemFeatures.load(folder / "features.arrow"), vectors)
