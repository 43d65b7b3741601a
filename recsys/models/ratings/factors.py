"""Matrix factorisation with biases (Koren, Bell and Volinsky, "Matrix Factorization Techniques", IEEE Computer 2009).

What :mod:`.biases` leaves is an inner product of user and item factors, found by alternating least squares. A user's
factors are solved for from the history. Deviation: the biases are estimated first and kept.

Shape legend: U users, N items, D factors, B histories, Q questions, n items rated by one user.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from recsys.models.base import check_items
from recsys.models.ratings.base import Rated, RatingConfig, RatingModel, saved_arrays
from recsys.models.ratings.biases import Biases, BiasModel
from recsys.models.retrievers.matrices.base import Sparse
from recsys.types import Float64Array, FloatArray, Int32Array


class Factors(RatingConfig):
    """Biases, and an inner product of user and item factors."""

    kind: Literal["factors"] = "factors"
    dim: int = Field(default=16, ge=1, le=4096, description="number of factors")
    regularization: float = Field(default=6.0, gt=0, description="squared length of factors counts so much")
    iterations: int = Field(default=15, ge=1, le=10_000, description="alternations")
    biases: Biases = Field(default=Biases(), description="what is taken out before")

    max_rmse: ClassVar[float] = 0.35

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls(dim=4, regularization=2)

    def fit(self, data: Rated, seed: int = 0) -> FactorModel:
        biases = self.biases.fit(data, seed)
        left_UN, _ = biases.residuals(data)
        left_NU = left_UN.T.tocsr()
        item_ND = np.random.default_rng(seed).normal(scale=0.1, size=(data.num_items, self.dim))
        for _ in range(self.iterations):
            user_UD = _solve(left_UN, item_ND, self.regularization)
            item_ND = _solve(left_NU, user_UD, self.regularization)
        return FactorModel(self, biases, item_ND)

    def load(self, folder: Path) -> FactorModel:
        arrays = saved_arrays(folder)
        biases = BiasModel(self.biases, float(arrays["mean"][0]), arrays["item"])
        return FactorModel(self, biases, arrays["factors"])


class FactorModel(RatingModel):
    """A fitted :class:`Factors`."""

    def __init__(self, config: Factors, biases: BiasModel, item_ND: Float64Array) -> None:
        self.config: Factors = config
        self.num_items = len(item_ND)
        self._biases, self._item_ND = biases, item_ND

    def predict(self, rated: Rated, item_idx: Int32Array) -> FloatArray:
        check_items(item_idx, self.num_items, "a question is about")
        left_QN, user_Q = self._biases.residuals(rated)
        user_QD = _solve(left_QN, self._item_ND, self.config.regularization)
        inner_Q = (user_QD * self._item_ND[item_idx]).sum(axis=1)
        return (self._biases.mean + self._biases.item_N[item_idx] + user_Q + inner_Q).astype(np.float32)

    def tensors(self) -> dict[str, NDArray[Any]]:
        return {**self._biases.tensors(), "factors": self._item_ND}


def _solve(ratings: Sparse, other: Float64Array, regularization: float) -> Float64Array:
    """Factors of the rows of ``ratings`` by ridge regression on the factors ``other`` of its columns."""
    dim = other.shape[1]
    found = np.zeros((ratings.shape[0], dim))
    ridge_DD = regularization * np.eye(dim)
    for row in range(len(found)):
        part = slice(ratings.indptr[row], ratings.indptr[row + 1])
        if part.stop > part.start:
            known_nD = other[ratings.indices[part]]
            found[row] = np.linalg.solve(known_nD.T @ known_nD + ridge_DD, known_nD.T @ ratings.data[part])
    return found
