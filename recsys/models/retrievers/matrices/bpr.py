"""Inner-product matrix factorisation by pairwise ranking (BPR: Rendle et al., UAI 2009, arXiv 1205.2618).

The factors and item biases are those of the library ``implicit``. Deviation: it keeps none per user here; a user's
factors are solved for from the history (:class:`.base.FactorRetriever`), and the bias is a factor like others.
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


class BPR(RetrieverConfig):
    """Matrix factorisation that ranks what was taken above what was not."""

    kind: Literal["bpr"] = "bpr"
    dim: int = Field(default=64, ge=1, le=4096, description="number of factors")
    learning_rate: float = Field(default=0.05, gt=0, description="step size")
    regularization: float = Field(default=0.01, ge=0, description="squared length of factors counts so much")
    iterations: int = Field(default=100, ge=1, le=10_000, description="passes over the interactions")
    fold_in_alpha: float = Field(default=10.0, gt=0, description="confidence in an item of the history over others")
    fold_in_regularization: float = Field(default=1.0, gt=0, description="squared length of a user's factors counts so")

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls(dim=8, iterations=30)

    def fit(self, data: FitData, runtime: Runtime) -> FactorRetriever:
        """Stochastic gradient on one thread, so that the same seed gives the same factors."""
        matrix_UN = interaction_matrix(data)
        model = library("implicit.cpu.bpr", f"the kind {self.kind}", extra="classical").BayesianPersonalizedRanking(
            factors=self.dim,
            learning_rate=self.learning_rate,
            regularization=self.regularization,
            iterations=self.iterations,
            random_state=data.seed,
            num_threads=1,
        )
        model.fit(matrix_UN, show_progress=False)
        return self._retriever(np.asarray(model.item_factors, np.float32), popularity_of(matrix_UN))

    def load(self, folder: Path) -> FactorRetriever:
        return self._retriever(*load_factors(folder))

    def _retriever(self, factors_ND: np.ndarray, popularity: np.ndarray) -> FactorRetriever:
        return FactorRetriever(
            self, factors_ND, popularity, alpha=self.fold_in_alpha, regularization=self.fold_in_regularization
        )
