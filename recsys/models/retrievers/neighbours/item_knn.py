"""Items that were consumed by the same users as the items of the history (item-based nearest neighbours).

Similarity is the shrunk cosine of "Item-based top-N recommendation algorithms" (Deshpande and Karypis, 2004) over
user-item weights, or Pearson's correlation over all users, those who did not take the item being 0, where it is
positive. Each item keeps its ``num_neighbours`` most similar others, and a history's score is their sum.

Shape legend: U users, B histories, N items.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import scipy.sparse as sp
import torch
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
from recsys.types import FloatArray, Int64Array

_ROWS_AT_ONCE = 1024


class ItemKNN(RetrieverConfig):
    """Cosine neighbours of the items in the history."""

    kind: Literal["item_knn"] = "item_knn"
    similarity: Literal["cosine", "pearson"] = Field(default="cosine", description="how alike two items are")
    num_neighbours: int = Field(default=100, ge=1, le=100_000, description="most similar items kept per item")
    shrinkage: float = Field(default=10.0, ge=0, description="added to the cosine's denominator: distrusts rare items")
    half_life: float | None = Field(
        default=None,
        gt=0,
        description="an interaction this many places back counts half; null counts the whole history alike",
    )

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls(num_neighbours=11, shrinkage=1.0)

    def fit(self, data: FitData, runtime: Runtime) -> ItemKNNRetriever:
        """Exact, in blocks of items."""
        weights_UN = interaction_matrix(data)
        popularity = popularity_of(weights_UN)
        squares = np.asarray(weights_UN.multiply(weights_UN).sum(axis=0)).ravel()
        # Pearson's correlation is the cosine after the mean is taken off; from sums, the matrix stays sparse.
        mean = popularity / len(data.histories) if self.similarity == "pearson" else np.zeros_like(popularity)
        norms = np.sqrt(np.maximum(squares - len(data.histories) * mean**2, 1e-12))
        weights_NU = weights_UN.T.tocsr()
        blocks: list[Any] = []
        for start in range(0, data.num_items, _ROWS_AT_ONCE):
            block = (weights_NU[start : start + _ROWS_AT_ONCE] @ weights_UN).tocoo()
            row, other = block.row + start, block.col
            similarity = (block.data - mean[row] * popularity[other]) / (norms[row] * norms[other] + self.shrinkage)
            keep = (row != other) & (similarity > 0)
            row, other, similarity = row[keep], other[keep], similarity[keep]
            order = np.lexsort((other, -similarity, row))
            first = np.searchsorted(row[order], row[order], side="left")
            best = order[np.arange(len(order)) - first < self.num_neighbours]
            shape = (min(_ROWS_AT_ONCE, data.num_items - start), data.num_items)
            blocks.append(sp.csr_matrix((similarity[best], (row[best] - start, other[best])), shape, np.float32))
        return ItemKNNRetriever(self, sp.vstack(blocks, format="csr"), popularity)

    def load(self, folder: Path) -> ItemKNNRetriever:
        tensors = load_tensors(folder / "model.safetensors")
        return ItemKNNRetriever(self, load_csr(tensors, "similarity"), tensors["popularity"].numpy())


class ItemKNNRetriever(Retriever):
    """A fitted :class:`ItemKNN`."""

    def __init__(self, config: ItemKNN, similarity_NN: Sparse, popularity: FloatArray) -> None:
        self.config: ItemKNN = config
        self.num_items = len(popularity)
        self._similarity_NN = similarity_NN
        self._popularity = popularity

    def score(self, histories: Histories, now_ms: Int64Array | None = None) -> FloatArray:
        """Summed similarity to the history; popularity orders what it leaves equal, so the empty history too."""
        history_BN = history_matrix(histories, self.num_items, self.config.half_life)
        scores = (history_BN @ self._similarity_NN).toarray().astype(np.float32)
        return scores + tie_break(self._popularity)

    def save_weights(self, folder: Path) -> None:
        """Write the sparse similarity matrix and the popularity."""
        tensors = save_csr(self._similarity_NN, "similarity")
        save_tensors(folder / "model.safetensors", {**tensors, "popularity": torch.from_numpy(self._popularity)})
