"""Exact search by NumPy, where FAISS is not installed.

Shape legend: N items, D dimensions, B queries, k results, A allowed items.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np

from recsys.errors import ModelError
from recsys.index.base import IndexConfig, VectorIndex
from recsys.types import BoolArray, FloatArray, Int64Array

# How FAISS writes an IndexFlatIP, little-endian: its code; dimension, vectors and two unused numbers; whether it is
# trained; the metric (0: inner product); the number of floats that follow.
_HEADER = struct.Struct("<4siqqq?iQ")
_CODE, _UNUSED, _INNER_PRODUCT = b"IxFI", 1 << 20, 0
_MAX_SCORES = 1 << 24
"""scores in memory at a time"""


class ExactIndex(VectorIndex):
    """Every item is scored. The answers are those of FAISS's flat index, ties in the same order, and so is the file;
    but vectors are read into memory, not mapped, as they do not lie at a multiple of four bytes in it.
    """

    def __init__(self, config: IndexConfig, vectors: FloatArray) -> None:
        """``vectors``: float32 [N, D], C-contiguous."""
        self.config = config
        self._vectors_ND = vectors

    @classmethod
    def read(cls, config: IndexConfig, path: Path) -> ExactIndex:
        """What :meth:`write` or FAISS wrote.

        :raises ModelError: when it is no whole flat index over inner products.
        """
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
            if len(head) < _HEADER.size or not head.startswith(_CODE):
                raise ModelError(f"{path}: not a readable flat FAISS index", path=str(path))
            _, dim, num_items, _, _, _, metric, num_floats = _HEADER.unpack(head)
            left = os.fstat(file.fileno()).st_size - _HEADER.size
            if metric != _INNER_PRODUCT or num_floats != num_items * dim or left != 4 * num_floats:
                raise ModelError(
                    f"{path}: not a readable flat FAISS index: {num_items} x {dim} vectors, metric {metric}, "
                    f"{left} bytes",
                    path=str(path),
                )
            vectors = np.fromfile(file, "<f4", num_floats)
        return cls(config, vectors.reshape(num_items, dim).astype(np.float32, copy=False))

    def write(self, path: Path) -> None:
        with path.open("wb") as file:
            shape = self.dim, self.num_items, _UNUSED, _UNUSED
            file.write(_HEADER.pack(_CODE, *shape, True, _INNER_PRODUCT, self._vectors_ND.size))
            self._vectors_ND.astype("<f4", copy=False).tofile(file)

    @property
    def num_items(self) -> int:
        return len(self._vectors_ND)

    @property
    def dim(self) -> int:
        return self._vectors_ND.shape[1]

    def vectors(self) -> FloatArray | None:
        return self._vectors_ND

    def _find(
        self, queries_BD: FloatArray, k: int, allowed: BoolArray | None, num_allowed: int
    ) -> tuple[FloatArray, Int64Array]:
        rows_A = None if allowed is None else np.flatnonzero(allowed)
        vectors_AD = self._vectors_ND if rows_A is None else self._vectors_ND[rows_A]
        scores_Bk = np.empty((len(queries_BD), k), np.float32)
        items_Bk = np.empty((len(queries_BD), k), np.int64)
        step = max(1, _MAX_SCORES // num_allowed)
        for start in range(0, len(queries_BD), step):
            for row, scores_A in enumerate(queries_BD[start : start + step] @ vectors_AD.T, start):
                least = np.partition(scores_A, num_allowed - k)[num_allowed - k]
                # All that are as good as the k-th, in order of item_idx, which the stable sort keeps among equals.
                best = np.flatnonzero(scores_A >= least)
                best = best[np.argsort(-scores_A[best], kind="stable")[:k]]
                scores_Bk[row] = scores_A[best]
                items_Bk[row] = best if rows_A is None else rows_A[best]
        return scores_Bk, items_Bk
