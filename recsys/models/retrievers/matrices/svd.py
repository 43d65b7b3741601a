"""Truncated singular value decomposition of the interaction matrix (PureSVD: Cremonesi, Koren and Turrin, RecSys 2010).

A user's vector is the history's row times the item singular vectors, as in the paper, so a user needs no training.

Shape legend: U users, N items, B histories, D factors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import scipy.sparse.linalg
from pydantic import Field

from recsys.data.histories import Histories
from recsys.models.base import FitData, RetrieverConfig
from recsys.models.retrievers.matrices.base import (
    FactorRetriever,
    history_matrix,
    interaction_matrix,
    load_factors,
    popularity_of,
)
from recsys.training.runtime import Runtime
from recsys.types import FloatArray, Int64Array


class SVD(RetrieverConfig):
    """Item singular vectors."""

    kind: Literal["svd"] = "svd"
    dim: int = Field(default=64, ge=1, le=4096, description="singular values kept, where the matrix has so many")

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls(dim=8)

    def fit(self, data: FitData, runtime: Runtime) -> SVDRetriever:
        """Lanczos iterations from a seeded start."""
        matrix_UN = interaction_matrix(data)
        num = min(self.dim, min(matrix_UN.shape) - 1)
        factors_ND = np.zeros((data.num_items, max(num, 1)))
        if num > 0:
            start = np.random.default_rng(data.seed).standard_normal(min(matrix_UN.shape))
            found: Any = scipy.sparse.linalg.svds(matrix_UN.astype(np.float64), k=num, v0=start)
            factors_ND = found[2][::-1].T
        return SVDRetriever(self, np.ascontiguousarray(factors_ND, np.float32), popularity_of(matrix_UN))

    def load(self, folder: Path) -> SVDRetriever:
        return SVDRetriever(self, *load_factors(folder))


class SVDRetriever(FactorRetriever):
    """A fitted :class:`SVD`."""

    def __init__(self, config: SVD, factors_ND: FloatArray, popularity: FloatArray) -> None:
        super().__init__(config, factors_ND, popularity, alpha=1.0, regularization=0.0)

    def encode_users(self, histories: Histories, now_ms: Int64Array | None = None) -> FloatArray:
        """float32 [B, 1, D + 1]: the summed vectors of the history's items."""
        users_BD = history_matrix(histories, self.num_items) @ self.factors_ND
        return np.concatenate([users_BD, np.ones((len(users_BD), 1), np.float32)], axis=1)[:, None]
