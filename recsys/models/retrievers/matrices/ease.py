"""A linear model from what was taken to what else is taken, in closed form (EASE: Steck, WWW 2019, arXiv 1905.03375).

Shape legend: U users, N items, B histories.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field

from recsys.data.histories import Histories
from recsys.errors import ModelError
from recsys.models.base import FitData, Retriever, RetrieverConfig
from recsys.models.retrievers.matrices.base import history_matrix, interaction_matrix, popularity_of, tie_break
from recsys.training.checkpoint import load_tensors, save_tensors
from recsys.training.runtime import Runtime
from recsys.types import FloatArray, Int64Array

_MAX_ITEMS = 40_000
"""the matrix between all items is inverted in float64 (13 GB here) and kept in float32"""


class EASE(RetrieverConfig):
    """Embarrassingly shallow autoencoder."""

    kind: Literal["ease"] = "ease"
    regularization: float = Field(default=250.0, gt=0, description="squared weights count so much")
    binary: bool = Field(default=True, description="an item taken often counts like one taken once, as in the paper")

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls(regularization=10.0)

    def fit(self, data: FitData, runtime: Runtime) -> EASERetriever:
        """Invert the regularised Gram matrix of the items (the paper's equation 8)."""
        if data.num_items > _MAX_ITEMS:
            raise ModelError(
                f"EASE inverts a matrix between all items, and {data.num_items} are more than {_MAX_ITEMS}: "
                "filter rare items or choose another kind",
                num_items=data.num_items,
            )
        matrix_UN = interaction_matrix(data)
        popularity = popularity_of(matrix_UN)
        if self.binary:
            matrix_UN.data[:] = 1
        gram_NN = (matrix_UN.T @ matrix_UN).toarray().astype(np.float64)
        gram_NN[np.diag_indices_from(gram_NN)] += self.regularization
        inverse_NN = np.linalg.inv(gram_NN)
        weights_NN = inverse_NN / -np.diag(inverse_NN)
        np.fill_diagonal(weights_NN, 0)
        return EASERetriever(self, weights_NN.astype(np.float32), popularity)

    def load(self, folder: Path) -> EASERetriever:
        tensors = load_tensors(folder / "model.safetensors")
        return EASERetriever(self, tensors["weights"].numpy(), tensors["popularity"].numpy())


class EASERetriever(Retriever):
    """A fitted :class:`EASE`."""

    def __init__(self, config: EASE, weights_NN: FloatArray, popularity: FloatArray) -> None:
        self.config: EASE = config
        self.num_items = len(popularity)
        self._weights_NN = weights_NN
        self._popularity = popularity

    def score(self, histories: Histories, now_ms: Int64Array | None = None) -> FloatArray:
        """The history's row times the weights; popularity orders what that leaves equal."""
        history_BN = history_matrix(histories, self.num_items)
        if self.config.binary:
            history_BN.sum_duplicates()
            history_BN.data[:] = 1
        return history_BN @ self._weights_NN + tie_break(self._popularity)

    def save_weights(self, folder: Path) -> None:
        """Write the weights between items and the popularity."""
        arrays = {"weights": self._weights_NN, "popularity": self._popularity}
        save_tensors(folder / "model.safetensors", {name: torch.from_numpy(array) for name, array in arrays.items()})
