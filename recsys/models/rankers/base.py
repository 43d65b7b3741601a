"""What every ranker is: it scores candidates of one user, each candidate by itself.

A new family is one file with a :class:`RankerConfig` and a :class:`Ranker`, plus its name in
``recsys/models/__init__.py``. The contract tests pick it up from there.

Shape legend: B queries, C candidates, L history length (cut to the ranker's ``max_history``), F features, D dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from recsys.config import StrictConfig
from recsys.data.features import NUM_FEATURES, ItemFeatures, candidate_features, fixed_size_list, matrix
from recsys.errors import ModelError
from recsys.files import map_arrow, write_arrow
from recsys.training.runtime import Runtime
from recsys.types import History

if TYPE_CHECKING:
    from recsys.models.base import UpdateConfig
    from recsys.models.rankers.examples import RankingExamples

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
class RankingCatalogue:
    """All that a ranker may read of the items of a Bundle."""

    items: RankingItems
    content: NDArray[np.float32]
    """float32 [N, E]: text vector (where items have text) beside the category row; see :func:`item_content`"""
    table: pa.Table
    """``ITEMS`` rows in order of ``item_idx``"""


def item_content(text_vectors: NDArray[np.float32] | None, features: ItemFeatures) -> NDArray[np.float32]:
    """float32 [N, E]: text vector (unit length, where items have text) beside the category row."""
    if text_vectors is None:
        return features.categories
    return np.concatenate([text_vectors, features.categories], axis=1)


@dataclass(frozen=True)
class RankingQuery:
    """One query before its features are computed."""

    history: History
    candidate_item_idx: NDArray[np.int32]
    retrieval_score: NDArray[np.float32]
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


def _check(query: RankingQuery, newest: NDArray[np.int32], num_items: int) -> None:
    for what, item_idx in (("candidate", query.candidate_item_idx), ("history entry", newest)):
        if len(item_idx) and not 0 <= int(item_idx.min()) <= int(item_idx.max()) < num_items:
            raise ModelError(f"a {what} is an item_idx outside 0..{num_items - 1}")
    if not np.isfinite(query.retrieval_score).all():
        row = int(np.argmin(np.isfinite(query.retrieval_score)))
        raise ModelError(f"the retrieval score of item_idx {query.candidate_item_idx[row]} is not finite")


class RankerConfig(StrictConfig, ABC):
    """Hyper-parameters of a ranker family. Subclasses add ``kind: Literal["..."]``."""

    kind: str
    max_history: int = Field(default=50, ge=1, description="newest history entries looked at")
    num_negatives: int = Field(default=31, ge=1, description="candidates sampled beside the relevant ones per query")
    epochs: int = Field(default=8, ge=0, description="most passes over the queries; 0 keeps the retriever's order")
    patience: int = Field(default=3, ge=1, description="epochs without a better holdout NDCG@10 before training stops")
    batch_queries: int = Field(default=32, ge=1, description="queries per optimizer step, over all workers")
    learning_rate: float = Field(default=3e-3, gt=0, description="peak step size of AdamW")
    weight_decay: float = Field(default=0.05, ge=0, description="decoupled weight decay of AdamW")

    @abstractmethod
    def fit(
        self,
        examples: RankingExamples,
        catalogue: RankingCatalogue,
        runtime: Runtime,
        *,
        holdout: RankingExamples | None,
        seed: int,
    ) -> Ranker:
        """Train on ``examples``; with a ``holdout`` stop at its best NDCG@10, else run ``epochs`` epochs."""

    def update(
        self,
        fitted: Ranker,
        examples: RankingExamples,
        catalogue: RankingCatalogue,
        runtime: Runtime,
        how: UpdateConfig,
        *,
        seed: int,
    ) -> Ranker:
        """Go on from ``fitted`` with ``examples``; a family that cannot keeps its weights, over the new catalogue."""
        return fitted.with_items(catalogue)

    def learning_rate_of(self, parameter: str) -> float:
        """The peak step size of a parameter by its name in the network."""
        return self.learning_rate

    def refit(self, fitted: Ranker) -> Self:
        """The configuration to fit all data with, once the holdout has chosen the number of epochs for ``fitted``."""
        return self.model_copy(update={"epochs": fitted.num_epochs})

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
    history: Sequence[Mapping[str, float]] = ()
    """per epoch (the untrained ranker first, where there is a holdout): training loss and holdout NDCG@10"""

    @property
    def num_epochs(self) -> int:
        """The number of epochs that was best on the holdout."""
        if not self.history:
            return 0
        best = max(range(len(self.history)), key=lambda epoch: self.history[epoch].get("ndcg@10", float(epoch)))
        return int(self.history[best]["epoch"])

    def rank(self, queries: list[RankingQuery]) -> list[NDArray[np.float32]]:
        """Per query float32 [C]: higher is better; each score is independent of the other candidates and queries."""
        scores = self.score(ranking_batch(queries, self.items, self.max_history))
        return [scores[row, : len(query.candidate_item_idx)] for row, query in enumerate(queries)]

    @abstractmethod
    def score(self, batch: RankingBatch) -> NDArray[np.float32]:
        """float32 [B, C]; what stands in padded slots means nothing."""

    @abstractmethod
    def with_items(self, catalogue: RankingCatalogue) -> Ranker:
        """The same weights over another Bundle's items."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write a self-describing folder (``config.json`` holds the kind); no pickle."""


def save_ranking_items(items: RankingItems, folder: Path) -> None:
    """Write ``features.arrow`` and ``vectors.arrow``."""
    items.features.save(folder / "features.arrow")
    write_arrow(folder / "vectors.arrow", pa.table({"vector": fixed_size_list(items.unit_vectors)}))


def load_ranking_items(folder: Path) -> RankingItems:
    """What :func:`save_ranking_items` wrote, memory-mapped."""
    vectors = matrix(map_arrow(folder / "vectors.arrow")["vector"])
    return RankingItems(ItemFeatures.load(folder / "features.arrow"), vectors)
