"""Weighted matrix factorisation by alternating least squares (Hu, Koren and Volinsky, ICDM 2008).

The factors are those of the library ``implicit``. Deviation: it keeps none per user here; a user's factors are
solved for from the history, by the very equation that training alternates over.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import Field

from recsys.libraries import library
from recsys.models.base import FitData, RetrieverConfig
from recsys.models.retrievers.matrices.base import FactorRetriever, interaction_matrix, load_factors, popularity_of
from recsys.training.runtime import Runtime


class ALS(RetrieverConfig):
    """Implicit-feedback matrix factorisation."""

    kind: Literal["als"] = "als"
    dim: int = Field(default=64, ge=1, le=4096, description="number of factors")
    alpha: float = Field(default=1.0, ge=0, description="confidence that a weight of 1 adds to an interaction's 1")
    regularization: float = Field(default=0.01, gt=0, description="squared length of factors counts so much")
    iterations: int = Field(default=15, ge=1, le=10_000, description="alternations")

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls(dim=8, iterations=5, regularization=0.1)

    def fit(self, data: FitData, runtime: Runtime) -> FactorRetriever:
        """Alternate; the same seed gives the same factors."""
        matrix_UN = interaction_matrix(data)
        model = library("implicit.cpu.als", f"the kind {self.kind}", extra="classical").AlternatingLeastSquares(
            factors=self.dim,
            regularization=self.regularization,
            iterations=self.iterations,
            random_state=data.seed,
            num_threads=1,
        )
        # What nobody met and who met nothing would enter the first alternation by their random factors alone.
        popularity = popularity_of(matrix_UN)
        known = np.diff(matrix_UN.tocsc().indptr) > 0
        confidence_UN = matrix_UN[np.diff(matrix_UN.indptr) > 0][:, known]
        confidence_UN.data = 1 + self.alpha * confidence_UN.data
        model.fit(confidence_UN, show_progress=False)
        factors_ND = np.zeros((len(known), self.dim), np.float32)
        factors_ND[known] = model.item_factors
        return self._retriever(factors_ND, popularity)

    def load(self, folder: Path) -> FactorRetriever:
        return self._retriever(*load_factors(folder))

    def _retriever(self, factors_ND: np.ndarray, popularity: np.ndarray) -> FactorRetriever:
        return FactorRetriever(self, factors_ND, popularity, alpha=self.alpha, regularization=self.regularization)
