"""What every ranker is: it scores candidates of one user, each candidate by itself.

Shape legend: B queries, C candidates, L history length (cut to the ranker's ``max_history``), F features, D dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recsys.config import StrictConfig
from recsys.data.features import NUM_FEATURES, ItemFeatures, candidate_features

PADDING = -1
"""``item_idx`` of a slot that holds no candidate or no history entry"""


@dataclass(frozen=True)
class RankingBatch:
    """Candidates and histories of B queries, padded to the longest of each."""

    candidate_item_idx: NDArray[np.int32]
    """int32 [B, C], ``PADDING`` where a query has fewer"""
    history_item_idx: NDArray[np.int32]
    """int32 [B, L], the newest entry last (right-aligned), ``PADDING`` before the first"""
    history_age_ms: NDArray[np.float32]
    """float32 [B, L]: how long before the request each entry was; 0 where the data has order only"""
    features: NDArray[np.float32]
    """float32 [B, C, F]; see ``recsys.data.features.FEATURE_NAMES``; column 0 is the retrieval score"""

    def __len__(self) -> int:
        return len(self.candidate_item_idx)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> RankingBatch:
        return RankingBatch(
            self.candidate_item_idx[rows], self.history_item_idx[rows], self.history_age_ms[rows], self.features[rows]
        )


@dataclass(frozen=True)
class RankingItems:
    """The item side of the features: rebuilt for each Bundle, while the network's weights stay."""

    features: ItemFeatures
    unit_vectors: NDArray[np.float32]
    """float32 [N, D]: the retriever's item vectors, scaled to unit length"""

    @classmethod
    def of(cls, features: ItemFeatures, item_embeddings: NDArray[np.float32]) -> RankingItems:
        norm = np.linalg.norm(item_embeddings, axis=1, keepdims=True)
        return cls(features, (item_embeddings / np.maximum(norm, 1e-12)).astype(np.float32))


@dataclass(frozen=True)
class RankingQuery:
    """One query before its features are computed."""

    history_item_idx: NDArray[np.int32]
    history_timestamp_ms: NDArray[np.int64] | None
    candidate_item_idx: NDArray[np.int32]
    retrieval_score: NDArray[np.float32]
    now_ms: int | None


def ranking_batch(queries: list[RankingQuery], items: RankingItems, max_history: int) -> RankingBatch:
    """Compute features and pad. A row's features depend on its own candidate and the user only."""
    num_candidates = max((len(query.candidate_item_idx) for query in queries), default=0)
    candidates = np.full((len(queries), num_candidates), PADDING, np.int32)
    history = np.full((len(queries), max_history), PADDING, np.int32)
    age = np.zeros((len(queries), max_history), np.float32)
    features = np.zeros((len(queries), num_candidates, NUM_FEATURES), np.float32)
    for row, query in enumerate(queries):
        newest = query.history_item_idx[-max_history:]
        times = None if query.history_timestamp_ms is None else query.history_timestamp_ms[-max_history:]
        count = len(query.candidate_item_idx)
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


class RankerConfig(StrictConfig, ABC):
    """Hyper-parameters of a ranker family. Subclasses add ``kind: Literal["..."]``."""

    kind: str

    @abstractmethod
    def load(self, folder: Path) -> Ranker:
        """Read what :meth:`Ranker.save` wrote with this very configuration."""


class Ranker(ABC):
    """A fitted ranker, tied to one Bundle's items."""

    config: RankerConfig
    items: RankingItems
    max_history: int
    uses_time: bool
    """whether it was trained with times; the caller then gives ``now_ms`` and history times"""

    def rank(self, queries: list[RankingQuery]) -> list[NDArray[np.float32]]:
        """Per query float32 [C]: higher is better; each score is independent of the other candidates and queries."""
        scores = self.score(ranking_batch(queries, self.items, self.max_history))
        return [scores[row, : len(query.candidate_item_idx)] for row, query in enumerate(queries)]

    @abstractmethod
    def score(self, batch: RankingBatch) -> NDArray[np.float32]:
        """float32 [B, C]; what stands in padded slots means nothing."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write a self-describing folder (``config.json`` holds the kind); no pickle."""
