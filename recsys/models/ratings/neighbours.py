"""What the user thought of similar items (item-based CF: Sarwar et al., WWW 2001; Koren, TKDD 2010, section 2.2).

Two items are as similar as what :mod:`.biases` leaves of their ratings by the same users (Pearson's correlation, less
what few common users may fake), and a rating is the biases plus the mean of what they leave of the ratings of the most
similar items in the history. Deviation: the most similar items of the catalogue are kept, not those of each user.

Shape legend: N items, B histories, Q questions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from pydantic import Field

from recsys.models.base import check_items
from recsys.models.ratings.base import Rated, RatingConfig, RatingModel, saved_arrays
from recsys.models.ratings.biases import Biases, BiasModel
from recsys.models.retrievers.matrices.base import Sparse
from recsys.types import FloatArray, Int32Array

_ITEMS_AT_ONCE = 1024


class Neighbours(RatingConfig):
    """Biases, and the ratings of similar items."""

    kind: Literal["neighbours"] = "neighbours"
    num_neighbours: int = Field(default=200, ge=1, le=100_000, description="most similar items kept per item")
    shrinkage: float = Field(default=20.0, ge=0, description="a similarity counts as if so many users disagreed on it")
    confidence: float = Field(default=1.0, ge=0, description="added to the summed similarity: distrusts few neighbours")
    biases: Biases = Field(default=Biases(), description="what is taken out before")

    max_rmse: ClassVar[float] = 0.6

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls(num_neighbours=20, shrinkage=5)

    def fit(self, data: Rated, seed: int = 0) -> NeighbourModel:
        biases = self.biases.fit(data, seed)
        left_UN, _ = biases.residuals(data)
        rated_UN = left_UN.copy()
        rated_UN.data = np.ones_like(rated_UN.data)
        square_UN = left_UN.multiply(left_UN).tocsr()
        parts: list[Sparse] = []
        for start in range(0, data.num_items, _ITEMS_AT_ONCE):
            columns = slice(start, min(start + _ITEMS_AT_ONCE, data.num_items))
            product = (left_UN[:, columns].T @ left_UN).toarray()
            # Lengths over the users that the two have in common, as in Pearson's correlation.
            own = (square_UN[:, columns].T @ rated_UN).toarray()
            other = (rated_UN[:, columns].T @ square_UN).toarray()
            common = (rated_UN[:, columns].T @ rated_UN).toarray()
            alike = product / np.sqrt(np.maximum(own * other, 1e-12)) * common / (common + self.shrinkage + 1e-9)
            alike[np.arange(len(alike)), np.arange(columns.start, columns.stop)] = 0
            alike[alike < 0] = 0
            if self.num_neighbours < data.num_items:
                least = np.partition(alike, -self.num_neighbours, axis=1)[:, -self.num_neighbours, None]
                alike[alike < least] = 0
            parts.append(sp.csr_matrix(alike))
        return NeighbourModel(self, biases, sp.csr_matrix(sp.vstack(parts)))

    def load(self, folder: Path) -> NeighbourModel:
        arrays = saved_arrays(folder)
        biases = BiasModel(self.biases, float(arrays["mean"][0]), arrays["item"])
        num_items = len(biases.item_N)
        parts = (arrays["similarity"], arrays["similar_item"], arrays["borders"])
        return NeighbourModel(self, biases, sp.csr_matrix(parts, (num_items, num_items)))


class NeighbourModel(RatingModel):
    """A fitted :class:`Neighbours`."""

    def __init__(self, config: Neighbours, biases: BiasModel, similar_NN: Sparse) -> None:
        self.config: Neighbours = config
        self.num_items = similar_NN.shape[0]
        self._biases, self._similar_NN = biases, similar_NN

    def predict(self, rated: Rated, item_idx: Int32Array) -> FloatArray:
        check_items(item_idx, self.num_items, "a question is about")
        left_QN, user_Q = self._biases.residuals(rated)
        similar_QN = self._similar_NN[item_idx]
        rated_QN = left_QN.copy()
        rated_QN.data = np.ones_like(rated_QN.data)
        leaning_Q = np.asarray(similar_QN.multiply(left_QN).sum(axis=1)).ravel()
        total_Q = np.asarray(similar_QN.multiply(rated_QN).sum(axis=1)).ravel()
        leaning_Q = leaning_Q / np.maximum(total_Q + self.config.confidence, 1e-9)
        return (self._biases.mean + self._biases.item_N[item_idx] + user_Q + leaning_Q).astype(np.float32)

    def tensors(self) -> dict[str, NDArray[Any]]:
        similar = self._similar_NN
        parts = {"similarity": similar.data, "similar_item": similar.indices, "borders": similar.indptr}
        return {**self._biases.tensors(), **parts}
