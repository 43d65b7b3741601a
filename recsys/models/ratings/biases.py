"""The mean, and by how much users and items stand off it (Koren, "Factor in the Neighbors", TKDD 2010, section 2.1).

``mean + item + user``: an item's deviation is estimated before a user's, both pulled towards zero where there are few
ratings. It is what every other family begins from, and hard to beat by much.

Shape legend: N items, B histories, Q questions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from recsys.models.base import check_items
from recsys.models.ratings.base import Rated, RatingConfig, RatingModel, saved_arrays, some_ratings
from recsys.models.retrievers.matrices.base import Sparse
from recsys.types import Float64Array, FloatArray, Int32Array


class Biases(RatingConfig):
    """Deviations of users and items from the mean."""

    kind: Literal["biases"] = "biases"
    item_shrinkage: float = Field(default=5.0, ge=0, description="an item's deviation is that of so many more ratings")
    user_shrinkage: float = Field(default=5.0, ge=0, description="a user's deviation is that of so many more ratings")

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls()

    def fit(self, data: Rated, seed: int = 0) -> BiasModel:
        matrix_UN = some_ratings(data)
        mean = float(matrix_UN.data.mean())
        centred_UN = matrix_UN.copy()
        centred_UN.data -= mean
        counts_N = np.bincount(matrix_UN.indices, minlength=data.num_items)
        sums_N = np.asarray(centred_UN.sum(axis=0)).ravel()
        return BiasModel(self, mean, sums_N / np.maximum(counts_N + self.item_shrinkage, 1e-9))

    def load(self, folder: Path) -> BiasModel:
        arrays = saved_arrays(folder)
        return BiasModel(self, float(arrays["mean"][0]), arrays["item"])


class BiasModel(RatingModel):
    """A fitted :class:`Biases`."""

    def __init__(self, config: Biases, mean: float, item_N: Float64Array) -> None:
        self.config: Biases = config
        self.num_items = len(item_N)
        self.mean, self.item_N = mean, item_N

    def residuals(self, rated: Rated) -> tuple[Sparse, Float64Array]:
        """What the deviations leave of the ratings, float64 [B, N] with the rated places only; the users', [B]."""
        left_BN = rated.matrix()
        left_BN.data -= self.mean + self.item_N[left_BN.indices]
        counts_B = np.diff(left_BN.indptr)
        user_B = np.asarray(left_BN.sum(axis=1)).ravel() / np.maximum(counts_B + self.config.user_shrinkage, 1e-9)
        left_BN.data -= np.repeat(user_B, counts_B)
        return left_BN, user_B

    def predict(self, rated: Rated, item_idx: Int32Array) -> FloatArray:
        check_items(item_idx, self.num_items, "a question is about")
        _, user_Q = self.residuals(rated)
        return (self.mean + self.item_N[item_idx] + user_Q).astype(np.float32)

    def tensors(self) -> dict[str, NDArray[Any]]:
        return {"mean": np.array([self.mean]), "item": self.item_N}
