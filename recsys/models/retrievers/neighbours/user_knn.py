"""What the users most like the history's owner have taken (user-based nearest neighbours).

"An Algorithmic Framework for Performing Collaborative Filtering" (Herlocker et al., SIGIR 1999), with implicit weights.
Pearson's correlation is taken over all items, those not taken being 0, and counts where it is positive.

Shape legend: U users, N items, B histories.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

import numpy as np
import scipy.sparse as sp
from pydantic import Field

from recsys.data.histories import Histories
from recsys.models.base import FitData, Retriever, RetrieverConfig
from recsys.models.retrievers.matrices.base import (
    Sparse,
    history_matrix,
    interaction_matrix,
    load_csr,
    popularity_of,
    save_csr,
    tie_break,
)
from recsys.training.checkpoint import load_tensors, save_tensors
from recsys.training.runtime import Runtime
from recsys.types import Float64Array, FloatArray, Int64Array

_HISTORIES_AT_ONCE = 512


class UserKNN(RetrieverConfig):
    """Neighbours among the users."""

    kind: Literal["user_knn"] = "user_knn"
    similarity: Literal["cosine", "pearson"] = Field(default="cosine", description="how alike two users are")
    num_neighbours: int = Field(default=100, ge=1, le=100_000, description="most similar users that are asked")
    shrinkage: float = Field(default=10.0, ge=0, description="added to the denominator: distrusts short histories")

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls(num_neighbours=20, shrinkage=1.0)

    def fit(self, data: FitData, runtime: Runtime) -> UserKNNRetriever:
        """Keep the interactions; neighbours are found when a history comes."""
        return UserKNNRetriever(self, interaction_matrix(data))

    def load(self, folder: Path) -> UserKNNRetriever:
        return UserKNNRetriever(self, load_csr(load_tensors(folder / "model.safetensors"), "interactions"))


class UserKNNRetriever(Retriever):
    """A fitted :class:`UserKNN`."""

    def __init__(self, config: UserKNN, matrix_UN: Sparse) -> None:
        self.config: UserKNN = config
        self.num_items = matrix_UN.shape[1]
        self._matrix_UN = matrix_UN
        self._matrix_NU = matrix_UN.T.tocsr()
        self._popularity = popularity_of(matrix_UN)
        self._sum_U, self._square_U = _moments(matrix_UN)

    def score(self, histories: Histories, now_ms: Int64Array | None = None) -> FloatArray:
        """Similarity times weight, summed over the neighbours; popularity orders what that leaves equal."""
        scores = np.empty((len(histories), self.num_items), np.float32)
        for rows, batch in histories.batches(_HISTORIES_AT_ONCE):
            neighbours_BU = self._neighbours(history_matrix(batch, self.num_items))
            scores[rows] = (neighbours_BU @ self._matrix_UN).toarray()
        return scores + tie_break(self._popularity)

    def _neighbours(self, history_BN: Sparse) -> Sparse:
        """float32 [B, U]: the similarities of the nearest, all else 0."""
        history_BN.sum_duplicates()
        common = (history_BN @ self._matrix_NU).tocoo()
        row, user, product = common.row, common.col, common.data.astype(np.float64)
        sum_B, square_B = _moments(history_BN)
        if self.config.similarity == "pearson":
            product = product - sum_B[row] * self._sum_U[user] / self.num_items
            square_B = square_B - sum_B**2 / self.num_items
            square_U = self._square_U - self._sum_U**2 / self.num_items
        else:
            square_U = self._square_U
        similarity = product / (np.sqrt(np.maximum(square_B[row] * square_U[user], 1e-12)) + self.config.shrinkage)
        keep = similarity > 0
        row, user, similarity = row[keep], user[keep], similarity[keep]
        order = np.lexsort((user, -similarity, row))
        place = np.arange(len(order)) - np.searchsorted(row[order], row[order], side="left")
        best = order[place < self.config.num_neighbours]
        return sp.csr_matrix((similarity[best].astype(np.float32), (row[best], user[best])), common.shape)

    def save_weights(self, folder: Path) -> None:
        save_tensors(folder / "model.safetensors", save_csr(self._matrix_UN, "interactions"))


def _moments(matrix: Sparse) -> tuple[Float64Array, Float64Array]:
    """float64 each: sums and sums of squares of the rows."""
    wide = matrix.astype(np.float64)
    return np.asarray(wide.sum(axis=1)).ravel(), np.asarray(wide.multiply(wide).sum(axis=1)).ravel()
