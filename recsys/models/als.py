"""Weighted matrix factorisation by alternating least squares (Hu, Koren and Volinsky, ICDM 2008).

The factors are those of the library ``implicit``. Deviation: it keeps none per user here; a user's factors are
solved for from the history, by the very equation that training alternates over.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from recsys.models.base import FitData, RetrieverConfig
from recsys.models.libraries import library
from recsys.models.matrices import FactorRetriever, interaction_matrix, load_factors, popularity_of
from recsys.training.runtime import Runtime


class ALS(RetrieverConfig):
    """Implicit-feedback matrix factorisation."""

    kind: Literal["als"] = "als"
    dim: int = Field(default=64, ge=1, le=4096, description="number of factors")
    alpha: float = Field(default=1.0, ge=0, description="confidence that a weight of 1 adds to an interaction's 1")
    regularization: float = Field(default=0.01, gt=0, description="squared length of factors counts so much")
    iterations: int = Field(default=15, ge=1, le=10_000, description="alternations")

    def fit(self, data: FitData, runtime: Runtime) -> FactorRetriever:
        """Alternate; the same seed gives the same factors."""
        matrix_UN = interaction_matrix(data)
        model = library("implicit.cpu.als", self.kind).AlternatingLeastSquares(
            factors=self.dim,
            regularization=self.regularization,
            iterations=self.iterations,
            random_state=data.seed,
            num_threads=1,
        )
        confidence_UN = matrix_UN.copy()
        confidence_UN.data = 1 + self.alpha * confidence_UN.data
        model.fit(confidence_UN, show_progress=False)
        return self._retriever(np.asarray(model.item_factors, np.float32), popularity_of(matrix_UN))

    def load(self, folder: Path) -> FactorRetriever:
        """Read saved factors."""
        return self._retriever(*load_factors(folder))

    def _retriever(self, factors_ND: np.ndarray, popularity: np.ndarray) -> FactorRetriever:
        return FactorRetriever(self, factors_ND, popularity, alpha=self.alpha, regularization=self.regularization)
