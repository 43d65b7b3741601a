"""What every ranker is: it scores candidates of one user, each candidate by itself.

A new family is one file with a :class:`RankerConfig` and a :class:`Ranker`, plus its line in
``recsys/models/rankers/__init__.py``. The contract tests pick it up from there.

Shape legend: B queries, C candidates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pydantic import Field

from recsys.kinds import Kind
from recsys.models.base import UpdateConfig
from recsys.models.rankers.queries import RankingBatch, RankingCatalogue, RankingItems, RankingQuery, ranking_batch
from recsys.types import FloatArray

if TYPE_CHECKING:
    from recsys.models.rankers.examples import RankingExamples
    from recsys.training.runtime import Runtime

SAMPLE_WORDS = ("red", "blue", "green", "white", "black", "thing")
"""of which the titles of planted items are made"""


class RankerConfig(Kind, ABC):
    """Hyper-parameters of a ranker family. Subclasses add ``kind: Literal["..."]``.

    The sample learns from planted queries about items whose titles are made of :data:`SAMPLE_WORDS`.
    """

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

    def rank(self, queries: list[RankingQuery]) -> list[FloatArray]:
        """Per query float32 [C]: higher is better; each score is independent of the other candidates and queries."""
        scores = self.score(ranking_batch(queries, self.items, self.max_history))
        return [scores[row, : len(query.candidate_item_idx)] for row, query in enumerate(queries)]

    @abstractmethod
    def score(self, batch: RankingBatch) -> FloatArray:
        """float32 [B, C]; what stands in padded slots means nothing."""

    @abstractmethod
    def with_items(self, catalogue: RankingCatalogue) -> Ranker:
        """The same weights over another Bundle's items."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write a self-describing folder (``config.json`` holds the kind); no pickle."""
