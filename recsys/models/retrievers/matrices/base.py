"""Interactions as sparse matrices, for the families that see neither order nor time; and fitted item factors.

Shape legend: U users, N items, B histories, D factors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse as sp
import torch

from recsys.data.histories import Histories
from recsys.errors import EmptyDataError
from recsys.models.base import FitData, RetrieverConfig, VectorRetriever, check_items
from recsys.training.checkpoint import load_tensors, save_tensors
from recsys.types import Float64Array, FloatArray, Int64Array

TIE_BREAK = 1e-6
"""so much do the most popular item's count add to its score: it orders what a family leaves equal"""
_HISTORIES_AT_ONCE = 1024
Sparse: TypeAlias = Any
"""a scipy.sparse.csr_matrix; scipy's own types do not know what its operators return"""


def interaction_matrix(data: FitData) -> Sparse:
    """float32 [U, N]: the summed weight of each user's interactions with each item.

    :raises EmptyDataError: when there is none.
    """
    rows = data.histories.rows()
    if not len(rows):
        raise EmptyDataError("there is no positive interaction to learn from: check the positives' configuration")
    users = np.repeat(np.arange(len(data.histories)), data.histories.lengths)
    shape = (len(data.histories), data.num_items)
    return sp.csr_matrix((data.weights[rows], (users, data.histories.item_idx[rows])), shape, np.float32)


def history_matrix(histories: Histories, num_items: int, half_life: float | None = None) -> Sparse:
    """float32 [B, N]: how often each item is in each history; ``half_life`` places back it counts half.

    :raises ModelError: when a history holds an item that the model does not know.
    """
    packed = histories.pack()
    check_items(packed.item_idx, num_items)
    weights = np.ones(len(packed.item_idx), np.float32)
    if half_life is not None:
        places_back = np.repeat(packed.offsets[1:], packed.lengths) - 1 - np.arange(len(weights))
        weights = np.exp2(-places_back / half_life).astype(np.float32)
    return sp.csr_matrix((weights, packed.item_idx, packed.offsets), (len(histories), num_items))


def tie_break(popularity: FloatArray) -> FloatArray:
    """float32 [N], 0 to :data:`TIE_BREAK`, in the order of ``popularity`` (float32 [N], not negative)."""
    return TIE_BREAK * popularity / max(1.0, float(popularity.max(initial=0)))


def popularity_of(matrix_UN: Sparse) -> FloatArray:
    """float32 [N]: the summed weight of each item."""
    return np.asarray(matrix_UN.sum(axis=0)).ravel().astype(np.float32)


def save_csr(matrix: Sparse, name: str) -> dict[str, torch.Tensor]:
    """A sparse matrix as tensors, for :func:`load_csr`."""
    parts = {"data": matrix.data, "indices": matrix.indices, "indptr": matrix.indptr, "shape": np.array(matrix.shape)}
    return {f"{name}.{part}": torch.from_numpy(np.ascontiguousarray(array)) for part, array in parts.items()}


def load_csr(tensors: dict[str, torch.Tensor], name: str) -> Sparse:
    """What :func:`save_csr` made."""
    data, indices, indptr, shape = (
        tensors[f"{name}.{part}"].numpy() for part in ("data", "indices", "indptr", "shape")
    )
    return sp.csr_matrix((data, indices, indptr), tuple(shape))


class FactorRetriever(VectorRetriever):
    """Item factors, and a user vector found from the history alone, so that a user needs no training.

    The user vector is the least-squares solution of implicit feedback (Hu, Koren and Volinsky, ICDM 2008, equation 4):
    the confidence of every item is 1, that of an item of the history ``1 + alpha`` per time it is there::

        u = (V'V + V' C V + regularization I)^-1 (V' (1 + C) p)

    One more dimension, 1 for every user, carries the popularity that orders the items of an empty history.
    """

    def __init__(
        self,
        config: RetrieverConfig,
        factors_ND: FloatArray,
        popularity: FloatArray,
        *,
        alpha: float,
        regularization: float,
    ) -> None:
        self.config = config
        self.num_items = len(factors_ND)
        self.factors_ND = factors_ND
        self.popularity = popularity
        self._alpha, self._regularization = alpha, regularization
        self._gram_DD = factors_ND.T.astype(np.float64) @ factors_ND

    def encode_users(self, histories: Histories, now_ms: Int64Array | None = None) -> FloatArray:
        """float32 [B, 1, D + 1]."""
        dim = self.factors_ND.shape[1]
        users = np.ones((len(histories), 1, dim + 1), np.float32)
        for rows, batch in histories.batches(_HISTORIES_AT_ONCE):
            users[rows, 0, :dim] = self._fold_in(history_matrix(batch, self.num_items))
        return users

    def _fold_in(self, history_BN: Sparse) -> Float64Array:
        dim = self.factors_ND.shape[1]
        base_DD = self._gram_DD + self._regularization * np.eye(dim)
        users = np.zeros((history_BN.shape[0], dim))
        for row in range(history_BN.shape[0]):
            items = history_BN.indices[history_BN.indptr[row] : history_BN.indptr[row + 1]]
            if not len(items):
                continue
            items, counts = np.unique(items, return_counts=True)
            confidence = self._alpha * counts
            known_nD = self.factors_ND[items].astype(np.float64)
            users[row] = np.linalg.solve(
                base_DD + known_nD.T @ (known_nD * confidence[:, None]), known_nD.T @ (1 + confidence)
            )
        return users

    def item_vectors(self) -> FloatArray:
        """float32 [N, D + 1]."""
        return np.concatenate([self.factors_ND, tie_break(self.popularity)[:, None]], axis=1)

    def item_embeddings(self) -> FloatArray:
        """float32 [N, D]."""
        return self.factors_ND

    def save_weights(self, folder: Path) -> None:
        """Write factors and popularity."""
        arrays = {"factors": self.factors_ND, "popularity": self.popularity}
        save_tensors(folder / "model.safetensors", {name: torch.from_numpy(array) for name, array in arrays.items()})


def load_factors(folder: Path) -> tuple[FloatArray, FloatArray]:
    """Factors [N, D] and popularity [N] that :meth:`FactorRetriever.save_weights` wrote."""
    tensors = load_tensors(folder / "model.safetensors")
    return tensors["factors"].numpy(), tensors["popularity"].numpy()
