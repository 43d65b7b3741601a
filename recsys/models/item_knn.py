"""Items that were consumed by the same users as the items of the history (item-based nearest neighbours).

Similarity is the shrunk cosine of "Item-based top-N recommendation algorithms" (Deshpande and Karypis, 2004) over
user-item weights; each item keeps its ``num_neighbours`` most similar others, and a history's score is their sum.

Shape legend: U users, B histories, N items.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from pydantic import Field

from recsys.data.histories import Histories
from recsys.errors import EmptyDataError, ModelError
from recsys.models.base import FitData, Retriever, RetrieverConfig
from recsys.training.checkpoint import load_tensors, save_tensors
from recsys.training.runtime import Runtime

_ROWS_AT_ONCE = 1024
_TIE_BREAK = 1e-6


class ItemKNN(RetrieverConfig):
    """Cosine neighbours of the items in the history."""

    kind: Literal["item_knn"] = "item_knn"
    num_neighbours: int = Field(default=100, ge=1, le=100_000, description="most similar items kept per item")
    shrinkage: float = Field(default=10.0, ge=0, description="added to the cosine's denominator: distrusts rare items")
    half_life: float | None = Field(
        default=None,
        gt=0,
        description="an interaction this many places back counts half; null counts the whole history alike",
    )

    def fit(self, data: FitData, runtime: Runtime) -> ItemKNNRetriever:
        """Exact, in blocks of items."""
        rows = data.histories.rows()
        if not len(rows):
            raise EmptyDataError("there is no positive interaction to compare: check the positives' configuration")
        users = np.repeat(np.arange(len(data.histories)), data.histories.lengths)
        shape = (len(data.histories), data.num_items)
        weights_UN = sp.csr_matrix((data.weights[rows], (users, data.histories.item_idx[rows])), shape, np.float32)
        norms = np.sqrt(np.asarray(weights_UN.multiply(weights_UN).sum(axis=0)).ravel())
        weights_NU = weights_UN.T.tocsr()
        blocks: list[Any] = []
        for start in range(0, data.num_items, _ROWS_AT_ONCE):
            block = (weights_NU[start : start + _ROWS_AT_ONCE] @ weights_UN).tocoo()
            row, other = block.row + start, block.col
            keep = row != other
            row, other = row[keep], other[keep]
            similarity = block.data[keep] / (norms[row] * norms[other] + self.shrinkage)
            order = np.lexsort((other, -similarity, row))
            first = np.searchsorted(row[order], row[order], side="left")
            best = order[np.arange(len(order)) - first < self.num_neighbours]
            shape = (min(_ROWS_AT_ONCE, data.num_items - start), data.num_items)
            blocks.append(sp.csr_matrix((similarity[best], (row[best] - start, other[best])), shape, np.float32))
        popularity = np.asarray(weights_UN.sum(axis=0)).ravel()
        return ItemKNNRetriever(self, sp.vstack(blocks, format="csr"), popularity.astype(np.float32))

    def load(self, folder: Path) -> ItemKNNRetriever:
        """Read saved neighbours."""
        tensors = {name: tensor.numpy() for name, tensor in load_tensors(folder / "model.safetensors").items()}
        num_items = len(tensors["popularity"])
        csr = (tensors["similarity"], tensors["neighbour"], tensors["offsets"])
        return ItemKNNRetriever(self, sp.csr_matrix(csr, (num_items, num_items)), tensors["popularity"])


class ItemKNNRetriever(Retriever):
    """A fitted :class:`ItemKNN`."""

    def __init__(self, config: ItemKNN, similarity_NN: Any, popularity: NDArray[np.float32]) -> None:
        self.config: ItemKNN = config
        self.num_items = len(popularity)
        self._similarity_NN = similarity_NN
        self._popularity = popularity

    def score(self, histories: Histories, now_ms: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """Summed similarity to the history; popularity orders what it leaves equal, so the empty history too."""
        packed = histories.pack()
        if packed.item_idx.size and not 0 <= packed.item_idx.min() <= packed.item_idx.max() < self.num_items:
            raise ModelError(f"a history holds an item_idx outside 0..{self.num_items - 1}")
        weights = np.ones(len(packed.item_idx), np.float32)
        if self.config.half_life is not None:
            places_back = np.repeat(packed.offsets[1:], packed.lengths) - 1 - np.arange(len(weights))
            weights = np.exp2(-places_back / self.config.half_life).astype(np.float32)
        history_BN = sp.csr_matrix((weights, packed.item_idx, packed.offsets), (len(histories), self.num_items))
        scores = (history_BN @ self._similarity_NN).toarray().astype(np.float32)
        return scores + _TIE_BREAK * self._popularity / max(1.0, float(self._popularity.max()))

    def save_weights(self, folder: Path) -> None:
        """Write the sparse similarity matrix and the popularity."""
        csr = self._similarity_NN
        arrays = {
            "similarity": csr.data,
            "neighbour": csr.indices,
            "offsets": csr.indptr,
            "popularity": self._popularity,
        }
        save_tensors(folder / "model.safetensors", {name: torch.from_numpy(array) for name, array in arrays.items()})
